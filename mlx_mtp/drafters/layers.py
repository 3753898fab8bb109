"""Transformer layers that a drafter has of its own, of any architecture mlx-lm knows, each with its own K/V.

Invariant: as in generation/cache.py, rows at or beyond the length are dead, so rolling back is a smaller length. Row r
of a layer belongs to the token at position r and is fed the state of the row before it; so the first rows of a
sequence, which have no row before them, are never seen by any other (`first` below). Layers attend to all rows before;
a window that their config names is not kept.

Shortlist: the tokens that a drafter proposes, where that is not all of the vocabulary. An unembedding of the whole is
most of what a small draft step costs, so that one that was trained on a shortlist has the rows of the target's head for
it alone. What is drawn from its distribution there is a distribution on the vocabulary; acceptance works with any.
Checkpoint: `shortlist` (N) in config.json and a tensor of that name, int32 [N], ids in rising order, or both in a file
shortlist.npy.
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
import numpy as np

from mlx_mtp.checkpoints.checkpoint import Checkpoint, compute_dtype, load_into, misfit, number, section
from mlx_mtp.errors import CheckpointError, IncompatibleDrafter, brief
from mlx_mtp.generation.cache import CAPACITY_STEP, FULL, KVCache, LayerShape, LayerView
from mlx_mtp.generation.interfaces import Drafter, Memory, SampleDraft, Target

MOST_LAYERS = 1 << 10


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """The config.json of a drafter with layers of its own.

    count: of its parts, each with one layer. reads: which of the target's states. block: an mlx-lm config of one layer.
    shortlist: tokens of it, 0 for none. aux_layers: of the target, whose inputs are read beside its last state.
    """

    count: int
    reads: str
    hidden_size: int
    vocab_size: int
    norm_eps: float
    block: Mapping[str, Any]
    shortlist: int = 0
    aux_layers: tuple[int, ...] = ()


class LayersModel(nn.Module):
    """The parameters of such a drafter: parts that each have a `layer`, and a `norm` in front of the unembedding.

    part: makes one for a config. named: what they are called among the tensors. counted: what config.json calls their
    number, and the most of them. states: those that may be read. default: the one where config.json does not say.
    """

    part: type[Any]
    named: str
    counted: tuple[str, int]
    states: Sequence[str]
    default: str | None = None

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.config = config
        self[self.named] = [self.part(config) for _ in range(config.count)]
        if config.shortlist:  # room for ids, which nothing learns
            self.shortlist = mx.arange(config.shortlist, dtype=mx.int32)
            self.freeze(recurse=False, keys=["shortlist"])

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """The layers of the target whose inputs it reads (interfaces.Drafter)."""
        return self.config.aux_layers

    @property
    def parts(self) -> list[Any]:
        """In the order in which they draft."""
        return self[self.named]

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
            shortlist=number(config, "shortlist", int, 0, 1 << 24, 0), aux_layers=_aux_layers(config),
        ))  # fmt: skip


def _aux_layers(config: Mapping[str, Any]) -> tuple[int, ...]:
    """A config.json's `aux_layers`, where it has them."""
    found = config.get("aux_layers", [])
    if not isinstance(found, list) or not all(type(layer) is int and 0 <= layer < MOST_LAYERS for layer in found):
        raise misfit("'aux_layers' to be numbers of layers", repr(found))
    return tuple(found)


def build_layer(block: Mapping[str, Any], width: int) -> nn.Module:
    """A fresh decoder layer over states of `width` numbers, of the architecture that an mlx-lm config describes.

    Raises CheckpointError where mlx-lm cannot build such a layer or it does not run.
    """
    # Public in all but name: mlx-lm has no other way from a config to a class.
    from mlx_lm.utils import _get_classes

    config = {"vocab_size": 1, **block, "num_hidden_layers": 1, "layer_types": None}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model_class, args_class = _get_classes(config)
        layer: nn.Module
        # The rest of the throw-away model is never evaluated, so it costs nothing.
        (layer,) = model_class(args_class.from_dict(config)).layers
        if (found := layer(mx.zeros((1, 1, width)), None, ChainedRows(1)).shape) != (1, 1, width):
            raise ValueError(f"a layer with results of shape {found}")
    # Another project's code on any config.json raises anything, and one of its models prints and exits.
    except (Exception, SystemExit) as error:
        wanted = f"in 'block' an mlx-lm config of decoder layers for states of {width} numbers"
        raise misfit(wanted, f"one that mlx-lm cannot run ({brief(error)})") from error
    return layer


def same_chat(start: mx.array) -> mx.array:
    """Which rows are of one chat, bool [B, 1, T, T], by where the chat of every row begins, [B, T]."""
    return start[:, None, :, None] == start[:, None, None, :]


class ChainedRows:
    """K/V of one layer over whole sequences in training, in the form in which mlx-lm's layers ask for a cache.

    The layer may run several times on its own last results, as the last module of a chain does: row t of pass j is
    then the j-th token after place t. It sees what it would see in decoding: of the first pass the rows up to t, and of
    the later ones only its own chain's. start [B, T]: where the chat of every row begins, as chats do not see each
    other; None for one text a sequence.
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
        (_, heads, _, size), width = self._keys[0].shape, self._values[0].shape[3]
        return LayerShape(FULL, heads, size, None if width == size else width)


class LayersDrafter(Drafter):
    """A family whose model has layers of its own: Parallel and Sequential as the loop sees them.

    chained: whether a part goes on from what the one before it left, so that part k (from 1) lacks a state or a token
    at its first k rows, which are masked; otherwise at the first row alone. memory["layers"] is the K/V of all layers,
    as a tree of arrays (length [B], keys, values).
    """

    reads_prompt = reads_states = True
    chained = False
    model_class: type[LayersModel]
    _target: Target  # these from attach() on
    _shortlist: mx.array | None
    _head: Callable[[mx.array], mx.array]

    def __init__(self, model: Any, dtype: mx.Dtype, name: str | None = None) -> None:
        self.model, self.name, self._dtype = model, name or self.name, dtype
        self.aux_layers = model.aux_layers
        self._shapes: list[LayerShape] = []
        for part in model.parts:
            seen = ChainedRows(1)
            part.layer(mx.zeros((1, 1, model.config.hidden_size), dtype=dtype), None, seen)  # never computed
            self._shapes.append(seen.shape)

    @classmethod
    def load(cls, checkpoint: Checkpoint) -> Self:
        """From a checkpoint of ours, trained here or brought in by `mlx-mtp convert`."""
        config, weights = with_shortlist(checkpoint)
        model, dtype = cls.model_class.of(config), compute_dtype(weights)
        load_into(model, weights, dtype, checkpoint)
        return cls(model, dtype, checkpoint.name)

    def attach(self, target: Target) -> None:
        config, info = self.model.config, target.info
        require_equal(self.name, ("hidden size", config.hidden_size, info.hidden_size),
                      ("vocabulary", config.vocab_size, info.vocab_size))  # fmt: skip
        if self.aux_layers:
            self._check_aux(target)
        self._target, self._shortlist = target, self.model.get("shortlist")
        self._head = target.head if self._shortlist is None else target.head_on(self._shortlist)

    def _check_aux(self, target: Target) -> None:
        """IncompatibleDrafter where the target does not give the states that are read."""
        there = len(layer_inputs(target))
        if max(self.aux_layers) >= there or -min(self.aux_layers) > there:
            raise IncompatibleDrafter(
                f"{self.name} does not fit the target: it reads the states in front of layers "
                f"{', '.join(map(str, self.aux_layers))}, and this target gives those of {there or 'none'}; use a "
                "drafter made for this target."
            )

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
        """Layer i (from 0) over rows x [B, M, D] that come `ahead` rows after the cache's length -> [B, M, D]."""
        later = copy.copy(own)
        later.length = own.length + ahead
        step = later.plan(x.shape[1])
        slots = mx.arange(own.capacity, dtype=mx.int32)
        itself = slots == step.slots[FULL][:, None, :, None]  # a row that sees nothing would be no number
        mask = step.masks[FULL] & ((slots >= (1 + layer if self.chained else 1)) | itself)
        out: mx.array = self.model.parts[layer].layer(x, mask, LayerView(own, layer, step))
        return out


def layer_inputs(target: Target) -> tuple[mx.array, ...]:
    """The residual streams in front of a target's layers, of some token; lazy, so that nothing is run."""
    return target.forward(mx.zeros((1, 1), dtype=mx.int32), target.new_cache(CAPACITY_STEP)).aux


def with_shortlist(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """config.json and weights of a drafter, its shortlist in both, however it is kept.

    CheckpointError for one that does not hold ids of the vocabulary in rising order.
    """
    config, weights = dict(checkpoint.config), checkpoint.weights()
    file = checkpoint.path / "shortlist.npy"
    if "shortlist" not in config and file.exists():
        try:
            weights["shortlist"] = mx.array(np.load(file).astype(np.int32))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: no list of token ids ({error}); download it again.") from error
        config["shortlist"] = weights["shortlist"].size
    if "shortlist" in weights:
        ids, size = np.array(weights["shortlist"]), config.get("vocab_size")
        rising = ids.ndim == 1 and ids.size and np.issubdtype(ids.dtype, np.integer) and bool((np.diff(ids) > 0).all())
        if not rising or not isinstance(size, int) or not 0 <= ids[0] <= ids[-1] < size:
            raise CheckpointError(
                f"{checkpoint.path}: expected as 'shortlist' token ids below the vocabulary's {size}, each above the "
                "one before, found something else; download the drafter again."
            )
    return config, weights


def require_equal(name: str, *sizes: tuple[str, object, object]) -> None:
    """Raises IncompatibleDrafter unless sizes of a drafter (what of, its own, its target's) are its target's."""
    for what, found, expected in sizes:
        if found != expected:
            raise IncompatibleDrafter(f"{name} does not fit the target: expected {what} {expected} as in the target, "
                                      f"found {found}; use the drafter made for this target.")  # fmt: skip
