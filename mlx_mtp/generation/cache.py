"""K/V buffers of fixed capacity whose length lives on the device, and masks that say which rows a query may see.

Invariant: a row at a position >= `length` is dead. Accepting n rows is `length += n`, rolling back is a smaller
`length`; nothing is ever copied or cleared. Full layers keep every position. Sliding layers are rings of
`window + slack` slots: the slot of position p is p mod size, so writing up to `slack` rows ahead only overwrites
rows that have already left the window, and any rollback by at most `slack` rows (less the rows of the next pass)
finds its window intact.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import mlx.core as mx

from mlx_mtp.errors import UnsupportedModel

FULL = "full_attention"
SLIDING = "sliding_attention"

# Rows a pass may write ahead of the committed length in a sliding layer. Two rounds of depth 8 in flight are 18.
SLACK = 32
# Steps of the capacity ladder: small enough to waste little attention, few enough that compiled shapes repeat.
CAPACITY_STEP = 256


@dataclass(frozen=True)
class LayerShape:
    """One layer that stores K/V: its kind (FULL or SLIDING), K/V heads G and head size d.

    value_dim: the size of the values where it is not that of the keys, as in multi-head latent attention.
    """

    kind: str
    heads: int
    head_dim: int
    value_dim: int | None = None


@dataclass
class AttentionPlan:
    """What one forward pass of M rows needs to know: where its rows are, and what each of them may see.

    offset [B] is the position of the first row; masks[kind] is bool [B, 1, M, S] (true = visible).
    """

    offset: mx.array
    masks: dict[str, mx.array]
    slots: dict[str, mx.array]
    ring_in_place: bool = True

    def last(self, rows: int) -> AttentionPlan:
        """The same pass seen from its last `rows` queries; for layers that only read."""
        total = next(iter(self.masks.values())).shape[2]
        masks = {kind: mask[:, :, total - rows :] for kind, mask in self.masks.items()}
        return AttentionPlan(self.offset + (total - rows), masks, self.slots, self.ring_in_place)


def capacity_for(rows: int) -> int:
    """The rung of the capacity ladder that holds `rows`: steps of 256, later of a quarter of the size."""
    capacity = CAPACITY_STEP
    while capacity < rows:
        capacity += max(CAPACITY_STEP, capacity // 4 // CAPACITY_STEP * CAPACITY_STEP)
    return capacity


def _mask(positions: mx.array, queries: mx.array, window: int | None) -> mx.array:
    """Visible = not in the future, and in a window (which counts the query itself) inside it and ever written."""
    keys, rows = positions[:, None, None, :], queries[:, None, :, None]
    return keys <= rows if window is None else (keys <= rows) & (keys > rows - window) & (keys >= 0)


class KVCache:
    """K/V buffers [B, G, S, d] of every storing layer, and the committed length [B] on the device.

    slack: rows that a pass may write ahead in a sliding layer; as many as the capacity, and nothing is ever forgotten.
    newest: the furthest row that was or will be written, for the loop, which knows it without asking the device.
    """

    def __init__(
        self, shapes: Sequence[LayerShape], window: int, capacity: int, dtype: mx.Dtype, batch: int = 1,
        slack: int = SLACK,
    ) -> None:  # fmt: skip
        self.shapes, self.window, self.slack = tuple(shapes), window, slack
        self.capacity, self.batch, self.newest = capacity, batch, -1
        self.length = mx.zeros((batch,), dtype=mx.int32)
        sizes = [(batch, s.heads, self.slots(s.kind)) for s in self.shapes]
        widths = [s.head_dim if s.value_dim is None else s.value_dim for s in self.shapes]
        self.keys = [mx.zeros((*size, s.head_dim), dtype=dtype) for size, s in zip(sizes, self.shapes, strict=True)]
        self.values = [mx.zeros((*size, width), dtype=dtype) for size, width in zip(sizes, widths, strict=True)]

    def slots(self, kind: str) -> int:
        """Slots of a buffer of this kind. A ring smaller than its window is never wrapped: it is plain storage."""
        return self.capacity if kind == FULL else min(self.capacity, self.window + self.slack)

    def grow(self, capacity: int) -> None:
        """Enlarges the buffers (never shrinks them); what is stored keeps its slot."""
        self.capacity = max(self.capacity, capacity)
        for buffers in (self.keys, self.values):
            for i, shape in enumerate(self.shapes):
                missing = self.slots(shape.kind) - buffers[i].shape[2]
                if missing > 0:
                    buffers[i] = mx.pad(buffers[i], [(0, 0), (0, 0), (0, missing), (0, 0)])

    def positions(self, kind: str, end: mx.array) -> mx.array:
        """Absolute position [B, S] of every slot once positions below `end` [B] are written; negative = empty."""
        slots = mx.arange(self.slots(kind), dtype=mx.int32)[None]
        if kind == FULL:
            return mx.broadcast_to(slots, (self.batch, slots.shape[1]))
        newest = end[:, None] - 1
        return newest - (newest - slots) % self.slots(kind)

    def plan(self, rows: int) -> AttentionPlan:
        """Opens a pass of `rows` rows at the committed length. The capacity must already hold them."""
        queries = self.length[:, None] + mx.arange(rows, dtype=mx.int32)
        ring = self.slots(SLIDING)
        # Within the slack (or before a ring is long enough to wrap) rows are written first and then read in place.
        # A longer chunk would overwrite rows its own first queries still see: it reads [ring, chunk] and writes after.
        in_place = rows <= self.slack or ring == self.capacity
        step = AttentionPlan(self.length, {}, {}, in_place)
        for kind in {shape.kind for shape in self.shapes}:
            sliding = kind == SLIDING
            step.slots[kind] = queries % ring if sliding else queries
            positions = self.positions(kind, self.length + (rows if in_place else 0))
            if sliding and not in_place:
                positions = mx.concatenate([positions, queries], axis=1)
            step.masks[kind] = _mask(positions, queries, self.window if sliding else None)
        return step

    def update(self, layer: int, keys: mx.array, values: mx.array, step: AttentionPlan) -> tuple[mx.array, mx.array]:
        """Writes rows [B, G, M, d] of one layer; returns the K/V that this pass attends to, as step.masks sees it."""
        kind, working = self.shapes[layer].kind, None
        slots = step.slots[kind]
        if kind == SLIDING and not step.ring_in_place:
            working = (mx.concatenate([self.keys[layer], keys], axis=2),
                       mx.concatenate([self.values[layer], values], axis=2))  # fmt: skip
            kept = min(keys.shape[2], self.slots(kind))  # only the newest rows; slots must not repeat in one write
            slots, keys, values = slots[:, -kept:], keys[:, :, -kept:], values[:, :, -kept:]
        contiguous = kind == FULL and self.batch == 1
        self.keys[layer] = _write(self.keys[layer], keys, slots, contiguous)
        self.values[layer] = _write(self.values[layer], values, slots, contiguous)
        return working or (self.keys[layer], self.values[layer])

    def visible(self, kind: str, newest: mx.array, span: int | None = None) -> mx.array:
        """Mask [B, 1, 1, S] of the stored rows at positions (newest - span, newest]; for readers that never write."""
        positions = self.positions(kind, self.length)
        mask = (positions <= newest[:, None]) & (positions >= 0)
        if span is not None:
            mask = mask & (positions > newest[:, None] - span)
        return mask[:, None, None, :]

    def recent(self, layer: int, rows: int) -> tuple[mx.array, mx.array, mx.array]:
        """The last `rows` committed rows of a full layer: K/V [B, G, rows, d] and which of them exist [B, 1, 1, rows].

        Copies them, so it is for readers that read them several times. In a batch the longest sequence decides.
        """
        start = mx.maximum(self.length.max() - rows, 0)
        shape = [*self.keys[layer].shape[:2], rows]
        keys, values = (
            mx.slice(buffer[layer], start, (2,), (*shape, buffer[layer].shape[3]))
            for buffer in (self.keys, self.values)
        )
        seen = start + mx.arange(rows, dtype=mx.int32) < self.length[:, None]
        return keys, values, seen[:, None, None, :]

    def advance(self, rows: mx.array | int) -> None:
        """Commits `rows` (int or [B]) of what was written after the length."""
        self.length = self.length + rows

    @property
    def arrays(self) -> tuple[mx.array, list[mx.array], list[mx.array]]:
        """Everything that changes, as one tree: for mx.compile and mx.eval."""
        return self.length, self.keys, self.values

    @arrays.setter
    def arrays(self, tree: tuple[mx.array, list[mx.array], list[mx.array]]) -> None:
        self.length, keys, values = tree
        self.keys, self.values = list(keys), list(values)

    def layout(self) -> Self:
        """The sizes as they are now and no arrays, for `around`: keeps no buffer alive and does not grow."""
        other = copy.copy(self)
        other.length, other.keys, other.values = mx.array(0), [], []
        return other

    def around(self, tree: tuple[mx.array, list[mx.array], list[mx.array]]) -> Self:
        """A cache of the same layout around other arrays; for code that mx.compile traces."""
        other = copy.copy(self)
        other.arrays = tree
        return other


class LayerView:
    """One layer of a cache during one pass, in the form in which mlx-lm's layers ask for theirs."""

    def __init__(self, cache: KVCache, layer: int, step: AttentionPlan) -> None:
        self._cache, self._layer, self._step = cache, layer, step
        self.offset = step.offset  # [B], on the device: a Python number would be frozen by mx.compile
        self._seen: tuple[mx.array, mx.array] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes rows [B, G, M, d] after the length; returns the buffers [B, G, S, d] that the masks speak of."""
        self.offset = self.offset + keys.shape[2]  # as mlx-lm's caches do; the committed length stays
        self._seen = self._cache.update(self._layer, keys, values, self._step)
        return self._seen

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """What this pass's `update_and_fetch` gave; for layers that read another layer's K/V."""
        assert self._seen is not None, "a layer read K/V that this pass has not written"
        return self._seen

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        """Mask [B, 1, M, S] of what each row may see; always an array, as the buffers are longer than what they hold.

        mlx-lm's windows, like ours, count the row itself.
        """
        kind = self._cache.shapes[self._layer].kind
        mask = self._step.masks[kind]
        if window_size is None or (kind == SLIDING and window_size == self._cache.window):
            return mask
        if kind == SLIDING:
            raise UnsupportedModel(
                f"Layer {self._layer} of this model keeps a window of {self._cache.window} tokens and attends to "
                f"one of {window_size}, which is not implemented; use another model."
            )
        rows, slots = self._step.slots[FULL], mx.arange(mask.shape[-1], dtype=mx.int32)
        return mask & (slots > rows[:, None, :, None] - window_size)


class NoCache:
    """Stands in for a KVCache where nothing is kept: training, and logits of a whole sequence."""

    def __init__(self, window: int, batch: int = 1) -> None:
        self.window, self.batch = window, batch

    def plan(self, rows: int) -> AttentionPlan:
        """A pass over positions 0..rows-1."""
        positions = mx.arange(rows, dtype=mx.int32)[None]
        masks = {FULL: _mask(positions, positions, None), SLIDING: _mask(positions, positions, self.window)}
        return AttentionPlan(mx.zeros((self.batch,), dtype=mx.int32), masks, {})

    def update(self, layer: int, keys: mx.array, values: mx.array, step: AttentionPlan) -> tuple[mx.array, mx.array]:
        """The rows themselves: the pass sees itself and nothing else."""
        return keys, values


def _write(buffer: mx.array, rows: mx.array, slots: mx.array, contiguous: bool) -> mx.array:
    """Puts rows [B, G, M, d] into slots [B, M]. In place where nothing else holds the buffer (measured, MLX 0.32.4)."""
    if contiguous:
        return mx.slice_update(buffer, rows, slots[0, :1], axes=(2,))
    if buffer.shape[0] == 1:
        buffer[:, :, slots[0]] = rows
    else:
        buffer[mx.arange(buffer.shape[0])[:, None], :, slots] = rows.transpose(0, 2, 1, 3)
    return buffer
