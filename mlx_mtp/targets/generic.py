"""Any causal language model of mlx-lm as a target: its own forward pass over our cache.

A checkpoint is loaded with mlx-lm, the model's layers get views of our cache in place of mlx-lm's, and the states
between trunk and head are read. No architecture is known by name. Models whose past is anything but plain or sliding
K/V are refused: a running state (Mamba, linear attention) has no way back from a rejected draft.

Invariant: a model that loads here was compared at load with itself over mlx-lm's own cache, one rejected row
included; one that differs is refused.

Shapes: B batch, M rows of the pass, D hidden, G K/V heads, S slots of a buffer, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.metadata
import io
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.utils import _get_classes, load_model

from mlx_mtp.backend import threads
from mlx_mtp.checkpoints.checkpoint import Checkpoint, misfit, number, section
from mlx_mtp.checkpoints.unpacking import unpack
from mlx_mtp.errors import CheckpointError, MLXMTPError, UnsupportedModel, brief
from mlx_mtp.generation.cache import CAPACITY_STEP, FULL, SLACK, SLIDING, KVCache, LayerShape, LayerView
from mlx_mtp.generation.interfaces import States, Target, TargetInfo
from mlx_mtp.targets import WITH_ROWS, registry, rows_of

# Names under which config.json files keep one size. The bounds are far above any model: building a module takes time
# in proportion to its layers, whatever the files hold.
LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "n_head")
CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")
MAX_SIZE, MAX_COUNT = 2**24, 2**10
DEFAULT_CONTEXT = 32_768

# The check at load: tokens, the passes (rows written, rows committed) they take through our cache, and how far apart
# two computations of the same logits may be (share of their norm). Kernels for few rows round in their own way.
CHECKED = 6
CHECKED_PASSES = ((4, 3), (2, 2), (1, 1))
APART, APART_HALF = 0.01, 0.2


class _Recorder:
    """Stands before a module, passes everything on, and keeps what last went in first and what came out."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self.received: Any = None
        self.returned: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.received = _first(args, kwargs)
        self.returned = self._module(*args, **kwargs)
        return self.returned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _Given(_Recorder):
    """Stands for the trunk when only the head is wanted: hands back what it is given, and keeps nothing."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _first(args, kwargs)


class _Reached(Exception):
    """Carries the first layer's input out of a pass that need go no further."""


class _Entrance(_Recorder):
    """Stands for the first layer when only its input is wanted."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Reached(_first(args, kwargs))


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()), None)


def _place_of_layers(model: nn.Module) -> tuple[tuple[str, ...], str] | None:
    """The names from a model to its trunk, the module that holds the decoder layers, and the name of their list.

    None where no module below the model holds them, so that trunk and head cannot be told apart.
    """
    found = getattr(model, "layers", None)
    if not isinstance(found, list) or not found:
        return None
    for name, module in model.named_modules():
        if name and not re.search(r"(^|\.)\d", name):
            for key, child in module.items():
                if isinstance(child, list) and list(map(id, child)) == list(map(id, found)):
                    return tuple(name.split(".")), key
    return None


def _replaced(module: nn.Module, path: tuple[str, ...], part: Any) -> nn.Module:
    """The same module with another part at a path; shallow copies of what is above it, the weights are shared."""
    other = copy.copy(module)
    name, below = path[0], path[1:]
    setattr(other, name, _replaced(getattr(module, name), below, part) if below else part)
    return other


class GenericTarget(Target):
    """A model of mlx-lm as the engine sees it (interfaces.Target).

    Raises UnsupportedModel where drafts could not be rolled back or trunk and head cannot be told apart, and
    CheckpointError where the model does not run at all.
    """

    model: nn.Module

    def __init__(self, model: nn.Module, config: Mapping[str, Any], path: Path | None = None) -> None:
        self.path, self.model = path, model
        self._name = f"{path or 'The model'} ({config.get('model_type')})"
        if (place := _place_of_layers(model)) is None:
            raise self._unsupported("its decoder layers are not in a part of their own, apart from the output head")
        self._path, self._list = place
        self._head = self._head_of(model)
        try:
            own = mlx_lm_cache.make_prompt_cache(model)
            window = self._window(own)
            states, logits = self._run(mx.array([[0]]), own)
            mx.eval(states.hidden, logits)
        except MLXMTPError:
            raise
        except Exception as error:  # another project's code on any config.json: whatever it raises
            raise CheckpointError(
                f"{self._name}: mlx-lm cannot run this model ({brief(error)}); "
                "the weights and config.json must belong together."
            ) from error
        self.shapes, self.dtype = self._shapes(own), own[0].keys.dtype
        self.info = TargetInfo(
            vocab_size=logits.shape[-1], hidden_size=states.hidden.shape[-1], window=window,
            max_context=_context(config, self._trunk), readable={}, storing_layers={},
            attention_heads=_size(config, HEADS, 1, MAX_COUNT) or max(shape.heads for shape in self.shapes),
        )  # fmt: skip
        self._check()

    def embed(self, tokens: mx.array) -> mx.array:
        first, *others = self._trunk[self._list]
        try:
            _replaced(self.model, self._path, self._with_layers([_Entrance(first), *others]))(tokens)
        except _Reached as reached:
            return reached.args[0]
        raise self._unsupported("not every pass goes through its first layer")

    def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
        rows = tokens.shape[1]
        step = cache.plan(rows)
        states, _ = self._run(tokens, [LayerView(cache, layer, step) for layer in range(len(cache.shapes))])
        # Lazy: of the rows that are cut away the last layer computes no more than their K/V.
        return states if keep is None or keep >= rows else states.last(keep)

    def head(self, hidden: mx.array) -> mx.array:
        return self._head(hidden).astype(mx.float32)

    def head_on(self, tokens: mx.array) -> Callable[[mx.array], mx.array]:
        """The head of `tokens` [N] alone, by their rows wherever the model keeps a row a token.

        A model that this changes in another way than by leaving logits out keeps its whole head.
        """
        model = self.model
        for name, module in self.model.named_modules():
            apart = name and not re.search(r"(^|\.)\d", name)
            if apart and isinstance(module, WITH_ROWS) and module.weight.shape[0] == self.info.vocab_size:
                model = _replaced(model, tuple(name.split(".")), rows_of(module, tokens))
        cut = self._head_of(model)
        hidden = mx.random.normal((1, 2, self.info.hidden_size), key=mx.random.key(0)).astype(self.dtype)
        with contextlib.suppress(Exception):  # another project's code, as above
            if self._same(cut(hidden), self.head(hidden)[..., tokens]):
                return lambda hidden: cut(hidden).astype(mx.float32)
        return lambda hidden: self.head(hidden)[..., tokens]

    @threads.device_work
    def logits(self, tokens: mx.array) -> mx.array:
        return self.model(tokens, cache=mlx_lm_cache.make_prompt_cache(self.model)).astype(mx.float32)

    def _unsupported(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._name}: {why}; use another model, or decode this one with mlx-lm.")

    @property
    def _trunk(self) -> nn.Module:
        return functools.reduce(getattr, self._path, self.model)

    def _with_layers(self, layers: list[Any]) -> nn.Module:
        """The trunk around other layers."""
        other = copy.copy(self._trunk)
        other[self._list] = layers
        return other

    def _head_of(self, model: nn.Module) -> nn.Module:
        """What follows the trunk in a model of this one's form."""
        return _replaced(model, self._path, _Given(functools.reduce(getattr, self._path, model)))

    def _run(self, tokens: mx.array, cache: list[Any]) -> tuple[States, mx.array]:
        """One pass of the model over any caches: its states, and its own logits (lazy, so free where unused)."""
        layers = [_Recorder(layer) for layer in self._trunk[self._list]]
        trunk = _Recorder(self._with_layers(layers))
        logits: Any = _replaced(self.model, self._path, trunk)(tokens, cache=cache)
        hidden, aux = trunk.returned, tuple(layer.received for layer in layers)
        if not isinstance(hidden, mx.array) or hidden.ndim != 3 or not isinstance(logits, mx.array):
            raise self._unsupported("what its layers give is not one array of states [B, M, D]")
        fit = all(isinstance(state, mx.array) and state.shape == hidden.shape for state in aux)
        return States(hidden, aux if fit else ()), logits

    def _window(self, caches: list[Any]) -> int:
        """The sliding window, 1 where nothing slides; UnsupportedModel for caches without a way back."""
        for layer, cache in enumerate(caches):
            found, keep = type(cache).__name__, getattr(cache, "keep", 0)
            found += f" that never forgets the first {keep} tokens" if keep else ""
            if keep or type(cache) not in (mlx_lm_cache.KVCache, mlx_lm_cache.RotatingKVCache):
                raise self._unsupported(f"layer {layer} keeps its past in mlx-lm's {found}, from which rejected drafts "
                                        "cannot be taken back")  # fmt: skip
        sliding = [cache.max_size for cache in caches if type(cache) is mlx_lm_cache.RotatingKVCache]
        if not all(type(window) is int and window > 0 for window in sliding):
            raise misfit("the size of the sliding window", "none")
        if len(set(sliding)) > 1:
            raise self._unsupported(f"its layers slide over windows of {' and '.join(map(str, sorted(set(sliding))))} "
                                    "tokens, and the cache that takes drafts back holds one size")  # fmt: skip
        return sliding[0] if sliding else 1

    def _shapes(self, caches: list[Any]) -> list[LayerShape]:
        """Shapes of the stored K/V, from what one token left in mlx-lm's own caches."""
        shapes = []
        for layer, cache in enumerate(caches):
            if cache.keys is None or cache.keys.shape[1] != cache.values.shape[1]:
                found = "stores none" if cache.keys is None else "stores them with different heads"
                raise self._unsupported(f"layer {layer} needs keys and values of equal heads, and {found}")
            (_, heads, _, size), values = cache.keys.shape, cache.values.shape[-1]
            kind = FULL if type(cache) is mlx_lm_cache.KVCache else SLIDING
            shapes.append(LayerShape(kind, heads, size, None if values == size else values))
        return shapes

    def _check(self) -> None:
        """Compares head, cache and rollback with the model over mlx-lm's cache; UnsupportedModel where they differ."""
        tokens = mx.array([[(31 * i + 5) % self.info.vocab_size for i in range(CHECKED)]])
        states, expected = self._run(tokens, mlx_lm_cache.make_prompt_cache(self.model))
        if not mx.isfinite(expected).all().item():
            raise CheckpointError(f"{self._name}: expected finite logits, found others; download the weights again.")
        try:
            found = {"head": self._head(states.hidden), "cache": self._through_cache(tokens)}
            self._traced(tokens)
            far = [part for part, logits in found.items() if not self._same(logits, expected)]
            reason = f"its {far[0]} gives other logits than mlx-lm's" if far else ""
            if self.embed(tokens).shape != states.hidden.shape:
                reason = "what goes into its first layer has not the shape of what its head is given"
        except MLXMTPError:
            raise
        except Exception as error:  # as above
            reason = brief(error)
        if reason:
            raise self._unsupported(f"it does not run over the cache that takes drafts back ({reason})")

    def _same(self, found: mx.array, expected: mx.array) -> bool:
        """Whether two computations of logits differ by no more than rounding explains."""
        if found.shape != expected.shape:
            return False
        found, expected = found.astype(mx.float32), expected.astype(mx.float32)
        apart: float = (mx.linalg.norm(found - expected) / mx.maximum(mx.linalg.norm(expected), 1e-20)).tolist()  # type: ignore[assignment]
        return apart <= (APART if self.dtype == mx.float32 else APART_HALF)

    def _through_cache(self, tokens: mx.array) -> mx.array:
        """Logits [1, M, V] of the committed rows of CHECKED_PASSES."""
        cache, rows, at = self.new_cache(CAPACITY_STEP), [], 0
        for written, committed in CHECKED_PASSES:
            states = self.forward(tokens[:, at : at + written], cache)
            rows.append(self.head(states.hidden)[:, :committed])
            cache.advance(committed)
            at += committed
        return mx.concatenate(rows, axis=1)

    def _traced(self, tokens: mx.array) -> None:
        """Traces a pass like a compiled round and runs nothing: a model that reads a device value on the way raises."""
        layout = self.new_cache(CAPACITY_STEP)

        def one_pass(tokens: mx.array, arrays: Any) -> tuple[mx.array, Any]:
            cache = layout.around(arrays)
            return self.head(self.forward(tokens, cache).hidden), cache.arrays

        mx.compile(one_pass)(tokens, layout.arrays)


def _size(config: Mapping[str, Any], names: tuple[str, ...], low: int, high: int) -> int | None:
    """The first of `names` that a config.json has, at the top or in `text_config`; lists (one size a layer) do not
    count. CheckpointError out of range."""
    for fields in (section(config, "text_config"), config):
        for name in names:
            if fields.get(name) is not None and not isinstance(fields[name], list):
                return number(fields, name, int, low, high)
    return None


def _context(config: Mapping[str, Any], trunk: nn.Module) -> int:
    """Most positions. A table of learned positions has none for the rows that a round writes ahead: they stay free."""
    context = _size(config, CONTEXT, 2 * SLACK, 2**31 - 1) or DEFAULT_CONTEXT
    learned = any(isinstance(part, nn.Embedding) and part.weight.shape[0] == context for part in trunk.modules())
    return context - SLACK if learned else context


def has_model(config: Mapping[str, Any]) -> bool:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _get_classes(dict(config))
    # An unknown model_type is a ValueError, odd ones and odd `architectures` raise anything; olmo prints and exits.
    except (Exception, SystemExit):
        return False
    return True


def _classes(config: dict[str, Any]) -> tuple[type[nn.Module], type]:
    """mlx-lm's classes for a config.json; the model's weights lose the modules that a checkpoint carries for drafting.

    DeepSeek's layout numbers those as layers after the last. mlx-lm drops number 61 of deepseek_v3, whatever the
    model's size, and refuses any other as unknown weights.
    """
    model_class, args_class = _get_classes(config)
    fields = section(config, "text_config") if "text_config" in config else config
    if not fields.get("num_nextn_predict_layers") or fields.get("num_hidden_layers") is None:
        return model_class, args_class
    layers = number(fields, "num_hidden_layers", int, 1, MAX_COUNT)

    class WithoutDraftModules(model_class):  # type: ignore[misc, valid-type]
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            known = super().sanitize(weights) if hasattr(model_class, "sanitize") else weights
            numbers = {name: re.match(r"(?:language_model\.)?model\.layers\.(\d+)\.", name) for name in known}
            return {name: known[name] for name, found in numbers.items() if not found or int(found[1]) < layers}

    return WithoutDraftModules, args_class


def load(checkpoint: Checkpoint) -> GenericTarget:
    for names, high in ((LAYERS, MAX_COUNT), (("hidden_size",), MAX_SIZE), (("vocab_size",), MAX_SIZE)):
        _size(checkpoint.config, names, 1, high)
    checkpoint.check_files()
    try:
        model, _ = load_model(checkpoint.path, lazy=True, get_model_classes=_classes)
        if mx.default_device() == mx.Device(mx.cpu):
            model.set_dtype(mx.float32)  # half precision is emulated there, and slow
            unpack(model, checkpoint.name)
        checkpoint.read(model)
    except Exception as error:  # mlx-lm has no error class of its own
        raise CheckpointError(
            f"{checkpoint.path}: mlx-lm cannot load this {checkpoint.config['model_type']} model ({brief(error)}); "
            "the weights and config.json must be whole and belong together."
        ) from error
    return GenericTarget(model, checkpoint.config, checkpoint.path)


registry.fallback = has_model, load, f"a model type of mlx-lm {importlib.metadata.version('mlx-lm')}"
