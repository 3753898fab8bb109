"""A stage of training: so many steps on packed ids, with a log and a checkpoint in a folder of its own, resumed there.

What was finished or interrupted before goes on from its checkpoint; a stage that is done yields nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn
import numpy as np

from mlx_mtp.generation.interfaces import Target
from mlx_mtp.training.data import Batches, fingerprint
from mlx_mtp.training.families import FAMILIES
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.trainer import Loss, Progress, Trainer, TrainOptions

DECAY = 0.8  # weight of a draft against the one before it
HELD_OUT_BATCHES = 8


@dataclass(frozen=True)
class Stage:
    """What is being done and how far it is, for whoever shows it; `progress` where something is trained."""

    name: str
    step: int
    steps: int
    progress: Progress | None = None
    figures: Sequence[str] = ()  # names of progress.figures


def run_stage(
    name: str, folder: Path, module: nn.Module, loss: Loss, train_ids: np.ndarray, held_ids: np.ndarray,
    recipe: Recipe, *, steps: int, lookahead: int, figures: tuple[str, ...], rate: float = 1.0, seed: int = 0,
) -> Iterator[Stage]:  # fmt: skip
    """Trains `module` from the weights it has, or from the checkpoint in folder/train-<name>."""
    batches = Batches(train_ids, recipe.batch_size, recipe.length, recipe.seed + seed, lookahead)
    held_size = min(recipe.batch_size, max(1, len(held_ids) // (2 * recipe.length)))
    fixed = Batches(held_ids, held_size, recipe.length, 0, lookahead)
    options = TrainOptions(steps=steps, learning_rate=recipe.learning_rate * rate, **recipe.options)
    trainer = Trainer(
        module, loss, batches.batch, options, folder / f"train-{name}", data=fingerprint(train_ids),
        held_out=[fixed.batch(i) for i in range(min(HELD_OUT_BATCHES, fixed.steps_per_epoch))], figures=figures,
    )  # fmt: skip
    trainer.resume()
    for progress in trainer.run():
        yield Stage(name, progress.step, progress.steps, progress, figures)


def drafter_stage(
    name: str, folder: Path, module: nn.Module, family: str, target: Target, drafts: int, train_ids: np.ndarray,
    held_ids: np.ndarray, recipe: Recipe, *, steps: int, rate: float = 1.0, seed: int = 0,
) -> Iterator[Stage]:  # fmt: skip
    """Trains a drafter to agree with a target that does not change."""
    loss = FAMILIES[family].objective(target, drafts, decay=DECAY, label_share=recipe.label_share)
    figures = tuple(f"agreement_{j + 1}" for j in range(drafts))
    return run_stage(name, folder, module, loss, train_ids, held_ids, recipe, steps=steps, lookahead=drafts,
                     figures=figures, rate=rate, seed=seed)  # fmt: skip
