"""Attention against NumPy in float64: groups, masks, large scores."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_mtp.backend.attention import attend


@pytest.mark.parametrize("rows", [1, 5, 33])
@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("spread", [1.0, 200.0])
def test_like_softmax(rows: int, heads: int, groups: int, spread: float) -> None:
    rng = np.random.default_rng(rows * heads)
    queries = rng.normal(size=(2, heads, rows, 16)) * spread
    keys, values = rng.normal(size=(2, 2, groups, 70, 16))
    mask = rng.random((2, 1, rows, 70)) < 0.5
    mask[..., 3] = True
    parts = [mx.array(part.astype(np.float32)) for part in (queries, keys, values)]
    found = np.array(attend(*parts, mx.array(mask), scale=0.5))
    queries, keys, values = (np.array(part).astype(np.float64) for part in parts)
    keys, values = (np.repeat(part, heads // groups, axis=1) for part in (keys, values))
    scores = np.where(mask, 0.5 * queries @ keys.swapaxes(-1, -2), -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    expected = weights @ values / weights.sum(axis=-1, keepdims=True)
    assert np.abs(found - expected).max() < 2e-6 * (1 + spread)


def test_a_row_that_sees_nothing_gives_numbers() -> None:
    ones = mx.ones((1, 2, 3, 8))
    assert mx.isfinite(attend(ones, ones, ones, mx.zeros((1, 1, 3, 3), dtype=mx.bool_))).all().item()
