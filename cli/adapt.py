"""`mlx-mtp adapt`: fine-tunes a drafter to a target on the target's own replies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mlx_mtp.cli.train import show, worth
from mlx_mtp.training.adapt import DEFAULTS
from mlx_mtp.training.adapt import adapt as run
from mlx_mtp.training.families import DrafterShape
from mlx_mtp.training.recipe import Recipe

SHAPE = DEFAULTS.drafters[0]


def adapt(
    drafter: Annotated[str, typer.Option(help="Drafter to start from: a folder or a hub name.")],
    data: Annotated[
        list[str], typer.Option(help="Prompts: JSONL, JSON (prompt, messages), text, folder or pattern; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapted drafter; OUT.work keeps chats and log.")],
    model: Annotated[
        str | None, typer.Option(help="Target, a folder or a hub name.", show_default="the embedded model")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of self-generated data.")] = DEFAULTS.tokens,
    steps: Annotated[int, typer.Option(help="Training steps.")] = DEFAULTS.drafter_steps,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = DEFAULTS.batch_size,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = DEFAULTS.length,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = DEFAULTS.learning_rate,
    drafts: Annotated[int, typer.Option(help="Drafts a round: trained for, and measured with.")] = SHAPE.drafts,
    seed: Annotated[int, typer.Option(help="Seed of replies and batches.")] = DEFAULTS.seed,
) -> None:
    """Fine-tune a drafter to a target; the answers stay the target's own, they only come faster."""
    recipe = Recipe(data=tuple(data), drafters=(DrafterShape(drafts=drafts),), drafter_steps=steps, tokens=tokens,
                    batch_size=batch_size, length=length, learning_rate=learning_rate, seed=seed)  # fmt: skip
    console = Console(stderr=True)
    console.print(f"Adapting into {out} (Ctrl-C saves; the same command goes on).", soft_wrap=True)
    print(worth(show(run(model, drafter, out, recipe), console), model))
