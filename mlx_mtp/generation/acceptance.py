"""Acceptance: which drafted tokens are kept, so that the output follows the target's own distribution.

Pure functions on the device: drafts, the distribution q they were drawn from and the target's distribution p, whose
row i is the one after i drafts, give the number of accepted drafts and the next token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.generation.sampling import TokenDistribution


@dataclass(frozen=True)
class Accepted:
    """accepted [B]: number of accepted drafts. tokens [B, M]: what to emit, of which the first accepted + 1 count.

    last [B, 1] is the newest of them, the one whose K/V is not in the cache yet.
    """

    accepted: mx.array
    tokens: mx.array
    last: mx.array


@dataclass(frozen=True)
class Odds:
    """pass_ [B, K]: chance that a uniform draw lets draft i pass. residual [B, M, N]: of the token after i drafts.

    prefix: a draft is accepted when it and all before it pass (True), or when it or any later one passes (False).
    """

    pass_: mx.array
    residual: TokenDistribution
    prefix: bool


def greedy(drafts: mx.array | None, logits: mx.array) -> Accepted:
    """Temperature 0: the longest prefix of drafts [B, K] equal to the target's own best tokens (logits [B, M, V]).

    Row i's best token is right whenever drafts 0..i-1 were; so the tokens to emit are simply the rows' best ones.
    """
    best = mx.argmax(logits, axis=-1).astype(mx.int32)
    if drafts is None:
        accepted = mx.zeros((logits.shape[0],), dtype=mx.int32)
    else:
        agrees = (drafts == best[:, :-1]).astype(mx.int32)
        accepted = mx.cumprod(agrees, axis=1).sum(axis=1)
    return Accepted(accepted, best, mx.take_along_axis(best, accepted[:, None], axis=1))


def token_odds(drafts: mx.array, q: TokenDistribution, p: TokenDistribution) -> Odds:
    """Leviathan et al. 2023 (arXiv 2211.17192, algorithm 1): each draft by itself, min(1, p / q)."""
    depth = drafts.shape[1]
    before = p.each(lambda rows: rows[:, :depth])
    excess = mx.maximum(before.probabilities - q.on(before), 0.0)
    return Odds(mx.minimum(before.at(drafts) / q.at(drafts), 1.0), _residual(excess, p, depth), True)


def block_odds(drafts: mx.array, q: TokenDistribution, p: TokenDistribution) -> Odds:
    """Block verification (Sun et al. 2024, arXiv 2403.10444, algorithm 2): the block as a whole, never fewer tokens.

    weight_i = min(1, weight_(i-1) * p/q of draft i). Draft i < K passes with s / (s + 1 - weight_i), where s is the
    sum of the excess max(weight_i * p - q, 0) after it; the last one with its weight. The last draft to pass is
    accepted together with all before it.
    """
    depth = drafts.shape[1]
    before = p.each(lambda rows: rows[:, :depth])
    ratio = before.at(drafts) / q.at(drafts)
    weights = [mx.ones(ratio.shape[:1])]
    for i in range(depth):
        weights.append(mx.minimum(weights[-1] * ratio[:, i], 1.0))
    weight = mx.stack(weights, axis=1)
    excess = mx.maximum(weight[:, :depth, None] * before.probabilities - q.on(before), 0.0)
    total = excess.sum(axis=-1)
    # 0 / 0 where p and q agree and the weight is 1: then a later draft, at the latest the last, surely passes.
    passes = total / mx.maximum(total + 1.0 - weight[:, :depth], 1e-30)
    return Odds(mx.concatenate([passes[:, 1:], weight[:, depth:]], axis=1), _residual(excess, p, depth), False)


def _residual(excess: mx.array, p: TokenDistribution, depth: int) -> TokenDistribution:
    """Excess [B, K, N] normalised, and p itself after all K drafts. Without any excess (rounding) p takes its place."""
    total = excess.sum(axis=-1, keepdims=True)
    rest = mx.where(total > 0, excess / mx.maximum(total, 1e-30), p.probabilities[:, :depth])
    return TokenDistribution(p.tokens, mx.concatenate([rest, p.probabilities[:, depth:]], axis=1))


def sampled(
    drafts: mx.array | None,
    q: TokenDistribution | None,
    p: TokenDistribution,
    keys: mx.array,
    odds: Callable[[mx.array, TokenDistribution, TokenDistribution], Odds] = block_odds,
) -> Accepted:
    """Temperature above 0: drafts [B, K] drawn from q [B, K, N], verified against p [B, M, N].

    keys [2, 2]: one for acceptance, one for the token after the last accepted draft.
    """
    if drafts is None or q is None:
        token = p.draw(keys[1])
        return Accepted(mx.zeros(token.shape[:1], dtype=mx.int32), token, token)
    batch, depth = drafts.shape
    found = odds(drafts, q, p)
    passes = (mx.random.uniform(shape=(batch, depth), key=keys[0]) < found.pass_).astype(mx.int32)
    if found.prefix:
        accepted = mx.cumprod(passes, axis=1).sum(axis=1)
    else:
        accepted = (passes * mx.arange(1, depth + 1)).max(axis=1)
    accepted = accepted.astype(mx.int32)
    last = found.residual.each(lambda rows: mx.take_along_axis(rows, accepted[:, None, None], axis=1)).draw(keys[1])
    kept = mx.arange(depth + 1) < accepted[:, None]
    padded = mx.concatenate([drafts, last], axis=1)
    return Accepted(accepted, mx.where(kept, padded, last), last)
