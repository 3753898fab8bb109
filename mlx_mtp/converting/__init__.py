"""Brings checkpoints of other layouts into ours, and quantises: what `mlx-mtp convert` does.

    Meta's `.pth` with extra heads  -> target/ and parallel/     (meta.py, read by pth.py)
    modules inside a checkpoint     -> sequential/, and target/ where asked for     (modules.py)
    any checkpoint, with bits       -> the same, quantised     (quantise.py)

The source is never touched.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.checkpoints.checkpoint import Checkpoint, check_finite, visible
from mlx_mtp.converting import meta, modules
from mlx_mtp.converting.output import whole_folder
from mlx_mtp.converting.quantise import check_options, quantise
from mlx_mtp.errors import CheckpointError, ModelNotFound, OptionError

WHAT = ("auto", "quantise", "split")
META, SPLIT, QUANTISE = "Meta's multi-token heads", "modules in a checkpoint", "a checkpoint to quantise"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What is to be done: `layout` is one of META, SPLIT, QUANTISE."""

    source: Path
    layout: str
    bits: int | None
    group_size: int
    with_target: bool
    modules: modules.Modules | None = None


def plan(
    source: Path | str, *, what: str = "auto", bits: int | None = None, group_size: int = 64, with_target: bool = False
) -> Conversion:
    """Looks at `source` and says what will be done; writes nothing.

    source: a folder, or a `.pth` file in it. what: "auto" tells by the files; "quantise" or "split" insist. bits: 4 or
    8 quantises what is written, in groups of group_size. with_target: write the target without its modules too.

    Raises a subclass of MLXMTPError whose message says what to do.
    """
    if what not in WHAT:
        raise OptionError(f"--what is '{what}', but must be one of {', '.join(WHAT)}.")
    if bits is not None:
        check_options(bits, group_size)
    folder = Path(os.path.expanduser(source))
    if folder.suffix == ".pth" and folder.is_file():
        folder = folder.parent
    if meta.files_of(folder):
        if what != "auto":
            raise OptionError(f"'{folder}' holds Meta's .pth, for which --what must be auto, not '{what}'.")
        return Conversion(source=folder, layout=META, bits=bits, group_size=group_size, with_target=True)
    if folder.is_dir() and not (folder / "config.json").exists() and visible(folder.glob("*.pth")):
        raise ModelNotFound(f"'{folder}' holds .pth files without {meta.PARAMS} and consolidated.pth; "
                            "point to a checkpoint of facebook/multi-token-prediction.")  # fmt: skip
    checkpoint = Checkpoint.open(folder)
    found = None if what == "quantise" else modules.Modules.find(checkpoint)
    if what == "split" and found is None:
        raise CheckpointError(f"{folder} has no MTP modules in its weights (model.layers.N.eh_proj or "
                              "model.mtp_layers); conversions often leave them out: use the checkpoint as it was "
                              "published.")  # fmt: skip
    if found is None and bits is None:
        raise OptionError(f"'{folder}' holds no MTP modules to split off, so it can only be quantised: "
                          "say --bits 4 or 8.")  # fmt: skip
    if found is None and with_target:
        raise OptionError(f"--with-target is for modules that are split off, and '{folder}' has none; leave it out.")
    layout = QUANTISE if found is None else SPLIT
    return Conversion(
        source=folder, layout=layout, bits=bits, group_size=group_size, with_target=with_target, modules=found
    )


def convert(conversion: Conversion, out: Path | str, *, force: bool = False) -> list[Path]:
    """Does it; the folders of the checkpoints that were written, all of them or none.

    Raises OptionError where `out` exists (a checkpoint is replaced with `force`).
    """
    out = Path(os.path.expanduser(out))
    with whole_folder(out, conversion.source, force) as folder:
        if conversion.layout == QUANTISE:
            assert conversion.bits is not None, "plan() saw to it"
            _check_weights(conversion.source, conversion.source)
            quantise(Checkpoint.open(conversion.source), folder, conversion.bits, conversion.group_size)
            _check_weights(folder, conversion.source)
            return [out]
        names = _split(conversion, folder) if conversion.modules else meta.bring_in(conversion.source, folder)
        for name in names:
            _check_weights(folder / name, conversion.source)
            if conversion.bits is not None:
                whole = (folder / name).rename(folder / f"{name}-whole")
                quantise(Checkpoint.open(whole), folder / name, conversion.bits, conversion.group_size)
                shutil.rmtree(whole)
                _check_weights(folder / name, conversion.source)
    return [out / name for name in names]


def _check_weights(folder: Path, source: Path) -> None:
    """CheckpointError where a weight is not finite: the source's own, or one too large for the type written.

    Looked for before weights are quantised, which hides a NaN, and after it.
    """
    weights = Checkpoint.open(folder).weights()
    one_by_one = (weights.popitem() for _ in range(len(weights)))  # so that no more than one is in memory
    check_finite(one_by_one, source, "nothing was written: use a checkpoint that is whole")


def _split(conversion: Conversion, folder: Path) -> list[str]:
    assert conversion.modules is not None, "plan() found some"
    conversion.modules.write_drafter(folder / "sequential")
    if not conversion.with_target:
        return ["sequential"]
    conversion.modules.write_target(folder / "target")
    return ["target", "sequential"]


__all__ = ["META", "QUANTISE", "SPLIT", "Conversion", "convert", "plan"]
