"""`mlx-mtp doctor`: what decides the speed here, measured, and what to do about it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlx_mtp.advice import Advice, advise
from mlx_mtp.cli import options
from mlx_mtp.cli.loading import load
from mlx_mtp.depth_profile import forget, profile_path
from mlx_mtp.diagnosis import Diagnosis, Quantisation, diagnose
from mlx_mtp.errors import MLXMTPError, OptionError
from mlx_mtp.machine import Machine


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
    for table in (_machine(found.machine), _pair(found), _curve(found), _pieces(found), _choices(found)):
        console.print(table)
        console.print()
    console.print(Text.assemble(("depth", "bold"), ": ", found.depth_reason))
    for one in advice:
        console.print(Text.assemble((one.topic, "bold"), ": ", one.text))


def _facts(title: str, rows: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    return table


def _machine(here: Machine) -> Table:
    generation = f", GPU generation {here.gpu_generation}" if here.gpu_generation else ""
    return _facts("Machine", {
        "chip": f"{here.name} ({here.architecture}{generation}), {here.cores} cores",
        "system": here.system,
        "MLX device": here.device.upper() + (" (Metal)" if here.metal else ""),
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
            drafter += f", {_size(pair.drafter_bytes)}, {_stored(pair.drafter_quantisation)}"
    experts = ", mixture of experts" if pair.mixture else ""
    return _facts("Pair", {
        "target": f"{_size(pair.bytes)}, {_stored(pair.quantisation)}{experts}",
        "folder": pair.path,
        "drafter": drafter,
        "mode": found.mode,
    })  # fmt: skip


def _stored(kinds: tuple[Quantisation, ...]) -> str:
    """'4-bit affine (groups of 64)', most bytes first."""
    found = [f"{kind.bits}-bit {kind.mode} (groups of {kind.group_size})" for kind in kinds]
    return " and ".join(found) if found else "not quantised"


def _curve(found: Diagnosis) -> Table:
    """Times of passes, and which of them give a row the bits it has alone."""
    table = Table(title=f"Passes over the target behind {found.costs.context} tokens", title_justify="left")
    for column in ("rows", "ms", "ratio", "same bits as one row"):
        table.add_column(column, justify="right")
    for rows, seconds in enumerate(found.costs.verify, 1):
        same = "" if rows == 1 else "yes" if rows in found.exactness.equal_widths else "no"
        table.add_row(str(rows), f"{1e3 * seconds:.2f}", f"{found.costs.ratio(rows):.2f}", same)
    return table


def _pieces(found: Diagnosis) -> Table:
    costs, exact = found.costs, found.exactness
    build = f"{1e3 * costs.build:.2f} ms to build a round in Python"
    if found.machine.device == "gpu":  # on a CPU the device's own work is in it
        build += f", up to {1e3 * costs.submit:.2f} ms to hand it over"
    if exact.width:
        way = f"by filling every pass to {exact.width} rows"
    else:
        way = "by passes that give the same bits" if exact.possible else "not possible here"
    drafted = costs.drafted
    return _facts("Round", {
        "plain": f"{1e3 * costs.plain:.2f} ms",
        f"{costs.drafted_depth} drafts": None if drafted is None else f"{1e3 * drafted:.2f} ms",
        "draft step": None if costs.draft_step is None else f"{1e3 * costs.draft_step:.2f} ms",
        "host": build,
        "exact mode": way,
    })  # fmt: skip


def _choices(found: Diagnosis) -> Table:
    """Predictions: expected tokens over the measured times, as the depth control computes them."""
    table = Table(title="Depth it would choose (estimate, against plain decoding in this mode)", title_justify="left")
    for column in ("drafts that stand", "depth", "tokens a round", "times plain"):
        table.add_column(column, justify="right")
    for one in found.choices:
        row = f"{one.acceptance:.0%}", str(one.depth), f"{one.tokens_per_round:.2f}", f"{one.speed_up:.2f}"
        table.add_row(*row)
    return table


def _size(count: int | None) -> str | None:
    if count is None:
        return None
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
