"""The engine: prefill, the pipelined decode loop, stop conditions, events and statistics.

What it does: keeps one round in flight while it reads the one before, and turns tokens into events. What it does
not do: acceptance (verify.py), rounds (speculate.py), loading (loading.py).

Invariant: the device is read in one place (`_Reader`), once per round; everything a request changes belongs to that
request, so stopping early, cancelling or an exception in the consumer leave the engine as it was.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_mtp.cache import KVCache, capacity_for
from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.interfaces import Drafter, States, Target
from mlx_mtp.results import Event, Result, Sampling, Stats
from mlx_mtp.speculate import Request, Rounds
from mlx_mtp.tokens import Prompt, StopStrings, Tokenizer, prompt_ids

# Most bytes of attention scores one prefill chunk may need, and its largest and smallest number of rows.
CHUNK_BYTES, MAX_CHUNK, MIN_CHUNK = 256_000_000, 512, 16
# Depth "auto" until it is chosen from measured costs: on two CPU cores a draft step costs a sixth of the embedded
# target's pass and one draft pays best (measured); GPUs read their weights once for several rows.
AUTO_DEPTH_CPU, AUTO_DEPTH_GPU = 1, 3

PrefillProgress = Callable[[int, int], None]


@dataclass
class _Reader:
    """The only place that waits for the device after prefill."""

    stats: Stats

    def rows(self, array: mx.array) -> list[int]:
        self.stats.host_syncs += 1
        values: list[list[int]] = array.tolist()  # type: ignore[assignment]
        return values[0]


@dataclass
class _Decoding:
    """Host side of one request: what was emitted, and an upper bound of the device's length."""

    request: Request
    stats: Stats
    bound: int
    tokens: list[int] = field(default_factory=list)


class Engine:
    """A target, perhaps a drafter, and the loop. Made by `mlx_mtp.load`.

    depth: drafts per round, "auto" or 0..8. max_context: most tokens of prompt and reply together.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        tokenizer: Tokenizer | None,
        *,
        end_tokens: Collection[int] = (),
        depth: int | str = "auto",
        mode: str = "fast",
        max_context: int | None = None,
    ) -> None:
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.mode = _checked_mode(mode)
        self.depth = _checked_depth(depth, drafter)
        limit = target.info.max_context
        if max_context is not None and not 2 <= max_context <= limit:
            raise OptionError(f"Expected max_context from 2 to {limit} (this model's limit), found {max_context}.")
        self.max_context = max_context or limit
        if drafter is not None:
            drafter.attach(target)
        self._rounds = Rounds(target, drafter)

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        logprobs: int = 0,
        raw: bool = False,
        ignore_end: bool = False,
        on_prefill: PrefillProgress | None = None,
    ) -> Result:
        """The whole reply to a string, a list of messages or a list of token ids; see `stream`."""
        events = self.stream(
            prompt, max_tokens=max_tokens, sampling=sampling, stop=stop, seed=seed, logprobs=logprobs, raw=raw,
            ignore_end=ignore_end, on_prefill=on_prefill,
        )  # fmt: skip
        result = None
        for event in events:
            result = event.result
        assert result is not None
        return result

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        logprobs: int = 0,
        raw: bool = False,
        ignore_end: bool = False,
        on_prefill: PrefillProgress | None = None,
    ) -> Iterator[Event]:
        """Events of a reply as they come; the last one carries the Result.

        raw: continue a string as it stands, without the chat template. ignore_end: go on past ending tokens (for
        timing). on_prefill(done, total) is called after every chunk of the prompt. Greedy decoding needs no seed;
        it is accepted for the sake of programs that always pass one.
        Raises PromptError and OptionError before anything runs.
        """
        if max_tokens < 1:
            raise OptionError(f"Expected max_tokens of at least 1, found {max_tokens}.")
        if logprobs:
            raise OptionError(f"Expected logprobs 0, found {logprobs}; they are not implemented yet.")
        if isinstance(stop, str):
            stop = [stop]
        if any(stop) and self.tokenizer is None:
            raise OptionError("Expected no stop strings, found some; this checkpoint has no tokenizer to compare with.")
        ids = self._checked(prompt_ids(prompt, self.tokenizer, raw))
        budget = min(max_tokens, self.max_context - len(ids))
        ends = frozenset[int]() if ignore_end else self.end_tokens
        return self._events(ids, budget, list(stop), ends, on_prefill)

    def _checked(self, ids: list[int]) -> list[int]:
        vocabulary = self.target.info.vocab_size
        if wrong := [token for token in ids if not 0 <= token < vocabulary]:
            raise PromptError(
                f"Expected token ids from 0 to {vocabulary - 1}, found {wrong[0]}; use this model's own tokenizer."
            )
        if len(ids) >= self.max_context:
            raise PromptError(
                f"Expected a prompt shorter than the context of {self.max_context} tokens, found {len(ids)}; "
                "shorten it or raise --max-context."
            )
        return ids

    def _events(
        self, ids: list[int], budget: int, stop: list[str], ends: Collection[int], on_prefill: PrefillProgress | None
    ) -> Iterator[Event]:
        stats = Stats(prompt_tokens=len(ids), mode=self.mode)
        mx.reset_peak_memory()
        text, stops = [], StopStrings(stop)
        detokenizer = self.tokenizer.stream() if self.tokenizer else None
        tokens: list[int] = []
        finish, began = "length", time.perf_counter()
        for run in self._decode(ids, budget, stats, on_prefill):
            stats.decode_seconds = time.perf_counter() - began - stats.prefill_seconds
            end = next((i for i, token in enumerate(run) if token in ends), None)
            fresh = run[:end]
            tokens += fresh
            stats.tokens = len(tokens)
            shown = ""
            if detokenizer:
                for token in fresh:
                    detokenizer.add_token(token)
                shown = stops.feed(detokenizer.last_segment)
            text.append(shown)
            if fresh or shown:
                yield Event(shown, fresh)
            if end is not None or stops.hit:
                finish = "stop"
                break
        last = ""
        if detokenizer:
            detokenizer.finalize()
            last = stops.feed(detokenizer.last_segment) + stops.flush()
            text.append(last)
        stats.peak_memory_bytes = mx.get_peak_memory()
        yield Event(last, [], Result("".join(text), tokens, None, finish, stats))

    def _decode(
        self, ids: list[int], budget: int, stats: Stats, on_prefill: PrefillProgress | None
    ) -> Iterator[list[int]]:
        """Runs of new tokens, at most `budget` in all: the first from the prefill, then one run a round."""
        began, reader = time.perf_counter(), _Reader(stats)
        request = self._prefill(ids, on_prefill)
        stats.head_passes += 1
        decoding = _Decoding(request, stats, len(ids))
        pending = self._submit(decoding) if budget > 1 else None
        first = reader.rows(request.token if pending is None else pending[1])
        stats.prefill_seconds = time.perf_counter() - began
        yield first
        emitted = 1
        while pending is not None:
            # The round in flight gives at least one token; only if that cannot be the last is another one wanted.
            ahead = self._submit(decoding) if emitted + 1 < budget else None
            *run, accepted = reader.rows(pending[0])
            stats.count(len(run) - 1, accepted)
            decoding.bound -= len(run) - 1 - accepted
            run = run[: min(accepted + 1, budget - emitted)]
            emitted += len(run)
            yield run
            pending = ahead if emitted < budget else None

    def _submit(self, decoding: _Decoding) -> tuple[mx.array, mx.array]:
        """Starts a round; returns its outcome and the token it began with."""
        began_with = decoding.request.token
        self._reserve(decoding.request.cache, decoding.bound + self.depth + 1)
        decoding.bound += self.depth + 1
        outcome = self._rounds.submit(decoding.request, self.depth)
        stats = decoding.stats
        stats.rounds += 1
        stats.head_passes += 1
        stats.depth_counts[self.depth] = stats.depth_counts.get(self.depth, 0) + 1
        return outcome, began_with

    @staticmethod
    def _reserve(cache: KVCache, rows: int) -> None:
        if rows > cache.capacity:
            cache.grow(capacity_for(rows))

    def _prefill(self, ids: list[int], on_prefill: PrefillProgress | None) -> Request:
        """Runs the prompt in chunks that bound memory; leaves the first new token on the device."""
        target, drafter = self.target, self.drafter
        cache = target.new_cache(capacity_for(len(ids) + self.depth + 1))
        memory = drafter.start(1, cache.capacity) if drafter else {}
        score_bytes = 4 * target.info.attention_heads * cache.capacity
        chunk = max(MIN_CHUNK, min(MAX_CHUNK, CHUNK_BYTES // score_bytes))
        states = States(mx.zeros((1, 0, 0)))
        for start in range(0, len(ids), chunk):
            rows = mx.array([ids[start : start + chunk]], dtype=mx.int32)
            final = start + chunk >= len(ids)
            wants_all = drafter is not None and drafter.reads_prompt
            states = target.forward(rows, cache, None if wants_all else int(final))
            if drafter is not None and wants_all:
                memory = drafter.observe(memory, rows, states, mx.array([rows.shape[1] - 1]))
            cache.advance(rows.shape[1])
            mx.eval(cache.arrays, memory)
            if on_prefill:
                on_prefill(min(start + chunk, len(ids)), len(ids))
        hidden = states.hidden[:, -1:]
        token = mx.argmax(target.head(hidden), axis=-1).astype(mx.int32)
        return Request(token, hidden, cache, memory)


def _checked_mode(mode: str) -> str:
    if mode != "fast":
        raise OptionError(f"Expected mode 'fast', found {mode!r}; no other mode is implemented yet.")
    return mode


def _checked_depth(depth: int | str, drafter: Drafter | None) -> int:
    """Drafts per round; a fixed number until the controller of step 2 is there. Without a drafter 0."""
    deepest = 8 if drafter is None else drafter.max_depth
    if depth != "auto" and (not isinstance(depth, int) or not 0 <= depth <= deepest):
        raise OptionError(f"Expected depth 'auto' or 0 to {deepest}, found {depth!r}.")
    if drafter is None:
        return 0
    if depth != "auto":
        return int(depth)
    return min(AUTO_DEPTH_CPU if mx.default_device() == mx.Device(mx.cpu) else AUTO_DEPTH_GPU, deepest)
