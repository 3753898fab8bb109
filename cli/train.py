"""`mlx-mtp train`: a small target and its assistant, of the embedded pair's shapes, on any text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from mlx_mtp.training.embedded import Recipe, Stage, train_embedded

DEFAULTS = Recipe()


def train(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and the finished pair.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSONL, folder or pattern; may be repeated.", show_default="Python's standard library"),
    ] = None,
    target_steps: Annotated[int, typer.Option(help="Steps of the target.")] = DEFAULTS.target_steps,
    drafter_steps: Annotated[int, typer.Option(help="Steps of the assistant on the data.")] = DEFAULTS.drafter_steps,
    agreement_steps: Annotated[
        int, typer.Option(help="Steps of the assistant on what the target itself writes.")
    ] = DEFAULTS.agreement_steps,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = DEFAULTS.batch_size,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = DEFAULTS.length,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = DEFAULTS.learning_rate,
    vocabulary: Annotated[int, typer.Option(help="Pieces of the tokenizer.")] = DEFAULTS.vocabulary,
    seed: Annotated[int, typer.Option(help="Seed of weights and batches.")] = DEFAULTS.seed,
) -> None:
    """Train a small Gemma-4-shaped target and its assistant; run again with the same options to resume."""
    recipe = Recipe(
        target_steps=target_steps, drafter_steps=drafter_steps,
        agreement_steps=agreement_steps, batch_size=batch_size, length=length,
        learning_rate=learning_rate, vocabulary=vocabulary, seed=seed, data=tuple(data or ()),
    )  # fmt: skip
    console = Console(stderr=True)
    console.print(f"Training into {out} (Ctrl-C saves; the same command goes on).")
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}
        stages = train_embedded(out, recipe)
        try:
            for stage in stages:
                if stage.name not in tasks:
                    tasks[stage.name] = bars.add_task(stage.name, total=stage.steps)
                _show(bars, tasks[stage.name], stage)
        finally:
            stages.close()
    console.print(f"Done: {out / 'target'} and {out / 'assistant'}.")


def _show(bars: Progress, task: TaskID, stage: Stage) -> None:
    at = stage.progress
    line = f"{stage.name}: loss {at.loss:.3f}, {at.tokens_per_second:,.0f} tokens/s" if at else stage.name
    bars.update(task, completed=stage.step, description=line)
    if at and at.held_out is not None:
        figures = ", ".join(f"{value:.3f}" for value in at.held_out[1:])
        bars.console.print(f"{stage.name} step {at.step}: held-out loss {at.held_out[0]:.3f}, agreement {figures}")
