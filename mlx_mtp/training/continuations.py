"""What a target itself writes: the text on which a drafter is trained to agree with it.

What it does: continues windows of a corpus, many at once, greedily and by sampling. What it does not do: draft;
a batch of plain decoding is the faster way to much text.

A drafter meets its target's own words in use, and those differ from any corpus (FastMTP, arXiv 2509.18362, 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from mlx_mtp.generation.interfaces import Target

BATCH = 32


def openings(ids: np.ndarray, count: int, length: int, marker: list[int], seed: int) -> np.ndarray:
    """`count` windows [N, length] of a corpus: half end anywhere, half where `marker` does (a reply begins there)."""
    random = np.random.default_rng(seed)
    anywhere = random.integers(length, len(ids) + 1, count)
    matches = np.ones(len(ids) - len(marker) + 1, dtype=bool)
    for i, token in enumerate(marker):
        matches &= ids[i : len(ids) - len(marker) + 1 + i] == token
    replies = np.flatnonzero(matches) + len(marker)
    replies = replies[replies >= length]
    ends = anywhere
    if marker and len(replies):
        ends = np.where(np.arange(count) % 2 == 0, anywhere, random.choice(replies, count))
    return np.stack([ids[end - length : end] for end in ends])


def continuations(
    target: Target, prompts: np.ndarray, tokens: int, seed: int, sampled_share: float = 0.5
) -> Iterator[np.ndarray]:
    """Prompts [N, P] followed by what the target writes, [n, P + tokens] at a time.

    sampled_share 0..1 of it is drawn at temperature 1, the rest is greedy.
    """
    for start in range(0, len(prompts), BATCH):
        batch = mx.array(prompts[start : start + BATCH].astype(np.int32))
        rows = np.arange(start, start + len(batch))
        drawn = mx.array(_drawn(rows, sampled_share)[:, None])
        yield np.array(_continue(target, batch, tokens, mx.random.key(seed + start), drawn))


def _drawn(rows: np.ndarray, share: float) -> np.ndarray:
    """Which rows are drawn and not greedy; spread evenly over pairs, because openings come in two kinds by turns."""
    pairs = rows // 2
    return np.asarray(np.floor((pairs + 1) * share) > np.floor(pairs * share))


def _continue(target: Target, prompts: mx.array, tokens: int, key: mx.array, sampled: mx.array) -> mx.array:
    """One batch, [B, P] -> [B, P + tokens]. sampled: [B, 1], which rows are drawn."""
    count, length = prompts.shape
    cache = target.new_cache(length + tokens, count)

    def step(rows: mx.array, key: mx.array, arrays: object) -> tuple[mx.array, mx.array, object]:
        inner = cache.around(arrays)  # type: ignore[arg-type]
        logits = target.head(target.forward(rows, inner, 1).hidden)
        inner.advance(rows.shape[1])
        key, draw = mx.random.split(key)
        chosen = mx.where(sampled, mx.random.categorical(logits, key=draw), mx.argmax(logits, axis=-1))
        return chosen.astype(mx.int32), key, inner.arrays

    written = [prompts]
    rows, key, arrays = step(prompts, key, cache.arrays)
    compiled = mx.compile(step)
    for _ in range(tokens - 1):
        written.append(rows)
        rows, key, arrays = compiled(rows, key, arrays)
        mx.async_eval(rows, key, arrays)
    return mx.concatenate([*written, rows], axis=1)
