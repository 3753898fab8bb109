"""The decode loop: chunked prefill, then rounds, the next one in flight while one is read that cannot be the last.

Rounds come back as chunks of tokens; text and stop conditions are the engine's.

Invariant: the device is read in one place (`read`), once per round; everything a request changes belongs to that
request, so stopping early, cancelling or an exception in the consumer leave nothing behind.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.backend import threads
from mlx_mtp.generation.cache import KVCache, capacity_for
from mlx_mtp.generation.constraint import Constraint
from mlx_mtp.generation.depth import DepthPolicy
from mlx_mtp.generation.exactness import WIDEST, Exactness, Probes
from mlx_mtp.generation.interfaces import Drafter, Memory, States, Target
from mlx_mtp.generation.prefix import Lease, Pair
from mlx_mtp.generation.processors import Processors
from mlx_mtp.generation.request import GenerationRequest
from mlx_mtp.generation.round import RoundOutput, Rounds, SequenceState
from mlx_mtp.generation.sampling import SamplingSpec
from mlx_mtp.generation.types import Stats

log = logging.getLogger(__name__)

# Most bytes of attention scores one prefill chunk may need, and its largest and smallest number of rows.
CHUNK_BYTES, MAX_CHUNK, MIN_CHUNK = 256_000_000, 512, 16
# The time between two reads is what a round costs, unless the consumer of the tokens took more than this share of it.
PAUSED = 0.1


@dataclass
class Chunk:
    """New tokens, and per token its logprob and the likeliest alternatives where asked for.

    drafted, accepted: of its round, before any cut; None and 0 for the prefill's token.
    """

    tokens: list[int]
    logprobs: list[float] | None = None
    top: list[dict[int, float]] | None = None
    drafted: int | None = None
    accepted: int = 0


def _first(array: mx.array) -> list[Any]:
    """The values of a batch's only sequence."""
    values: list[list[Any]] = array.tolist()  # type: ignore[assignment]
    return values[0]


class RoundClock:
    """What a round took: the time between two reads of the device, where that says something about a round.

    It says nothing next to a round whose graph or buffers were made, or where the consumer of the tokens was slow, so
    that the device was ahead. disturbed: whether the interval that runs holds more than a round. paused: seconds of it
    in which the consumer had the tokens.
    """

    def __init__(self) -> None:
        self.paused, self.disturbed = 0.0, True
        self._read_at, self._before = time.perf_counter(), True

    def lap(self) -> float | None:
        """Seconds since the last read, None where they say nothing; starts the next interval."""
        now = time.perf_counter()
        seconds = now - self._read_at
        disturbed = self.disturbed or self.paused > PAUSED * seconds
        found = None if disturbed or self._before else seconds
        self._read_at, self.paused, self._before, self.disturbed = now, 0.0, disturbed, False
        return found


class _Decoding:
    """Host side of one request: its tokens so far, and an upper bound of the device's length.

    constraint: the grammar, which is one of the `changes`: what changes logits on the host between a pass and its
    acceptance, in this order; rounds are then read one by one.
    """

    def __init__(self, request: GenerationRequest, state: SequenceState, stats: Stats) -> None:
        self.request, self.state, self.stats = request, state, stats
        self.bound, self.emitted, self.clock = len(request.ids), list[int](), RoundClock()
        self.constraint = Constraint(request.grammar, request.thought) if request.grammar else None
        processors = Processors(request.processors, request.ids) if request.processors else None
        self.changes = [one for one in (processors, self.constraint) if one is not None]

    @property
    def left(self) -> int:
        """Tokens that may still be emitted."""
        return self.request.budget - len(self.emitted)

    def read(self, output: RoundOutput, drafted: int | None = None) -> Chunk:
        """A round, cut to what was accepted and to the budget. After prefill only this waits for the device."""
        self.stats.host_syncs += 1
        *tokens, accepted = _first(output.tokens)
        kept = slice(min(accepted + 1, self.left))
        chunk = Chunk(tokens[kept], None, None, drafted, accepted)
        if output.logprobs is not None and output.top is not None:
            # Computed with the tokens by one graph, so these wait for nothing.
            ids, values = (_first(array)[kept] for array in output.top)
            chunk.logprobs = _first(output.logprobs)[kept]
            chunk.top = [dict(zip(*row, strict=True)) for row in zip(ids, values, strict=True)]
        return chunk

    def add(self, tokens: list[int]) -> None:
        """Tokens that were read."""
        self.emitted += tokens
        for change in self.changes:
            change.add(tokens)

    def change(self, drafts: mx.array | None, logits: mx.array) -> mx.array:
        """The logits [1, M, V] of a pass over drafts [1, K] as they are to be decided by."""
        for change in self.changes:
            logits = change(drafts, logits)
        return logits


# What a session has of a prompt: what it lends, how many tokens' rows are there, and the states of the last of them,
# None where the caller has to run that token again if it wants them.
Reused = tuple[Lease, int, States | None]


class Decoder:
    """Decodes requests with one pair. exact: how this device can be exact, None for the fast mode."""

    def __init__(
        self, target: Target, drafter: Drafter | None, policy: DepthPolicy, exact: Probes | None = None
    ) -> None:
        self.target, self.drafter, self.policy, self.exact = target, drafter, policy, exact
        self.pair: Pair = target, drafter, exact is not None  # what K/V that it fills belong to
        self.rounds = Rounds(*self.pair)
        self._reads_states = drafter is not None and drafter.reads_states
        self._aux_layers = drafter.aux_layers if drafter else ()

    def decode(
        self, request: GenerationRequest, stats: Stats, policy: DepthPolicy | None = None
    ) -> Generator[Chunk, None, None]:
        """Chunks of new tokens, at most the budget in all: the first from the prefill, then one a round."""
        policy = policy or self.policy
        policy.begin()
        session, reused, decoding = request.session, None, None
        if session is not None:  # a drafter that reads states needs the last row's, which is run again for it
            back = None if self.exact else int(self._reads_states)
            reused = session.acquire(request.ids, back, self.pair)
        stats.prefilled_tokens = len(request.ids) - (reused[1] if reused else 0)
        try:
            began = time.perf_counter()
            decoding = _Decoding(request, self.prefill(request, policy.deepest, reused), stats)
            yield from self._rounds(decoding, policy, began)
        finally:
            if session is not None and decoding is not None:
                # The last token's row is not written yet, or not for sure. In exact mode the session has the prompt
                # only: what a reply leaves beyond what was wanted of it depends on the drafter.
                said = [] if self.exact else decoding.emitted[:-1]
                session.release(Lease(decoding.state.cache, decoding.state.memory), [*request.ids, *said])
            elif session is not None:
                session.release()

    def _rounds(self, decoding: _Decoding, policy: DepthPolicy, began: float) -> Iterator[Chunk]:
        """The tokens after the prompt; one round in flight while the one before is read."""
        clock, stats = decoding.clock, decoding.stats
        first = self.rounds.first(decoding.state, decoding.change)
        stats.head_passes += 1
        # Read before a round is submitted: where that waits for the device (MLX on a CPU), the token would be late.
        chunk = decoding.read(first)
        stats.prefill_seconds = time.perf_counter() - began
        clock.lap()
        decoding.add(chunk.tokens)
        yield chunk
        pending: tuple[int, RoundOutput] | None = None
        while decoding.left > 0:
            depth, output = pending or self._submit(decoding, policy)
            # After a round that may be the last none is submitted: it would be for nothing, and on a CPU waited for.
            # What is done on the host wants every token before the next round is built.
            ahead = None
            if decoding.left > depth + 1 and not decoding.changes:
                ahead = self._submit(decoding, policy)
            chunk = decoding.read(output, depth)
            # What a round takes shows only where it was built while the one before ran, and the next, which is built
            # meanwhile, is one like it: with nothing to build it looks far too short, with two of them too long.
            seconds, alike = clock.lap(), pending is not None and ahead is not None and ahead[0] == depth
            policy.learn(depth, chunk.accepted, seconds if alike else None)
            decoding.bound -= depth - chunk.accepted
            decoding.add(chunk.tokens)
            given = time.perf_counter()
            yield chunk
            clock.paused, pending = time.perf_counter() - given, ahead

    def _submit(self, decoding: _Decoding, policy: DepthPolicy) -> tuple[int, RoundOutput]:
        """Starts a round of the depth the policy chose; that depth and what the round will give."""
        depth, state = policy.next(), decoding.state
        depth = state.exact.deepest(depth) if state.exact else depth
        rows = decoding.bound + max(depth + 1, (state.exact and state.exact.width) or 0)
        state.cache.newest = max(state.cache.newest, rows - 1)
        if rows > state.cache.capacity:
            state.cache.grow(capacity_for(rows))
            if self.drafter is not None:
                state.memory = self.drafter.grow(state.memory, state.cache.capacity)
            decoding.clock.disturbed = True
        decoding.clock.disturbed |= self.rounds.is_new(state, depth)
        decoding.bound += depth + 1
        change = decoding.change if decoding.changes else None
        override = decoding.constraint.override(depth) if decoding.constraint and depth else None
        output = self.rounds.submit(state, depth, change, override)
        decoding.stats.host_syncs += decoding.constraint is not None  # the drafts are read
        decoding.stats.submitted(depth)
        return depth, output

    def prefill(self, request: GenerationRequest, deepest: int, reused: Reused | None = None) -> SequenceState:
        """Runs the prompt in chunks that bound memory; the sequence after it. reused: what is there of it already."""
        target, drafter, ids = self.target, self.drafter, request.ids
        # In exact mode room for the whole reply: the kernels may depend on the size of the buffers, and when those
        # grow must not depend on how many drafts are in flight.
        rows = len(ids) + (request.budget + 4 * WIDEST if self.exact else deepest + 1)
        capacity = max(capacity_for(rows), reused[0].cache.capacity if reused else 0)
        exact = self._exactness(capacity)  # before there are buffers: the probe has some of its own
        cache, memory, states, begin = self._start(ids, capacity, reused)
        if drafter is not None:
            memory = drafter.expect(memory, mx.array([list(request.prediction)], dtype=mx.int32))
        # In exact mode every family goes the same way, plain decoding too: the same rows through every layer.
        wants_all = self.exact is not None or self._reads_states
        score_bytes = 4 * target.info.attention_heads * cache.capacity  # of one row
        rows_at_once = max(MIN_CHUNK, min(MAX_CHUNK, CHUNK_BYTES // score_bytes))
        for start in range(begin, len(ids), rows_at_once):
            tokens = mx.array([ids[start : start + rows_at_once]], dtype=mx.int32)
            final = start + rows_at_once >= len(ids)
            states = target.forward(tokens, cache, None if wants_all else int(final)).of_layers(self._aux_layers)
            if drafter is not None and drafter.reads_prompt:
                memory = drafter.observe(memory, tokens, states, mx.array([tokens.shape[1] - 1]))
            cache.advance(tokens.shape[1])
            mx.eval(cache.arrays, memory)
            threads.pause()
            if request.on_prefill:
                request.on_prefill(min(start + rows_at_once, len(ids)) - begin, len(ids) - begin)
        assert states is not None, "a prompt has a last token"
        cache.newest = max(cache.newest, len(ids) - 1)
        if request.session is not None and begin < len(ids):
            request.session.snapshot(cache, len(ids), states.last() if self.exact else None)
        vocabulary = target.info.vocab_size
        spec = SamplingSpec.of(request.sampling, vocabulary, request.logprobs)
        return SequenceState(
            mx.zeros((1, 1), dtype=mx.int32), states.hidden[:, -1:], cache, memory, spec,
            spec.arrays(request.sampling, vocabulary), spec.history(ids, vocabulary), mx.random.key(request.seed),
            exact,
        )  # fmt: skip

    def _exactness(self, capacity: int) -> Exactness | None:
        """How passes over caches of this capacity are exact; None in the fast mode."""
        if self.exact is None:
            return None
        known = capacity in self.exact.found
        found = self.exact.at(capacity)
        if self.drafter is not None and not known and not found.possible:
            log.warning("Exact mode: no way was found to verify drafts bit for bit with room for %d tokens; "
                        "decoding plainly where that much is needed.", capacity)  # fmt: skip
        return found

    def _start(
        self, ids: list[int], capacity: int, reused: Reused | None
    ) -> tuple[KVCache, Memory, States | None, int]:
        """Cache and drafter's memory to start from, the last token's states, and how many tokens these hold."""
        target, drafter = self.target, self.drafter
        if reused is None:
            cache = target.new_cache(capacity)
            return cache, drafter.start(1, cache.capacity) if drafter else {}, None, 0
        lease, length, states = reused
        cache, memory = lease.cache, lease.memory
        cache.grow(capacity)
        if drafter is not None:
            if self._reads_states and states is None:
                last = mx.array([[ids[length - 1]]], dtype=mx.int32)
                states = target.forward(last, cache).of_layers(self._aux_layers)
                cache.advance(1)
            memory = drafter.rewind(drafter.grow(memory, cache.capacity), length, states)
        return cache, memory, states, length
