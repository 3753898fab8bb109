"""The stages that `train` and `adapt` share: a target writes chats, a module learns, tokens per round are measured.

Every stage has a folder of its own and is resumed there; one that is done yields nothing more.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.engine import Engine
from mlx_mtp.errors import CheckpointError, OptionError
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.training.chats import Chats, Script, write_chats
from mlx_mtp.training.families import FAMILIES, DrafterShape, fresh, prepared, started, write_drafter
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.run_folder import read_log
from mlx_mtp.training.trainer import Stage, Trainer

DECAY = 0.6  # weight of a draft against the one before it
DRAFTER_RATE = 3.0  # a fresh drafter's learning rate against a target's
PATIENCE = 6
HELD_OUT_BATCHES = 8
HELD_OUT_SHARE, MOST_HELD_OUT = 20, 32_768  # tokens held out: one in so many, and at most
MEASURED_PROMPTS, MEASURED_TOKENS = 8, 96


@dataclass(frozen=True)
class Report:
    """Tokens per round before and after, on prompts held out, greedily and at one fixed depth."""

    folder: Path
    before: float
    after: float
    depth: int
    prompts: int


def chats_of(
    folder: Path, engine: Engine, prompts: Sequence[Sequence[int]], held: Sequence[Sequence[int]], recipe: Recipe
) -> Generator[Stage, None, tuple[Chats, Chats]]:
    """Self-generated data in folder/chats and folder/held_out, which share no prompt; what is there is not written
    again. The target asks itself where there are no prompts."""
    if engine.tokenizer is None:
        raise OptionError("The target has no tokenizer to write chats with; choose another.")
    aux = aux_layers_of(recipe, engine.target)
    width = (1 + len(aux)) * engine.target.info.hidden_size
    fewer = max(8 * recipe.length, min(recipe.tokens // HELD_OUT_SHARE, MOST_HELD_OUT))
    made: list[Chats] = []
    for name, given, tokens in (("held_out", held, fewer), ("chats", prompts, recipe.tokens)):
        script = Script.of(engine.tokenizer, given, set(engine.stop_tokens))
        avoided = made[0].questions() if made else frozenset()
        for done, total in write_chats(
            engine.target, script, folder / name, tokens=tokens, length=recipe.length,
            seed=2 * recipe.seed + len(made), avoided=avoided, aux_layers=aux,
        ):  # fmt: skip
            yield Stage("chats held out" if name == "held_out" else name, done, total)
        made.append(Chats(folder / name))
        if made[-1].width != width:
            raise CheckpointError(f"{folder / name} keeps other states than this drafter reads; take another folder.")
    return made[1], made[0]


def aux_layers_of(recipe: Recipe, target: Target) -> tuple[int, ...]:
    """What the drafters of a run read of a finished target's layers; those that read any read the same."""
    if recipe.target and recipe.start:
        configs = [Checkpoint.open(recipe.start).config]
    else:
        configs = [FAMILIES[shape.family].describe(shape, target, recipe.length) for shape in recipe.drafters]
    return next((tuple(config["aux_layers"]) for config in configs if config.get("aux_layers")), ())


def make_drafter(
    run: Path, out: Path, engine: Engine, shape: DrafterShape, recipe: Recipe, chats: Chats, held: Chats,
    asked: Sequence[Sequence[int]],
) -> Generator[Stage, None, Report]:  # fmt: skip
    """Trains a drafter on a finished target's chats, and writes it to `out`; log and checkpoint go to `run`.

    It begins as recipe.start, or fresh. Measured before (1.0 for a fresh one) and after with the prompts `asked`, or
    where there are none with those of the chats held out.
    """
    mx.random.seed(recipe.seed + 1)
    target, start = engine.target, recipe.start if recipe.target else None
    config, module = started(start, shape, target) if start else fresh(shape, target, recipe.length)
    asked = asked or held.prompts(MEASURED_PROMPTS) or chats.prompts(MEASURED_PROMPTS)
    before = 1.0
    if start:
        there = mlx_mtp.load(target.path, drafter=start, depth=shape.drafts, draft_head_bits=0)
        before = yield from measured("before", there, asked)
    yield from drafter_stage(run, module, engine, shape, recipe, chats, held, new=not start)
    write_drafter(out, config, module)
    made = mlx_mtp.load(target.path, drafter=out, depth=shape.drafts, draft_head_bits=0)
    after = yield from measured(f"{shape.family} measured", made, asked)
    return Report(out, before, after, shape.drafts, len(asked))


def drafter_stage(
    run: Path, module: nn.Module, engine: Engine, shape: DrafterShape, recipe: Recipe, chats: Chats, held: Chats, *,
    new: bool,
) -> Iterator[Stage]:  # fmt: skip
    """Trains a drafter to agree with a target that does not change, on its chats; new: from random weights."""
    if new:
        module = prepared(module, chats)
    # An array of its own: a compiled step takes the module's as its input, and the loss needs a constant.
    listed = mx.array(np.array(module.shortlist)) if "shortlist" in module else None
    loss = FAMILIES[shape.family].objective(engine.target, shape.drafts, DECAY, listed)
    figures = tuple(f"accepted_{j + 1}" for j in range(shape.drafts))
    size = min(recipe.batch_size, len(held.tokens))
    fixed = held.batches(size, 0)
    options = recipe.options(recipe.drafter_steps, DRAFTER_RATE if new else 1.0, PATIENCE)
    trainer = Trainer(
        module, loss, chats.batches(recipe.batch_size, recipe.seed, recipe.accumulate), options,
        run / f"train-{shape.family}", data=chats.name,
        held_out=[fixed(i) for i in range(min(HELD_OUT_BATCHES, len(held.tokens) // size))],
        figures=figures, name=shape.family,
    )  # fmt: skip
    for stage in trainer.run():
        if stage.held_out:
            plot(trainer.log_file, figures, recipe.batch_size * recipe.length)
        yield stage


def measured(name: str, engine: Engine, prompts: Sequence[Sequence[int]]) -> Generator[Stage, None, float]:
    """Tokens per round over all prompts, greedily."""
    tokens = rounds = 0
    for i, prompt in enumerate(prompts):
        stats = engine.generate(list(prompt), max_tokens=MEASURED_TOKENS, temperature=0.0).stats
        tokens, rounds = tokens + max(0, stats.tokens - 1), rounds + stats.rounds
        yield Stage(name, i + 1, len(prompts))
    return tokens / max(1, rounds)


def plot(log: Path, figures: Sequence[str], tokens: int) -> None:
    """Draws acceptance by position over tokens seen (`tokens` a step) beside a log, where matplotlib is installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
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
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))  # 1.5M
    axis.grid(alpha=0.3)
    axis.legend()
    picture.savefig(log.with_name("acceptance.png"), dpi=110)
