"""`mlx-mtp adapt`: fine-tunes a drafter to a target on the target's own replies."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

from rich.console import Console

from mlx_mtp.cli import options
from mlx_mtp.cli.loading import fetch
from mlx_mtp.cli.train import Length, show, worth
from mlx_mtp.training.adapt import DEFAULTS
from mlx_mtp.training.adapt import adapt as run
from mlx_mtp.training.families import DrafterShape
from mlx_mtp.training.recipe import Recipe

SHAPE = DEFAULTS.drafters[0]
DATA_HELP = "Prompts: JSONL, JSON (prompt, messages), text, folder or pattern; may be repeated."


def adapt(
    drafter: Annotated[str, options.PairPanel(metavar="NAME", help="Drafter to start from.")],
    data: Annotated[list[str], options.PromptPanel(metavar="FILE", help=DATA_HELP)],
    out: Annotated[
        Path, options.OutputPanel(metavar="FOLDER", help="For the adapted drafter; OUT.work keeps chats and log.")
    ],
    model: options.Model = None,
    tokens: Annotated[int, Length(help="Tokens of self-generated data.")] = DEFAULTS.tokens,
    steps: Annotated[int, Length(help="Training steps.")] = DEFAULTS.drafter_steps,
    batch_size: Annotated[int, Length(help="Sequences per step.")] = DEFAULTS.batch_size,
    length: Annotated[int, Length(help="Tokens per sequence.")] = DEFAULTS.length,
    learning_rate: Annotated[float, Length(help="Highest learning rate.")] = DEFAULTS.learning_rate,
    drafts: Annotated[int, Length(help="Drafts a round: trained for, and measured with.")] = SHAPE.drafts,
    seed: Annotated[int, Length(help="Seed of replies and batches.")] = DEFAULTS.seed,
) -> None:
    """Fine-tune a drafter to a target; the answers stay the target's own, they only come faster.

    Examples:
      mlx-mtp adapt -m smollm2 --drafter my-drafter --data prompts.jsonl --out adapted
      mlx-mtp adapt -m smollm2 --drafter my-drafter --data notes --out adapted --steps 50 --tokens 20000
    """
    recipe = Recipe(data=tuple(data), drafters=(DrafterShape(drafts=drafts),), drafter_steps=steps, tokens=tokens,
                    batch_size=batch_size, length=length, learning_rate=learning_rate, seed=seed)  # fmt: skip
    console = Console(stderr=True)
    console.print(f"Adapting into {out}; Ctrl-C saves.", soft_wrap=True)
    fetch(model)
    print(worth(show(run(model, drafter, out, recipe), console, shlex.join(["mlx-mtp", *sys.argv[1:]])), model))
