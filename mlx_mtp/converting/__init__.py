"""Brings checkpoints of other layouts into ours, and quantises: what `mlx-mtp convert` does.

    Meta's `.pth` with extra heads  -> target/ and parallel/     (meta.py, read by pth.py)
    modules inside a checkpoint     -> sequential/, and target/ where asked for     (modules.py)
    a GGUF file                     -> a checkpoint     (gguf.py, read by gguf_file.py and tokenizers.py)
    any checkpoint, with bits       -> the same, quantised     (quantise.py)

The source is never touched.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mlx_mtp.checkpoints.checkpoint import Checkpoint, check_finite, is_gguf, visible
from mlx_mtp.converting import gguf, meta
from mlx_mtp.converting.modules import Modules
from mlx_mtp.converting.output import whole_folder
from mlx_mtp.converting.quantise import check_options, quantise
from mlx_mtp.errors import CheckpointError, ModelNotFound, OptionError


def convert(
    source: Path | str,
    out: Path | str,
    *,
    what: str = "auto",
    bits: int | None = None,
    group_size: int = 64,
    with_target: bool = False,
    force: bool = False,
) -> list[Path]:
    """Converts a checkpoint; the folders that were written, all of them or none.

    source: a folder, a `.pth` file in it, or a GGUF file. out: a new folder, or with `force` a checkpoint to replace.
    what: "auto" tells by the files; "quantise" or "split" insist. bits: 4 or 8 quantises what is written.
    with_target: write the target without its modules too. Raises a subclass of MLXMTPError that says what to do.
    """
    check_options(what, bits, group_size)
    folder, out = Path(os.path.expanduser(source)), Path(os.path.expanduser(out))
    if is_gguf(folder):
        if what != "auto" or bits is not None or with_target:
            raise OptionError(f"'{folder}' is a GGUF file, which is brought in as it is; leave out --what, --bits "
                              "and --with-target (a folder that comes of it unquantised can be quantised then).")
        with whole_folder(out, folder, force) as place:
            gguf.bring_in(folder, place)
            _check_weights(place, folder)
        return [out]
    if folder.suffix == ".pth" and folder.is_file():
        folder = folder.parent
    if (of_meta := bool(meta.files_of(folder))) and what != "auto":
        raise OptionError(f"'{folder}' holds Meta's .pth, for which --what must be auto, not '{what}'.")
    modules = None if of_meta else _modules_of(folder, what, bits, with_target)
    with whole_folder(out, folder, force) as place:
        # What is quantised is first written whole, unless the source is quantised as it is.
        whole = place if bits is None else place / "whole" if of_meta or modules else folder
        names = modules.write(whole, with_target) if modules else meta.bring_in(folder, whole) if of_meta else [""]
        for name in names:
            _check_weights(whole / name, folder)
            if bits is not None:
                quantise(Checkpoint.open(whole / name), place / name, bits, group_size)
                _check_weights(place / name, folder)
        shutil.rmtree(place / "whole", ignore_errors=True)
    return [out / name for name in names]


def _modules_of(folder: Path, what: str, bits: int | None, with_target: bool) -> Modules | None:
    """The MTP modules to split off, None where the checkpoint is only quantised; an error where neither is possible."""
    if folder.is_dir() and not (folder / "config.json").exists() and visible(folder.glob("*.pth")):
        raise ModelNotFound(f"'{folder}' holds .pth files without {meta.PARAMS} and consolidated.pth; "
                            "point to a checkpoint of facebook/multi-token-prediction.")  # fmt: skip
    checkpoint = Checkpoint.open(folder)
    if what != "quantise" and (found := Modules.find(checkpoint)):
        return found
    if what == "split":
        raise CheckpointError(f"{folder} has no MTP modules in its weights (model.layers.N.eh_proj or "
                              "model.mtp_layers); conversions often leave them out: use the checkpoint as it was "
                              "published.")  # fmt: skip
    if bits is None:
        raise OptionError(f"'{folder}' holds no MTP modules to split off, so it can only be quantised: "
                          "say --bits 4 or 8.")  # fmt: skip
    if with_target:
        raise OptionError(f"--with-target is for modules that are split off, and '{folder}' has none; leave it out.")
    return None


def _check_weights(folder: Path, source: Path) -> None:
    """CheckpointError where a weight is not finite. Looked for before weights are quantised, which hides a NaN, and
    after it, since one may be too large for the type written."""
    weights = Checkpoint.open(folder).weights()
    one_by_one = (weights.popitem() for _ in range(len(weights)))  # so that no more than one is in memory
    check_finite(one_by_one, source, "nothing was written: use a checkpoint that is whole")
