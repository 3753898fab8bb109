"""The cache against a plain list: whatever is written, committed and rolled back, a query sees exactly its past."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.generation.cache import FULL, SLIDING, AttentionPlan, KVCache, LayerShape, capacity_for

SHAPES = (LayerShape(FULL, 2, 3), LayerShape(SLIDING, 1, 4), LayerShape(SLIDING, 2, 2))


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[tuple[int, list[int]]]]:
    """A window, a batch size, and passes (rows written, rows committed by each sequence of the batch)."""
    window, batch = draw(st.integers(1, 40)), draw(st.integers(1, 3))
    passes = []
    for _ in range(draw(st.integers(1, 12))):
        if draw(st.integers(0, 3)) == 0:  # a chunk of the prompt: any length, all of it committed
            rows = draw(st.integers(1, 100))
            passes.append((rows, [rows] * batch))
        else:  # a round: some rows stand
            rows = draw(st.integers(1, 9))
            passes.append((rows, draw(st.lists(st.integers(0, rows), min_size=batch, max_size=batch))))
    return window, batch, passes


def written(serial: int, batch: int, rows: int, shape: LayerShape) -> mx.array:
    """Rows [B, G, M, d] that say which pass, sequence and row they are."""
    names = serial * 1000 + np.arange(batch)[:, None] * 100_000 + np.arange(rows)
    return mx.array(np.broadcast_to(names[:, None, :, None], (batch, shape.heads, rows, shape.head_dim)), mx.float32)


def seen(keys: mx.array, step: AttentionPlan, kind: str, sequence: int, row: int) -> set[int]:
    """Names of the rows that one query attends to, the same in every head and channel."""
    masks = np.array(step.masks[kind])
    mask = masks[sequence % len(masks), 0, row]  # one mask may serve the whole batch
    visible = np.array(keys)[sequence][:, mask]
    assert (visible == visible[:1, :, :1]).all()
    return set(visible[0, :, 0].astype(int).tolist())


@settings(max_examples=60, deadline=None)
@given(histories())
def test_like_a_plain_list(history: tuple[int, int, list[tuple[int, list[int]]]]) -> None:
    window, batch, passes = history
    cache = KVCache(SHAPES, window, 256, mx.float32, batch)
    past: list[list[int]] = [[] for _ in range(batch)]
    for serial, (rows, committed) in enumerate(passes):
        longest = max(map(len, past)) + rows
        if longest > cache.capacity:
            cache.grow(capacity_for(longest))
        step = cache.plan(rows)
        for layer, shape in enumerate(SHAPES):
            fresh = written(serial, batch, rows, shape)
            keys, values = cache.update(layer, fresh, -fresh, step)
            assert np.array_equal(np.array(keys), -np.array(values))
            for sequence in range(batch):
                names = np.array(fresh)[sequence, 0, :, 0].astype(int).tolist()
                for row in {0, rows // 2, rows - 1}:
                    expected = past[sequence] + names[: row + 1]
                    span = expected if shape.kind == FULL else expected[-window:]
                    assert seen(keys, step, shape.kind, sequence, row) == set(span)
        cache.advance(mx.array(committed))
        for sequence, count in enumerate(committed):
            past[sequence] += (serial * 1000 + sequence * 100_000 + np.arange(count)).tolist()


@settings(max_examples=40, deadline=None)
@given(window=st.integers(1, 40), length=st.integers(1, 200), extra=st.integers(0, 1))
def test_a_drafter_sees_the_newest_committed_rows(window: int, length: int, extra: int) -> None:
    """`visible`, which drafters use: the last `span` rows below the length, and nothing that was rejected."""
    cache = KVCache(SHAPES[1:2], window, 256, mx.float32)
    for start in range(0, length, 7):
        rows = min(7, length - start)
        step = cache.plan(rows)
        values = mx.broadcast_to(mx.arange(start, start + rows, dtype=mx.float32)[:, None], (1, 1, rows, 4))
        cache.update(0, values, values, step)
        cache.advance(rows)
    rejected = mx.full((1, 1, 8, 4), -1.0)
    cache.update(0, rejected, rejected, cache.plan(8))
    mask = np.array(cache.visible(SLIDING, cache.length - 1, window + extra))[0, 0, 0]
    names = np.array(cache.keys[0])[0, 0, mask, 0].astype(int).tolist()
    assert sorted(names) == list(range(max(0, length - window - extra), length))
