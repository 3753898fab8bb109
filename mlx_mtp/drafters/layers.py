"""Transformer layers that a drafter has of its own, of any architecture mlx-lm knows, each with its own K/V.

What it does: builds decoder layers from an mlx-lm config, runs them behind K/V buffers whose length lives on the
device, or over whole sequences in training. What it does not do: know a drafter family, or choose tokens.

Invariant: as in cache.py, rows at or beyond the length are dead, so rolling back is a smaller length. Row r of a layer
belongs to the token at position r and is fed the state of the row before it; so the first rows of a sequence, which
have no row before them, are never seen by any other (`first` below).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.cache import FULL, KVCache, LayerShape, Pass
from mlx_mtp.errors import CheckpointError, IncompatibleDrafter
from mlx_mtp.interfaces import Target


def build_layers(block: Mapping[str, Any], count: int) -> list[nn.Module]:
    """`count` fresh decoder layers of the architecture that an mlx-lm config.json describes.

    Raises CheckpointError where mlx-lm knows no such architecture or a field is missing.
    """
    # Public in all but name: mlx-lm has no other way from a config to a class.
    from mlx_lm.utils import _get_classes  # type: ignore[attr-defined]

    config = {**block, "num_hidden_layers": count, "layer_types": None}
    try:
        model_class, args_class = _get_classes(config)
        # The embedding of the throw-away model is never evaluated, so it costs nothing.
        layers: list[nn.Module] = list(model_class(args_class.from_dict(config)).layers)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"config.json: expected in 'block' the config of layers that mlx-lm can build, found {error}; "
            "use the config.json that belongs to this drafter."
        ) from error
    return layers


class _LayerView:
    """One layer's K/V for one pass, in the form in which mlx-lm's layers ask for a cache."""

    def __init__(self, cache: KVCache, layer: int, step: Pass) -> None:
        self._cache, self._layer, self._step = cache, layer, step
        self.offset = step.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Writes the new rows; everything the pass may attend to."""
        return self._cache.update(self._layer, keys, values, self._step)


class _Recorder:
    """Stands in for a cache once, to see the shapes of keys and values."""

    offset = 0
    keys: mx.array
    values: mx.array

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Notes the rows and gives them back."""
        self.keys, self.values = keys, values
        return keys, values


class OwnLayers:
    """The layers of one drafter and the memory of their K/V.

    first[i]: rows before this one are no rows of layer i, and are masked. The memory is a tree of arrays
    (length [B], keys, values), to be kept in the drafter's Memory.
    """

    def __init__(self, layers: Sequence[nn.Module], width: int, dtype: mx.Dtype, first: Sequence[int]) -> None:
        self._layers, self._first, self._dtype = layers, first, dtype
        self._shapes = [_shape(layer, width, dtype) for layer in layers]

    def start(self, batch: int, capacity: int) -> Any:
        """The memory of a new request."""
        return KVCache(self._shapes, 0, capacity, self._dtype, batch).arrays

    def grow(self, memory: Any, capacity: int) -> Any:
        """The same memory with room for `capacity` rows."""
        cache = self.open(memory)
        cache.grow(capacity)
        return cache.arrays

    def open(self, memory: Any) -> KVCache:
        """The memory as a cache; `arrays` of it is the memory again."""
        layout = KVCache(self._shapes, 0, 0, self._dtype)
        _, keys, _ = memory
        layout.capacity, layout.batch = keys[0].shape[2], keys[0].shape[0]
        return layout.around(memory)

    def run(self, layer: int, x: mx.array, cache: KVCache, ahead: int = 0) -> mx.array:
        """Layer i over rows x [B, M, D] that stand `ahead` rows behind the cache's length -> [B, M, D]."""
        behind = copy.copy(cache)
        behind.length = cache.length + ahead
        step = behind.begin(x.shape[1])
        slots = mx.arange(cache.capacity, dtype=mx.int32)
        itself = slots == step.slots[FULL][:, None, :, None]
        mask = step.masks[FULL] & ((slots >= self._first[layer]) | itself)
        out: mx.array = self._layers[layer](x, mask, _LayerView(cache, layer, step))
        return out


def _shape(layer: nn.Module, width: int, dtype: mx.Dtype) -> LayerShape:
    seen = _Recorder()
    layer(mx.zeros((1, 1, width), dtype=dtype), None, seen)
    return LayerShape(FULL, seen.keys.shape[1], seen.keys.shape[3])


def check_sizes(name: str, hidden_size: int, vocab_size: int, target: Target) -> None:
    """Raises IncompatibleDrafter unless a drafter's sizes are its target's."""
    pairs = (("hidden size", hidden_size, target.info.hidden_size), ("vocabulary", vocab_size, target.info.vocab_size))
    for what, found, expected in pairs:
        if found != expected:
            raise IncompatibleDrafter(
                f"{name} does not fit the target: expected {what} {expected} as in the target, found {found}; "
                "use the drafter made for this target."
            )
