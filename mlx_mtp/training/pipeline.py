"""From data to checkpoints: tokenizer, target, drafters, in stages that resume.

The data are prepared, the small target of small_target.py is trained (or any finished one loaded), and drafters are
trained on it or together with it. A stage that was interrupted goes on, one that is finished is not run again.

    folder/recipe.json  inputs.json  prompts.json  tokenizer/  train.npy  held_out.npy  train-<stage>/  target/
    folder/chats/  held_out/  <family>/
"""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint, read_json, write_checkpoint
from mlx_mtp.engine import Engine
from mlx_mtp.errors import CheckpointError, DataError, MLXMTPError, OptionError
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.targets import load_target
from mlx_mtp.targets.gemma4 import Gemma4Model, Gemma4Target, published_weights
from mlx_mtp.targets.gemma4_config import Gemma4Config
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.data import Batches, Document, documents_of, files_of, pack, split
from mlx_mtp.training.families import FAMILIES, QUANTISED, DrafterShape, started, trainable, write_drafter
from mlx_mtp.training.objective import Joint, next_token_loss
from mlx_mtp.training.prompts import prompts_of
from mlx_mtp.training.recipe import FILE, Recipe
from mlx_mtp.training.run_folder import digest, locked, model_digest, read_array, write_array, write_json
from mlx_mtp.training.small_target import IDS, TOKENIZER_FILES, target_config, train_tokenizer
from mlx_mtp.training.stages import Report, Stage, chats_of, drafter_stage, measured, run_stage

MEASURED_PROMPTS = 8
PACKED = ("prompts.json", "train.npy", "held_out.npy")
KEPT = (*PACKED, "inputs.json", FILE)
Documents = tuple[list[Document], list[Document]]  # training and held out


@dataclass(frozen=True)
class Data:
    """Packed ids for a small target, training and held out, and prompts for chats, likewise; none where the target asks
    itself."""

    train: np.ndarray
    held_out: np.ndarray
    prompts: list[list[int]]
    held_prompts: list[list[int]]


def train(folder: Path, recipe: Recipe) -> Generator[Stage, None, list[Report]]:
    """Makes folder/target (unless the recipe names one) and folder/<family> of every drafter; resumes what is there.

    All data and options are checked before anything is trained; a run that cannot begin leaves nothing in the folder.
    Returns what the drafters that this call made are worth. OptionError where the folder holds a run of another recipe,
    or one on data or models that have changed since.
    """
    with locked(folder):
        fresh = not (folder / FILE).exists()
        _check_run(folder, recipe, fresh)
        to_train = recipe.target is None and not _finished(folder / "target")
        try:
            documents = _read_inputs(folder, recipe, fresh)
            if not to_train and all(_finished(folder / shape.family) for shape in recipe.drafters):
                return []
            engine = _finished_target(folder, recipe) if recipe.target else None
            data = prepare(folder, recipe, documents, engine)
            _check_stages(recipe, data, engine.target if engine else None)
        except MLXMTPError:
            if fresh:
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)
                for name in KEPT:
                    (folder / name).unlink(missing_ok=True)
            raise
        if to_train:
            yield from (_train_joint if recipe.joint else _train_target)(folder, folder / "target", recipe, data)
        reports = []
        for shape in recipe.drafters:
            if not _finished(folder / shape.family):
                # The target as it is on disk: rounded to float16 and back.
                engine = engine or mlx_mtp.load(folder / "target", drafter=None)
                reports.append((yield from _train_drafter(folder, engine, shape, recipe, data)))
        return reports


def _finished(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _check_run(folder: Path, recipe: Recipe, fresh: bool) -> None:
    """OptionError where the folder holds a run of another recipe, or something that this one would take for its own."""
    if fresh:
        names = *KEPT, "tokenizer", "target", *(shape.family for shape in recipe.drafters)
        if there := [name for name in names if (folder / name).exists()]:
            raise OptionError(f"'{folder}' holds something named {there[0]} already; train into another folder.")
    elif changed := Recipe.read(folder).differs(recipe):
        raise OptionError(
            f"{folder} holds a run with other values of {', '.join(changed)}; use the same, or another folder."
        )


def _read_inputs(folder: Path, recipe: Recipe, fresh: bool) -> Documents:
    """The documents, none where they are packed already; begins the run's record, or compares with it."""
    if fresh:
        write_json(folder / FILE, recipe.saved())
    packed = (folder / PACKED[0]).exists()
    if recipe.data:
        try:
            _compare(folder, "data", digest(files_of(recipe.data)))
        except DataError:
            if not packed:
                raise  # else the run goes on with what it has kept of data that are gone
    if recipe.start and Path(recipe.start).is_dir():
        _compare(folder, "start", model_digest(Path(recipe.start)))
    unasked = recipe.target and not recipe.data
    return ([], []) if packed or unasked else split(documents_of(recipe.data, prompts=recipe.target is not None))


def _compare(folder: Path, name: str, found: str) -> None:
    """OptionError where this input is not what it was when the run began; noted where nothing is known of it."""
    file = folder / "inputs.json"
    known = read_json(file) if file.exists() else {}
    if name not in known:
        write_json(file, known | {name: found})
    elif known[name] != found:
        raise OptionError(
            f"{folder} holds a run whose {name} has changed since it began; put back what it was, or choose another "
            "folder."
        )


def _finished_target(folder: Path, recipe: Recipe) -> Engine:
    engine = mlx_mtp.load(recipe.target, drafter=None)
    assert engine.target.path is not None
    _compare(folder, "target", model_digest(engine.target.path))
    return engine


def _check_stages(recipe: Recipe, data: Data, target: Target | None) -> None:
    """MLXMTPError for what would stop a later stage: too little data, too short a context, families that do not fit."""
    if target and recipe.length + recipe.ahead > target.info.max_context:
        raise OptionError(
            f"length must be at most {target.info.max_context - recipe.ahead} in the target's context, "
            f"not {recipe.length}."
        )
    if target is None:
        for ids, rows in ((data.train, recipe.batch_size), (data.held_out, 1)):
            Batches(ids, rows, recipe.length, recipe.seed, recipe.ahead)
    if recipe.start and target is None:
        _fresh_target(recipe)
    if target:
        for shape in recipe.drafters:
            if recipe.start:
                started(recipe.start, shape, target)
            else:
                FAMILIES[shape.family].describe(shape, target, recipe.length)


def prepare(folder: Path, recipe: Recipe, documents: Documents, engine: Engine | None = None) -> Data:
    """Prompts, and for a small target its tokenizer and packed ids, made once and kept in `folder`.

    documents: training and held out, needed where they are not packed yet. engine: of a finished target.
    """
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    kept, own = folder / PACKED[0], folder / "tokenizer"
    if engine is None and not (own / TOKENIZER_FILES[-1]).exists():
        if recipe.start:
            _copy_tokenizer(Path(recipe.start), own)
        else:
            train_tokenizer((_plain(document) for document in documents[0]), own, recipe.vocabulary)
    tokenizer = engine.tokenizer if engine else Tokenizer.load(own)
    if tokenizer is None:
        raise CheckpointError(f"{own if engine is None else engine.target.path}: no tokenizer to read the data with; "
                              "use a target that has one.")  # fmt: skip
    files = [folder / name for name in PACKED[1:]]
    if not kept.exists():
        info = engine.target.info if engine else None
        if engine is None:
            for file, part in zip(files, documents, strict=True):
                write_array(file, pack(part, load_tokenizer(own)))
        asked = [prompts_of(part, tokenizer, recipe.length, info) for part in documents]
        write_json(kept, {"prompts": asked[0], "held_out": [ids for ids in asked[1] if ids not in asked[0]]})
    found = read_json(kept)
    ids = [np.zeros(0, np.int32)] * 2 if engine else [read_array(file) for file in files]
    return Data(ids[0], ids[1], found["prompts"], found["held_out"])


def _plain(document: Document) -> str:
    return document.text or "\n".join(message["content"] for message in document.messages or [])


def _copy_tokenizer(source: Path, out: Path) -> None:
    """A checkpoint's tokenizer, the template last: its presence says that all is there."""
    out.mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, out / name)


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


def _train_target(folder: Path, out: Path, recipe: Recipe, data: Data) -> Iterator[Stage]:
    config, model = _fresh_target(recipe)
    yield from run_stage("target", folder, model, next_token_loss, data.train, data.held_out, recipe,
                         steps=recipe.target_steps, lookahead=0, figures=("accuracy",))  # fmt: skip
    _write_target(folder, out, config, model)


def _train_joint(folder: Path, out: Path, recipe: Recipe, data: Data) -> Iterator[Stage]:
    """The target and its first drafter with one loss."""
    (shape,) = recipe.drafters
    config, model = _fresh_target(recipe)
    family = FAMILIES[shape.family]
    described = family.describe(shape, Gemma4Target(model, mx.float32), recipe.length)
    if shape.family == "parallel":
        described["reads"] = "trunk"  # as in the paper: the last layer is the first head's own
    module = Joint(model, family.build(described))
    assert family.joint is not None
    names = ("accuracy", *(f"accuracy_{j + 2}" for j in range(shape.drafts)))
    yield from run_stage("joint", folder, module, family.joint(shape.drafts), data.train, data.held_out, recipe,
                         steps=recipe.target_steps, lookahead=shape.drafts, figures=names)  # fmt: skip
    _write_target(folder, out, config, model)
    write_drafter(folder / shape.family, described, module.drafter)


def _write_target(folder: Path, out: Path, config: dict[str, Any], model: Gemma4Model) -> None:
    _copy_tokenizer(folder / "tokenizer", out)
    generation = {"do_sample": False} | {name: config[name] for name in IDS if name in config}
    write_json(out / "generation_config.json", generation)
    write_checkpoint(out, config, published_weights(model))


def _train_drafter(
    folder: Path, engine: Engine, shape: DrafterShape, recipe: Recipe, data: Data
) -> Generator[Stage, None, Report]:
    """On chats of the target; tokens per round are measured before (1.0 for a fresh drafter) and after."""
    mx.random.seed(recipe.seed + 1)
    family, name, target = FAMILIES[shape.family], shape.family, engine.target
    start = recipe.start if recipe.target else None
    if start:
        config, drafter = started(start, shape, target)
    else:
        config = family.describe(shape, target, recipe.length)
        drafter = trainable(family.build(config))
    chats, held = yield from chats_of(folder, engine, data.prompts, data.held_prompts, recipe)
    asked, before = held.prompts(MEASURED_PROMPTS) or chats.prompts(MEASURED_PROMPTS), 1.0
    if start:
        before = yield from measured("before", mlx_mtp.load(target.path, drafter=start, depth=shape.drafts), asked)
    yield from drafter_stage(name, folder, drafter, name, engine, shape.drafts, chats, held, recipe, fresh=not start)
    write_drafter(folder / name, config, drafter)
    made = mlx_mtp.load(target.path, drafter=folder / name, depth=shape.drafts)
    after = yield from measured(f"{name} measured", made, asked)
    return Report(folder / name, before, after, shape.drafts, len(asked))
