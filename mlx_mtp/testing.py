"""Public fakes for tests of engines and drafters."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp.cache import KVCache
from mlx_mtp.interfaces import Memory, States, Target


class ScriptedDrafter:
    """Proposes what a script says follows: script[i] is the proposal for absolute position i (0 beyond its end).

    With prompt + the target's own continuation as script every draft stands; with any other tokens none does.
    """

    max_depth = 8
    reads_prompt = False

    def __init__(self, script: Sequence[int]) -> None:
        self._script = mx.array([*script, *[0] * 64], dtype=mx.int32)

    def attach(self, target: Target) -> None:
        """Fits every target."""

    def start(self, batch: int, capacity: int) -> Memory:
        """Nothing to remember."""
        return {}

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int
    ) -> tuple[mx.array, Memory]:
        """The script's tokens behind `token`, whose position is the committed length."""
        places = cache.length[:, None] + 1 + mx.arange(depth, dtype=mx.int32)
        return self._script[mx.minimum(places, self._script.size - 1)], memory

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        """Nothing to remember."""
        return memory
