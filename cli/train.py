"""`mlx-mtp train`: drafters of every family, on a finished target or beside a small one of their own."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mlx_mtp.cli import options
from mlx_mtp.cli.loading import fetch
from mlx_mtp.errors import OptionError
from mlx_mtp.training.families import FAMILIES, SIZED, DrafterShape
from mlx_mtp.training.optimizers import OPTIMIZERS
from mlx_mtp.training.pipeline import train as run
from mlx_mtp.training.recipe import FILE, Recipe
from mlx_mtp.training.stages import Report
from mlx_mtp.training.trainer import Returned, Stage, followed

DEFAULTS, SHAPE = Recipe(), DrafterShape()
Output = partial(typer.Option, rich_help_panel="The run")
Model = partial(typer.Option, rich_help_panel="The model")
Drafter = partial(typer.Option, rich_help_panel="The drafter")
Length = partial(typer.Option, rich_help_panel="How long, and how")
Size = partial(Drafter, show_default="by target")
GIVEN = ("COMMANDLINE", "ENVIRONMENT")  # where an option comes from that is not a default
LOG_SECONDS = 60.0  # between two lines on how far it is, where no terminal shows bars

FAMILY_HELP = f"{', '.join(FAMILIES)} (may be repeated), or none."
TARGET_HELP = "Finished target, a folder, a hub name or 'smollm2'; it does not change."
START_HELP = "What to go on training: a Gemma 4 target, or with --target a drafter."
SHORTLIST_HELP = "Tokens that heads of the sequential and parallel families propose; 0 = all."
AUX_HELP = "Layers of the target that a sequential module reads beside its last state, or 'none'."
DATA_HELP = "What the target is asked, a small one's texts: JSONL, JSON, text, folder or pattern; may be repeated."
DATA_DEFAULT = "it asks itself; a small one: Python's standard library"


def train(
    context: typer.Context,
    out: Annotated[Path, Output(metavar="FOLDER", help="For checkpoints, logs and what comes out.")],
    resume: Annotated[bool, Output("--resume", help="Go on with the run in --out, which must be there.")] = False,
    target: Annotated[
        str | None,
        Model(metavar="NAME", help=TARGET_HELP, show_default="a small one is trained first",
              autocompletion=options.models),
    ] = None,
    start: Annotated[str | None, Model(metavar="NAME", help=START_HELP, show_default="a new one")] = None,
    joint: Annotated[bool, Model("--joint", help="Train the small target and its heads with one loss.")] = False,
    vocabulary: Annotated[int, Model(help="Pieces of the small target's tokenizer.")] = DEFAULTS.vocabulary,
    family: Annotated[
        list[str] | None,
        Drafter(metavar="NAME", help=FAMILY_HELP, show_default=SHAPE.family,
                autocompletion=lambda: [*FAMILIES, "none"]),
    ] = None,
    drafts: Annotated[int, Drafter(help="Drafts a round it is trained for; parallel: its heads.")] = SHAPE.drafts,
    modules: Annotated[int, Drafter(help="Modules of the sequential family.")] = SHAPE.modules,
    width: Annotated[int | None, Size(help="Hidden size of an assistant.")] = SHAPE.width,
    inner: Annotated[int | None, Size(help="Hidden size of feed-forward layers.")] = SHAPE.inner,
    shortlist: Annotated[int, Drafter(help=SHORTLIST_HELP)] = SHAPE.shortlist,
    aux_layers: Annotated[str | None, Size(metavar="N,N", help=AUX_HELP)] = None,
    data: Annotated[list[str] | None, Length(metavar="FILE", help=DATA_HELP, show_default=DATA_DEFAULT)] = None,
    tokens: Annotated[int, Length(help="Tokens of self-generated data.")] = DEFAULTS.tokens,
    target_steps: Annotated[int, Length(help="Steps of the small target.")] = DEFAULTS.target_steps,
    drafter_steps: Annotated[int, Length(help="Most steps of a drafter.")] = DEFAULTS.drafter_steps,
    batch_size: Annotated[int, Length(help="Sequences per step.")] = DEFAULTS.batch_size,
    length: Annotated[int, Length(help="Tokens per sequence.")] = DEFAULTS.length,
    learning_rate: Annotated[float, Length(help="Highest learning rate.")] = DEFAULTS.learning_rate,
    optimizer: Annotated[
        str, Length(metavar="NAME", help=f"{' or '.join(OPTIMIZERS)}.", autocompletion=lambda: list(OPTIMIZERS))
    ] = DEFAULTS.optimizer,
    accumulate: Annotated[int, Length(help="Parts in which a batch goes through.")] = DEFAULTS.accumulate,
    seed: Annotated[int, Length(help="Seed of weights and batches.")] = DEFAULTS.seed,
) -> None:
    """Train drafters for a finished target, or a small Gemma-4-shaped target and drafters for it.

    Examples:
      mlx-mtp train --target smollm2 --family sequential --out runs/smollm2
      mlx-mtp train --out runs/smollm2 --resume
      mlx-mtp train --family assistant --family parallel --data my-texts --out runs/small
    """
    said = {name: value for name, value in context.params.items()
            if (source := context.get_parameter_source(name)) and source.name in GIVEN}  # fmt: skip
    recipe = _recipe(Recipe.read(out) if resume or (out / FILE).exists() else DEFAULTS, said)
    console = Console(stderr=True)
    console.print(f"Training into {out}; Ctrl-C saves.", soft_wrap=True)
    fetch(recipe.target)
    reports = show(run(out, recipe), console, shlex.join(["mlx-mtp", "train", "--out", str(out)]))
    console.print(f"Done; all of it is in {out}.", soft_wrap=True)
    for report in reports:
        print(worth(report, recipe.target or str(out / "target")))


def _recipe(known: Recipe, said: Mapping[str, Any]) -> Recipe:
    """A recipe with what the command line says of it; of a run that was begun, another value is refused later."""
    asked = list(said.get("family", [shape.family for shape in known.drafters]))
    shapes = {name: DrafterShape(family=name) for name in asked if asked != ["none"]}
    shapes |= {shape.family: shape for shape in known.drafters if shape.family in shapes}
    sizes = {name: said[name] for name in said.keys() & (SIZED | {"drafts"})}
    if sizes and not shapes:
        raise OptionError(f"No drafter is trained that could have {sorted(sizes)[0]}; leave the option out.")
    if "aux_layers" in sizes:
        sizes["aux_layers"] = _layers(sizes["aux_layers"])
    # What only another of the families has is not meant for this one; what none of them has is refused.
    of = {name: FAMILIES[name].sized for name in shapes}
    meant = {name: sizes.keys() - (set().union(*of.values()) - of[name]) for name in shapes}
    drafters = tuple(replace(shape, **{size: sizes[size] for size in meant[name]}) for name, shape in shapes.items())
    rest = {field.name: said[field.name] for field in fields(Recipe) if field.name in said}
    return replace(known, **rest | {"drafters": drafters, "data": tuple(said.get("data", known.data))})


def _layers(text: str) -> tuple[int, ...]:
    """Numbers of layers as they were typed."""
    try:
        return () if text == "none" else tuple(map(int, text.split(",")))
    except ValueError as error:
        raise OptionError(f"--aux-layers takes numbers of layers, such as 10,20, or none, not '{text}'.") from error


def worth(report: Report, target: str | None) -> str:
    """What a drafter makes of its target's passes, and how to use it."""
    return (
        f"{report.folder}: {report.before:.2f} tokens per round before, {report.after:.2f} after, on {report.prompts} "
        f"held-out prompts at depth {report.depth}.\n"
        f"Next: mlx-mtp chat{f' --model {target}' if target else ''} --drafter {report.folder}"
    )


def show(stages: Generator[Stage, None, Returned], console: Console, command: str) -> Returned:
    """Runs stages to their end with a bar for each; what they return. command: what goes on after an interrupt."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    goes_on = f"Stopped; what was done is kept. To go on: {command}"
    tasks: dict[str, TaskID] = {}
    next_line = 0.0

    def hear(stage: Stage) -> None:
        nonlocal next_line
        if stage.name not in tasks:
            tasks[stage.name] = bars.add_task(stage.name, total=stage.steps)
        line = stage.name
        if stage.figures:
            line += f": loss {stage.figures['loss']:.3f}, {stage.tokens_per_second:,.0f} tokens/s"
        bars.update(tasks[stage.name], completed=stage.step, description=line)
        if not console.is_interactive and time.monotonic() >= next_line:
            console.print(f"{line}, {stage.step:,} of {stage.steps:,}", soft_wrap=True)
            next_line = time.monotonic() + LOG_SECONDS
        if stage.held_out:
            figures = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in stage.held_out.items())
            bars.console.print(f"{stage.name} step {stage.step}, held out: {figures}", soft_wrap=True)

    with answered(console, goes_on), Progress(*columns, console=console) as bars, closing(stages):
        return followed(stages, hear)


@contextmanager
def answered(console: Console, goes_on: str) -> Iterator[None]:
    """Within: Ctrl-C is answered at once, though what is being computed must end first; another one ends the process.

    Python's own handlers wait for MLX, so a thread hears of the signal. goes_on: the last words after an interrupt.
    """
    heard, told = socket.socketpair()
    told.setblocking(False)

    def answer() -> None:
        if heard.recv(1):
            console.print("Stopping once this step is done and saved; Ctrl-C again does not wait.", soft_wrap=True)
        if heard.recv(1):
            console.show_cursor()
            console.print(goes_on, soft_wrap=True)
            os._exit(130)

    thread = threading.Thread(target=answer, daemon=True)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        console.print(goes_on, soft_wrap=True)
        raise
    finally:
        signal.set_wakeup_fd(before)
        told.close()
        thread.join()
        heard.close()
