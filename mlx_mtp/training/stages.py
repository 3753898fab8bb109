"""A stage of training: so many steps with a log and a checkpoint in a folder of its own, resumed there.

What was finished or interrupted before goes on from its checkpoint; a stage that is done yields nothing more.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.engine import Engine
from mlx_mtp.errors import OptionError
from mlx_mtp.generation.types import Sampling
from mlx_mtp.training.chats import Chats, Script, write_chats
from mlx_mtp.training.data import Batches, fingerprint
from mlx_mtp.training.families import FAMILIES, prepared
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.run_folder import read_log
from mlx_mtp.training.trainer import Loss, Progress, Trainer, TrainOptions

DECAY = 0.6  # weight of a draft against the one before it
DRAFTER_RATE = 3.0  # a drafter's learning rate against a target's
PATIENCE = 6
HELD_OUT_BATCHES = 8
HELD_OUT_SHARE, MOST_HELD_OUT = 20, 32_768  # tokens held out: one in so many, and at most
MEASURED_PROMPTS, MEASURED_TOKENS = 8, 96


@dataclass(frozen=True)
class Stage:
    """What is being done and how far it is, for whoever shows it; `progress` where something is trained."""

    name: str
    step: int
    steps: int
    progress: Progress | None = None
    figures: Sequence[str] = ()  # names of progress.figures


@dataclass(frozen=True)
class Report:
    """Tokens per round before and after, on prompts held out, greedily and at one fixed depth."""

    folder: Path
    before: float
    after: float
    depth: int
    prompts: int


def run_stage(
    name: str, folder: Path, module: nn.Module, loss: Loss, train_ids: np.ndarray, held_ids: np.ndarray,
    recipe: Recipe, *, steps: int, lookahead: int, figures: tuple[str, ...],
) -> Iterator[Stage]:  # fmt: skip
    """Trains `module` on packed ids from the weights it has, or from the checkpoint in folder/train-<name>."""
    batches = Batches(train_ids, recipe.batch_size, recipe.length, recipe.seed, lookahead)
    held_size = min(recipe.batch_size, max(1, len(held_ids) // (2 * recipe.length)))
    fixed = Batches(held_ids, held_size, recipe.length, 0, lookahead)
    options = TrainOptions(steps=steps, learning_rate=recipe.learning_rate, **recipe.options)
    trainer = Trainer(
        module, loss, batches.batch, options, folder / f"train-{name}", data=fingerprint(train_ids),
        held_out=[fixed.batch(i) for i in range(min(HELD_OUT_BATCHES, fixed.steps_per_epoch))], figures=figures,
    )  # fmt: skip
    trainer.resume()
    for progress in trainer.run():
        yield Stage(name, progress.step, progress.steps, progress, figures)


def chats_of(
    folder: Path, engine: Engine, prompts: Sequence[Sequence[int]], held: Sequence[Sequence[int]], recipe: Recipe
) -> Generator[Stage, None, tuple[Chats, Chats]]:
    """Self-generated data in folder/chats and folder/held_out, which share no prompt; what is there is not written
    again. The target asks itself where there are no prompts."""
    if engine.tokenizer is None:
        raise OptionError("The target has no tokenizer to write chats with; choose another.")
    fewer = max(8 * recipe.length, min(recipe.tokens // HELD_OUT_SHARE, MOST_HELD_OUT))
    made: list[Chats] = []
    for name, given, tokens in (("held_out", held, fewer), ("chats", prompts, recipe.tokens)):
        script = Script.of(engine.tokenizer, given, set(engine.stop_tokens))
        avoided = made[0].questions() if made else frozenset()
        for done, total in write_chats(
            engine.target, script, folder / name, tokens=tokens, length=recipe.length,
            seed=2 * recipe.seed + len(made), avoided=avoided,
        ):  # fmt: skip
            yield Stage("chats held out" if name == "held_out" else name, done, total)
        made.append(Chats(folder / name))
    return made[1], made[0]


def drafter_stage(
    name: str, folder: Path, module: nn.Module, family: str, engine: Engine, drafts: int, chats: Chats, held: Chats,
    recipe: Recipe, *, fresh: bool,
) -> Iterator[Stage]:  # fmt: skip
    """Trains a drafter to agree with a target that does not change, on its chats; fresh: from random weights."""
    if fresh:
        module = prepared(module, chats)
    # An array of its own: a compiled step takes the module's as its input, and the loss needs a constant.
    listed = mx.array(np.array(module.shortlist)) if "shortlist" in module else None
    loss = FAMILIES[family].objective(engine.target, drafts, DECAY, listed)
    figures = tuple(f"accepted_{j + 1}" for j in range(drafts))
    options = TrainOptions(steps=recipe.drafter_steps, patience=PATIENCE, **recipe.options,
                           learning_rate=recipe.learning_rate * (DRAFTER_RATE if fresh else 1.0))  # fmt: skip
    size = min(recipe.batch_size, len(held.tokens))
    fixed = held.batches(size, 0)
    trainer = Trainer(
        module, loss, chats.batches(recipe.batch_size, recipe.seed), options, folder / f"train-{name}",
        data=chats.name, figures=figures,
        held_out=[fixed(i) for i in range(min(HELD_OUT_BATCHES, len(held.tokens) // size))],
    )  # fmt: skip
    trainer.resume()
    for progress in trainer.run():
        if progress.held_out is not None:
            plot(trainer.log_file, figures, recipe.batch_size * recipe.length)
        yield Stage(name, progress.step, progress.steps, progress, figures)


def measured(name: str, engine: Engine, prompts: Sequence[Sequence[int]]) -> Generator[Stage, None, float]:
    """Tokens per round over all prompts, greedily."""
    tokens = rounds = 0
    for i, prompt in enumerate(prompts):
        sampling = Sampling(temperature=0.0)
        stats = engine.generate(list(prompt), max_tokens=MEASURED_TOKENS, sampling=sampling).stats
        tokens, rounds = tokens + max(0, stats.tokens - 1), rounds + stats.rounds
        yield Stage(name, i + 1, len(prompts))
    return tokens / max(1, rounds)


def plot(log: Path, figures: Sequence[str], tokens: int) -> None:
    """Draws acceptance by position over tokens seen (`tokens` a step) beside a log, where matplotlib is installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return
    rows = [row for row in read_log(log) if "held_out" in row]
    picture = Figure(figsize=(6.5, 4.0), layout="constrained")
    FigureCanvasAgg(picture)  # no pyplot: it would choose a window system and keep the figure alive
    axis = picture.subplots()
    for i, name in enumerate(figures):
        label = f"draft {i + 1} and all before it"
        axis.plot([tokens * row["step"] for row in rows], [row["held_out"][name] for row in rows], "o-", label=label)
    axis.set(xlabel="tokens seen", ylabel="accepted, chats held out", ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend()
    picture.savefig(log.with_name("acceptance.png"), dpi=110)
