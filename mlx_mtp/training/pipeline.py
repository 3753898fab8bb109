"""From data to checkpoints: tokenizer, target, drafters, in stages that resume.

The data are prepared, the small target of small_target.py is trained (or any finished one loaded), and drafters are
trained on it or together with it. A stage that was interrupted goes on, one that is finished is not run again.

    folder/recipe.json  inputs.json  tokenizer/  train.npy  held_out.npy  train-<stage>/  own_words.npy  target/
    folder/<family>/
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
from mlx_mtp.errors import CheckpointError, DataError, MLXMTPError, OptionError
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.targets import load_target
from mlx_mtp.targets.gemma4 import Gemma4Model, Gemma4Target, published_weights
from mlx_mtp.targets.gemma4_config import Gemma4Config
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.data import Batches, Document, documents_of, files_of, pack, split
from mlx_mtp.training.families import FAMILIES, QUANTISED, DrafterShape, started, trainable, write_drafter
from mlx_mtp.training.objective import Joint, next_token_loss
from mlx_mtp.training.recipe import FILE, Recipe
from mlx_mtp.training.run_folder import digest, locked, model_digest, read_array, write_array, write_json
from mlx_mtp.training.self_generated import continuations, openings
from mlx_mtp.training.small_target import IDS, TOKENIZER_FILES, target_config, train_tokenizer
from mlx_mtp.training.stages import Stage, drafter_stage, run_stage

OPENING = 96  # tokens of the corpus that the target continues with its own
FINE_TUNING = 0.4  # share of the learning rate for the second stage
PACKED = ("train.npy", "held_out.npy")
KEPT = (*PACKED, "own_words.npy", "own_words_held_out.npy", "inputs.json", FILE)
Documents = tuple[list[Document], list[Document]]  # training and held out


@dataclass(frozen=True)
class Data:
    """Packed ids, training and held out, and where a reply begins in them."""

    train: np.ndarray
    held_out: np.ndarray
    reply_marker: list[int]


def train(folder: Path, recipe: Recipe) -> Generator[Stage, None, None]:
    """Makes folder/target (unless the recipe names one) and folder/<family> of every drafter; resumes what is there.

    All data and options are checked before anything is trained; a run that cannot begin leaves nothing in the folder.
    OptionError where the folder holds a run of another recipe, or one on data or models that have changed since.
    """
    with locked(folder):
        fresh = not (folder / FILE).exists()
        _check_run(folder, recipe, fresh)
        to_train = recipe.target is None and not _finished(folder / "target")
        try:
            documents = _read_inputs(folder, recipe, fresh)
            if not to_train and all(_finished(folder / shape.family) for shape in recipe.drafters):
                return
            target = _finished_target(folder, recipe) if recipe.target else None
            data = prepare(folder, recipe, documents, target.path if target else None)
            _check_stages(recipe, data, target)
        except MLXMTPError:
            if fresh:
                shutil.rmtree(folder / "tokenizer", ignore_errors=True)
                for name in KEPT:
                    (folder / name).unlink(missing_ok=True)
            raise
        if to_train:
            yield from (_train_joint if recipe.joint else _train_target)(folder, folder / "target", recipe, data)
        for shape in recipe.drafters:
            if not _finished(folder / shape.family):
                # The target as it is on disk: rounded to float16 and back.
                target = target or mlx_mtp.load(folder / "target", drafter=None).target
                yield from _train_drafter(folder, target, shape, recipe, data)


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
    packed = all((folder / name).exists() for name in PACKED)
    if recipe.data:
        try:
            _compare(folder, "data", digest(files_of(recipe.data)))
        except DataError:
            if not packed:
                raise  # else the run goes on with what it has kept of data that are gone
    if recipe.start and Path(recipe.start).is_dir():
        _compare(folder, "start", model_digest(Path(recipe.start)))
    return ([], []) if packed else split(documents_of(recipe.data))


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


def _finished_target(folder: Path, recipe: Recipe) -> Target:
    target = mlx_mtp.load(recipe.target, drafter=None).target
    assert target.path is not None
    _compare(folder, "target", model_digest(target.path))
    return target


def _check_stages(recipe: Recipe, data: Data, target: Target | None) -> None:
    """MLXMTPError for what would stop a later stage: too little data, too short a context, families that do not fit."""
    if target and recipe.length + recipe.ahead > target.info.max_context:
        raise OptionError(
            f"length must be at most {target.info.max_context - recipe.ahead} in the target's context, "
            f"not {recipe.length}."
        )
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


def prepare(folder: Path, recipe: Recipe, documents: Documents, tokenizer_folder: Path | None = None) -> Data:
    """Tokenizer (of a finished target, or one trained on the data) and packed ids, made once and kept in `folder`.

    documents: training and held out, needed where they are not packed yet.
    """
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    files = [folder / name for name in PACKED]
    own = folder / "tokenizer"
    if recipe.target is None:
        if not (own / TOKENIZER_FILES[-1]).exists():
            if recipe.start:
                _copy_tokenizer(Path(recipe.start), own)
            else:
                train_tokenizer((_plain(document) for document in documents[0]), own, recipe.vocabulary)
        tokenizer_folder = own
    assert tokenizer_folder is not None
    try:
        tokenizer = load_tokenizer(tokenizer_folder)
    except Exception as error:  # transformers raises what it likes
        raise CheckpointError(
            f"{tokenizer_folder}: no tokenizer to read the data with ({error}); use a target that has one."
        ) from error
    if not all(file.exists() for file in files):
        for file, part in zip(files, [pack(part, tokenizer) for part in documents], strict=True):
            write_array(file, part)
    return Data(read_array(files[0]), read_array(files[1]), reply_marker(tokenizer))


def _plain(document: Document) -> str:
    return document.text or "\n".join(message["content"] for message in document.messages or [])


def reply_marker(tokenizer: Any) -> list[int]:
    """What a chat template writes in front of a reply; empty where there is no template."""
    return Tokenizer(tokenizer).template.reply_opening()


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
    folder: Path, target: Target, shape: DrafterShape, recipe: Recipe, data: Data
) -> Iterator[Stage]:
    """First on the corpus, then on self-generated data, with a share of the corpus for replay."""
    mx.random.seed(recipe.seed + 1)
    family, name = FAMILIES[shape.family], shape.family
    if recipe.target and recipe.start:
        config, drafter = started(recipe.start, shape, target)
    else:
        config = family.describe(shape, target, recipe.length)
        drafter = trainable(family.build(config))
    if recipe.drafter_steps:
        yield from drafter_stage(name, folder, drafter, name, target, shape.drafts, data.train, data.held_out, recipe,
                                 steps=recipe.drafter_steps, seed=1)  # fmt: skip
    if recipe.agreement_steps:
        rows = max(recipe.agreement_steps * recipe.batch_size // 2, recipe.batch_size + 1)
        own = yield from self_generated(folder / "own_words.npy", target, data.train, data.reply_marker, recipe, rows)
        fixed = yield from self_generated(folder / "own_words_held_out.npy", target, data.held_out,
                                          data.reply_marker, recipe, 8 * recipe.batch_size + 1)  # fmt: skip
        replayed = round(len(own) * recipe.rehearsal / (1.0 - recipe.rehearsal))
        mixed = np.concatenate([own, np.resize(data.train, replayed)])  # from its beginning again where it is short
        yield from drafter_stage(f"{name}-agreement", folder, drafter, name, target, shape.drafts, mixed, fixed, recipe,
                                 steps=recipe.agreement_steps, rate=FINE_TUNING, seed=1)  # fmt: skip
    write_drafter(folder / name, config, drafter)


def self_generated(
    file: Path, target: Target, ids: np.ndarray, marker: list[int], recipe: Recipe, count: int
) -> Generator[Stage, None, np.ndarray]:
    """What the target writes after `count` windows of a corpus, in one row of ids; kept as it grows."""
    opening = min(OPENING, recipe.length // 2)
    prompts = openings(ids, count, opening, marker, recipe.seed)
    rows = read_array(file) if file.exists() else np.zeros((0, recipe.length), ids.dtype)
    more = continuations(target, prompts[len(rows) :], recipe.length - opening, recipe.seed + len(rows),
                         recipe.sampled_share)  # fmt: skip
    for written in more:
        rows = np.concatenate([rows, written.astype(ids.dtype)])
        write_array(file, rows)
        yield Stage("self-generated data", len(rows), count)
    return rows.reshape(-1)
