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
    folder, arrays = golden
    return load_target(Checkpoint.open(folder / "target")), arrays


def test_whole_and_through_the_cache_in_any_chunks(loaded) -> None:
    target, arrays = loaded
    assert difference(target.logits(mx.array(arrays["input_ids"])), arrays["logits"]) < TOLERANCE
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


def test_last_rows_are_the_same_rows(loaded) -> None:
    target, arrays = loaded
    tokens = mx.array(arrays["input_ids"])
    whole = target.forward(tokens, target.new_cache(256))
    for keep in (0, 2, 100):
        kept = target.forward(tokens, target.new_cache(256), keep)
        assert all(state.shape == kept.hidden.shape for state in kept.aux)
        if keep == 2:
            assert len(kept.aux) == len(whole.aux) == len(target.model.layers)
            for state, expected in zip(kept.aux, whole.aux, strict=True):
                assert difference(state, np.array(expected[:, -2:])) < 1e-4
            assert difference(kept.hidden, np.array(whole.hidden[:, -2:])) < 1e-4
