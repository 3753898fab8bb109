"""`mlx-mtp convert`: checkpoints of other layouts into ours, and quantisation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from mlx_mtp import converting
from mlx_mtp.cli import progress


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of a checkpoint, a GGUF file, or Meta's .pth file.")],
    out: Annotated[Path, typer.Option(help="Folder for the result; made whole or not at all.")],
    what: Annotated[
        Literal["auto", "quantise", "split"],
        typer.Option(help="auto: tells by the files; quantise, or split (MTP modules off a target): insists."),
    ] = "auto",
    bits: Annotated[int | None, typer.Option(help="Quantise to 4 or 8 bits.", show_default="as they are")] = None,
    group_size: Annotated[int, typer.Option(help="Numbers that share a scale: 32, 64 or 128.")] = 64,
    with_target: Annotated[
        bool, typer.Option("--with-target", help="Also write the target without the modules split off it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a checkpoint at --out.")] = False,
) -> None:
    """Quantise a checkpoint, bring in a GGUF file or Meta's .pth, or split MTP modules off a target.

    Examples:
      mlx-mtp convert model.gguf --out my-model
      mlx-mtp convert my-model --out my-model-4bit --bits 4
      mlx-mtp convert deepseek --out modules --what split --with-target
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    # Shown on a terminal while it lasts: an error is to stand alone.
    with progress.held_back(), console.status("Converting ..."):
        written = converting.convert(
            source, out, what=what, bits=bits, group_size=group_size, with_target=with_target, force=force
        )
    console.print(f"Done: {' and '.join(map(str, written))}.", markup=False)
