"""From data to checkpoints: tokenizer, target, drafters, in stages that resume.

What it does: prepares the data, trains the small target of embedded.py (or takes any target the engine loads), trains
drafters on it or together with it, writes all in the layouts that are loaded. What it does not do: the loop
(trainer.py), the losses (objective.py) or anything on a screen.

Everything follows from the recipe, which is kept beside the checkpoints; a stage that was interrupted goes on from
its checkpoint, a stage that is finished is not run again.

    folder/recipe.json  tokenizer/  train.npy  held_out.npy  train-<stage>/  own_words.npy  target/  <family>/
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
from mlx_mtp.checkpoint import Checkpoint, read_json, write_checkpoint
from mlx_mtp.errors import CheckpointError, OptionError
from mlx_mtp.interfaces import Target
from mlx_mtp.targets import load_target
from mlx_mtp.targets.gemma4 import Gemma4Model, Gemma4Target, published_weights
from mlx_mtp.targets.gemma4_config import Gemma4Config
from mlx_mtp.tokens import Tokenizer
from mlx_mtp.training.continuations import continuations, openings
from mlx_mtp.training.corpus import Document, is_held_out, standard_library
from mlx_mtp.training.data import Batches, fingerprint, pack, read_documents
from mlx_mtp.training.embedded import IDS, TOKENIZER_FILES, target_config
from mlx_mtp.training.families import FAMILIES, QUANTISED, DrafterShape, started, trainable, write_drafter
from mlx_mtp.training.objective import Joint, next_token_loss
from mlx_mtp.training.tokenizer import train_tokenizer
from mlx_mtp.training.trainer import Progress, Trainer, TrainOptions

OPENING = 96  # tokens of the corpus that the target continues with its own
FINE_TUNING = 0.4  # share of the learning rate for the second stage
DECAY = 0.8  # weight of a draft against the one before it
HELD_OUT_BATCHES = 8


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
        TrainOptions(steps=1, learning_rate=self.learning_rate, **self.options)  # says what is wrong before any work

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

    OptionError where the folder holds a run of another recipe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "recipe.json").exists():
        if changed := Recipe.read(folder).differs(recipe):
            raise OptionError(
                f"{folder} holds a run with other values of {', '.join(changed)}; use the same, or another folder."
            )
    else:
        (folder / "recipe.json").write_text(json.dumps(recipe.saved(), indent=2) + "\n")
    target_folder = Path(recipe.target) if recipe.target else folder / "target"
    if recipe.target is None and not (target_folder / "config.json").exists():
        yield from (_train_joint if recipe.joint else _train_target)(folder, target_folder, recipe)
    waiting = [shape for shape in recipe.drafters if not (folder / shape.family / "config.json").exists()]
    if waiting:
        # As shipped: rounded to float16 and back.
        target = mlx_mtp.load(recipe.target or target_folder, drafter=None).target
        data = prepare(folder, recipe, target.path)
        for shape in waiting:
            yield from _train_drafter(folder, target, shape, recipe, data)


def prepare(folder: Path, recipe: Recipe, tokenizer_folder: Path | None = None) -> Data:
    """Tokenizer (of a finished target, or one trained on the data) and packed ids, made once and kept in `folder`."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    files = folder / "train.npy", folder / "held_out.npy"
    own = folder / "tokenizer"
    whole = all(file.exists() for file in files)
    documents: tuple[list[Document], list[Document]] = ([], []) if whole else split(recipe.data)
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
    except Exception as error:  # as in tokens.py
        raise CheckpointError(
            f"{tokenizer_folder}: expected a tokenizer to read the data with, found none that loads ({error}); "
            "use a target that has one."
        ) from error
    if not whole:
        np.save(files[1], pack(documents[1], tokenizer))
        np.save(files[0], pack(documents[0], tokenizer))
    return Data(np.load(files[0]), np.load(files[1]), reply_marker(tokenizer))


def split(sources: Sequence[str]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents: whole modules of the standard library, or every 25th of the user's."""
    if not sources:
        documents = list(standard_library())
        held = [document for document in documents if is_held_out(document.module)]
        return [document for document in documents if not is_held_out(document.module)], held
    documents = list(read_documents(sources))
    held = documents[::25] if len(documents) >= 25 else documents[-1:]
    return [document for document in documents if document not in held] or documents, held


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


def _train_target(folder: Path, out: Path, recipe: Recipe) -> Iterator[Stage]:
    data = prepare(folder, recipe)
    config, model = _fresh_target(recipe)
    yield from run_stage("target", folder, model, next_token_loss, data.train, data.held_out, recipe,
                         steps=recipe.target_steps, lookahead=0, figures=("accuracy",))  # fmt: skip
    _write_target(folder, out, config, model)


def _train_joint(folder: Path, out: Path, recipe: Recipe) -> Iterator[Stage]:
    """The target and its first drafter with one loss."""
    data, (shape,) = prepare(folder, recipe), recipe.drafters
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
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
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
    rows = np.load(file) if file.exists() else np.zeros((0, recipe.length), ids.dtype)
    more = continuations(target, prompts[len(rows) :], recipe.length - opening, recipe.seed + len(rows),
                         recipe.sampled_share)  # fmt: skip
    for written in more:
        rows = np.concatenate([rows, written.astype(ids.dtype)])
        part = file.with_suffix(".part.npy")
        np.save(part, rows)
        part.replace(file)
        yield Stage("own words", len(rows), count)
    return rows.reshape(-1)
