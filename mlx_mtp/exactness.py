"""Exact mode: greedy output that is bit-equal with and without a drafter, if this device can do it.

What it does: probes a loaded target for a way to make a row's result independent of how many rows travel with it.
What it does not do: decode.

Kernels for one row and for several round differently (performance.md, D1), so equality is found out, never assumed.
Two ways, tried in order: widths whose rows all equal the one-row result; or a canonical width that every pass is
filled up to, plain ones included, so that every row goes through the same kernels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.interfaces import Target

CANONICAL = 5  # rows; Apple's kernels for few rows read the weights once for up to five (performance.md, A1)
WIDEST = 9
PROBE_CAPACITIES = (256, 1024)
PROBE_TOKENS = 24


@dataclass(frozen=True)
class Exactness:
    """depths that keep the output bit-equal, and the width to fill passes up to (None = leave them as they are)."""

    depths: tuple[int, ...]
    width: int | None

    @property
    def possible(self) -> bool:
        """Whether any drafting is."""
        return len(self.depths) > 1

    @property
    def equal_widths(self) -> tuple[int, ...]:
        """Widths from 2 on whose rows equal the one-row result bit for bit, as the probe found them."""
        return () if self.width else tuple(depth + 1 for depth in self.depths if depth)


def probe(target: Target) -> Exactness:
    """Finds the way this target on this device can be exact; Exactness((0,), None) when it cannot."""
    one_row: _Known = {}
    widths = [width for width in range(2, WIDEST + 1) if _same(target, 1, width, one_row)]
    if widths:
        return Exactness((0, *(width - 1 for width in widths)), None)
    if _same(target, CANONICAL, CANONICAL, {}):
        return Exactness(tuple(range(CANONICAL)), CANONICAL)
    return Exactness((0,), None)


# Where the probe's tokens stand: (length of the prompt before them, capacity of the cache).
_Place = tuple[int, int]
# Logits [T, V] of the tokens taken one a pass: what every width is compared with.
_Known = dict[_Place, mx.array]


def _same(target: Target, single: int, width: int, known: _Known) -> bool:
    """Whether row i of a pass of `width` rows equals, bit for bit, the first row of a pass of `single` rows there."""
    info = target.info
    tokens = [(7919 * i + 13) % info.vocab_size for i in range(PROBE_TOKENS + width)]
    starts = (17, min(info.window, 512) + 41)  # before the window fills, and after a ring has wrapped
    for capacity in PROBE_CAPACITIES:
        for start in starts:
            if start + PROBE_TOKENS + width <= capacity:
                place = start, capacity
                if place not in known:
                    known[place] = _logits(target, tokens, place, [1] * PROBE_TOKENS, single)
                if not _agree(target, tokens, place, width, width if single > 1 else 1, known[place]):
                    return False
    return True


def _agree(target: Target, tokens: Sequence[int], place: _Place, width: int, filled: int, one: mx.array) -> bool:
    for first in range(min(width, 3)):  # so that a position is met as different rows of a pass
        sizes = [1] * first + [width] * ((PROBE_TOKENS - first) // width)
        several = _logits(target, tokens, place, sizes, filled)
        if not mx.array_equal(one[: len(several)], several).item():
            return False
    return True


def _logits(target: Target, tokens: Sequence[int], place: _Place, sizes: Sequence[int], width: int) -> mx.array:
    """Logits [T, V] of tokens behind a prompt, `sizes` of them committed a pass, each pass filled up to `width`."""
    start, capacity = place
    cache = target.new_cache(capacity)
    target.forward(mx.array([[(31 * i + 5) % target.info.vocab_size for i in range(start)]]), cache, 0)
    cache.advance(start)
    rows, at = [], 0
    for size in sizes:
        taken = [*tokens[at : at + size], *[tokens[at]] * (width - size)]
        rows.append(target.head(target.forward(mx.array([taken]), cache).hidden)[0, :size])
        cache.advance(size)
        mx.eval(rows[-1], cache.arrays)
        at += size
    return mx.concatenate(rows)
