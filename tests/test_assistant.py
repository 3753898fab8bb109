"""The assistant against transformers' numbers, both heads, both conventions, step by step."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
import pytest
from conftest import HEADS

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.assistant import Convention
from mlx_mtp.generation.cache import FULL
from mlx_mtp.generation.sampling import DraftSampler, SamplingSpec
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.targets import load_target

TOLERANCE = 1e-3


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("convention", list(Convention))
def test_four_steps(golden, head: str, convention: Convention) -> None:
    folder, arrays = golden
    name = {"A": "draft", "B": "draftB"}[convention.value] + f"_{head}"
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
    """`reads_last` against a mask over the whole buffer, behind 130 rows of which the newest 2 were rejected."""
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
