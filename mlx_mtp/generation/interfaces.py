"""What the loop knows of a target and of a drafter, and nothing else.

Shape legend, used in every file:
    B batch   M rows of one pass (= K + 1)   K drafts (the depth)   D hidden   V vocabulary   N some of its tokens
    S slots of a K/V buffer   G K/V heads   H query heads   d head size   P committed length
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.generation.cache import KVCache, LayerShape
from mlx_mtp.generation.sampling import Forced


@dataclass(frozen=True)
class States:
    """What a forward pass leaves per row: hidden [B, M, D] after the final norm; row i is the state after token i.

    aux: the residual stream in front of decoder layers, each [B, M, D]. `forward` gives that of every layer, in order,
    or none where the target has none to give; a drafter hears of those it asked for (`Drafter.aux_layers`). Lazy:
    nobody computes or keeps what nobody reads.
    """

    hidden: mx.array
    aux: tuple[mx.array, ...] = ()

    def first(self, rows: int) -> States:
        """The same of the first `rows` rows."""
        return States(self.hidden[:, :rows], tuple(state[:, :rows] for state in self.aux))

    def last(self, rows: int = 1) -> States:
        """The same of the last `rows` rows, which may be none."""
        hidden, *aux = (state[:, state.shape[1] - rows :] for state in (self.hidden, *self.aux))
        return States(hidden, tuple(aux))

    def of_layers(self, layers: Sequence[int]) -> States:
        """The same with the residual stream in front of these layers alone; negative numbers count from the end."""
        return States(self.hidden, tuple(self.aux[layer] for layer in layers))


@dataclass(frozen=True, kw_only=True)
class TargetInfo:
    """Sizes a drafter is checked against, and where it may read K/V.

    readable[kind] is the shape of the K/V a drafter may read, storing_layers[kind] its index in the cache; both are
    empty where a target's K/V is its own affair. window: of the sliding layers, 1 where there are none.
    """

    vocab_size: int
    hidden_size: int
    max_context: int
    window: int
    readable: Mapping[str, LayerShape]
    storing_layers: Mapping[str, int]
    attention_heads: int


class Target(Protocol):
    """A model that answers. `forward` writes after the cache's length and never moves it: committing is the loop's."""

    info: TargetInfo
    path: Path | None = None  # local folder of the checkpoint
    model: Any = None  # the module that holds its weights, where it is one
    # What its layers store, and the type of it.
    shapes: Sequence[LayerShape] = ()
    dtype: mx.Dtype = mx.float32

    def modules(self) -> Sequence[nn.Module]:
        """The modules that hold its weights; for reports."""
        return () if self.model is None else (self.model,)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for `capacity` positions."""
        return KVCache(self.shapes, self.info.window, capacity, self.dtype, batch)

    @abstractmethod
    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [B, M] -> [B, M, D]."""

    @abstractmethod
    def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
        """Tokens [B, M] after the length; `keep` = last rows whose state is wanted (None all, 0 none)."""

    @abstractmethod
    def head(self, hidden: mx.array) -> mx.array:
        """Hidden [B, M, D] -> float32 logits [B, M, V]."""

    def head_on(self, tokens: mx.array) -> Callable[[mx.array], mx.array]:
        """The head of `tokens` int32 [N] alone: hidden [B, M, D] -> float32 logits [B, M, N]; at best at N / V of the
        whole's cost."""
        return lambda hidden: self.head(hidden)[..., tokens]

    @abstractmethod
    def logits(self, tokens: mx.array) -> mx.array:
        """Tokens [B, M] -> float32 logits [B, M, V], without a cache."""


# A drafter's own memory between rounds: any tree of arrays ({} for families without any). It travels through the
# compiled round beside the cache, so a family never keeps device state anywhere else.
Memory = dict[str, Any]


class SampleDraft(Protocol):
    """Picks a draft from scores: greedily or by the request's sampling; made anew for each round."""

    def __call__(self, logits: mx.array, tokens: mx.array | None = None, forced: Forced | None = None) -> mx.array:
        """The next draft [B, 1] from logits [B, 1, N] of `tokens` (None = the whole vocabulary)."""

    def point_mass(self, tokens: mx.array) -> mx.array:
        """Drafts [B, K] proposed without scores."""


class Drafter(Protocol):
    """A family of draft heads. It may read the target's cache, never write it.

    The defaults are those of one that knows nothing but the target's K/V: no weights of its own, no memory, and nothing
    to hear of what was accepted.
    """

    name: str = "drafter"  # in messages; the checkpoint's folder where there is one
    model: Any = None  # the module that holds weights of its own, where it is one
    max_depth: int = 8
    # Whether `observe` must hear the prompt too, and whether it needs the states of it; others save that work.
    reads_prompt: bool = False
    reads_states: bool = False
    # The decoder layers in front of which it reads the residual stream too (States.aux); the last is -1.
    aux_layers: Sequence[int] = ()

    def attach(self, target: Target) -> None:
        """Binds the drafter to the target it will read; raises IncompatibleDrafter where the two differ."""
        return None

    def modules(self) -> Sequence[nn.Module]:
        """The modules that hold weights of its own, the target's not among them; for reports."""
        return () if self.model is None else (self.model,)

    def quantise_head(self, bits: int) -> bool:
        """Stores the family's own output head in `bits` bits; False where it has no dense one."""
        return False

    def start(self, batch: int, capacity: int) -> Memory:
        """Memory of a new request."""
        return {}

    def grow(self, memory: Memory, capacity: int) -> Memory:
        """The same memory with room for `capacity` positions."""
        return memory

    def expect(self, memory: Memory, tokens: mx.array) -> Memory:
        """What the caller expects of the reply, tokens [B, E], in place of what was expected before."""
        return memory

    @abstractmethod
    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        """Proposes K = depth tokens [B, K] after `token` [B, 1], the one that is not in the cache yet.

        hidden [B, 1, D] is the target's state that produced `token`. Every draft is picked by `sample`, which keeps
        what acceptance needs to know. Lazy: no value may be read.
        """

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        """Hears what a pass over tokens [B, M] left; the first `accepted` + 1 rows are true, the rest is dead.

        Of the prompt there are fewer states than tokens unless the family reads_states.
        """
        return memory

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        """The same memory as it was when `length` rows were committed, for the next turn of a conversation.

        states: of the last of these rows, [B, 1, D], for a family that reads_states; else None.
        """
        return memory
