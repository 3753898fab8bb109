"""Transformer layers that a drafter has of its own, of any architecture mlx-lm knows, each with its own K/V.

Decoder layers are built from an mlx-lm config and run over K/V buffers whose length lives on the device, or over whole
sequences in training.

Invariant: as in generation/cache.py, rows at or beyond the length are dead, so rolling back is a smaller length. Row r
of a layer belongs to the token at position r and is fed the state of the row before it; so the first rows of a
sequence, which have no row before them, are never seen by any other (`first` below). Layers attend to all rows before;
a window that their config names is not kept.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.checkpoint import Checkpoint, compute_dtype, load_into, misfit, number, section
from mlx_mtp.drafters.shortlist import with_shortlist
from mlx_mtp.errors import IncompatibleDrafter, brief
from mlx_mtp.generation.cache import FULL, KVCache, LayerShape, LayerView
from mlx_mtp.generation.interfaces import Drafter, Memory, SampleDraft, Target


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """The config.json of a drafter with layers of its own.

    count: of its parts, each with one layer. reads: which of the target's states. block: an mlx-lm config of one layer.
    shortlist: tokens of it, 0 for none.
    """

    count: int
    reads: str
    hidden_size: int
    vocab_size: int
    norm_eps: float
    block: Mapping[str, Any]
    shortlist: int = 0


class LayersModel(nn.Module):
    """The parameters of such a drafter.

    counted: what config.json calls the number of its parts, and the most of them. states: those that it may read.
    default: the one that it reads where config.json does not say.
    """

    counted: tuple[str, int]
    states: Sequence[str]
    default: str | None = None

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.config = config
        if config.shortlist:  # room for ids, which nothing learns
            self.shortlist = mx.arange(config.shortlist, dtype=mx.int32)
            self.freeze(recurse=False, keys=["shortlist"])

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Fresh parameters for a config.json; CheckpointError where a field is missing or makes no sense."""
        block, reads = section(config, "block"), config.get("reads", cls.default)
        if reads not in cls.states:
            raise misfit(f"'reads' to be one of {', '.join(cls.states)}", repr(reads))
        name, most = cls.counted
        return cls(LayersConfig(
            count=number(config, name, int, 1, most), reads=reads, block=block,
            hidden_size=number(config, "hidden_size", int, 1, 1 << 20),
            vocab_size=number(config, "vocab_size", int, 2, 1 << 24),
            norm_eps=number(block, "rms_norm_eps", float, 1e-30, 1.0, 1e-6),
            shortlist=number(config, "shortlist", int, 0, 1 << 24, 0),
        ))  # fmt: skip


def build_layers(block: Mapping[str, Any], count: int, width: int) -> list[nn.Module]:
    """`count` fresh decoder layers over states of `width` numbers, of the architecture an mlx-lm config describes.

    Raises CheckpointError where mlx-lm cannot build such layers or they do not run.
    """
    # Public in all but name: mlx-lm has no other way from a config to a class.
    from mlx_lm.utils import _get_classes

    config = {"vocab_size": 1, **block, "num_hidden_layers": count, "layer_types": None}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model_class, args_class = _get_classes(config)
        # The rest of the throw-away model is never evaluated, so it costs nothing.
        layers: list[nn.Module] = list(model_class(args_class.from_dict(config)).layers)
        found = layers[0](mx.zeros((1, 1, width)), None, ChainedRows(1)).shape
        if len(layers) != count or found != (1, 1, width):
            raise ValueError(f"{len(layers)} layers with results of shape {found}")
    # Another project's code on any config.json raises anything, and one of its models prints and exits.
    except (Exception, SystemExit) as error:
        wanted = f"in 'block' an mlx-lm config of decoder layers for states of {width} numbers"
        raise misfit(wanted, f"one that mlx-lm cannot run ({brief(error)})") from error
    return layers


def same_chat(start: mx.array) -> mx.array:
    """Which rows are of one chat, bool [B, 1, T, T], by where the chat of every row begins, [B, T]."""
    return start[:, None, :, None] == start[:, None, None, :]


class ChainedRows:
    """K/V of one layer over whole sequences in training, in the form in which mlx-lm's layers ask for a cache.

    The layer may run several times, each time on its own last results, as when the last module of a chain drafts
    again and again: row t of pass j is then the j-th token after place t. It sees what it would see in decoding:
    of the first pass the rows up to t, and of the later ones only its own chain's. start [B, T]: where the chat of
    every row begins, as rows of different chats do not see each other; None for one text a sequence.
    """

    def __init__(self, rows: int, start: mx.array | None = None) -> None:
        self.offset = 0
        self._causal = mx.tri(rows, dtype=mx.bool_)
        if start is not None:
            self._causal = self._causal & same_chat(start)
        self._itself = mx.broadcast_to(mx.eye(rows, dtype=mx.bool_), self._causal.shape)
        self._keys: list[mx.array] = []
        self._values: list[mx.array] = []

    @property
    def mask(self) -> mx.array:
        """What the rows of the next pass may see, bool [T, (j + 1) T] in pass j, with `start` [B, 1, T, (j + 1) T]."""
        return mx.concatenate([self._causal] + [self._itself] * len(self._keys), axis=-1)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Adds the K/V [B, G, T, d] of a pass; those of all passes [B, G, (j + 1) T, d]."""
        self.offset += 1
        self._keys.append(keys)
        self._values.append(values)
        return mx.concatenate(self._keys, axis=2), mx.concatenate(self._values, axis=2)

    @property
    def shape(self) -> LayerShape:
        """What the layer stores per row."""
        (_, heads, _, size), width = self._keys[0].shape, self._values[0].shape[3]
        return LayerShape(FULL, heads, size, None if width == size else width)


class LayersDrafter(Drafter):
    """A family whose model has layers of its own: Parallel and Sequential as the loop sees them.

    first[i]: rows before this one are no rows of layer i, and are masked. memory["layers"] is the K/V of all layers, as
    a tree of arrays (length [B], keys, values).
    """

    reads_prompt = reads_states = True
    _target: Target  # both from attach() on
    _head: Callable[[mx.array], mx.array]

    def __init__(
        self, model: Any, dtype: mx.Dtype, name: str, layers: Sequence[nn.Module], first: Sequence[int]
    ) -> None:
        self.model, self.name, self._dtype, self._layers, self._first = model, name, dtype, layers, first
        self._shapes = [_shape(layer, model.config.hidden_size, dtype) for layer in layers]
        self._shortlist: mx.array | None = model.get("shortlist")

    def attach(self, target: Target) -> None:
        config, info = self.model.config, target.info
        require_equal(self.name, ("hidden size", config.hidden_size, info.hidden_size),
                      ("vocabulary", config.vocab_size, info.vocab_size))  # fmt: skip
        self._target = target
        self._head = target.head if self._shortlist is None else target.head_on(self._shortlist)

    def modules(self) -> list[nn.Module]:
        return [self.model]

    def start(self, batch: int, capacity: int) -> Memory:
        return {"layers": KVCache(self._shapes, 0, capacity, self._dtype, batch).arrays}

    def grow(self, memory: Memory, capacity: int) -> Memory:
        own = self.opened(memory)
        own.grow(capacity)
        return {**memory, "layers": own.arrays}

    def opened(self, memory: Memory) -> KVCache:
        """The layers' K/V as a cache, whose `arrays` are memory["layers"] again."""
        layout, (_, keys, _) = KVCache(self._shapes, 0, 0, self._dtype), memory["layers"]
        layout.batch, layout.capacity = keys[0].shape[0], keys[0].shape[2]
        return layout.around(memory["layers"])

    def rewound(self, memory: Memory, length: int) -> Any:
        """memory["layers"] with `length` rows committed."""
        committed, keys, values = memory["layers"]
        return mx.full(committed.shape, length, dtype=mx.int32), keys, values

    def no_state(self, batch: int) -> mx.array:
        """What stands for a state before the first row, [B, 1, D]."""
        return mx.zeros((batch, 1, self.model.config.hidden_size), dtype=self._dtype)

    def sampled(self, hidden: mx.array, sample: SampleDraft) -> mx.array:
        """Drafts [B, K] from states that are ready for the target's head, [B, K, D], by one pass of it."""
        logits = self._head(hidden)
        rows = [logits[:, i : i + 1] for i in range(logits.shape[1])]
        listed = None if self._shortlist is None else mx.broadcast_to(self._shortlist, rows[0].shape)
        return mx.concatenate([sample(row, listed) for row in rows], axis=1)

    def run(self, layer: int, x: mx.array, own: KVCache, ahead: int = 0) -> mx.array:
        """Layer i over rows x [B, M, D] that come `ahead` rows after the cache's length -> [B, M, D]."""
        later = copy.copy(own)
        later.length = own.length + ahead
        step = later.plan(x.shape[1])
        slots = mx.arange(own.capacity, dtype=mx.int32)
        itself = slots == step.slots[FULL][:, None, :, None]  # a row that sees nothing would be no number
        mask = step.masks[FULL] & ((slots >= self._first[layer]) | itself)
        out: mx.array = self._layers[layer](x, mask, LayerView(own, layer, step))
        return out


def load_layers(checkpoint: Checkpoint, model_class: type[LayersModel]) -> tuple[Any, mx.Dtype]:
    """The model of a checkpoint of ours, trained here or brought in by `mlx-mtp convert`, and its type."""
    config, weights = with_shortlist(checkpoint)
    model, dtype = model_class.of(config), compute_dtype(weights)
    load_into(model, weights, dtype, checkpoint)
    return model, dtype


def _shape(layer: nn.Module, width: int, dtype: mx.Dtype) -> LayerShape:
    """What a layer stores per row, from one row that is never computed."""
    seen = ChainedRows(1)
    layer(mx.zeros((1, 1, width), dtype=dtype), None, seen)
    return seen.shape


def require_equal(name: str, *sizes: tuple[str, object, object]) -> None:
    """Raises IncompatibleDrafter unless sizes of a drafter (what of, its own, its target's) are its target's."""
    for what, found, expected in sizes:
        if found != expected:
            raise IncompatibleDrafter(f"{name} does not fit the target: expected {what} {expected} as in the target, "
                                      f"found {found}; use the drafter made for this target.")  # fmt: skip
