"""Acceptance: which drafted tokens the target would have produced itself. Pure functions, on the device.

What it does: turns drafts and the target's logits into an accepted count and the next token. What it does not do:
read a value, know a model, or touch a cache.

Shapes: B batch, K drafts, M = K + 1 rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx


@dataclass(frozen=True)
class Verdict:
    """accepted [B]: drafts that stand. tokens [B, M]: what to emit, of which the first accepted + 1 count.

    last [B, 1] is the newest of them, the one whose K/V is not in the cache yet.
    """

    accepted: mx.array
    tokens: mx.array
    last: mx.array


def greedy(drafts: mx.array | None, logits: mx.array) -> Verdict:
    """Temperature 0: the longest prefix of drafts [B, K] equal to the target's own best tokens (logits [B, M, V]).

    Row i's best token is right whenever drafts 0..i-1 were; so the row behind the last accepted draft gives the
    next token, and the tokens to emit are simply the rows' best ones.
    """
    best = mx.argmax(logits, axis=-1).astype(mx.int32)
    if drafts is None:
        accepted = mx.zeros((logits.shape[0],), dtype=mx.int32)
    else:
        agrees = (drafts == best[:, :-1]).astype(mx.int32)
        accepted = mx.cumprod(agrees, axis=1).sum(axis=1)
    return Verdict(accepted, best, mx.take_along_axis(best, accepted[:, None], axis=1))
