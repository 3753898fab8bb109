"""`mlx-mtp train`: drafters of every family, on a finished target or beside a small one of their own."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mlx_mtp.errors import OptionError
from mlx_mtp.training.families import FAMILIES, DrafterShape
from mlx_mtp.training.optimizers import OPTIMIZERS
from mlx_mtp.training.pipeline import Recipe, Stage
from mlx_mtp.training.pipeline import train as run
from mlx_mtp.training.trainer import TrainOptions

DEFAULTS, SHAPE, OPTIONS = Recipe(), DrafterShape(), TrainOptions(steps=1)
MODEL = "The model"
DRAFTER = "The drafter"
LENGTH = "How long, and how"
GIVEN = ("COMMANDLINE", "ENVIRONMENT")  # where an option comes from that is not a default
Returned = TypeVar("Returned")


def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and what comes out.")],
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, with its own options.")
    ] = False,
    target: Annotated[
        str | None,
        typer.Option(help="Finished target, a folder or a hub name; it does not change.", rich_help_panel=MODEL,
                     show_default="a small one is trained first"),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="What to go on training: a Gemma 4 target, or with --target a drafter.",
                     rich_help_panel=MODEL, show_default="a new one"),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="Train the small target and its heads with one loss.", rich_help_panel=MODEL)
    ] = False,
    vocabulary: Annotated[
        int, typer.Option(help="Pieces of the small target's tokenizer.", rich_help_panel=MODEL)
    ] = DEFAULTS.vocabulary,
    family: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(FAMILIES)} (may be repeated), or none.", show_default=SHAPE.family,
                     rich_help_panel=DRAFTER),
    ] = None,
    drafts: Annotated[
        int, typer.Option(help="Drafts a round it is trained for; parallel: its heads.", rich_help_panel=DRAFTER)
    ] = SHAPE.drafts,
    modules: Annotated[
        int, typer.Option(help="Modules of the sequential family.", rich_help_panel=DRAFTER)
    ] = SHAPE.modules,
    width: Annotated[
        int | None, typer.Option(help="Hidden size of an assistant.", show_default="by target", rich_help_panel=DRAFTER)
    ] = SHAPE.width,
    inner: Annotated[
        int | None,
        typer.Option(help="Hidden size of feed-forward layers.", show_default="by target", rich_help_panel=DRAFTER),
    ] = SHAPE.inner,
    label_share: Annotated[
        float,
        typer.Option(help="Share of the loss on the text's own tokens, the rest on the target's distribution.",
                     rich_help_panel=DRAFTER),
    ] = DEFAULTS.label_share,
    sampled_share: Annotated[
        float,
        typer.Option(help="Share of what the target itself writes that is drawn at temperature 1, the rest greedily.",
                     rich_help_panel=DRAFTER),
    ] = DEFAULTS.sampled_share,
    rehearsal: Annotated[
        float, typer.Option(help="Share of the data beside what the target itself writes.", show_default="a third",
                            rich_help_panel=DRAFTER)
    ] = DEFAULTS.rehearsal,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSONL, JSON, folder or pattern; may be repeated.",
                     show_default="Python's standard library", rich_help_panel=LENGTH),
    ] = None,
    target_steps: Annotated[
        int, typer.Option(help="Steps of the small target.", rich_help_panel=LENGTH)
    ] = DEFAULTS.target_steps,
    drafter_steps: Annotated[
        int, typer.Option(help="Steps of a drafter on the data.", rich_help_panel=LENGTH)
    ] = DEFAULTS.drafter_steps,
    agreement_steps: Annotated[
        int, typer.Option(help="Steps of a drafter on what the target itself writes.", rich_help_panel=LENGTH)
    ] = DEFAULTS.agreement_steps,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.", rich_help_panel=LENGTH)] = DEFAULTS.batch_size,
    length: Annotated[int, typer.Option(help="Tokens per sequence.", rich_help_panel=LENGTH)] = DEFAULTS.length,
    learning_rate: Annotated[
        float, typer.Option(help="Highest learning rate.", rich_help_panel=LENGTH)
    ] = DEFAULTS.learning_rate,
    optimizer: Annotated[
        str, typer.Option(help=f"{' or '.join(OPTIMIZERS)}.", rich_help_panel=LENGTH)
    ] = OPTIONS.optimizer,
    accumulate: Annotated[
        int, typer.Option(help="Parts in which a batch goes through, to save memory.", rich_help_panel=LENGTH)
    ] = OPTIONS.accumulate,
    checkpoint_gradients: Annotated[
        bool, typer.Option("--checkpoint-gradients", help="Run layers again for the gradient, to save memory.",
                           rich_help_panel=LENGTH)
    ] = False,
    memory_saving: Annotated[
        bool, typer.Option("--memory-saving", help="Keep MLX's CPU backend from working ahead.",
                           rich_help_panel=LENGTH)
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="float32 or bfloat16 while training.", rich_help_panel=LENGTH)
    ] = OPTIONS.dtype,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.", rich_help_panel=LENGTH)] = DEFAULTS.seed,
) -> None:
    """Train drafters for a finished target, or a small Gemma-4-shaped target and drafters for it."""
    if not resume and (out / "recipe.json").exists():
        raise OptionError(f"{out} holds a run already; add --resume to go on with it, or choose another folder.")
    shapes = tuple(
        DrafterShape(family=name, drafts=drafts, modules=modules, width=width, inner=inner)
        for name in ([] if family == ["none"] else family or [SHAPE.family])
    )
    asked = Recipe(
        drafters=shapes, target=target, start=start, joint=joint, target_steps=target_steps,
        drafter_steps=drafter_steps, agreement_steps=agreement_steps, batch_size=batch_size, length=length,
        learning_rate=learning_rate, label_share=label_share, sampled_share=sampled_share,
        rehearsal=rehearsal, seed=seed, vocabulary=vocabulary, data=tuple(data or ()),
        options={"optimizer": optimizer, "accumulate": accumulate, "checkpoint_gradients": checkpoint_gradients,
                 "memory_saving": memory_saving, "dtype": dtype},
    )  # fmt: skip
    recipe = _resumed(context, out, asked) if resume else asked
    console = Console(stderr=True)
    console.print(f"Training into {out} (Ctrl-C saves; mlx-mtp train --out {out} --resume goes on).", soft_wrap=True)
    show(run(out, recipe), console)
    made = [out / "target"] if recipe.target is None else []
    console.print(f"Done: {', '.join(str(path) for path in [*made, *(out / s.family for s in recipe.drafters)])}.",
                  soft_wrap=True)  # fmt: skip


def _resumed(context: typer.Context, out: Path, asked: Recipe) -> Recipe:
    """The recipe of the run in `out`; OptionError where an option on the command line asks for something else."""
    recipe = Recipe.read(out)
    given = {name for name in context.params if (source := context.get_parameter_source(name)) and source.name in GIVEN}
    given |= {"drafters"} if given & {field.name for field in fields(DrafterShape)} else set()
    given |= {"options"} if given & asked.options.keys() else set()
    if changed := sorted(given & set(recipe.differs(asked))):
        raise OptionError(
            f"Expected beside --resume nothing else than the run in {out} began with, found another value of "
            f"{', '.join(changed)}; leave it out, or train into another folder."
        )
    return recipe


def show(stages: Generator[Stage, None, Returned], console: Console) -> Returned:
    """Runs stages to their end with a bar for each, and returns what they return; an interrupt saves first."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}
        try:
            while True:
                stage = next(stages)
                if stage.name not in tasks:
                    tasks[stage.name] = bars.add_task(stage.name, total=stage.steps)
                _update(bars, tasks[stage.name], stage)
        except StopIteration as end:
            returned: Returned = end.value
            return returned
        finally:
            stages.close()


def _update(bars: Progress, task: TaskID, stage: Stage) -> None:
    at = stage.progress
    line = f"{stage.name}: loss {at.loss:.3f}, {at.tokens_per_second:,.0f} tokens/s" if at else stage.name
    bars.update(task, completed=stage.step, description=line)
    if at and at.held_out is not None:
        named = zip(("loss", *stage.figures), at.held_out, strict=False)
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in named)
        bars.console.print(f"{stage.name} step {at.step}, held out: {figures}", soft_wrap=True)
