"""Lookup: what followed the last time the same words were written, found on the device; needs no weights.

Keeps the tokens of prompt and reply, and what the caller expects of the reply; finds the longest match of their end
(n-grams up to 8, the most recent of the longest) and proposes its continuation; alone, or in front of another drafter
where the match is long enough to be trusted. The idea is prompt lookup decoding (Saxena 2023; LLMA, arXiv 2304.04487).

Shapes: B batch, S places for tokens, K drafts, n length of a match.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.generation.cache import KVCache
from mlx_mtp.generation.interfaces import Drafter, Memory, SampleDraft, States, Target
from mlx_mtp.generation.sampling import Forced

LONGEST = 8
# From this length on a match is worth more than the drafter it comes before (measured; benchmarks/acceptance.py).
TRUSTED = 6
NOTHING = -1


class Lookup(Drafter):
    reads_prompt = True

    def start(self, batch: int, capacity: int) -> Memory:
        return {
            "tokens": mx.full((batch, capacity), NOTHING, dtype=mx.int32), "length": mx.zeros((batch,), mx.int32),
            "expected": mx.full((batch, 1), NOTHING, dtype=mx.int32),
        }  # fmt: skip

    def grow(self, memory: Memory, capacity: int) -> Memory:
        missing = max(0, capacity - memory["tokens"].shape[1])
        return {**memory, "tokens": mx.pad(memory["tokens"], [(0, 0), (0, missing)], constant_values=NOTHING)}

    def expect(self, memory: Memory, tokens: mx.array) -> Memory:
        """In buffers of few sizes, so that few rounds are compiled; NOTHING parts it from the text."""
        places = 1 << int(tokens.shape[1]).bit_length()
        padding = [(0, 0), (0, places - tokens.shape[1])]
        return {**memory, "expected": mx.pad(tokens.astype(mx.int32), padding, constant_values=NOTHING)}

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        found, _ = self.continuation(memory, token, depth)
        return sample.point_mass(found), memory

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        places = memory["length"][:, None] + mx.arange(tokens.shape[1], dtype=mx.int32)
        kept = mx.put_along_axis(memory["tokens"], places, tokens.astype(mx.int32), axis=1)
        return {**memory, "tokens": kept, "length": memory["length"] + accepted + 1}

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        return {**memory, "length": mx.full(memory["length"].shape, length, dtype=mx.int32)}

    @staticmethod
    def continuation(memory: Memory, token: mx.array, depth: int) -> tuple[mx.array, mx.array]:
        """Proposals [B, K] after `token` [B, 1], and the length n [B] of the match they rest on."""
        text = mx.concatenate([memory["expected"], memory["tokens"]], axis=1)
        length = memory["length"][:, None] + memory["expected"].shape[1]  # the place of `token`
        text = mx.put_along_axis(text, length, token, axis=1)
        places = mx.arange(text.shape[1], dtype=mx.int32)[None]
        matches, run = mx.zeros(text.shape, dtype=mx.int32), places < length
        for back in range(LONGEST):
            wanted = mx.take_along_axis(text, mx.maximum(length - back, 0), axis=1)
            shifted = mx.pad(text, [(0, 0), (back, 0)], constant_values=NOTHING)[:, : text.shape[1]]
            run = run & (shifted == wanted)
            matches = matches + run
        best = mx.argmax(matches * text.shape[1] + places, axis=1, keepdims=True)
        # A match that ends close by repeats itself: its continuation runs into the newest token and starts over.
        step = mx.arange(depth, dtype=mx.int32) % mx.maximum(length - best, 1)
        found = mx.take_along_axis(text, best + 1 + step, axis=1)
        size = mx.take_along_axis(matches, best, axis=1)
        return mx.where((size > 0) & (found != NOTHING), found, token), size[:, 0]


class LookupFirst(Drafter):
    """Another drafter, whose drafts a lookup replaces for a whole round where a long match is found."""

    def __init__(self, drafter: Drafter) -> None:
        self.drafter, self.lookup = drafter, Lookup()
        self.max_depth = drafter.max_depth
        self.reads_prompt, self.reads_states = True, drafter.reads_states
        self.aux_layers = drafter.aux_layers
        self.name = f"in front of {type(drafter).__name__} {drafter.name}"

    def attach(self, target: Target) -> None:
        self.drafter.attach(target)

    def modules(self) -> Sequence[nn.Module]:
        return self.drafter.modules()

    def quantise_head(self, bits: int) -> bool:
        return self.drafter.quantise_head(bits)

    def start(self, batch: int, capacity: int) -> Memory:
        return {"lookup": self.lookup.start(batch, capacity), "drafter": self.drafter.start(batch, capacity)}

    def _both(self, memory: Memory, change: Callable[[Drafter, Memory], Memory]) -> Memory:
        return {"lookup": change(self.lookup, memory["lookup"]), "drafter": change(self.drafter, memory["drafter"])}

    def grow(self, memory: Memory, capacity: int) -> Memory:
        return self._both(memory, lambda one, its: one.grow(its, capacity))

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        found, size = self.lookup.continuation(memory["lookup"], token, depth)
        overridden = _Override(sample, (size >= TRUSTED)[:, None], found)
        drafts, inner = self.drafter.draft(memory["drafter"], token, hidden, cache, depth, overridden)
        return drafts, {**memory, "drafter": inner}

    def expect(self, memory: Memory, tokens: mx.array) -> Memory:
        return self._both(memory, lambda one, its: one.expect(its, tokens))

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        return self._both(memory, lambda one, its: one.observe(its, tokens, states, accepted))

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        return self._both(memory, lambda one, its: one.rewind(its, length, states))


class _Override:
    """A SampleDraft that takes the lookup's token of the same step wherever its mask [B, 1] is set."""

    def __init__(self, sample: SampleDraft, mask: mx.array, found: mx.array) -> None:
        self._sample, self._mask, self._found, self._step = sample, mask, found, 0

    def __call__(self, logits: mx.array, tokens: mx.array | None = None, forced: Forced | None = None) -> mx.array:
        at = self._step
        self._step += 1
        return self._sample(logits, tokens, forced or (self._mask, self._found[:, at : at + 1]))

    def point_mass(self, tokens: mx.array) -> mx.array:
        return self._sample.point_mass(mx.where(self._mask, self._found, tokens))
