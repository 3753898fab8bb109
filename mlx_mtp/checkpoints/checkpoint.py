"""A checkpoint folder: config.json and safetensors, read defensively, poured into a module strictly.

Invariant: whatever is wrong with the files comes out as one CheckpointError that names the file.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from safetensors import SafetensorError, safe_open

from mlx_mtp.backend import threads
from mlx_mtp.errors import CheckpointError, ModelNotFound, explaining

INDEX = "model.safetensors.index.json"
GGUF_MAGIC = b"GGUF"
# Parts of a multimodal checkpoint that text does not need: never read, so they cost no memory.
TOWERS = ("vision_tower", "audio_tower", "embed_vision", "embed_audio", "vision_embedder", "multi_modal_projector")
SHARD = re.compile(r"(.*)-\d{5}-of-(\d{5})\.safetensors")
PIECE_BYTES = 256 * 2**20  # weights are read in such pieces, that progress can be told in between
SHARD_BYTES = 4 * 10**9  # small enough that a shard fits in memory beside the tensor that is being read

Number = TypeVar("Number", int, float)
OnRead = Callable[[int, int], None]  # hears (bytes read, bytes in all)


@dataclass
class Checkpoint:
    """An opened folder: a source whose files are here. `config` is the parsed config.json; on_read hears of reading."""

    path: Path
    config: dict[str, Any]
    on_read: OnRead | None = None
    bytes_to_come: ClassVar[int] = 0  # nothing is to be downloaded

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Raises ModelNotFound without a folder, CheckpointError without a usable config.json."""
        folder = Path(os.path.expanduser(path))
        if is_gguf(folder):
            raise ModelNotFound(f"'{path}' is a GGUF file, which is made a folder first: mlx-mtp convert {path} "
                                "--out FOLDER, and then use that folder.")  # fmt: skip
        if not os.path.isdir(folder):  # unlike Path.is_dir it answers for every string
            found = "a file" if os.path.exists(folder) else "nothing"
            raise ModelNotFound(
                f"Expected a folder with config.json and safetensors files, found {found} at '{path}'; check the path."
            )
        return cls(folder, read_config(folder / "config.json"))

    @property
    def name(self) -> str:
        return str(self.path)

    def fetch(self, on_progress: Any = None) -> Checkpoint:
        return self

    @cached_property
    def headers(self) -> dict[Path, list[tuple[str, str, int]]]:
        """The tensors of every weight file; read once. CheckpointError for a shard that is missing or not whole."""
        names = weight_files(self.path)
        if missing := [name for name in names if not os.path.isfile(self.path / name)]:
            raise CheckpointError(
                f"{self.path}: of its {len(names)} model*.safetensors there was found none named "
                f"{missing[0]!r:.90}; download the weights again."
            )
        return {self.path / name: header_of(self.path / name) for name in names}

    def check_files(self) -> None:
        """CheckpointError for a weight file that mlx-lm's loader would take, and which is missing or not whole."""
        for file in set(self.path.glob("model*.safetensors")) - self.headers.keys():
            header_of(file)

    def tensors(self) -> Iterator[tuple[str, str, int]]:
        """Name, type and bytes of every stored tensor; a family may need none."""
        if any(self.path.glob("*.safetensors")):
            yield from chain.from_iterable(self.headers.values())

    def weights(self) -> dict[str, mx.array]:
        """Every tensor of every shard, memory-mapped, under the names of the files."""
        weights: dict[str, mx.array] = {}
        for file in self.headers:
            with explaining(f"{file} is not readable as safetensors", "download it again", RuntimeError, ValueError):
                weights.update(mx.load(str(file)))  # type: ignore[arg-type]
        return weights

    def read(self, module: nn.Module) -> None:
        """Evaluates a module's parameters, that is reads them; RuntimeError from MLX where a file cannot be read."""
        arrays = list(named_parameters(module).values())
        begun, done = 0, list(accumulate(array.nbytes for array in arrays))
        for i, so_far in enumerate(done):
            if so_far - (done[begun - 1] if begun else 0) >= PIECE_BYTES or i + 1 == len(arrays):
                mx.eval(arrays[begun : i + 1])
                threads.pause()
                begun = i + 1
                if self.on_read is not None:
                    self.on_read(so_far, done[-1])


def is_gguf(path: Path) -> bool:
    """Whether a path is a file that begins as a GGUF does, or is named like one."""
    if not os.path.isfile(path):
        return False
    with suppress(OSError), path.open("rb") as stream:
        if stream.read(len(GGUF_MAGIC)) == GGUF_MAGIC:
            return True
    return path.suffix.lower() == ".gguf"


def visible(files: Iterable[Path]) -> list[Path]:
    """The files in order, without hidden ones: macOS leaves `._name` beside a file on disks that are not its own."""
    return sorted(file for file in files if not file.name.startswith("."))


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that a folder must have: those of its index, else those there and their series."""
    index = section(read_json(folder / INDEX), "weight_map", INDEX).values() if (folder / INDEX).exists() else ()
    if odd := [name for name in index if not isinstance(name, str)]:
        raise CheckpointError(f"{folder / INDEX} names {reprlib.repr(odd[0])} as a weight file; download it again.")
    if index:
        return sorted(set(index))
    there = visible(folder.glob("model*.safetensors")) or visible(folder.glob("*.safetensors"))
    names = {file.name for file in there}
    for shard in filter(None, map(SHARD.fullmatch, sorted(names))):
        names |= {f"{shard[1]}-{i:05d}-of-{shard[2]}.safetensors" for i in range(1, int(shard[2]) + 1)}
    return sorted(names) or ["model.safetensors"]


def lacking(folder: Path) -> list[str]:
    """Files that a checkpoint must have, and that are not there."""
    try:
        wanted = ["config.json", *weight_files(folder)]
    except CheckpointError:
        return [INDEX]
    return [name for name in wanted if not os.path.isfile(folder / name)]


def read_config(file: Path) -> dict[str, Any]:
    """A config.json, which must say what it is of."""
    config = read_json(file)
    if not isinstance(found := config.get("model_type"), str):
        raise misfit("a name as 'model_type'", reprlib.repr(found), str(file))
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file; CheckpointError with the file's name otherwise."""
    if not os.path.exists(file):
        raise CheckpointError(
            f"Expected the file {file.name} in '{file.parent}', found none; "
            "point to a folder that holds a whole checkpoint."
        )
    what = f"{file}: expected JSON, found something else"
    with explaining(what, "download it again", OSError, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(found, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(found).__name__}; download it again.")
    return found


def header_of(file: Path) -> list[tuple[str, str, int]]:
    """Name, type ("BF16", "U32", ...) and bytes of every tensor in a safetensors file, which is found whole: MLX reads
    lazily, so a short file would otherwise fail much later."""
    with (
        explaining(f"{file} cannot be read", "check the file and its rights", OSError),
        explaining(f"{file} is no whole safetensors file", "download it again", SafetensorError),
        safe_open(file, "numpy") as stored,
    ):
        return [_described(name, stored.get_slice(name)) for name in stored.keys()]  # noqa: SIM118


def _described(name: str, tensor: Any) -> tuple[str, str, int]:
    bits = re.search(r"\d+", dtype := str(tensor.get_dtype()))  # none in BOOL
    return name, dtype, math.prod(tensor.get_shape()) * int(bits[0] if bits else 8) // 8


def misfit(expected: str, found: str, where: str = "config.json") -> CheckpointError:
    return CheckpointError(f"{where}: expected {expected}, found {found}; use the one that belongs to this checkpoint.")


def number(
    fields: Mapping[str, Any], key: str, kind: type[Number], low: Number, high: Number, default: Number | None = None,
    where: str = "config.json",
) -> Number:  # fmt: skip
    """A field of a config.json; absent or null it is the default. CheckpointError outside low..high."""
    value = default if fields.get(key) is None else fields[key]
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        found = "none" if value is None else reprlib.repr(value)
        raise misfit(f"{what} from {low} to {high} as '{key}'", found, where)
    return kind(value)


def section(fields: Mapping[str, Any], key: str, where: str = "config.json") -> dict[str, Any]:
    """An object inside a config.json, empty where it is absent or null; CheckpointError for anything else."""
    value = fields.get(key)
    if value is not None and not isinstance(value, dict):
        raise misfit(f"a JSON object as '{key}'", reprlib.repr(value), where)
    return value or {}


def compute_dtype(weights: Mapping[str, mx.array]) -> mx.Dtype:
    """float32 on a CPU, where half precision is emulated and slow; elsewhere the checkpoint's own type, and float32
    where it has both kinds of half precision, as neither holds what the other does."""
    halves = {w.dtype for w in weights.values() if w.dtype in (mx.bfloat16, mx.float16)}
    if len(halves) != 1 or mx.default_device() == mx.Device(mx.cpu):
        return mx.float32
    return halves.pop()


def named_parameters(module: nn.Module) -> dict[str, mx.array]:
    return dict(tree_flatten(module.parameters()))


def load_into(module: nn.Module, weights: dict[str, mx.array], dtype: mx.Dtype, source: Checkpoint) -> None:
    """Quantises `module` like `weights`, casts floating tensors to `dtype` and loads them; nothing may be left over."""
    _quantize_like(module, weights, source.path)
    check_shapes(module, {name: weight.shape for name, weight in weights.items()}, str(source.path))
    module.load_weights(list(weights.items()), strict=True)
    module.set_dtype(dtype)
    module.eval()
    with explaining(f"{source.path}: weights that cannot be read", "download them again", RuntimeError):
        source.read(module)


def check_shapes(module: nn.Module, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """CheckpointError with the first few names where tensors are missing, unknown or of another shape than here."""
    wanted = {name: parameter.shape for name, parameter in named_parameters(module).items()}
    wrong = [name for name in sorted(wanted.keys() & found.keys()) if wanted[name] != found[name]]
    for problem, names in (("lacks", wanted.keys() - found.keys()), ("has unknown", found.keys() - wanted.keys()),
                           ("has other shapes for", wrong)):  # fmt: skip
        if names:
            first, *more = sorted(names)
            detail = f" ({list(found[first])} where config.json says {list(wanted[first])})" if names is wrong else ""
            raise CheckpointError(
                f"{where} {problem} {len(names)} tensors: {', '.join([first, *more[:2]])}{' ...' if more[2:] else ''}"
                f"{detail}; the weights and config.json must belong together."
            )


def _quantize_like(module: nn.Module, weights: Mapping[str, mx.array], source: Path) -> None:
    """Makes every layer quantised whose stored weight is; bits, group and mode come from the tensors themselves, since
    `config["quantization"]` names layers by the writer's paths, which differ."""
    from mlx_lm.utils import infer_quant_config

    def settings(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if f"{path}.scales" not in weights or not hasattr(layer, "to_quantized"):
            return False
        found: dict[str, Any] = infer_quant_config(path, layer, dict(weights))
        return found | ({"global_scale": True} if f"{path}.global_scale" in weights else {})

    if any(name.endswith(".scales") for name in weights):
        what, kinds = f"{source}: cannot tell how the weights are quantised", (LookupError, TypeError, ValueError)
        with explaining(what, "download them again", *kinds, ZeroDivisionError):
            nn.quantize(module, class_predicate=settings)


def check_finite(tensors: Iterable[tuple[str, mx.array]], where: Path, advice: str) -> None:
    """CheckpointError with the `advice` for a tensor that holds NaN or an infinity. Looks at one after the other."""
    for name, tensor in tensors:
        if mx.issubdtype(tensor.dtype, mx.floating) and not mx.isfinite(tensor).all().item():
            raise CheckpointError(f"{where}: expected finite numbers as weights, found others in '{name}'; {advice}.")


def write_checkpoint(folder: Path, config: Mapping[str, Any], weights: Mapping[str, mx.array]) -> None:
    """Writes config.json and the weights, in float16; nothing, and a CheckpointError, where one is not finite so."""
    halves = {k: w.astype(mx.float16) if mx.issubdtype(w.dtype, mx.floating) else w for k, w in weights.items()}
    check_finite(halves.items(), folder, "nothing was written: train with a lower learning rate")
    write_tensors(folder, config, halves.items())


def write_tensors(folder: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, mx.array]]) -> None:
    """config.json and model*.safetensors, with types as they come; RuntimeError or OSError where it cannot be done.
    Tensors are taken one by one and may be lazy: no more than one shard of them is in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    shard: dict[str, mx.array] = {}
    total = held = 0

    def flush() -> None:
        mx.save_safetensors(str(folder / f"part-{len(shards)}.safetensors"), shard, {"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            flush()
            held = 0
        shard[name] = tensor
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    places: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"part-{i}.safetensors").rename(folder / file)
        places |= dict.fromkeys(names, file)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
    write_json(folder / "config.json", config)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
