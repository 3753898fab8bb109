"""What `train` and `adapt` shall make and how: kept beside the checkpoints, and everything follows from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.checkpoints.checkpoint import read_json
from mlx_mtp.errors import CheckpointError, OptionError
from mlx_mtp.generation import checks
from mlx_mtp.training.families import FAMILIES, DrafterShape
from mlx_mtp.training.trainer import TrainOptions

FILE = "recipe.json"
LEAST = {"target_steps": 1, "drafter_steps": 1, "tokens": 1, "batch_size": 1, "length": 2, "seed": 0, "vocabulary": 1}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, how long, how much at once, from which seed.

    target: a folder or hub name of a finished one; None = the small one is trained. start: a folder of what the
    training begins with: a Gemma 4 target and its tokenizer, or beside a finished target one drafter of the family
    to be trained. joint: its first drafter learns together with it. optimizer, accumulate, evaluate_every: of
    TrainOptions.
    """

    drafters: Sequence[DrafterShape] = (DrafterShape(),)
    target: str | None = None
    start: str | None = None
    joint: bool = False
    target_steps: int = 1400
    drafter_steps: int = 3000
    tokens: int = 1_000_000  # of self-generated data
    batch_size: int = 4
    length: int = 512
    learning_rate: float = 2e-3
    seed: int = 0
    vocabulary: int = 4096
    data: Sequence[str] = ()  # empty = a finished target asks itself; for a small one Python's standard library
    optimizer: str = "muon"
    accumulate: int = 1
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            checks.whole(name, vars(self)[name], least)
        self.options(1)
        if self.joint and (self.target or len(self.drafters) != 1 or FAMILIES[self.drafters[0].family].joint is None):
            raise OptionError(
                "Training jointly takes one drafter, parallel or sequential, and no finished target; "
                "train on a frozen target in place of that."
            )
        if self.start:
            self._check_start(self.start)
        if self.target:
            self._check_idle("the target is a finished one", "target_steps", "vocabulary")
        if self.joint or not self.drafters:
            self._check_idle("no drafter is trained by itself", "drafter_steps", "tokens")
        if self.target and not self.drafters:
            raise OptionError(f"No drafter to train for '{self.target}'; name a family.")
        if self.length <= self.ahead:
            raise OptionError(f"length must be above the {self.ahead} drafts, not {self.length}.")
        if self.drafters and self.tokens < self.batch_size * self.length:
            raise OptionError(
                f"tokens must be at least {self.batch_size * self.length} for one batch of {self.batch_size} rows of "
                f"{self.length}, not {self.tokens}."
            )
        if self.batch_size % self.accumulate:
            raise OptionError(
                f"A batch of {self.batch_size} rows cannot go through in {self.accumulate} equal parts; "
                "choose another accumulate."
            )

    def _check_start(self, start: str) -> None:
        """OptionError for what a start cannot serve, and for sizes that it brings itself."""
        if self.target and len(self.drafters) != 1:
            raise OptionError(f"'{start}' is the start of one drafter; train {len(self.drafters)} families one by one.")
        fresh = [DrafterShape(family=s.family, drafts=s.drafts) for s in self.drafters]
        if list(self.drafters) != fresh if self.target else self.vocabulary != type(self).vocabulary:
            what = "modules, width and inner size" if self.target else "vocabulary"
            raise OptionError(f"'{start}' brings its own {what}; leave the option out.")

    def _check_idle(self, why: str, *names: str) -> None:
        """OptionError for an option that was given another value and would have no effect."""
        if given := [name for name in names if vars(self)[name] != vars(type(self))[name]]:
            raise OptionError(f"{given[0]} has no effect here, as {why}; leave the option out.")

    @property
    def ahead(self) -> int:
        """The most drafts of a drafter: how many tokens after a row a batch holds."""
        return max((shape.drafts for shape in self.drafters), default=0)

    def options(self, steps: int, rate: float = 1.0, patience: int = 0) -> TrainOptions:
        """Of a stage of so many steps, `rate` times the learning rate."""
        return TrainOptions(steps=steps, learning_rate=rate * self.learning_rate, patience=patience,
                            optimizer=self.optimizer, accumulate=self.accumulate,
                            evaluate_every=self.evaluate_every)  # fmt: skip

    def saved(self) -> dict[str, Any]:
        """As JSON's types."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def read(cls, folder: Path) -> Recipe:
        """The recipe of an earlier run in `folder`; CheckpointError where there is none."""
        file = folder / FILE
        if not file.exists():
            raise CheckpointError(f"'{folder}' holds no earlier run's {FILE}; leave --resume out.")
        try:
            found = read_json(file)
            found.pop("inputs", None)
            drafters = tuple(DrafterShape(**shape) for shape in found.pop("drafters"))
            return cls(**found, drafters=drafters)
        except (TypeError, KeyError) as error:
            raise CheckpointError(f"{file}: not a recipe of this version ({error}); move it.") from error

    def differs(self, other: Recipe) -> list[str]:
        """Names of the fields in which two recipes differ."""
        theirs = other.saved()
        return [name for name, mine in self.saved().items() if mine != theirs[name]]
