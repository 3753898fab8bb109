"""`mlx-mtp models`: known pairs, their sizes, what fits in this machine's memory, what is downloaded."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from mlx_mtp.checkpoints import hub, memory, packaged, pairs
from mlx_mtp.loading import ASSETS, drafters_in
from mlx_mtp.measuring import tables

HEADS = ("model, drafter", "download", "memory", "fits", "here")


def models(
    fitting: Annotated[bool, typer.Option("--fitting", help="Only what fits in this machine's memory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """List known pairs of model and drafter: sizes, what fits here, what is downloaded.

    Nothing is asked of the hub. Your own pairs go into
    ~/.config/mlx-mtp/pairs.json. MLX_MTP_IGNORE_MEMORY=1 loads what does not fit all the same.

    Examples:
      mlx-mtp models --fitting
      mlx-mtp models --json
    """
    available = memory.available_bytes()
    shown, best = rows(available), pairs.best_pair(available)
    if fitting:
        shown = [row for row in shown if row["fits"]]
    if as_json:
        print(json.dumps({"memory_bytes": available, "best": best.target if best else None, "pairs": shown}))
    else:
        tables.show([
            f"{memory.readable(available)} of memory for a model and its drafter; sizes are approximate",
            tables.Table("", HEADS, list(map(_cells, shown))),
            f"The first that fits: {best.target}" if best else "None fits; the embedded model needs no download.",
        ])  # fmt: skip


def rows(available: int) -> list[dict[str, Any]]:
    """All known pairs as JSON, in order of preference, and then the packaged models."""
    known = (_row(pair, available) for pair in pairs.known_pairs())
    return [*known, *(_packaged_row(model, available) for model in packaged.MODELS.values())]


def _row(pair: pairs.KnownPair, available: int) -> dict[str, Any]:
    """A pair as JSON. fits: null where its size is unknown. downloaded: "yes", "partly" or "no", of both together."""
    names = [name for name in (pair.target, pair.assistant) if name and hub.NAME.fullmatch(name)]
    downloaded = "yes" if all(map(hub.cached, names)) else "partly" if any(map(hub.started, names)) else "no"
    return {
        "target": pair.target,
        "assistant": pair.assistant,
        "bits": pair.bits,
        "download_bytes": pair.download_bytes or None,
        "memory_bytes": pair.memory_bytes or None,
        "fits": pair.memory_bytes <= available if pair.memory_bytes else None,
        "downloaded": downloaded,
        "source": pair.source or None,
    }


def _packaged_row(model: packaged.PackagedModel, available: int) -> dict[str, Any]:
    """A packaged model as `_row` gives a pair; its drafters come with this program."""
    drafter = next(iter(drafters_in(ASSETS / model.name)), None)
    pair = pairs.KnownPair(target=model.name, assistant=drafter, bits=model.bits, weight_bytes=model.weight_bytes,
                           download_bytes=model.download_bytes,
                           source=f"{model.title} ({model.licence}), package {model.requirement}")  # fmt: skip
    return _row(pair, available) | {"downloaded": "yes" if model.here else "no"}


def _cells(row: dict[str, Any]) -> list[str]:
    """The drafter in a line of its own below the model: a terminal of any width can hold that."""
    fits = {None: "?", True: "yes", False: "no"}[row["fits"]]
    return [f"{row['target']}\n{row['assistant'] or 'none'}", *sizes(row), fits, row["downloaded"]]


def sizes(row: dict[str, Any]) -> list[str]:
    """What is downloaded, and the memory that it takes."""
    return [memory.readable(row[key]) if row[key] else "?" for key in ("download_bytes", "memory_bytes")]
