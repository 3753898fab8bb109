"""Shortlists: drafts are tokens of the list, the head costs its rows, the distribution stays the target's."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from families import config_of, model_of, written
from mlx.utils import tree_flatten
from test_generic import BASE, CONFIGS, loaded
from test_generic import written as target_written
from test_sampling import filtered, markov_pair, worst_deviation

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.parallel import Parallel
from mlx_mtp.drafters.sequential import Sequential
from mlx_mtp.generation.types import Sampling
from mlx_mtp.targets import load_target

FAMILIES: dict[str, Callable[..., Any]] = {"parallel_heads": Parallel, "sequential_modules": Sequential}
GEMMA = GOLDEN / "ple" / "target"
IDS = mx.array([3, 7, 8, 31, 100, 127], dtype=mx.int32)


@pytest.mark.parametrize("name", [*CONFIGS, "gemma4", "4 bits"])
def test_a_head_on_a_list_is_those_rows_of_the_whole(name: str, tmp_path: Path) -> None:
    if name == "gemma4":
        target: Any = load_target(Checkpoint.open(GEMMA))
    else:
        config, bits = (CONFIGS["llama"], 4) if name == "4 bits" else (CONFIGS[name], None)
        target = loaded(target_written(tmp_path / "target", BASE | config, bits))[0]
    ids = IDS % target.info.vocab_size
    hidden = mx.random.normal((1, 3, target.info.hidden_size), key=mx.random.key(1)).astype(mx.float32)
    expected = np.array(target.head(hidden))[..., np.array(ids)]
    assert np.abs(np.array(target.head_on(ids)(hidden)) - expected).max() < 5e-3


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beside", [False, True], ids=["tensor", "file"])
def test_drafts_are_the_lists_best(family: str, beside: bool, tmp_path: Path) -> None:
    """From a checkpoint with the list among its tensors, or in a file of its own."""
    model = model_of(config_of(family, 32, 128, 1))
    weights, config = dict(tree_flatten(model.parameters())), config_of(family, 32, 128, 1)
    if beside:
        np.save(written(tmp_path, config, weights) / "shortlist.npy", np.array(IDS))
    else:
        written(tmp_path, config | {"shortlist": IDS.size}, weights | {"shortlist": IDS})
    target, drafter = load_target(Checkpoint.open(GEMMA)), load_drafter(Checkpoint.open(tmp_path))
    drafter.attach(target)
    tokens = mx.array([[5, 6, 7]])
    states = target.forward(tokens, target.new_cache(256))
    memory = drafter.observe(drafter.start(1, 256), tokens, states, mx.array([2]))
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def sample(logits: mx.array, tokens: mx.array | None = None, forced: object = None) -> mx.array:
        assert tokens is not None
        seen.append((np.array(logits)[0, 0], np.array(tokens)[0, 0]))
        return mx.take_along_axis(tokens, mx.argmax(logits, axis=-1)[..., None], axis=-1)[..., 0]

    whole = FAMILIES[family](model, mx.float32)
    whole.attach(target)
    all_logits: list[np.ndarray] = []

    def note(logits: mx.array, tokens: mx.array | None = None, forced: object = None) -> mx.array:
        all_logits.append(np.array(logits)[0, 0])
        return mx.argmax(logits, axis=-1)

    one, hidden = mx.array([[9]]), states.hidden[:, -1:]
    drafts, _ = drafter.draft(memory, one, hidden, target.new_cache(256), 1, sample)
    whole.draft(memory, one, hidden, target.new_cache(256), 1, note)
    listed = np.array(IDS)
    assert (seen[0][1] == listed).all() and np.abs(seen[0][0] - all_logits[0][listed]).max() < 5e-3
    assert drafts.item() == listed[seen[0][0].argmax()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_distribution_is_the_targets(family: str) -> None:
    """Over a vocabulary of six, of which the drafter knows three."""
    table, target, _ = markov_pair()
    config = config_of(family, 1, 6, 1, shortlist=3)
    config["block"] |= {"hidden_size": 1}
    model = model_of(config)
    model.shortlist = mx.array([0, 2, 5], dtype=mx.int32)
    drafter, sampling = FAMILIES[family](model, mx.float32), Sampling(temperature=1.0)
    result = mlx_mtp.Engine(target, drafter, None, depth=1).generate([0], max_tokens=1500, sampling=sampling, seed=3)
    assert worst_deviation([result.tokens], filtered(table, sampling)) < 5
    assert 0 < result.stats.accepted < result.stats.drafted


@pytest.mark.parametrize("ids", [[], [3, 2], [3, 3], [-1, 4], [4, 128]], ids=str)
def test_a_list_that_cannot_be_one(ids: list[int], tmp_path: Path) -> None:
    config = config_of("sequential_modules", 32, 128, 1)
    weights = dict(tree_flatten(model_of(config).parameters()))
    listed = mx.array(ids, dtype=mx.int32)
    written(tmp_path, config | {"shortlist": max(1, len(ids))}, weights | {"shortlist": listed})
    with pytest.raises(mlx_mtp.CheckpointError, match="each above the one before"):
        mlx_mtp.load(GEMMA, drafter=tmp_path)
    written(tmp_path, config | {"shortlist": 4}, weights | {"shortlist": IDS})
    with pytest.raises(mlx_mtp.CheckpointError, match="other shapes for 1 tensors: shortlist"):
        mlx_mtp.load(GEMMA, drafter=tmp_path)
