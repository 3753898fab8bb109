"""Exact mode: greedy output that is bit-equal with and without a drafter, where this device can do it.

Kernels for one row and for several round differently (performance.md, D1), and so do kernels for buffers of different
sizes; so equality is found out, never assumed, for each capacity of the cache by itself, with the very pass that
rounds take. Two ways, tried in order: widths whose rows all equal the one-row result; or a canonical width that every
pass is padded to, plain ones included, so that every row goes through the same kernels.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.kept import Kept
from mlx_mtp.generation.cache import CAPACITY_STEP, FULL, KVCache
from mlx_mtp.generation.interfaces import States, Target

log = logging.getLogger(__name__)

CANONICAL = 5  # rows; Apple's kernels for few rows read the weights once for up to five (performance.md, A1)
WIDEST = 9
# Tokens that are taken one a pass and several a pass. With the widest pass they stay within the slack of a ring, so
# that going back to the first of them finds its window intact.
PROBE_TOKENS = 18
# Rows that fill a buffer by turns: computed by the target once. A prime number, so that equal rows meet other places.
SEED_TOKENS = 61


@dataclass(frozen=True)
class Exactness:
    """Depths that keep the output bit-equal, and the width to fill passes up to (None = leave them as they are)."""

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

    def deepest(self, depth: int) -> int:
        """The most drafts that are allowed of up to `depth`."""
        return max(allowed for allowed in self.depths if allowed <= depth)


class TargetPass:
    """The target's pass and its head, compiled by themselves for each capacity and number of rows.

    Compiling fuses neighbouring operations, and what is fused may round differently. In one graph with the rest of a
    round, the bits would depend on drafter family, sampling and depth; here they depend on rows and capacity only.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._compiled: dict[int, Callable[..., Any]] = {}

    def forget(self) -> None:
        """Lets go of the compiled functions."""
        self._compiled.clear()

    def __call__(self, rows: mx.array, cache: KVCache) -> tuple[States, mx.array]:
        """Rows [B, M] written after the cache's length: their states, and float32 logits [B, M, V]."""
        if cache.capacity not in self._compiled:
            target, layout = self._target, cache.layout()

            def one_pass(rows: mx.array, arrays: Any) -> tuple[mx.array, tuple[mx.array, ...], mx.array, Any]:
                cache = layout.around(arrays)
                states = target.forward(rows, cache)
                return states.hidden, states.aux, target.head(states.hidden), cache.arrays

            self._compiled[cache.capacity] = mx.compile(one_pass)
        hidden, aux, logits, cache.arrays = self._compiled[cache.capacity](rows, cache.arrays)
        return States(hidden, aux), logits


class ProbeFile(Kept):
    """Where the results of one target on one device are kept: finding them takes half a minute."""

    def load(self) -> dict[int, Exactness]:
        """What earlier runs found, by capacity; without what cannot be such a result."""
        known, found = self.read(), {}
        for capacity, entry in known.items() if isinstance(known, dict) else ():
            with contextlib.suppress(KeyError, TypeError, ValueError, IndexError):
                result = Exactness(tuple(map(int, entry["depths"])), entry["width"] and int(entry["width"]))
                if result.depths[0] == 0 and all(0 <= depth < WIDEST for depth in result.depths):
                    found[int(capacity)] = result
        return found

    def save(self, found: dict[int, Exactness]) -> None:
        """Keeps results beside those of other capacities."""
        self.write({str(capacity): asdict(result) for capacity, result in (self.load() | found).items()})


class Probes:
    """What was found of a target, capacity by capacity; each is probed when a request first meets it.

    kept: where the results of earlier runs are, which of one target on one device are the same.
    """

    def __init__(self, target: Target, kept: ProbeFile | None = None) -> None:
        self.target, self.found, self._kept = target, dict[int, Exactness](), kept

    def at(self, capacity: int) -> Exactness:
        """How passes over a cache of this capacity can be exact."""
        if capacity not in self.found:
            known = self._kept.load() if self._kept else {}
            if capacity not in known:
                log.warning("Exact mode: comparing passes of one and of several tokens bit for bit (room for %d "
                            "tokens); it may take half a minute%s.", capacity,
                            " and is remembered for this model here" if self._kept else "")  # fmt: skip
                known = {capacity: probe(self.target, capacity)}
                if self._kept:
                    self._kept.save(known)
            self.found[capacity] = known[capacity]
        return self.found[capacity]


def probe(target: Target, capacity: int = CAPACITY_STEP) -> Exactness:
    """Finds the way this target can be exact over caches of this capacity; Exactness((0,), None) when it cannot."""
    trial = _Trial(target, capacity)
    if widths := trial.equal(1, range(2, WIDEST + 1)):
        return Exactness((0, *(width - 1 for width in widths)), None)
    if trial.equal(CANONICAL, [CANONICAL]):
        return Exactness(tuple(range(CANONICAL)), CANONICAL)
    return Exactness((0,), None)


class _Trial:
    """The same tokens after the same past, so and so many a pass.

    What a pass does depends on rows and capacity alone, for it always goes over whole buffers; so these are filled.
    """

    def __init__(self, target: Target, capacity: int) -> None:
        self._pass, self._cache = TargetPass(target), _filled(target, capacity)
        self._vocabulary = target.info.vocab_size
        last = min(capacity, target.info.max_context) - PROBE_TOKENS - WIDEST - 1
        # Where nearly everything may be seen and rings have wrapped, and where hardly anything may.
        self._starts = sorted({max(1, last - last % 2), min(17, max(1, last))}, reverse=True)

    def equal(self, single: int, widths: Sequence[int]) -> list[int]:
        """Those of `widths` whose every row equals, bit for bit, the first row of a pass of `single` rows there."""
        found = list(widths)
        for start in self._starts:
            alone = self._left(start, single, [1] * PROBE_TOKENS) if found else []
            found = [width for width in found if all(
                mx.array_equal(one, other).item() for commits in _commits(width)
                for one, other in zip(alone, self._left(start, width, commits), strict=True)
            )]  # fmt: skip
        return found

    def _left(self, start: int, width: int, commits: Sequence[int]) -> list[mx.array]:
        """Logits [T, V] of tokens of which `commits` are accepted a pass, and the K/V rows [B, G, T, d] that they
        leave; what else is in a pass are wrong drafts."""
        cache, rows, at = self._cache, [], 0
        tokens = [(7919 * (start + i) + 13) % self._vocabulary for i in range(PROBE_TOKENS + width)]
        cache.length = mx.array([start], dtype=mx.int32)
        for count in commits:
            # Padded passes of plain decoding hold their only token again and again (round.py).
            wrong = [tokens[at] if sum(commits) == len(commits) else (31 * token + 7) % self._vocabulary
                     for token in tokens[at + count : at + width]]  # fmt: skip
            _, logits = self._pass(mx.array([[*tokens[at : at + count], *wrong]], dtype=mx.int32), cache)
            rows.append(logits[0, :count])
            cache.advance(count)
            mx.eval(rows[-1], cache.arrays)
            at += count
        positions, left = mx.arange(start, start + PROBE_TOKENS), [mx.concatenate(rows)]
        for shape, keys, values in zip(cache.shapes, cache.keys, cache.values, strict=True):
            slots = positions if shape.kind == FULL else positions % cache.slots(shape.kind)
            left += (mx.take(buffer, slots, axis=2) for buffer in (keys, values))
        return left


def _commits(width: int) -> Iterator[list[int]]:
    """How many rows of each pass are accepted: all of them; and by turns 1, 2, ... so that a token is met as each."""
    for sizes in ([width] * PROBE_TOKENS, [1 + i % width for i in range(PROBE_TOKENS)]):
        passes = next(n for n in range(1, PROBE_TOKENS + 1) if sum(sizes[:n]) >= PROBE_TOKENS)
        yield [*sizes[: passes - 1], PROBE_TOKENS - sum(sizes[: passes - 1])]


def _filled(target: Target, capacity: int) -> KVCache:
    """A cache full of K/V of this target: those of a short text, again and again."""
    count = min(SEED_TOKENS, target.info.max_context - 1)
    seed, cache = target.new_cache(CAPACITY_STEP), target.new_cache(capacity)
    target.forward(mx.array([[(31 * i + 5) % target.info.vocab_size for i in range(count)]]), seed)
    for mine, its in ((cache.keys, seed.keys), (cache.values, seed.values)):
        for layer, shape in enumerate(cache.shapes):
            places = mx.arange(cache.slots(shape.kind)) % min(count, seed.slots(shape.kind))
            mine[layer] = mx.take(its[layer], places, axis=2)
    mx.eval(cache.arrays)
    return cache
