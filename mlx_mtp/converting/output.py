"""Where a conversion goes: a whole folder or none, and the files beside the weights that go with a model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_mtp.checkpoints.atomic import replacing
from mlx_mtp.errors import OptionError, explaining

COMPANIONS = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
# --force replaces a checkpoint, or a folder of checkpoints with these names: what conversions write, nothing else.
PARTS = ("target", "parallel", "sequential")


@contextmanager
def whole_folder(out: Path, source: Path, force: bool) -> Iterator[Path]:
    """A folder to write into, which becomes `out` where the block ends well; OptionError where something is there,
    unless it is a checkpoint and `force` is given."""
    out = Path(os.path.realpath(out))
    advice, kinds = "make room, or name another folder with --out", (OSError, RuntimeError)  # MLX raises the second
    with explaining(f"'{out}' cannot be written", advice, *kinds, raised=OptionError):
        _check_out(out, source, force)
        with replacing(out) as partial:
            partial.mkdir(parents=True)
            yield partial
            _check_out(out, source, force)  # the work may have taken an hour


def _check_out(out: Path, source: Path, force: bool) -> None:
    """OptionError unless a conversion of `source` may become `out`."""
    if source.resolve().is_relative_to(out):
        raise OptionError(f"'{out}' holds the source itself; name a folder beside it with --out.")
    inside = list(out.iterdir()) if out.is_dir() else [out] if os.path.lexists(out) else []
    known = _is_checkpoint(out) or all(path.name in PARTS and _is_checkpoint(path) for path in inside)
    if inside and not (force and known):
        what = "a checkpoint is there; replace it with --force" if known else "more than a checkpoint is there"
        raise OptionError(f"'{out}' stays as it is: {what}, or name another folder with --out.")


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds one and nothing below it."""
    files = {path.name: path.is_file() for path in folder.iterdir()} if folder.is_dir() else {}
    weights = any(name.endswith(".safetensors") for name in files)
    return weights and "config.json" in files and all(files.values())


def copy_companions(source: Path, folder: Path) -> None:
    """Tokenizer, chat template and generation settings of a checkpoint, as far as there are any."""
    for name in COMPANIONS:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
