"""Gemma 4 against transformers' own numbers: whole, token by token, in chunks, after a rollback."""

import mlx.core as mx
import numpy as np
import pytest
from greedy import in_passes, random_sizes

from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.targets import load_target

TOLERANCE = 1e-3


def difference(found: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(found) - expected).max())


@pytest.fixture
def loaded(golden):
    """A reference model and the arrays transformers computed for it."""
    folder, arrays = golden
    return load_target(Checkpoint.open(folder / "target")), arrays


def test_whole_sequence(loaded) -> None:
    target, arrays = loaded
    assert difference(target.logits(mx.array(arrays["input_ids"])), arrays["logits"]) < TOLERANCE


def test_through_the_cache_in_any_chunks(loaded) -> None:
    target, arrays = loaded
    tokens = mx.array(np.concatenate([arrays["input_ids"], arrays["verify_ids"]], axis=1))
    prompt, length = arrays["input_ids"].shape[1], tokens.shape[1]
    for sizes in ([1] * length, random_sizes(length, 0, 9), random_sizes(length, 1, 9)):
        logits, _ = in_passes(target, tokens, sizes)
        assert difference(logits[:, :prompt], arrays["logits"]) < TOLERANCE
        assert difference(logits[:, prompt:], arrays["verify_logits"]) < TOLERANCE


def test_rollback_is_a_smaller_length(loaded) -> None:
    target, arrays = loaded
    _, cache = in_passes(target, mx.array(arrays["input_ids"]), [arrays["input_ids"].shape[1]])
    target.forward(mx.array(arrays["verify_ids"]), cache)
    cache.advance(2)  # of five rows two stand
    states = target.forward(mx.array(arrays["after_crop_id"]), cache)
    assert difference(target.head(states.hidden), arrays["after_crop_logits"]) < TOLERANCE


def test_long_sequences_wrap_the_ring_like_no_cache(loaded) -> None:
    """300 tokens through a ring of 8 + 32 slots, in chunks below and above the slack, against the uncached pass.

    Both sides round: each may be a tolerance from the exact logits. A row that sees a wrong slot is off by about 1.
    """
    target, _ = loaded
    tokens = mx.array(np.random.default_rng(0).integers(3, 128, (1, 300)))
    cache_free = np.array(target.logits(tokens))
    for sizes in ([7] * 42 + [6], [100, 1, 33, 66, 5, 95], [40] * 7 + [20]):
        assert difference(in_passes(target, tokens, sizes)[0], cache_free) < 2 * TOLERANCE


def test_last_rows_are_the_same_rows(loaded) -> None:
    target, arrays = loaded
    tokens = mx.array(arrays["input_ids"])
    whole = target.forward(tokens, target.new_cache(256))
    for keep in (0, 2, 100):
        kept = target.forward(tokens, target.new_cache(256), keep)
        assert kept.trunk.shape == kept.hidden.shape
        if keep == 2:
            assert difference(kept.trunk, np.array(whole.trunk[:, -2:])) < 1e-4
            assert difference(kept.hidden, np.array(whole.hidden[:, -2:])) < 1e-4
