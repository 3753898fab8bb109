"""From data to checkpoints: tokenizer, target, drafters, in stages that resume.

What it does: prepares the data, trains the small target of embedded.py (or takes any target the engine loads), trains
drafters on it or together with it, writes all in the layouts that are loaded. What it does not do: the loop
(trainer.py), the losses (objective.py) or anything on a screen.

Everything follows from the recipe, which is kept beside the checkpoints; a stage that was interrupted goes on from
its checkpoint, a stage that is finished is not run again.

    folder/recipe.json  inputs.json  tokenizer/  train.npy  held_out.npy  train-<stage>/  own_words.npy  target/
    folder/<family>/
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint, read_json, write_checkpoint
from mlx_mtp.errors import CheckpointError, DataError, MLXMTPError, OptionError
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.targets import load_target
from mlx_mtp.targets.gemma4 import Gemma4Model, Gemma4Target, published_weights
from mlx_mtp.targets.gemma4_config import Gemma4Config
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.continuations import continuations, openings
from mlx_mtp.training.corpus import Document, is_held_out, standard_library
from mlx_mtp.training.data import Batches, files_of, fingerprint, pack, read_documents
from mlx_mtp.training.embedded import IDS, TOKENIZER_FILES, target_config
from mlx_mtp.training.families import (
    FAMILIES,
    QUANTISED,
    DrafterShape,
    started,
    trainable,
    write_drafter,
)
from mlx_mtp.training.files import digest, locked, model_digest, read_array, write_array, write_json
from mlx_mtp.training.objective import Joint, next_token_loss
from mlx_mtp.training.tokenizer import train_tokenizer
from mlx_mtp.training.trainer import Progress, Trainer, TrainOptions

OPENING = 96  # tokens of the corpus that the target continues with its own
FINE_TUNING = 0.4  # share of the learning rate for the second stage
DECAY = 0.8  # weight of a draft against the one before it
HELD_OUT_BATCHES = 8
PACKED = ("train.npy", "held_out.npy")
KEPT = (*PACKED, "own_words.npy", "own_words_held_out.npy", "inputs.json", "tokenizer", "recipe.json")
LEAST = {"target_steps": 1, "drafter_steps": 0, "agreement_steps": 0, "batch_size": 1, "length": 2, "seed": 0,
         "vocabulary": 1}  # fmt: skip
Documents = tuple[list[Document], list[Document]]  # training and held out


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a user may turn: what is trained, how long, how much at once, from which seed.

    target: a folder or hub name of a finished one; None = the small one is trained. start: a folder of what the
    training begins with: a Gemma 4 target and its tokenizer, or beside a finished target one drafter of the family
    to be trained. joint: its first drafter learns together with it.
    """

    drafters: Sequence[DrafterShape] = (DrafterShape(),)
    target: str | None = None
    start: str | None = None
    joint: bool = False
    target_steps: int = 1400
    drafter_steps: int = 600  # on the corpus
    agreement_steps: int = 300  # then on what the target itself writes
    batch_size: int = 4
    length: int = 512
    learning_rate: float = 2e-3
    label_share: float = 0.0
    sampled_share: float = 0.5  # of what the target itself writes: at temperature 1, the rest greedily
    rehearsal: float = 1 / 3  # share of the corpus beside what the target itself writes
    seed: int = 0
    vocabulary: int = 4096
    data: Sequence[str] = ()  # empty = Python's standard library
    options: dict[str, Any] = field(default_factory=dict)  # of TrainOptions: optimizer, accumulate, ...

    def __post_init__(self) -> None:
        if self.joint and (self.target or len(self.drafters) != 1 or FAMILIES[self.drafters[0].family].joint is None):
            raise OptionError(
                "Expected for joint training one drafter, parallel or sequential, and no finished target; "
                "train on a frozen target in place of that."
            )
        for name, most in (("label_share", 1.0), ("sampled_share", 1.0), ("rehearsal", 0.9)):
            if not 0.0 <= getattr(self, name) <= most:
                raise OptionError(f"Expected {name} from 0 to {most}, found {getattr(self, name)}.")
        if self.start:
            self._check_start(self.start)
        if self.target and not self.drafters:
            raise OptionError(f"Expected a drafter to train for '{self.target}', found none; name a family.")
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise OptionError(f"Expected {name} of at least {least}, found {getattr(self, name)}; raise it.")
        if self.length <= (ahead := max((shape.drafts for shape in self.drafters), default=0)):
            raise OptionError(f"Expected a length above the {ahead} drafts, found {self.length}; raise it.")
        options = TrainOptions(steps=1, learning_rate=self.learning_rate, **self.options)
        if self.batch_size % options.accumulate:
            raise OptionError(
                f"Expected accumulate to divide a batch's {self.batch_size} rows, found {options.accumulate}; "
                "choose one that does."
            )

    def _check_start(self, start: str) -> None:
        """OptionError for what a start cannot serve, and for sizes that it brings itself."""
        if self.target and len(self.drafters) != 1:
            raise OptionError(
                f"Expected one drafter to start from '{start}', found {len(self.drafters)} families; "
                "train them one after the other."
            )
        fresh = [DrafterShape(family=s.family, drafts=s.drafts) for s in self.drafters]
        sized = list(self.drafters) != fresh if self.target else self.vocabulary != type(self).vocabulary
        if sized:
            what = "modules, width or inner" if self.target else "vocabulary"
            raise OptionError(f"Expected no {what} beside '{start}', whose own stand, found some; leave it out.")

    def saved(self) -> dict[str, Any]:
        """As JSON's types."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """The recipe of an earlier run in `folder`; CheckpointError where there is none."""
        file = folder / "recipe.json"
        if not file.exists():
            raise CheckpointError(f"Expected an earlier run's recipe.json in '{folder}', found none; omit --resume.")
        try:
            found = read_json(file)
            drafters = tuple(DrafterShape(**shape) for shape in found.pop("drafters"))
            return cls(**found, drafters=drafters)
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{file}: not a recipe of this version ({error}); move it.") from error

    def differs(self, other: Recipe) -> list[str]:
        """Names of the fields in which two recipes differ."""
        mine, theirs = self.saved(), other.saved()
        return [f.name for f in fields(self) if mine[f.name] != theirs[f.name]]


@dataclass(frozen=True)
class Stage:
    """What is being done and how far it is, for whoever shows it; `progress` where something is trained."""

    name: str
    step: int
    steps: int
    progress: Progress | None = None
    figures: Sequence[str] = ()  # names of progress.figures


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
        fresh = not (folder / "recipe.json").exists()
        _check_run(folder, recipe, fresh)
        missing = [shape for shape in recipe.drafters if not (folder / shape.family / "config.json").exists()]
        to_train = recipe.target is None and not (folder / "target" / "config.json").exists()
        try:
            documents = _read_inputs(folder, recipe, fresh)
            if not missing and not to_train:
                return
            target = _finished_target(folder, recipe) if recipe.target else None
            data = prepare(folder, recipe, documents, target.path if target else None)
            _check_stages(recipe, data, target)
        except MLXMTPError:
            if fresh:
                _forget(folder)
            raise
        if to_train:
            yield from (_train_joint if recipe.joint else _train_target)(folder, folder / "target", recipe, data)
            missing = [shape for shape in missing if not (folder / shape.family / "config.json").exists()]
        if missing and target is None:
            # As shipped: rounded to float16 and back.
            target = mlx_mtp.load(folder / "target", drafter=None).target
        for shape in missing:
            assert target is not None
            yield from _train_drafter(folder, target, shape, recipe, data)


def _check_run(folder: Path, recipe: Recipe, fresh: bool) -> None:
    """OptionError where the folder holds a run of another recipe, or something that this one would take for its own."""
    if fresh:
        names = *KEPT, "target", *(shape.family for shape in recipe.drafters)
        if there := [name for name in names if (folder / name).exists()]:
            raise OptionError(
                f"Expected nothing named {there[0]} in '{folder}' before a run begins there, found some; "
                "choose another folder."
            )
    elif changed := Recipe.read(folder).differs(recipe):
        raise OptionError(
            f"{folder} holds a run with other values of {', '.join(changed)}; use the same, or another folder."
        )


def _read_inputs(folder: Path, recipe: Recipe, fresh: bool) -> Documents:
    """The documents, none where they are packed already; begins the run's record, or compares with it."""
    if fresh:
        write_json(folder / "recipe.json", recipe.saved())
    packed = all((folder / name).exists() for name in PACKED)
    if recipe.data:
        try:
            _compare(folder, "data", digest(files_of(recipe.data)))
        except DataError:
            if not packed:
                raise  # else the run goes on with what it has kept of data that are gone
    if recipe.start and Path(recipe.start).is_dir():
        _compare(folder, "start", model_digest(Path(recipe.start)))
    return ([], []) if packed else split(recipe.data)


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
    ahead = max((shape.drafts for shape in recipe.drafters), default=0)
    if target and recipe.length + ahead > target.info.max_context:
        raise OptionError(
            f"Expected a length of at most {target.info.max_context - ahead}, the target's context, found "
            f"{recipe.length}; lower it."
        )
    for ids, rows in ((data.train, recipe.batch_size), (data.held_out, 1)):
        Batches(ids, rows, recipe.length, recipe.seed, ahead)
    if recipe.start and target is None:
        _fresh_target(recipe)
    for shape in recipe.drafters if target else ():
        assert target is not None
        if recipe.start:
            started(recipe.start, shape, target)
        else:
            FAMILIES[shape.family].describe(shape, target, recipe.length)


def _forget(folder: Path) -> None:
    """Takes back what a run wrote that could not begin."""
    for name in KEPT:
        (folder / name).unlink(missing_ok=True) if name != "tokenizer" else shutil.rmtree(folder / name, True)


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
    except Exception as error:  # as in text/tokenizer.py
        raise CheckpointError(
            f"{tokenizer_folder}: expected a tokenizer to read the data with, found none that loads ({error}); "
            "use a target that has one."
        ) from error
    if not all(file.exists() for file in files):
        for file, part in zip(files, [pack(part, tokenizer) for part in documents], strict=True):
            write_array(file, part)
    return Data(read_array(files[0]), read_array(files[1]), reply_marker(tokenizer))


def split(sources: Sequence[str]) -> Documents:
    """Training and held-out documents: whole modules of the standard library, or every 25th of the user's."""
    if not sources:
        documents = list(standard_library())
        held = [document for document in documents if is_held_out(document.module)]
        return [document for document in documents if not is_held_out(document.module)], held
    documents = list(read_documents(sources))
    if len(documents) < 25:
        return documents[:-1] or documents, documents[-1:]
    return [document for i, document in enumerate(documents) if i % 25], documents[::25]


def _plain(document: Document) -> str:
    return document.text or "\n".join(message["content"] for message in document.messages or [])


def reply_marker(tokenizer: Any) -> list[int]:
    """What a chat template writes in front of a reply; empty where there is no template."""
    return Tokenizer(tokenizer).template.reply_opening()


def run_stage(
    name: str, folder: Path, module: nn.Module, loss: Any, train_ids: np.ndarray, held_ids: np.ndarray,
    recipe: Recipe, *, steps: int, lookahead: int, figures: tuple[str, ...], rate: float = 1.0, seed: int = 0,
) -> Iterator[Stage]:  # fmt: skip
    """Trains `module` from the weights it has, or from the stage's checkpoint."""
    batches = Batches(train_ids, recipe.batch_size, recipe.length, recipe.seed + seed, lookahead)
    fixed = Batches(held_ids, min(recipe.batch_size, max(1, len(held_ids) // (2 * recipe.length))), recipe.length, 0,
                    lookahead)  # fmt: skip
    options = TrainOptions(steps=steps, learning_rate=recipe.learning_rate * rate, **recipe.options)
    trainer = Trainer(
        module, loss, batches.batch, options, folder / f"train-{name}", data=fingerprint(train_ids),
        held_out=[fixed.batch(i) for i in range(min(HELD_OUT_BATCHES, fixed.steps_per_epoch))], figures=figures,
    )  # fmt: skip
    trainer.resume()
    for progress in trainer.run():
        yield Stage(name, progress.step, progress.steps, progress, figures)


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
            f"Expected a Gemma 4 target that is not quantised at '{recipe.start}', found another kind; "
            "start from one that is."
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
    """First on the corpus, then on the target's own continuations of it, with some corpus for rehearsal."""
    mx.random.seed(recipe.seed + 1)
    family, out = FAMILIES[shape.family], folder / shape.family
    if recipe.target and recipe.start:
        config, drafter = started(recipe.start, shape, target)
    else:
        config = family.describe(shape, target, recipe.length)
        drafter = trainable(family.build(config))
    loss = family.objective(target, shape.drafts, decay=DECAY, label_share=recipe.label_share)
    sizes: dict[str, Any] = {
        "lookahead": shape.drafts, "figures": tuple(f"agreement_{j + 1}" for j in range(shape.drafts)), "seed": 1
    }  # fmt: skip
    if recipe.drafter_steps:
        yield from run_stage(shape.family, folder, drafter, loss, data.train, data.held_out, recipe,
                             steps=recipe.drafter_steps, **sizes)  # fmt: skip
    if recipe.agreement_steps:
        rows = max(recipe.agreement_steps * recipe.batch_size // 2, recipe.batch_size + 1)
        own = yield from own_words(folder / "own_words.npy", target, data.train, data.reply_marker, recipe, rows)
        fixed_rows = 8 * recipe.batch_size + 1
        fixed = yield from own_words(folder / "own_words_held_out.npy", target, data.held_out, data.reply_marker,
                                     recipe, fixed_rows)  # fmt: skip
        rehearsed = round(len(own) * recipe.rehearsal / (1.0 - recipe.rehearsal))
        mixed = np.concatenate([own, np.resize(data.train, rehearsed)])  # from its beginning again where it is short
        yield from run_stage(f"{shape.family}-agreement", folder, drafter, loss, mixed, fixed, recipe,
                             steps=recipe.agreement_steps, rate=FINE_TUNING, **sizes)  # fmt: skip
    write_drafter(out, config, drafter)


def own_words(
    file: Path, target: Target, ids: np.ndarray, marker: list[int], recipe: Recipe, count: int
) -> Generator[Stage, None, np.ndarray]:
    """What the target writes behind `count` windows of a corpus, in one row of ids; kept as it grows."""
    opening = min(OPENING, recipe.length // 2)
    prompts = openings(ids, count, opening, marker, recipe.seed)
    rows = read_array(file) if file.exists() else np.zeros((0, recipe.length), ids.dtype)
    more = continuations(target, prompts[len(rows) :], recipe.length - opening, recipe.seed + len(rows),
                         recipe.sampled_share)  # fmt: skip
    for written in more:
        rows = np.concatenate([rows, written.astype(ids.dtype)])
        write_array(file, rows)
        yield Stage("own words", len(rows), count)
    return rows.reshape(-1)
