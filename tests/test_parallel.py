"""Parallel heads against the paper's formula in NumPy, through rounds with random outcomes; files that are wrong."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from families import config_of, drafted, model_of, written
from mlx.utils import tree_flatten
from references import float64, parallel_heads

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters
from mlx_mtp.drafters.parallel import Parallel
from mlx_mtp.targets import load_target

TOLERANCE = 2e-3
WIDTH, VOCABULARY = 32, 128
GEMMA = GOLDEN / "ple" / "target"
BLOCK = config_of("", WIDTH, VOCABULARY, 1)["block"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reads", ["trunk", "hidden"])
def test_every_draft_is_the_heads_answer_to_one_state(reads: str, seed: int) -> None:
    """In decoding, behind any outcomes of the rounds before, and over the whole sequence at once."""
    target = load_target(Checkpoint.open(GEMMA))
    model = model_of(config_of("parallel_heads", WIDTH, VOCABULARY, 3, reads=reads))
    drafter = Parallel(model, mx.float32)
    drafter.attach(target)
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, 40)
    states = target.forward(mx.array(tokens[None]), target.new_cache(256))
    read = states.trunk if reads == "trunk" else states.hidden
    by_hand = parallel_heads(float64(named_parameters(model)), np.array(read)[0])
    expected = np.array(target.head(mx.array(by_hand.astype(np.float32))))
    whole = np.array(target.head(mx.concatenate(model(read))))
    assert np.abs(whole - expected).max() < TOLERANCE
    rounds = 0
    for at, logits in drafted(drafter, target, tokens, states, [1, 2, 9, 30][seed], 3, seed):
        # Behind the token at place `at`: what the state of the place before says.
        assert np.abs(np.stack(logits) - expected[:, at - 1]).max() < TOLERANCE
        rounds += 1
    assert rounds > 1


def refusal(folder: Path, error: type[mlx_mtp.MLXMTPError], target: Path = GEMMA) -> str:
    """One sentence."""
    with pytest.raises(error) as caught:
        mlx_mtp.load(target, drafter=folder)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and 60 < len(message) < 700
    return message


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"heads": 0}, "'heads'"), ({"heads": 17}, "'heads'"), ({"heads": None}, "'heads'"), ({"heads": 3}, "lacks"),
    ({"heads": 1}, "unknown"), ({"reads": None}, "'reads'"), ({"reads": "x"}, "'reads'"), ({"block": None}, "'block'"),
    ({"block": 7}, "'block'"), ({"block": BLOCK | {"model_type": "x"}}, "'block'"),
    ({"block": BLOCK | {"model_type": "olmo"}}, "'block'"), ({"block": BLOCK | {"hidden_size": 48}}, "'block'"),
    ({"block": BLOCK | {"num_attention_heads": 3}}, "'block'"), ({"block": BLOCK | {"rms_norm_eps": "x"}}, "rms_norm"),
    ({"block": BLOCK | {"intermediate_size": 32}}, "other shapes"), ({"hidden_size": 48}, "'block'"),
    ({"hidden_size": None}, "'hidden_size'"), ({"vocab_size": "x"}, "'vocab_size'"),
    ({"block": BLOCK | {"num_key_value_heads": 0}}, "'block'"), ({"block": {"model_type": "llama"}}, "'block'"),
]  # fmt: skip


MODULES: list[tuple[dict[str, Any], str]] = [
    ({"modules": 0}, "'modules'"), ({"modules": 9}, "'modules'"), ({"modules": 3}, "lacks"),
    ({"modules": "x"}, "'modules'"), ({"block": 7}, "'block'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [*(("parallel_heads", *row) for row in FIELDS), *(("sequential_modules", *row) for row in MODULES)], ids=str,
)  # fmt: skip
def test_config_fields(family: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = config_of(family, WIDTH, VOCABULARY, 2)
    weights = dict(tree_flatten(model_of(config).parameters()))
    message = refusal(written(tmp_path / "drafter", config | fields, weights), mlx_mtp.CheckpointError)
    assert words in message and str(tmp_path) in message


@pytest.mark.parametrize("family", ["parallel_heads", "sequential_modules"])
def test_sizes_of_another_target(family: str, tmp_path: Path) -> None:
    for width, vocabulary, words in ((48, 128, "hidden size 32"), (32, 96, "vocabulary 128")):
        folder = written(tmp_path / words, config_of(family, width, vocabulary, 2))
        assert words in refusal(folder, mlx_mtp.IncompatibleDrafter)


def test_heads_on_a_trunk_that_the_target_does_not_give() -> None:
    from mlx_mtp.testing import MarkovTarget

    block = BLOCK | {"hidden_size": 1}
    drafter = Parallel(model_of(config_of("parallel_heads", 1, 6, 1, reads="trunk", block=block)), mx.float32)
    with pytest.raises(mlx_mtp.IncompatibleDrafter, match="gives none"):
        drafter.attach(MarkovTarget(mx.zeros((6, 6))))
