"""`mlx-mtp adapt`: fine-tunes a drafter to a target on the target's own replies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mlx_mtp.cli.train import show, worth
from mlx_mtp.training import adapt as library
from mlx_mtp.training.adapt import Adapting

DEFAULTS = Adapting()


def adapt(
    drafter: Annotated[str, typer.Option(help="Drafter to start from: a folder or a hub name.")],
    data: Annotated[
        list[str], typer.Option(help="Prompts: JSONL, JSON (prompt, messages), text, folder or pattern; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the adapted drafter; OUT.work keeps chats and log.")],
    model: Annotated[
        str | None, typer.Option(help="Target, a folder or a hub name.", show_default="the embedded model")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Most prompts that the target answers.")] = DEFAULTS.prompts,
    tokens: Annotated[int, typer.Option(help="Tokens of self-generated data.")] = DEFAULTS.tokens,
    steps: Annotated[int, typer.Option(help="Training steps.")] = DEFAULTS.steps,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = DEFAULTS.batch_size,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = DEFAULTS.length,
    learning_rate: Annotated[float, typer.Option(help="Highest learning rate.")] = DEFAULTS.learning_rate,
    drafts: Annotated[int, typer.Option(help="Drafts a round it is trained for.")] = DEFAULTS.drafts,
    depth: Annotated[int, typer.Option(help="Drafts a round when measuring before and after.")] = DEFAULTS.depth,
    seed: Annotated[int, typer.Option(help="Seed of replies and batches.")] = DEFAULTS.seed,
) -> None:
    """Fine-tune a drafter to a target; the answers stay the target's own, they only come faster."""
    options = Adapting(prompts=prompts, tokens=tokens, steps=steps, batch_size=batch_size, length=length,
                       learning_rate=learning_rate, drafts=drafts, depth=depth, seed=seed)  # fmt: skip
    console = Console(stderr=True)
    console.print(f"Adapting into {out} (Ctrl-C saves; the same command goes on).", soft_wrap=True)
    print(worth(show(library.adapt(model, drafter, out, data, options), console), model))
