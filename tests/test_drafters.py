"""Drafters of every family against references: transformers' numbers, the papers' equations in NumPy, a search."""

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN, HEADS, refusal
from families import config_of, drafted, model_of, written
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map
from references import Equations, float64, parallel_heads
from test_generic import BASE, CONFIGS, loaded
from test_generic import written as target_written
from test_sampling import filtered, markov_pair, worst_deviation

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.assistant import Convention
from mlx_mtp.drafters.lookup import LONGEST, Lookup
from mlx_mtp.drafters.parallel import Parallel
from mlx_mtp.drafters.sequential import Sequential
from mlx_mtp.generation.cache import FULL
from mlx_mtp.generation.interfaces import States
from mlx_mtp.generation.sampling import DraftSampler, SamplingSpec
from mlx_mtp.generation.types import Sampling
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.targets import load_target

TOLERANCE = 1e-3


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("convention", list(Convention))
def test_four_steps(golden, head: str, convention: Convention) -> None:
    folder, arrays = golden
    name = {"A": "draft", "B": "draftB"}[convention.name] + f"_{head}"
    target = load_target(Checkpoint.open(folder / "target"))
    drafter = load_drafter(Checkpoint.open(folder / f"assistant_{head}"))
    drafter.convention = convention
    drafter.attach(target)
    cache = target.new_cache(256)
    states = target.forward(mx.array(arrays["input_ids"]), cache)
    cache.advance(arrays["input_ids"].shape[1])
    token, state = mx.array(arrays["bonus_id"])[None], states.hidden[:, -1:]

    drafts, _ = drafter.draft({}, token, state, cache, 4, DraftSampler(SamplingSpec(), {}, {}, mx.random.key(0)))
    assert np.array_equal(np.array(drafts), arrays[f"{name}_ids"])

    position, shared, masks = drafter.view(cache)
    for step in range(4):
        hidden, state = drafter.model.step(target.embed(token), state, position, shared, masks)
        tokens, logits = drafter.model.candidates(hidden)
        expected, found = arrays[f"{name}_logits"][0, step], np.array(logits)[0, 0]
        if tokens is not None:
            # Elsewhere transformers fills in the smallest candidate minus one; here the others do not exist.
            ids = np.array(tokens)[0, 0]
            others = np.delete(expected, ids)
            assert np.abs(others - (found.min() - 1)).max() < TOLERANCE
            expected = expected[ids]
        assert np.abs(found - expected).max() < TOLERANCE
        assert np.abs(np.array(state)[0, 0] - arrays[f"{name}_state"][0, step]).max() < TOLERANCE
        best = int(np.array(logits)[0, 0].argmax())
        token = mx.array([[best if tokens is None else int(np.array(tokens)[0, 0, best])]])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_head_scores_like_its_own_rounding(bits: int) -> None:
    """The embedded assistant's, against NumPy with the rows quantised and restored by MLX's own functions."""
    drafter = load_drafter(Checkpoint.open(EMBEDDED / "assistant"))
    table = drafter.model.model.embed_tokens.weight
    drafter.quantise_head(bits)
    group = drafter.model.model.embed_tokens.group_size
    restored = mx.dequantize(*mx.quantize(table, group, bits), group, bits)
    hidden = mx.random.normal((1, 3, table.shape[1]), key=mx.random.key(0))
    tokens, logits = drafter.model.candidates(hidden)
    assert tokens is None
    assert np.abs(np.array(logits) - np.array(hidden) @ np.array(restored).T).max() < TOLERANCE
    assert mx.abs(restored - table).max() > 0
    drafter.quantise_head(12 - bits)  # a second time changes nothing
    assert drafter.model.model.embed_tokens.bits == bits


def test_reading_the_last_rows_is_a_window_over_all() -> None:
    """`reads_last` against a mask over the whole buffer, after 130 rows of which the newest 2 were rejected."""
    engine = mlx_mtp.load()
    drafter, target = engine.drafter, engine.target
    cache = target.new_cache(256)
    tokens = mx.array([[(37 * i) % 4000 + 10 for i in range(130)]])
    states = target.forward(tokens, cache)
    cache.advance(128)
    hidden, token = states.hidden[:, 127:128], tokens[:, 128:129]
    for last in (1, 40, 255):
        states_of = []
        for reads_last in (last, None):
            drafter.model.config = dataclasses.replace(drafter.model.config, reads_last=reads_last)
            position, shared, masks = drafter.view(cache)
            if reads_last is None:
                masks = {FULL: cache.visible(FULL, cache.length - 1, last)}
            states_of.append(drafter.model.step(target.embed(token), hidden, position, shared, masks)[1])
        assert mx.abs(states_of[0] - states_of[1]).max().item() < TOLERANCE


def test_a_head_in_fewer_bits_computes_in_any_thread() -> None:
    """It is made where the engine is loaded, and read where a reply is asked for first."""
    engine = mlx_mtp.load(draft_head_bits=4, depth=2)
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(engine.generate, [5, 6, 7], max_tokens=8, ignore_end=True).result()
    assert len(result.tokens) == 8 and result.stats.drafted


# Parallel heads and sequential modules

LAYERS = 2e-3  # tolerance of layers in float32
WIDTH, VOCABULARY = 32, 128
GEMMA = GOLDEN / "ple" / "target"
BLOCK = config_of("", WIDTH, VOCABULARY, 1)["block"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reads", ["trunk", "hidden"])
def test_every_draft_is_the_heads_answer_to_one_state(reads: str, seed: int) -> None:
    """In decoding, after any outcomes of the rounds before, and over the whole sequence at once."""
    target = load_target(Checkpoint.open(GEMMA))
    model = model_of(config_of("parallel_heads", WIDTH, VOCABULARY, 3, reads=reads))
    drafter = Parallel(model, mx.float32)
    drafter.attach(target)
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, 40)
    states = target.forward(mx.array(tokens[None]), target.new_cache(256))
    read = states.aux[-1] if reads == "trunk" else states.hidden
    by_hand = parallel_heads(float64(named_parameters(model)), np.array(read)[0])
    expected = np.array(target.head(mx.array(by_hand.astype(np.float32))))
    whole = np.array(target.head(mx.concatenate(model(read))))
    assert np.abs(whole - expected).max() < LAYERS
    rounds = 0
    for at, logits in drafted(drafter, target, tokens, states, [1, 2, 9, 30][seed], 3, seed):
        # Behind the token at place `at`: what the state of the place before says.
        assert np.abs(np.stack(logits) - expected[:, at - 1]).max() < LAYERS
        rounds += 1
    assert rounds > 1


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
    ({"modules": "x"}, "'modules'"), ({"block": 7}, "'block'"), ({"aux_layers": 3}, "'aux_layers'"),
    ({"aux_layers": [-1]}, "'aux_layers'"), ({"aux_layers": ["1"]}, "'aux_layers'"), ({"aux_layers": [1]}, "lacks"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [*(("parallel_heads", *row) for row in FIELDS), *(("sequential_modules", *row) for row in MODULES)], ids=str,
)  # fmt: skip
def test_config_fields(family: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    config = config_of(family, WIDTH, VOCABULARY, 2)
    weights = dict(tree_flatten(model_of(config).parameters()))
    folder = written(tmp_path / "drafter", config | fields, weights)
    message = refusal(lambda: mlx_mtp.load(GEMMA, drafter=folder), mlx_mtp.CheckpointError)
    assert words in message and str(tmp_path) in message


@pytest.mark.parametrize("family", ["parallel_heads", "sequential_modules"])
def test_sizes_of_another_target(family: str, tmp_path: Path) -> None:
    for width, vocabulary, words in ((48, 128, "hidden size 32"), (32, 96, "vocabulary 128")):
        folder = written(tmp_path / words, config_of(family, width, vocabulary, 2))
        loading = partial(mlx_mtp.load, GEMMA, drafter=folder)
        assert words in refusal(loading, mlx_mtp.IncompatibleDrafter)


def test_heads_on_a_trunk_that_the_target_does_not_give() -> None:
    from mlx_mtp.testing import MarkovTarget

    block = BLOCK | {"hidden_size": 1}
    drafter = Parallel(model_of(config_of("parallel_heads", 1, 6, 1, reads="trunk", block=block)), mx.float32)
    with pytest.raises(mlx_mtp.IncompatibleDrafter, match="those of none"):
        drafter.attach(MarkovTarget(mx.zeros((6, 6))))


FAMILIES: dict[str, Callable[..., Any]] = {"parallel_heads": Parallel, "sequential_modules": Sequential}


@pytest.mark.parametrize("aux_layers", [[], [1, 0]], ids=["", "aux"])
@pytest.mark.parametrize(("modules", "depth"), [(1, 1), (1, 4), (2, 2), (3, 3), (2, 5), (3, 8)])
def test_chains_follow_the_equations(modules: int, depth: int, aux_layers: list[int]) -> None:
    """In decoding, after any outcomes of the rounds before, and over the whole sequence at once."""
    target = load_target(Checkpoint.open(GEMMA))
    model = model_of(config_of("sequential_modules", WIDTH, 128, modules, aux_layers=aux_layers))
    drafter = Sequential(model, mx.float32)
    drafter.attach(target)
    tokens = np.random.default_rng(depth).integers(3, VOCABULARY, 36)
    states = target.forward(mx.array(tokens[None]), target.new_cache(256))
    embedded = target.embed(mx.array(tokens[None]))
    aux = [np.array(states.aux[layer])[0] for layer in aux_layers]
    hand = Equations(float64(named_parameters(model)), np.array(states.hidden)[0], np.array(embedded)[0], aux)
    read = model.read(states.of_layers(aux_layers).first(len(tokens) - depth))
    whole = np.array(target.head(mx.concatenate(model(read, embedded[:, 1:], depth))))
    rounds = 0
    for first in (1, 5, 20):
        for at, logits in drafted(drafter, target, tokens, states, first, depth, first):
            expected = np.array(target.head(mx.array(np.stack(hand.drafts(at, depth))[None].astype(np.float32))))[0]
            assert np.abs(np.stack(logits) - expected).max() < LAYERS
            assert np.abs(whole[:, at - 1] - expected).max() < LAYERS
            rounds += 1
    assert rounds > 8


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtypes", [(mx.float16, mx.float32), (mx.float32, mx.bfloat16), (mx.bfloat16, mx.float16)])
def test_another_precision_than_the_targets(family: str, dtypes: tuple[mx.Dtype, mx.Dtype]) -> None:
    """Everything that comes from the target or goes to its head is cast, so that a round's arrays keep their types."""
    aux = {"aux_layers": [0, 2]} if family == "sequential_modules" else {}
    target, model = load_target(Checkpoint.open(GEMMA)), model_of(config_of(family, WIDTH, VOCABULARY, 2, **aux))
    target.dtype, dtype = dtypes
    target.model.update(tree_map(lambda array: array.astype(target.dtype), target.model.parameters()))
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    drafter = FAMILIES[family](model, dtype)
    engine = mlx_mtp.Engine(target, drafter, None, depth=2)
    memory, tokens = drafter.start(1, 256), mx.array([[5, 6]])
    kinds = [array.dtype for _, array in tree_flatten(memory)]
    states = target.forward(tokens, target.new_cache(256)).of_layers(drafter.aux_layers)
    memory = drafter.observe(memory, tokens, states, mx.array([1]))
    assert [array.dtype for _, array in tree_flatten(memory)] == kinds
    assert len(engine.generate([5, 6, 7], max_tokens=3, ignore_end=True).tokens) == 3


# Shortlists: drafts are tokens of the list, the head costs its rows, the distribution stays the target's

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
    seen: list[mx.array] = []

    def sample(logits: mx.array, tokens: mx.array | None = None, forced: object = None) -> mx.array:
        assert (tokens is None) == bool(seen) and (tokens is None or mx.array_equal(tokens[0, 0], IDS))
        seen.append(logits[0, 0])
        best = mx.argmax(logits, axis=-1)
        return best if tokens is None else mx.take_along_axis(tokens, best[..., None], axis=-1)[..., 0]

    whole = FAMILIES[family](model, mx.float32)
    whole.attach(target)
    drafts, _ = (each.draft(memory, mx.array([[9]]), states.hidden[:, -1:], target.new_cache(256), 1, sample)[0]
                 for each in (drafter, whole))  # fmt: skip
    listed, every = seen
    assert mx.abs(listed - every[IDS]).max() < 5e-3 and drafts.item() == IDS[mx.argmax(listed)].item()


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


# Lookup

NO_STATES = States(mx.zeros((1, 0, 0)))


def by_hand(text: list[int], depth: int) -> tuple[list[int], int]:
    """Continuation of the most recent of the longest matches of the text's end, and the match's length."""
    best, size = None, 0
    for end in range(len(text) - 1):
        length = 0
        while length < min(LONGEST, end + 1) and text[end - length] == text[-1 - length]:
            length += 1
        if length and length >= size:
            best, size = end, length
    if best is None:
        return [text[-1]] * depth, 0
    period = len(text) - 1 - best
    return [text[best + 1 + i % period] for i in range(depth)], size


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 9))
def test_like_a_search_by_hand(text: list[int], depth: int, chunk: int) -> None:
    lookup = Lookup()
    memory = lookup.start(1, 64)
    for start in range(0, len(text) - 1, chunk):
        rows = text[:-1][start : start + chunk]
        rejected = [9] * 3  # written after the rows, never committed
        memory = lookup.observe(memory, mx.array([rows + rejected]), NO_STATES, mx.array([len(rows) - 1]))
    found, size = lookup.continuation(memory, mx.array([text[-1:]]), depth)
    assert (found.tolist()[0], size.item()) == by_hand(text, depth)
