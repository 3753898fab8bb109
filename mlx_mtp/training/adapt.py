"""Fine-tuning a drafter to a target: the target's own replies to the user's prompts are what it learns to foresee.

The target chats, the drafter is trained on that, tokens per round are measured before and after on held-out prompts,
and the new drafter is written only where it is the better one. The target, and so what it answers, is never changed. A
drafter loses acceptance where its target was quantised or fine-tuned; self-generated data win it back (FastMTP, arXiv
2509.18362, section 3.2).

    out/                       the new drafter
    out.work/<chats>/          what one target wrote to one set of prompts, with one seed
    out.work/<chats>/<run>/    log and checkpoint of one drafter and one set of options
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path

import mlx_mtp
from mlx_mtp.checkpoints.atomic import replacing_or_refused
from mlx_mtp.checkpoints.checkpoint import read_config, read_json
from mlx_mtp.drafters.assistant import Assistant
from mlx_mtp.drafters.parallel import Parallel
from mlx_mtp.drafters.sequential import Sequential
from mlx_mtp.engine import Engine
from mlx_mtp.errors import MLXMTPError, OptionError
from mlx_mtp.training import stages
from mlx_mtp.training.families import MODEL_TYPES, DrafterShape, family_of
from mlx_mtp.training.pipeline import check_stages, data_of
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.run_folder import hashed, locked, model_digest
from mlx_mtp.training.stages import Report
from mlx_mtp.training.trainer import Stage

DEFAULTS = Recipe(tokens=200_000, drafter_steps=400, length=384)


class NotBetter(MLXMTPError):
    """The adapted drafter is no better than the one there is; nothing was replaced."""


def adapt(model: str | Path | None, drafter: str | Path, out: Path, recipe: Recipe) -> Generator[Stage, None, Report]:
    """Writes to `out` a drafter that started as `drafter` and was fine-tuned to `model` on prompts from recipe.data.

    Of the recipe's own drafter only `drafts` counts: for how many a round it is trained and measured; one with heads
    takes no other number than theirs. NotBetter where it accepts no more than `drafter`, or than the drafter that `out`
    holds. Resumes what an earlier call left in `out`.work. All data are checked before the target is asked anything.
    """
    out = Path(os.path.abspath(out))  # so that it has a name, whatever was given
    _check_place(out)
    work = out.with_name(f"{out.name}.work")
    with locked(work):
        engine = mlx_mtp.load(model, drafter=drafter, draft_head_bits=0)
        recipe, shape = _recipe(engine, drafter, recipe)
        data = data_of(recipe, engine)
        check_stages(recipe, engine)
        best = 0.0
        if (out / "config.json").exists():
            there = mlx_mtp.load(model, drafter=out, depth=shape.drafts, draft_head_bits=0)
            best = yield from stages.measured("the one there is", there, data.held_prompts)
        # Another target, other prompts or another seed are other chats, and another drafter or option is another run.
        target, source = Path(str(recipe.target)), Path(str(recipe.start))
        aux = stages.aux_layers_of(recipe, engine.target)
        asked = model_digest(target), data.prompts, data.held_prompts, recipe.tokens, recipe.length, recipe.seed, aux
        folder, candidate = work / hashed(asked), work / "candidate"
        chats, held = yield from stages.chats_of(folder, engine, data.prompts, data.held_prompts, recipe)
        options = replace(recipe, target=None, start=None, data=()).saved()
        run = folder / hashed((model_digest(source), options))
        report = yield from stages.make_drafter(run, candidate, engine, shape, recipe, chats, held, data.held_prompts)
        if report.after <= (best := max(best, report.before)):
            raise NotBetter(
                f"The new drafter makes {report.after:.2f} tokens per round on {report.prompts} held-out prompts, the "
                f"one there is {best:.2f}: nothing was replaced; give more prompts, tokens or steps (the new one is in "
                f"{candidate})."
            )
        with replacing_or_refused(out, "free some disk space and go on") as place:
            shutil.copytree(candidate, place)
        return replace(report, folder=out)


def _check_place(folder: Path) -> None:
    """OptionError where a drafter written to `folder` would replace anything but a drafter."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    model_type = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    if model_type not in MODEL_TYPES:
        raise OptionError(f"'{folder}' holds something else than a drafter, which stays; choose another folder.")


def _recipe(engine: Engine, drafter: str | Path, recipe: Recipe) -> tuple[Recipe, DrafterShape]:
    """The recipe with folders of the target and the drafter that were loaded, and the shape of that drafter."""
    if engine.target.path is None or not isinstance(engine.drafter, Assistant | Parallel | Sequential):
        raise OptionError(f"'{drafter}' is no drafter with weights to train; name a folder or hub name.")
    config = read_config(Path(engine.drafter.name) / "config.json")
    drafts = max(shape.drafts for shape in recipe.drafters)
    if drafts == DrafterShape.drafts:  # nobody chose: as many as there are heads
        drafts = config.get("heads", drafts)
    shape = DrafterShape(family=family_of(config, engine.drafter.name), drafts=drafts)
    return replace(recipe, target=str(engine.target.path), start=engine.drafter.name, drafters=(shape,)), shape
