"""Seconds of the pieces of a round: passes and rounds evaluated alone, and rounds in a pipeline as in a reply."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.exactness import TargetPass
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.generation.loop import Decoder, GenerationRequest
from mlx_mtp.generation.types import NEUTRAL, Sampling

WARM = 3  # computations before those that are timed


@dataclass(frozen=True)
class PieceTime:
    """Seconds of one computation, each a median.

    build: Python makes the graph. submit: MLX takes it; where its queue is full, the wait for the device is in it.
    device: from submitting to the last value. scatter: the middle half of the device's times spans this share of it.
    """

    build: float
    submit: float
    device: float
    scatter: float

    @classmethod
    def of(cls, times: Sequence[tuple[float, float, float]]) -> PieceTime:
        """From (build, submit, device) of each repeat, two at least."""
        builds, submits, devices = zip(*times, strict=True)
        low, middle, high = statistics.quantiles(devices, n=4)
        return cls(statistics.median(builds), statistics.median(submits), middle, (high - low) / middle)


def timed_in_turns(builds: Sequence[Callable[[], Any]], repeats: int) -> list[PieceTime]:
    """Times computations, whose arrays the builds return; in turns, so that a slow minute falls on all of them."""
    times: list[list[tuple[float, float, float]]] = [[] for _ in builds]
    for _ in range(repeats + WARM):
        for build, found in zip(builds, times, strict=True):
            began = time.perf_counter()
            arrays = build()
            built = time.perf_counter()
            mx.async_eval(arrays)
            submitted = time.perf_counter()
            mx.eval(arrays)
            found.append((built - began, submitted - built, time.perf_counter() - built))
    return [PieceTime.of(found[WARM:]) for found in times]


class Passes:
    """Passes of the target, head and best tokens included; each is compiled once per width and size of the cache."""

    def __init__(self, target: Target) -> None:
        self._decoder, self._pass = Decoder(target, None, FixedDepth(0)), TargetPass(target)

    def alone(self, prompt: list[int], widths: Sequence[int], repeats: int) -> list[PieceTime]:
        """Passes of so many tokens after a prompt, each evaluated alone."""
        cache = self._decoder.prefill(GenerationRequest(ids=prompt, budget=1), max(widths)).cache

        def of(width: int) -> Callable[[], Any]:
            tokens = mx.array([(prompt * width)[-width:]])
            return lambda: (mx.argmax(self._pass(tokens, cache)[1], axis=-1), cache.arrays)

        return timed_in_turns([of(width) for width in widths], repeats)


def rounds_alone(
    decoder: Decoder, prompt: list[int], depths: Sequence[int], repeats: int, sampling: Sampling = NEUTRAL
) -> list[PieceTime]:
    """Whole rounds of so many drafts after a prompt, each evaluated before the next is built."""
    room = (repeats + WARM) * sum(depth + 1 for depth in depths)
    state = decoder.prefill(GenerationRequest(ids=prompt, budget=room, sampling=sampling), room)
    decoder.rounds.first(state)

    def of(depth: int) -> Callable[[], Any]:
        return lambda: (decoder.rounds.build(state, depth).tokens, state.tree)

    return timed_in_turns([of(depth) for depth in depths], repeats)


def pipelined_rounds(
    decoder: Decoder, prompt: list[int], depths: Sequence[int], repeats: int, sampling: Sampling = NEUTRAL,
    middle: Callable[[Sequence[float]], float] = min,
) -> dict[int, float]:  # fmt: skip
    """Seconds of a round of each depth, one after the other after a prompt, while the next one is in flight.

    middle: which of the times counts; the fastest, for whatever else runs only ever makes a round slower.
    """
    room = (repeats + 4) * sum(depth + 1 for depth in depths)  # nothing makes room between these rounds
    state = decoder.prefill(GenerationRequest(ids=prompt, budget=room, sampling=sampling), room)
    decoder.rounds.first(state)
    found = {}
    for depth in depths:
        mx.eval([decoder.rounds.submit(state, depth).tokens for _ in range(2)])
        times, pending, began = [], decoder.rounds.submit(state, depth), time.perf_counter()
        for _ in range(repeats):
            ahead = decoder.rounds.submit(state, depth)
            mx.eval(pending.tokens)
            now = time.perf_counter()
            times.append(now - began)
            pending, began = ahead, now
        mx.eval(pending.tokens)
        found[depth] = middle(times)
    return found
