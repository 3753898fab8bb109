"""From data to checkpoints: tokenizer, target, drafters, in stages that resume.

The small target of small_target.py is trained (or any finished one loaded), and drafters are trained on it or together
with it. A stage that was interrupted goes on, one that is finished is not run again.

    folder/recipe.json  tokenizer/  train-<stage>/  target/  chats/  held_out/  <family>/
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

import mlx_mtp
from mlx_mtp.checkpoints.atomic import replacing, replacing_or_refused
from mlx_mtp.checkpoints.checkpoint import Checkpoint, read_json, write_checkpoint
from mlx_mtp.converting.output import copy_companions
from mlx_mtp.engine import Engine
from mlx_mtp.errors import CheckpointError, DataError, OptionError
from mlx_mtp.targets import load_target
from mlx_mtp.targets.gemma4 import Gemma4Model, Gemma4Target, published_weights
from mlx_mtp.targets.gemma4_config import Gemma4Config
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.data import Batches, Document, files_of, pack, read_documents, split, standard_library
from mlx_mtp.training.families import FAMILIES, QUANTISED, started, write_drafter
from mlx_mtp.training.objective import Joint, next_token_loss
from mlx_mtp.training.prompts import FEWEST, prompts_of
from mlx_mtp.training.recipe import FILE, Recipe
from mlx_mtp.training.run_folder import RESUME, digest, locked, model_digest
from mlx_mtp.training.small_target import target_config, train_tokenizer
from mlx_mtp.training.stages import HELD_OUT_BATCHES, Report, chats_of, make_drafter
from mlx_mtp.training.trainer import Loss, Stage, Trainer

Ids = list[list[int]]


@dataclass(frozen=True)
class Data:
    """Prompts for chats, training and held out, none where the target asks itself; for a small target also texts."""

    prompts: Ids
    held_prompts: Ids
    texts: tuple[Batches, Batches] | None = None


def train(folder: Path, recipe: Recipe) -> Generator[Stage, None, list[Report]]:
    """Makes folder/target (unless the recipe names one) and folder/<family> of every drafter; resumes what is there.

    All data and options are checked before anything is trained; a run that cannot begin leaves nothing in the folder.
    Returns what the drafters that this call made are worth. OptionError where the folder holds a run of another recipe,
    or one on data or models that have changed since.
    """
    with locked(folder):
        engine = mlx_mtp.load(recipe.target, drafter=None) if recipe.target else None
        _check_run(folder, recipe, engine)
        if engine is None and _finished(folder / "target"):
            # As it is on disk: rounded to float16 and back.
            engine = mlx_mtp.load(folder / "target", drafter=None)
        left = [] if recipe.joint else [s for s in recipe.drafters if not _finished(folder / s.family)]
        if engine is not None and not left:
            return []
        with contextlib.ExitStack() as made:
            data = data_of(recipe, engine) if engine is not None else _texts(folder / "tokenizer", recipe, made)
            check_stages(recipe, engine)
            if not (folder / FILE).exists():
                with replacing_or_refused(folder / FILE, RESUME) as file:
                    file.write_text(json.dumps(recipe.saved() | {"inputs": _inputs(recipe, engine)}, indent=2) + "\n")
        if data.texts is not None:
            yield from _train_target(folder, recipe, *data.texts)
        engine = engine or mlx_mtp.load(folder / "target", drafter=None)
        reports = []
        for shape in left:
            chats, held = yield from chats_of(folder, engine, data.prompts, data.held_prompts, recipe)
            reports.append((yield from make_drafter(folder, folder / shape.family, engine, shape, recipe, chats, held,
                                                      data.held_prompts)))  # fmt: skip
        return reports


def _finished(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _inputs(recipe: Recipe, engine: Engine | None) -> dict[str, str]:
    """Hashes of what the run begins with; the target is not one where the run itself makes it."""
    found = {"data": digest(files_of(recipe.data))} if recipe.data else {}
    if recipe.start and Path(recipe.start).is_dir():
        found["start"] = model_digest(Path(recipe.start))
    if recipe.target and engine is not None and engine.target.path:
        found["target"] = model_digest(engine.target.path)
    return found


def _check_run(folder: Path, recipe: Recipe, engine: Engine | None) -> None:
    """OptionError where the folder holds a run of another recipe, or something that this one would take for its own."""
    if not (folder / FILE).exists():
        names = "tokenizer", "target", *(shape.family for shape in recipe.drafters)
        if there := [name for name in names if (folder / name).exists()]:
            raise OptionError(f"'{folder}' holds something named {there[0]} already; train into another folder.")
        return
    if changed := Recipe.read(folder).differs(recipe):
        raise OptionError(
            f"The run in {folder} began with another value of {', '.join(changed)}; use the same, or another folder."
        )
    known = read_json(folder / FILE).get("inputs", {})
    if changed := [name for name, found in _inputs(recipe, engine).items() if known.get(name, found) != found]:
        raise OptionError(
            f"{folder} holds a run whose {changed[0]} has changed since it began; put back what it was, or choose "
            "another folder."
        )


def check_stages(recipe: Recipe, engine: Engine | None) -> None:
    """MLXMTPError for what would stop a later stage: too short a context, families that do not fit."""
    if engine is None:
        if recipe.start:
            _fresh_target(recipe)
        return
    longest = engine.target.info.max_context - recipe.ahead
    if recipe.length > longest:
        raise OptionError(f"length must be at most {longest} in the target's context, not {recipe.length}.")
    for shape in recipe.drafters:
        if recipe.target and recipe.start:
            started(recipe.start, shape, engine.target)
        else:
            FAMILIES[shape.family].describe(shape, engine.target, recipe.length)


def data_of(recipe: Recipe, engine: Engine) -> Data:
    """What a finished target is asked."""
    if engine.tokenizer is None:
        raise OptionError("The target has no tokenizer to read the data with; choose another.")
    documents = _documents(recipe)
    # The recipe's own target has learned rows of any length.
    info = engine.target.info if recipe.target else None
    prompts = prompts_of(documents, engine.tokenizer, recipe.length, info)
    if recipe.target and recipe.data and len(prompts) < FEWEST:
        raise DataError(f"The data hold {len(prompts)} prompts and at least {FEWEST} are needed; give more.")
    return _split(prompts)


def _split(prompts: Ids, texts: tuple[Batches, Batches] | None = None) -> Data:
    learned, held = split(prompts)
    return Data(learned, [ids for ids in held if ids not in learned], texts)


def _documents(recipe: Recipe) -> list[Document]:
    if recipe.data or recipe.target:
        return list(read_documents(recipe.data, prompts=recipe.target is not None))
    return list(standard_library())


def _texts(place: Path, recipe: Recipe, made: contextlib.ExitStack) -> Data:
    """What a small target learns; its tokenizer is made in `place` where it is not there, and kept if `made` ends
    well."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    documents = _documents(recipe)
    learned, held = split(documents)
    if not place.exists():
        place = made.enter_context(replacing(place))
        place.mkdir()
        if recipe.start:
            copy_companions(Path(recipe.start), place)
        else:
            train_tokenizer((document.plain for document in learned), place, recipe.vocabulary)
    tokenizer = Tokenizer.load(place)
    if tokenizer is None:
        raise CheckpointError(f"'{recipe.start}' has no tokenizer to read the data with; start from one that has.")
    ids = [pack(part, load_tokenizer(place)) for part in (learned, held)]
    held_rows = min(recipe.batch_size, max(1, len(ids[1]) // (2 * recipe.length)))
    ahead = recipe.ahead if recipe.joint else 0
    texts = (Batches(ids[0], recipe.batch_size, recipe.length, recipe.seed, ahead),
             Batches(ids[1], held_rows, recipe.length, 0, ahead))  # fmt: skip
    return _split(prompts_of(documents, tokenizer, recipe.length), texts)


def _fresh_target(recipe: Recipe) -> tuple[dict[str, Any], Gemma4Model]:
    """config.json and model of the target to be trained: new, or as `start` left it."""
    mx.random.seed(recipe.seed)
    if recipe.start is None:
        config = target_config(recipe.vocabulary)
        return config, Gemma4Model(Gemma4Config.from_dict(config))
    checkpoint = Checkpoint.open(recipe.start)
    target = load_target(checkpoint)
    if not isinstance(target, Gemma4Target) or any(key in checkpoint.config for key in QUANTISED):
        raise OptionError(
            f"'{recipe.start}' is no Gemma 4 target, or a quantised one; start from one that can be trained."
        )
    return checkpoint.config, target.model


def _train_target(folder: Path, recipe: Recipe, texts: Batches, held: Batches) -> Iterator[Stage]:
    """The target alone, or with its first drafter by one loss."""
    config, model = _fresh_target(recipe)
    loss: Loss = next_token_loss
    module: Any = model
    name, figures = "target", ["accuracy"]
    if recipe.joint:
        (shape,) = recipe.drafters
        family = FAMILIES[shape.family]
        assert family.joint is not None
        described = family.describe(shape, Gemma4Target(model, mx.float32), recipe.length)
        if shape.family == "parallel":
            described["reads"] = "trunk"  # as in the paper: the last layer is the first head's own
        loss = family.joint(shape.drafts)
        name, module = "joint", Joint(model, family.build(described))
        figures += [f"accuracy_{j + 2}" for j in range(shape.drafts)]
    trainer = Trainer(
        module, loss, texts.batch, recipe.options(recipe.target_steps), folder / f"train-{name}", name=name,
        held_out=[held.batch(i) for i in range(min(HELD_OUT_BATCHES, held.steps_per_epoch))], data=texts.name,
        figures=tuple(figures),
    )  # fmt: skip
    yield from trainer.run()
    if recipe.joint:
        write_drafter(folder / shape.family, described, module.drafter)
    out = folder / "target"  # last: that it is there says that all is
    out.mkdir(exist_ok=True)
    copy_companions(folder / "tokenizer", out)
    write_checkpoint(out, config, published_weights(model))
