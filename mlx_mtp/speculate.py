"""One round: draft, verify, accept, commit. Names no model and no drafter family.

What it does: builds the round as one lazy graph (compiled once per depth and capacity) and submits it without
waiting. What it does not do: read a value, stop, or know text.

Invariant: whatever the round wrote behind the committed length is dead; committing is `length += accepted + 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_mtp.cache import KVCache
from mlx_mtp.interfaces import Drafter, Memory, Target
from mlx_mtp.verify import greedy


@dataclass
class Request:
    """The device state of one request.

    token [B, 1] is the newest token, whose K/V is not in the cache yet; hidden [B, 1, D] the state that produced it.
    """

    token: mx.array
    hidden: mx.array
    cache: KVCache
    memory: Memory


class Rounds:
    """Rounds for one pair. Stateless but for the compiled functions, so that requests may take turns."""

    def __init__(self, target: Target, drafter: Drafter | None) -> None:
        self._target = target
        self._drafter = drafter
        self._compiled: dict[tuple[int, int], Callable[..., Any]] = {}

    def submit(self, request: Request, depth: int) -> mx.array:
        """Starts a round on the device and moves `request` behind it.

        Returns int32 [B, M + 1]: the M tokens of the round and, last, how many of the K drafts stand. Reading it
        is the only wait there is, and the caller may submit the next round first.
        """
        key = (depth, request.cache.capacity)
        if key not in self._compiled:
            self._compiled[key] = mx.compile(self._round(request.cache, depth))
        token, hidden, arrays, memory, outcome = self._compiled[key](
            request.token, request.hidden, request.cache.arrays, request.memory
        )
        request.token, request.hidden, request.cache.arrays, request.memory = token, hidden, arrays, memory
        mx.async_eval(outcome, token, hidden, arrays, memory)
        return outcome

    def _round(self, layout: KVCache, depth: int) -> Callable[..., Any]:
        """The round as a pure function of arrays, for one cache layout and one depth."""
        target, drafter = self._target, self._drafter

        def one_round(token: mx.array, hidden: mx.array, arrays: Any, memory: Memory) -> tuple[Any, ...]:
            cache = layout.around(arrays)
            rows, drafts = token, None
            if drafter is not None and depth:
                drafts, memory = drafter.draft(memory, token, hidden, cache, depth)
                rows = mx.concatenate([token, drafts], axis=1)
            states = target.forward(rows, cache)
            verdict = greedy(drafts, target.head(states.hidden))
            if drafter is not None:
                memory = drafter.observe(memory, rows, states, verdict.accepted)
            cache.advance(verdict.accepted + 1)
            hidden = mx.take_along_axis(states.hidden, verdict.accepted[:, None, None], axis=1)
            outcome = mx.concatenate([verdict.tokens, verdict.accepted[:, None]], axis=1)
            return verdict.last, hidden, cache.arrays, memory, outcome

        return one_round
