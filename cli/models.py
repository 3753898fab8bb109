"""`mlx-mtp models`: known pairs, their sizes, what fits in this machine's memory, what is downloaded."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_mtp.checkpoints import hub, memory, packaged, pairs
from mlx_mtp.loading import packaged_drafters

COLUMNS = ("model", "drafter", "download", "memory", "fits", "here")


def models(
    fitting: Annotated[bool, typer.Option("--fitting", help="Only what fits in this machine's memory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """List known pairs of model and drafter: sizes, what fits here, what is downloaded.

    Nothing is asked of the hub. The first that fits is what chat proposes. Your own pairs go into
    ~/.config/mlx-mtp/pairs.json. MLX_MTP_IGNORE_MEMORY=1 loads what does not fit all the same.
    """
    available = memory.available_bytes()
    rows = [_row(pair, available) for pair in pairs.known_pairs()]
    rows += [_packaged_row(model, available) for model in packaged.MODELS.values()]
    best = pairs.best_pair(available)
    if fitting:
        rows = [row for row in rows if row["fits"]]
    if as_json:
        print(json.dumps({"memory_bytes": available, "best": best.target if best else None, "pairs": rows}))
    elif sys.stdout.isatty():
        _show(rows, available, best.target if best else None)
    else:
        print("\t".join(COLUMNS))
        for row in rows:
            print("\t".join(_cells(row)))


def _row(pair: pairs.KnownPair, available: int) -> dict[str, Any]:
    """A pair as JSON. fits: null where its size is unknown. downloaded: "yes", "partly" or "no", of both together."""
    names = [name for name in (pair.target, pair.assistant) if name and hub.NAME.fullmatch(name)]
    whole = [name for name in names if hub.cached(name)]
    some = whole or [name for name in names if hub.started(name)]
    return {
        "target": pair.target,
        "assistant": pair.assistant,
        "bits": pair.bits,
        "download_bytes": pair.download_bytes or None,
        "memory_bytes": pair.memory_bytes or None,
        "fits": pair.memory_bytes <= available if pair.memory_bytes else None,
        "downloaded": "yes" if len(whole) == len(names) else "partly" if some else "no",
        "source": pair.source or None,
    }


def _packaged_row(model: packaged.PackagedModel, available: int) -> dict[str, Any]:
    """A packaged model as `_row` gives a pair; its drafters come with this program."""
    drafter = next(iter(packaged_drafters(model.name)), None)
    pair = pairs.KnownPair(target=model.name, assistant=drafter, bits=model.bits, weight_bytes=model.weight_bytes,
                           download_bytes=model.download_bytes,
                           source=f"{model.title} ({model.licence}), package {model.requirement}")  # fmt: skip
    return _row(pair, available) | {"downloaded": "yes" if model.here else "no"}


def _cells(row: dict[str, Any]) -> list[str]:
    sizes = [memory.readable(row[key]) if row[key] else "?" for key in ("download_bytes", "memory_bytes")]
    fits = "?" if row["fits"] is None else "yes" if row["fits"] else "no"
    return [row["target"], row["assistant"] or "none", *sizes, fits, row["downloaded"]]


def _show(rows: list[dict[str, Any]], available: int, best: str | None) -> None:
    """A table that a terminal of any width can hold: the drafter in a line of its own below the model."""
    table = Table(
        title=f"{memory.readable(available)} of memory for a model and its drafter; sizes are approximate",
        title_justify="left",
        caption=Text(f"The first that fits: {best}" if best else "None fits; the embedded model needs no download."),
        caption_justify="left",
    )
    table.add_column("model, drafter", overflow="fold")
    for name in COLUMNS[2:4]:
        table.add_column(name, justify="right")
    for name in COLUMNS[4:]:
        table.add_column(name)
    for row in rows:
        target, drafter, *rest = _cells(row)
        style = "bold" if row["target"] == best else "" if row["fits"] else "dim"
        table.add_row(Text.assemble(target, "\n", (drafter, "dim")), *rest, style=style)
    Console().print(table)
