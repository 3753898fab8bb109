"""`mlx-mtp doctor`: what decides the speed here, measured, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console

from mlx_mtp.cli import options
from mlx_mtp.cli.loading import load
from mlx_mtp.errors import MLXMTPError, OptionError
from mlx_mtp.generation.depth_profile import forget, profile_path
from mlx_mtp.generation.exactness import Exactness
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.advice import Advice, advise
from mlx_mtp.measuring.diagnosis import Diagnosis, diagnose
from mlx_mtp.measuring.machine import Machine
from mlx_mtp.measuring.summary import stored
from mlx_mtp.measuring.tables import Table, facts


def doctor(
    model: options.Model = None,
    drafter: options.Drafter = "auto",
    mode: options.Mode = "fast",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    forgetting: Annotated[
        bool, typer.Option("--forget", help="Measure nothing; drop what earlier runs learned of every pair.")
    ] = False,
) -> None:
    """Measure this machine with a pair, and say what to expect."""
    if forgetting:
        if (model, drafter, mode) != (None, "auto", "fast"):
            raise OptionError("Expected --forget without --model, --drafter and --mode; it drops all that was learned.")
        return _forget(as_json)
    console = Console(stderr=True)
    engine = load(model, drafter, mode=mode)
    with console.status("measuring") as status:
        found = diagnose(engine, on_step=status.update)
    advice = advise(found)
    if as_json:
        print(json.dumps(found.as_dict() | {"advice": [asdict(one) for one in advice]}))
    else:
        report(Console(), found, advice)


def _forget(as_json: bool) -> None:
    """Drops the profiles of the depth control, and says whose they were."""
    path = profile_path()
    try:
        dropped = forget(path)
    except OSError as error:
        raise MLXMTPError(f"What was learned could not be dropped ({error}); remove {path} yourself.") from None
    if as_json:
        print(json.dumps({"forgotten": dropped}))
    elif dropped:
        print("Forgotten what rounds cost and how often drafts were accepted of:", *dropped, sep="\n  ")
    else:
        print("Nothing was learned yet, so there was nothing to forget.")


def report(console: Console, found: Diagnosis, advice: list[Advice]) -> None:
    """Prints everything that was found, and what it means."""
    parts = [_machine(found.machine), _pair(found), _curve(found), _pieces(found), _choices(found)]
    tables.show(console, [*parts, f"depth: {found.depth_reason}", *(f"{one.topic}: {one.text}" for one in advice)])


def _machine(here: Machine) -> Table:
    generation = f", GPU generation {here.gpu_generation}" if here.gpu_generation else ""
    return facts("Machine", {
        "chip": f"{here.name} ({here.architecture}{generation}), {here.cores} cores",
        "system": here.system,
        "MLX device": here.device.upper() + (" (Metal)" if here.metal else ", which says nothing of a Mac's GPU"),
        "memory": _size(here.memory_bytes),
        "recommended": _size(here.recommended_bytes),
        "wired limit": _size(here.wired_limit_bytes),
        "versions": f"mlx_mtp {here.mlx_mtp}, MLX {here.mlx}, mlx-lm {here.mlx_lm}",
        "BLAS": here.blas if here.device == "cpu" else None,
        "mx.compile": "works" if here.compile_works else "off",
        "low power": None if here.low_power_mode is None else "on" if here.low_power_mode else "off",
    })  # fmt: skip


def _pair(found: Diagnosis) -> Table:
    pair = found.pair
    drafter = "none"
    if pair.family:
        drafter = pair.family
        if pair.drafter_bytes:
            drafter += f", {_size(pair.drafter_bytes)}, {stored(map(asdict, pair.drafter_quantisation))}"
    experts = ", mixture of experts" if pair.mixture else ""
    return facts("Pair", {
        "target": f"{_size(pair.bytes)}, {stored(map(asdict, pair.quantisation))}{experts}",
        "folder": pair.path,
        "drafter": drafter,
        "mode": found.mode,
    })  # fmt: skip


def _curve(found: Diagnosis) -> Table:
    """Times of passes, and which of them give a row the bits it has alone."""
    rows = []
    for width, seconds in enumerate(found.costs.verify, 1):
        same = "" if width == 1 else "yes" if width in found.exactness.equal_widths else "no"
        rows.append([str(width), f"{1e3 * seconds:.2f}", f"{found.costs.ratio(width):.2f}", same])
    title = f"Passes over the target after {found.costs.context} tokens"
    return Table(title, ("rows", "ms", "ratio", "same bits as one row"), rows)


def _pieces(found: Diagnosis) -> Table:
    costs, exact = found.costs, found.exactness
    build = f"{1e3 * costs.build:.2f} ms to build a round in Python"
    if found.machine.device == "gpu":  # on a CPU the device's own work is in it
        build += f", up to {1e3 * costs.submit:.2f} ms to hand it over"
    drafted = costs.drafted
    return facts("Round", {
        "plain": f"{1e3 * costs.plain:.2f} ms",
        f"{costs.drafted_depth} drafts": None if drafted is None else f"{1e3 * drafted:.2f} ms",
        "draft step": None if costs.draft_step is None else f"{1e3 * costs.draft_step:.2f} ms",
        "host": build,
        "exact mode": _way(exact),
    } | {f"room for {size:,} tokens": _way(way) for size, way in found.by_capacity.items()})  # fmt: skip


def _way(exact: Exactness) -> str:
    """How exact mode drafts, or that it does not."""
    if exact.width:
        return f"by filling every pass to {exact.width} rows"
    if not exact.possible:
        return "decodes plainly: no pass of several rows gives the same bits"
    return f"by passes of 1, {', '.join(map(str, exact.equal_widths))} rows, which give the same bits"


def _choices(found: Diagnosis) -> Table:
    """Predictions: expected tokens over the measured times, as the depth control computes them."""
    rows = [[f"{one.acceptance:.0%}", str(one.depth), f"{one.tokens_per_round:.2f}", f"{one.speed_up:.2f}"]
            for one in found.choices]  # fmt: skip
    return Table("Depth it would choose (estimate, against plain decoding in this mode)",
                 ("drafts accepted", "depth", "tokens a round", "times plain"), rows)  # fmt: skip


def _size(count: int | None) -> str | None:
    if count is None:
        return None
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
