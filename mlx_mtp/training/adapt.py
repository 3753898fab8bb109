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

import math
import os
import shutil
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx_mtp
from mlx_mtp.checkpoints.atomic import replacing_or_refused
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.assistant import Assistant
from mlx_mtp.drafters.parallel import Parallel, ParallelModel
from mlx_mtp.drafters.sequential import Sequential
from mlx_mtp.drafters.shortlist import with_shortlist
from mlx_mtp.engine import Engine
from mlx_mtp.errors import DataError, MLXMTPError, OptionError
from mlx_mtp.training.chats import Chats
from mlx_mtp.training.data import read_documents
from mlx_mtp.training.families import MOST_DRAFTS, QUANTISED, check_place, family_of, for_training, write_drafter
from mlx_mtp.training.prompts import prompts_of
from mlx_mtp.training.ranges import check_ranges
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.run_folder import hashed, locked, model_digest
from mlx_mtp.training.stages import Report, Stage, chats_of, drafter_stage, measured

FEWEST_PROMPTS = 4
HELD_OUT_SHARE, MOST_HELD_OUT = 8, 24  # every eighth prompt


class NotBetter(MLXMTPError):
    """The adapted drafter is no better than the one there is; nothing was replaced."""


@dataclass(frozen=True, kw_only=True)
class Adapting:
    """What a user may turn.

    prompts: most that are asked. tokens: of self-generated data. depth: drafts a round when measuring.
    """

    prompts: int = 1000
    tokens: int = 200_000
    steps: int = 400
    batch_size: int = 4
    length: int = 384
    learning_rate: float = 2e-3
    drafts: int = 3
    depth: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"prompts": FEWEST_PROMPTS, "steps": 1, "batch_size": 1, "length": 16, "depth": 1, "seed": 0}
        check_ranges(self, drafts=(1, MOST_DRAFTS), **{name: (value, math.inf) for name, value in least.items()})
        self.recipe()

    def recipe(self) -> Recipe:
        """What a stage of training takes from these options."""
        return Recipe(batch_size=self.batch_size, length=self.length, learning_rate=self.learning_rate,
                      drafter_steps=self.steps, tokens=self.tokens, seed=self.seed)  # fmt: skip


def adapt(
    model: str | Path | None, drafter: str | Path, out: Path, data: Sequence[str], options: Adapting
) -> Generator[Stage, None, Report]:
    """Writes to `out` a drafter that started as `drafter` and was fine-tuned to `model` on prompts from `data`.

    NotBetter where it accepts no more than `drafter`, or than the drafter that `out` holds. Resumes what an earlier
    call left in `out`.work. All data are checked before the target is asked anything.
    """
    out = Path(os.path.abspath(out))  # so that it has a name, whatever was given
    check_place(out)
    documents = list(read_documents(data, prompts=True))
    work = out.with_name(f"{out.name}.work")
    with locked(work):
        engine = mlx_mtp.load(model, drafter=drafter, depth=options.depth, draft_head_bits=0)
        source = _source(engine, drafter)
        if engine.tokenizer is None or engine.target.path is None:
            raise OptionError("The target has no tokenizer to read the prompts with; choose another.")
        found = prompts_of(documents, engine.tokenizer, options.length, engine.target.info)
        if len(found) < FEWEST_PROMPTS:
            raise DataError(f"The data hold {len(found)} prompts and at least {FEWEST_PROMPTS} are needed; give more.")
        count = min(options.prompts, len(found))
        prompts = [found[i * len(found) // count] for i in range(count)]  # from all over the data
        held = prompts[::HELD_OUT_SHARE][:MOST_HELD_OUT]
        learned = [prompt for i, prompt in enumerate(prompts) if i % HELD_OUT_SHARE and prompt not in held]
        before = yield from measured("before", engine, held)
        best = before
        if (out / "config.json").exists():
            there = mlx_mtp.load(model, drafter=out, depth=options.depth, draft_head_bits=0)
            best = max(before, (yield from measured("the one there is", there, held)))
        # Another target, other prompts or another seed are other chats, and another drafter or option is another run.
        asked = model_digest(engine.target.path), prompts, options.tokens, options.length, options.seed
        folder = work / hashed(asked)
        chats, watched = yield from chats_of(folder, engine, learned, held, options.recipe())
        run = folder / hashed((model_digest(source), asdict(options)))
        yield from _train(source, run, work / "candidate", engine, chats, watched, options)
        fresh = mlx_mtp.load(model, drafter=work / "candidate", depth=options.depth, draft_head_bits=0)
        after = yield from measured("after", fresh, held)
        if after <= best:
            raise NotBetter(
                f"The new drafter makes {after:.2f} tokens per round on {len(held)} held-out prompts, the one there is "
                f"{best:.2f}: nothing was replaced; give more prompts, tokens or steps (the new one is in "
                f"{work / 'candidate'})."
            )
        with replacing_or_refused(out, "free some disk space and go on") as place:
            shutil.copytree(work / "candidate", place)
        return Report(out, before, after, fresh.depth if isinstance(fresh.depth, int) else options.depth, len(held))


def _train(
    source: Path, run: Path, out: Path, engine: Engine, chats: Chats, watched: Chats, options: Adapting
) -> Generator[Stage, None, None]:
    """Fine-tunes the drafter in `source` on these chats and writes it to `out`."""
    checkpoint = Checkpoint.open(source)
    module = for_training(load_drafter(checkpoint))
    drafts = len(module.heads) if isinstance(module, ParallelModel) else options.drafts
    family = family_of(checkpoint.config, str(source))
    yield from drafter_stage("adapt", run, module, family, engine, drafts, chats, watched, options.recipe(),
                             fresh=False)  # fmt: skip
    config = with_shortlist(checkpoint)[0]
    write_drafter(out, {key: value for key, value in config.items() if key not in QUANTISED}, module)


def _source(engine: Engine, drafter: str | Path) -> Path:
    """The folder of a drafter that was loaded."""
    if not isinstance(engine.drafter, Assistant | Parallel | Sequential):
        raise OptionError(f"'{drafter}' is no drafter with weights to train; name a folder or hub name.")
    return Path(engine.drafter.name)
