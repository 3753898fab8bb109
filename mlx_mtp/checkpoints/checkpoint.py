"""A checkpoint folder: config.json and safetensors, read defensively, poured into a module strictly.

What it does: finds the weight files, checks every header before MLX maps it, quantises a fresh module the way the
stored tensors are quantised, and loads with nothing missing and nothing left over. What it does not do: know a
model family, or the hub.

Invariant: whatever is wrong with the files comes out as one CheckpointError that names the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_mtp.backend import threads
from mlx_mtp.errors import CheckpointError, ModelNotFound, brief

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1}
ITEM_BYTES |= {"U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8}
# Parts of a multimodal checkpoint that text does not need: never read, so they cost no memory.
TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder", "multi_modal_projector")
SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors")
# Weights are read in pieces of so many bytes, that progress can be told in between.
PIECE_BYTES = 256 * 2**20
# Hears (bytes read, bytes in all) while weights are read; set around a load. A context variable, since between
# the caller who wants to know and the reading below stand families that need not care.
on_read: ContextVar[Callable[[int, int], None] | None] = ContextVar("on_read", default=None)

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Checkpoint:
    """An opened folder. `config` is the parsed config.json; the weights are read by `weights()`."""

    path: Path
    config: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Raises ModelNotFound without a folder, CheckpointError without a usable config.json."""
        folder = Path(os.path.expanduser(path))
        if not os.path.isdir(folder):  # unlike Path.is_dir it answers for every string
            raise ModelNotFound(
                f"Expected a folder with config.json and safetensors files, found "
                f"{'a file' if os.path.exists(folder) else 'nothing'} at '{path}'; check the path."
            )
        config = read_json(folder / "config.json")
        if not isinstance(found := config.get("model_type"), str):
            raise CheckpointError(
                f"{folder / 'config.json'}: expected a name as 'model_type', found {reprlib.repr(found)}; "
                "use the config.json that belongs to this checkpoint."
            )
        return cls(folder, config)

    def weights(self) -> dict[str, mx.array]:
        """Every tensor of every shard, memory-mapped, under the names of the files."""
        weights: dict[str, mx.array] = {}
        for file in self._files():
            check_safetensors(file)
            try:
                weights.update(mx.load(str(file)))  # type: ignore[arg-type]
            except (RuntimeError, ValueError) as error:
                raise CheckpointError(f"{file}: not readable as safetensors ({error}); download it again.") from error
        return weights

    def check_files(self) -> None:
        """CheckpointError for a shard that is missing or not whole; for readers other than `weights`."""
        for file in {*self._files(), *visible(self.path.glob("model*.safetensors"))}:
            check_safetensors(file)

    def tensors(self) -> Iterator[tuple[str, str, int]]:
        """Name, type ("BF16", "U32", ...) and bytes of every stored tensor, from the headers alone."""
        for file in self._files():
            for name, entry in check_safetensors(file).items():
                if name != "__metadata__":
                    yield name, entry["dtype"], entry["data_offsets"][1] - entry["data_offsets"][0]

    def _files(self) -> list[Path]:
        index = self.path / INDEX
        if index.exists():
            shards = section(read_json(index), "weight_map", INDEX).values()
            if odd := [shard for shard in shards if not isinstance(shard, str)]:
                raise CheckpointError(
                    f"{index}: expected file names in 'weight_map', found {reprlib.repr(odd[0])}; download it again."
                )
            names = sorted(set(shards))
            for name in names:
                if not os.path.isfile(self.path / name):
                    raise CheckpointError(
                        f"{index} lists {len(names)} shards, but '{name}' is missing; download it into {self.path}."
                    )
            if names:
                return [self.path / name for name in names]
        files = visible(self.path.glob("model*.safetensors")) or visible(self.path.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"Expected model*.safetensors in {self.path}, found none; download the weights.")
        if missing := missing_shards(file.name for file in files):
            raise CheckpointError(
                f"Expected all shards of the weights in {self.path}, found none named '{missing[0]}'; "
                "download the weights again."
            )
        return files


def visible(files: Iterable[Path]) -> list[Path]:
    """The files in order, without hidden ones: macOS leaves `._name` beside a file on disks that are not its own."""
    return sorted(file for file in files if not file.name.startswith("."))


def missing_shards(names: Iterable[str]) -> list[str]:
    """Shards that the others' names ("model-00001-of-00003.safetensors") say there must be, and are not."""
    there = set(names)
    series = {(found[1], int(found[3])) for name in there if (found := SHARD.fullmatch(name))}
    wanted = [f"{stem}-{i:05d}-of-{n:05d}.safetensors" for stem, n in sorted(series) for i in range(1, n + 1)]
    return [name for name in wanted if name not in there]


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError with the file's name otherwise."""
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise CheckpointError(
            f"Expected the file {file.name} in '{file.parent}', found none; "
            "point to a folder that holds a whole checkpoint."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON, found something else ({error}); download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(found).__name__}; download it again.")
    return found


def check_safetensors(file: Path) -> dict[str, Any]:
    """A file's header, compared with its size: MLX reads lazily, so a short file would otherwise fail much later."""
    found: dict[str, Any] = {}
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            whole = 2 <= length <= min(MAX_HEADER_BYTES, size - 8)
            header = stream.read(length) if whole else b""
    except OSError as error:
        raise CheckpointError(f"{file}: expected a readable file, found {error.strerror}; check its rights.") from error
    problem = f"a header of {length} bytes in a file of {size}"
    if whole:
        try:
            found = json.loads(header)
            wanted = 8 + length + _data_bytes(found)
            problem = "" if wanted == size else f"{size} bytes where its header says {wanted}"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            problem = "a header that is not the format's JSON"
    if problem:
        raise CheckpointError(f"{file}: expected a whole safetensors file, found {problem}; download it again.")
    return found


def _data_bytes(header: dict[str, Any]) -> int:
    """Bytes behind a header; ValueError where a tensor's place and its shape disagree."""
    ends = [0]
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            shape, item = entry["shape"], ITEM_BYTES.get(entry["dtype"])
            if not all(type(n) is int and n >= 0 for n in (begin, end, *shape)) or begin > end:
                raise ValueError(name)
            if item and end - begin != math.prod(shape) * item:
                raise ValueError(name)
            ends.append(end)
    return max(ends)


def number(
    fields: Mapping[str, Any],
    key: str,
    kind: type[Number],
    low: Number,
    high: Number,
    default: Number | None = None,
    where: str = "config.json",
) -> Number:
    """A field of a config.json; absent or null it is the default. CheckpointError outside low..high."""
    value = default if fields.get(key) is None else fields[key]
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise CheckpointError(
            f"{where}: expected {what} from {low} to {high} as '{key}', found {reprlib.repr(value)}; "
            "use the config.json that belongs to this checkpoint."
        )
    return kind(value)


def section(fields: Mapping[str, Any], key: str, where: str = "config.json") -> dict[str, Any]:
    """An object inside a config.json, empty where it is absent or null; CheckpointError for anything else."""
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise CheckpointError(
            f"{where}: expected a JSON object as '{key}', found {reprlib.repr(value)}; "
            "use the file that belongs to this checkpoint."
        )
    return value or {}


def compute_dtype(weights: Mapping[str, mx.array]) -> mx.Dtype:
    """float32 on a CPU, where half precision is emulated and slow; elsewhere the checkpoint's own type."""
    if mx.default_device() == mx.Device(mx.cpu):
        return mx.float32
    halves = [w.dtype for w in weights.values() if w.dtype in (mx.bfloat16, mx.float16)]
    return max(set(halves), key=halves.count) if halves else mx.float32


def named_parameters(module: nn.Module) -> dict[str, mx.array]:
    """A module's parameters under their dotted names."""
    return dict(tree_flatten(module.parameters()))


def load_into(module: nn.Module, weights: dict[str, mx.array], dtype: mx.Dtype, source: Path) -> None:
    """Quantises `module` like `weights`, casts floating tensors to `dtype` and loads them; nothing may be left over.

    Raises CheckpointError with the first few names where tensors are missing, unknown or of another shape.
    """
    _quantize_like(module, weights, source)
    wanted = named_parameters(module)
    missing, unknown = sorted(wanted.keys() - weights.keys()), sorted(weights.keys() - wanted.keys())
    wrong = [n for n in wanted.keys() & weights.keys() if wanted[n].shape != weights[n].shape]
    for problem, names in (("lacks", missing), ("has unknown", unknown), ("has other shapes for", sorted(wrong))):
        if names:
            detail = ""
            if names is not missing and names is not unknown:
                detail = f" ({list(weights[names[0]].shape)} where config.json says {list(wanted[names[0]].shape)})"
            raise CheckpointError(
                f"{source} {problem} {len(names)} tensors: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
                f"{detail}; the weights and config.json must belong together."
            )
    floating = (mx.float32, mx.bfloat16, mx.float16)
    cast = {n: w.astype(dtype) if w.dtype in floating else w for n, w in weights.items()}
    module.load_weights(list(cast.items()), strict=True)
    module.eval()
    try:
        read_parameters(module)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: the weights could not be read ({error}); download them again.") from error


def read_parameters(module: nn.Module) -> None:
    """Evaluates a module's parameters, that is reads them from their files, and tells `on_read` how far it is.

    RuntimeError from MLX where a file cannot be read.
    """
    arrays = list(named_parameters(module).values())
    total, done, waiting = sum(array.nbytes for array in arrays), 0, 0
    piece: list[mx.array] = []
    tell = on_read.get()
    for i, array in enumerate(arrays):
        piece.append(array)
        waiting += array.nbytes
        if waiting >= PIECE_BYTES or i + 1 == len(arrays):
            mx.eval(piece)
            threads.pause()
            done, piece, waiting = done + waiting, [], 0
            if tell is not None:
                tell(done, total)


def _quantize_like(module: nn.Module, weights: Mapping[str, mx.array], source: Path) -> None:
    """Makes every layer quantised whose stored weight is; bits, group and mode come from the tensors themselves.

    The tensors decide because `config["quantization"]` names layers by the writer's paths, which differ.
    """
    from mlx_lm.utils import infer_quant_config

    def settings(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights or not hasattr(layer, "to_quantized"):
            return False
        try:
            found: dict[str, Any] = infer_quant_config(path, layer, dict(weights))
        except (ValueError, KeyError, IndexError, TypeError, ZeroDivisionError) as error:
            raise CheckpointError(
                f"{source}: cannot tell how '{path}' is quantised ({brief(error)}); download the weights again."
            ) from error
        if f"{path}.global_scale" in weights:
            found["global_scale"] = True
        return found

    if any(name.endswith(".scales") for name in weights):
        try:
            nn.quantize(module, class_predicate=settings)
        except ValueError as error:  # scales of a shape that no bits and no group size give
            raise CheckpointError(
                f"{source}: cannot tell how the weights are quantised ({brief(error)}); download them again."
            ) from error


def renamed(weights: Mapping[str, mx.array], name_of: Callable[[str], str | None]) -> tuple[dict[str, mx.array], int]:
    """Weights under new names, without those that `name_of` maps to None; and how many those were."""
    kept = {new: value for key, value in weights.items() if (new := name_of(key)) is not None}
    return kept, len(weights) - len(kept)


def check_finite(tensors: Iterable[tuple[str, mx.array]], where: Path, advice: str) -> None:
    """CheckpointError with the `advice` for a tensor that holds NaN or an infinity. Looks at one after the other."""
    for name, tensor in tensors:
        if mx.issubdtype(tensor.dtype, mx.floating) and not mx.isfinite(tensor).all().item():
            raise CheckpointError(f"{where}: expected finite numbers as weights, found others in '{name}'; {advice}.")


def write_checkpoint(folder: Path, config: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
    """Writes config.json and model.safetensors in the published layout (float16 on disk).

    Raises CheckpointError, and writes nothing, where a weight is not finite as float16.
    """
    floating = (mx.float32, mx.bfloat16)
    halves = {k: w.astype(mx.float16) if w.dtype in floating else w for k, w in weights.items()}
    check_finite(halves.items(), folder, "nothing was written: train with a lower learning rate")
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), halves, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
