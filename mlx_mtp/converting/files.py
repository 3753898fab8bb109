"""What conversions write: whole folders or none, tensors shard by shard, and the files that go with a model.

What it does: writes into a hidden folder beside the wanted one and renames it at the end, so that an interrupted
conversion leaves nothing that looks like a checkpoint. What it does not do: know what is converted.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.atomic import replacing
from mlx_mtp.checkpoints.checkpoint import INDEX
from mlx_mtp.errors import OptionError, brief

# Small enough that a shard fits in memory beside the tensor that is being read.
SHARD_BYTES = 4 * 10**9
COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
# --force replaces a checkpoint, or a folder of checkpoints with these names: what conversions write, nothing else.
PARTS = ("target", "parallel", "sequential")


@contextmanager
def whole_folder(out: Path, source: Path, force: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `out` where the block ends well and vanishes where it does not.

    Raises OptionError where `out` exists, unless it is empty, or a checkpoint and `force` is given.
    """
    out = Path(os.path.realpath(out))
    try:
        check_out(out, source, force)
        with replacing(out) as partial:
            partial.mkdir(parents=True)
            yield partial
            check_out(out, source, force)  # the work may have taken an hour
    except OSError as error:
        raise unwritten(out, error) from error


def check_out(out: Path, source: Path, force: bool) -> None:
    """OptionError unless a conversion of `source` may become `out`."""
    if source.resolve().is_relative_to(out.resolve()):
        raise OptionError(f"Expected a folder beside the source as --out, found '{out}', which holds it; name another.")
    if not os.path.lexists(out):
        return
    inside = list(out.iterdir()) if out.is_dir() else [out]
    known = _is_checkpoint(out) or all(path.name in PARTS and _is_checkpoint(path) for path in inside)
    if inside and not (force and known):
        what = "a checkpoint; use --force to replace it" if known else "more than a checkpoint, which stays"
        raise OptionError(f"Expected a new folder as --out, found at '{out}' {what}, or name another.")


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds one and nothing below it."""
    inside = list(folder.iterdir()) if folder.is_dir() else []
    names = {path.name for path in inside}
    return "config.json" in names and any(name.endswith(".safetensors") for name in names) and all(
        path.is_file() for path in inside
    )  # fmt: skip


def write_model(folder: Path, config: Mapping[str, Any], tensors: Iterable[tuple[str, mx.array]]) -> None:
    """config.json and model*.safetensors, with types as they come; holds one shard in memory.

    Tensors are taken one by one and may be lazy.
    """
    folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, int] = {}
    shard: dict[str, mx.array] = {}
    shards = total = held = 0

    def flush() -> None:
        nonlocal shards, held
        shards += 1
        try:
            mx.save_safetensors(str(folder / f"part-{shards}.safetensors"), shard, {"format": "pt"})
        except RuntimeError as error:
            raise unwritten(folder, error) from error
        shard.clear()
        held = 0

    for name, tensor in tensors:
        if shard and held + tensor.nbytes > SHARD_BYTES:
            flush()
        shard[name] = tensor
        places[name] = shards + 1
        held, total = held + tensor.nbytes, total + tensor.nbytes
    flush()
    names = ["model.safetensors"] if shards == 1 else [
        f"model-{i:05}-of-{shards:05}.safetensors" for i in range(1, shards + 1)
    ]  # fmt: skip
    for i, name in enumerate(names, 1):
        (folder / f"part-{i}.safetensors").rename(folder / name)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[i - 1] for name, i in places.items()}}
        write_json(folder / INDEX, index)
    write_json(folder / "config.json", config)


def unwritten(folder: Path, error: Exception) -> OptionError:
    """What to raise where a folder cannot be written."""
    return OptionError(
        f"Expected to write into '{folder.parent}', found that it cannot be done ({brief(error)}); "
        "make room or name another folder with --out."
    )


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """A JSON file as people like to read it."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation settings of a checkpoint, as far as there are any."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
