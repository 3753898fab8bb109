"""Fine-tuning a drafter to a target: the target's own replies to the user's prompts are what it learns to foresee.

The target answers (with the drafter it has, so by MTP), the drafter is trained on the answers and a share of other text
for replay, tokens per round are measured before and after on held-out prompts, and the new drafter is written only
where it is the better one. The target, and so what it answers, is never changed. A drafter loses acceptance where its
target was quantised or fine-tuned; self-generated data win it back (FastMTP, arXiv 2509.18362, section 3.2).

    out/                       the new drafter
    out.work/replies.jsonl     prompt and reply ids, a line each, with what the reply depends on (self_generated.py)
    out.work/<run>/            log and checkpoint of one set of models, replies and options
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import mlx_mtp
from mlx_mtp.checkpoints.atomic import replacing_or_refused
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.assistant import Assistant
from mlx_mtp.drafters.parallel import Parallel, ParallelModel
from mlx_mtp.drafters.sequential import Sequential
from mlx_mtp.engine import Engine
from mlx_mtp.errors import DataError, MLXMTPError, OptionError, PromptError
from mlx_mtp.generation.interfaces import TargetInfo
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.data import Document, documents_of, fingerprint, pack, read_documents, split
from mlx_mtp.training.families import MOST_DRAFTS, QUANTISED, check_place, family_of, for_training, write_drafter
from mlx_mtp.training.ranges import check_ranges
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.run_folder import hashed, locked
from mlx_mtp.training.self_generated import Question, Replies, source_of
from mlx_mtp.training.stages import Stage, drafter_stage

FEWEST_PROMPTS = 4
HELD_OUT_SHARE, MOST_HELD_OUT = 8, 24  # every eighth prompt
MOST_REPLAY = 0.99
CUT = 3  # a text is an opening of a third of its piece; the target writes the rest


class NotBetter(MLXMTPError):
    """The adapted drafter is no better than the one there is; nothing was replaced."""


@dataclass(frozen=True, kw_only=True)
class Adapting:
    """What a user may turn.

    prompts: most that are answered. tokens: most of a reply. rehearsal: replay, the share of what is learned that is
    other text (`rehearsal_data`, the standard library where there is none). label_share: share of the loss on the
    tokens of the text, the rest on the target's distribution. depth: drafts a round when measuring.
    """

    prompts: int = 160
    tokens: int = 192
    steps: int = 120
    batch_size: int = 4
    length: int = 256
    learning_rate: float = 1e-3
    drafts: int = 3
    depth: int = 4
    label_share: float = 0.0
    rehearsal: float = 0.25
    rehearsal_data: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"prompts": FEWEST_PROMPTS, "tokens": 8, "steps": 1, "batch_size": 1, "length": 16, "depth": 1,
                 "seed": 0}  # fmt: skip
        check_ranges(self, drafts=(1, MOST_DRAFTS), rehearsal=(0, MOST_REPLAY), label_share=(0, 1),
                     **{name: (value, math.inf) for name, value in least.items()})  # fmt: skip
        self.recipe()

    def recipe(self) -> Recipe:
        """What a stage of training takes from these options."""
        return Recipe(batch_size=self.batch_size, length=self.length, learning_rate=self.learning_rate,
                      label_share=self.label_share, seed=self.seed)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """Tokens per round on the prompts held out, greedily and at one fixed depth."""

    before: float
    after: float
    depth: int
    prompts: int


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
    others = split(documents_of(options.rehearsal_data))[0] if options.rehearsal else []
    work = out.with_name(f"{out.name}.work")
    with locked(work):
        engine = mlx_mtp.load(model, drafter=drafter, depth=options.depth, draft_head_bits=0)
        source, tokenizer = _source(engine, drafter), _tokenizer(engine)
        prompts = prompts_of(documents, tokenizer, options, engine.target.info)
        held = prompts[::HELD_OUT_SHARE][:MOST_HELD_OUT]
        learned = [prompt for i, prompt in enumerate(prompts) if i % HELD_OUT_SHARE]
        other = _replay(others, engine, learned, options)
        replies, asked_of = Replies(work / "replies.jsonl"), source_of(engine, source)
        before = yield from _measure("before", engine, held, options)
        best = before
        if (out / "config.json").exists():
            there = mlx_mtp.load(model, drafter=out, depth=options.depth, draft_head_bits=0)
            best = max(before, (yield from _measure("the one there is", there, held, options)))
        own = yield from _replies(replies, asked_of, engine, learned, options)
        ids, watched = _rows(own, other, options)
        # Other models, prompts or options are another run; the same goes on where it was stopped.
        run = work / hashed((asked_of, fingerprint(ids), fingerprint(watched), options))
        yield from _train(source, run, work / "candidate", engine, ids, watched, options)
        fresh = mlx_mtp.load(model, drafter=work / "candidate", depth=options.depth, draft_head_bits=0)
        after = yield from _measure("after", fresh, held, options)
        if after <= best:
            raise NotBetter(
                f"The new drafter makes {after:.2f} tokens per round on {len(held)} held-out prompts, the one there is "
                f"{best:.2f}: nothing was replaced; give more prompts or steps (the new one is in "
                f"{work / 'candidate'})."
            )
        with replacing_or_refused(out, "free some disk space and go on") as place:
            shutil.copytree(work / "candidate", place)
        return Report(before, after, fresh.depth if isinstance(fresh.depth, int) else options.depth, len(held))


def _train(
    source: Path, run: Path, out: Path, engine: Engine, ids: np.ndarray, watched: np.ndarray, options: Adapting
) -> Generator[Stage, None, None]:
    """Fine-tunes the drafter in `source` on these ids and writes it to `out`."""
    checkpoint = Checkpoint.open(source)
    module = for_training(load_drafter(checkpoint))
    drafts = len(module.heads) if isinstance(module, ParallelModel) else options.drafts
    family = family_of(checkpoint.config, str(source))
    yield from drafter_stage("adapt", run, module, family, engine.target, drafts, ids, watched, options.recipe(),
                             steps=options.steps)  # fmt: skip
    write_drafter(out, {key: value for key, value in checkpoint.config.items() if key not in QUANTISED}, module)


def prompts_of(
    documents: Iterable[Document], tokenizer: Tokenizer, options: Adapting, info: TargetInfo | None = None
) -> list[list[int]]:
    """Token ids of at most options.prompts prompts: conversations up to the last reply, and the openings of texts.

    Spread evenly over the documents. DataError where there are too few, or where the chat template or the target
    (`info`) does not take one of them.
    """
    found: list[list[int]] = []
    for document in documents:
        asked = [_question(document, tokenizer)] if document.messages is not None else _openings(
            tokenizer.encode(document.text or ""), options.length
        )  # fmt: skip
        for ids in filter(None, asked):
            if info is not None:
                _check_prompt(ids, document.module, info, options)
            found.append(ids)
    if len(found) < FEWEST_PROMPTS:
        raise DataError(f"The data hold {len(found)} prompts and at least {FEWEST_PROMPTS} are needed; give more.")
    count = min(options.prompts, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _question(document: Document, tokenizer: Tokenizer) -> list[int]:
    """A conversation up to the last thing asked."""
    messages = list(document.messages or [])
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(f"{document.module}: there is no prompt of the user; write one.")
    try:
        return tokenizer.chat(messages)
    except PromptError as error:
        raise DataError(f"{document.module}: {error}") from error


def _openings(ids: list[int], length: int) -> list[list[int]]:
    """The first third of every piece of a text; no piece is begun whose half is not there."""
    starts = range(0, max(1, len(ids) - length // 2), length)
    return [ids[start : start + max(1, min(length, len(ids) - start) // CUT)] for start in starts]


def _check_prompt(ids: list[int], where: str, info: TargetInfo, options: Adapting) -> None:
    if len(ids) + options.tokens > info.max_context:
        raise DataError(
            f"{where}: the prompt has {len(ids)} tokens and the target's context has room for "
            f"{info.max_context - options.tokens} beside a reply of {options.tokens}; shorten it or lower --max-tokens."
        )
    if max(ids) >= info.vocab_size:
        raise DataError(
            f"{where}: token {max(ids)} is not among the target's {info.vocab_size}; "
            "use the tokenizer that belongs to the target."
        )


def _source(engine: Engine, drafter: str | Path) -> Path:
    """The folder of a drafter that was loaded."""
    if not isinstance(engine.drafter, Assistant | Parallel | Sequential):
        raise OptionError(f"'{drafter}' is no drafter with weights to train; name a folder or hub name.")
    return Path(engine.drafter.name)


def _tokenizer(engine: Engine) -> Tokenizer:
    if engine.tokenizer is None or engine.target.path is None:
        raise OptionError("The target has no tokenizer to read the prompts with; choose another.")
    return engine.tokenizer


def _measure(
    name: str, engine: Engine, prompts: list[list[int]], options: Adapting
) -> Generator[Stage, None, float]:
    """Tokens per round over all prompts, greedily."""
    tokens = rounds = 0
    for i, prompt in enumerate(prompts):
        stats = engine.generate(prompt, max_tokens=options.tokens, sampling=mlx_mtp.Sampling(temperature=0.0)).stats
        tokens, rounds = tokens + max(0, stats.tokens - 1), rounds + stats.rounds
        yield Stage(name, i + 1, len(prompts))
    return tokens / max(1, rounds)


def _replies(
    replies: Replies, source: str, engine: Engine, prompts: list[list[int]], options: Adapting
) -> Generator[Stage, None, list[list[int]]]:
    """Prompt and reply of every prompt, half of the replies greedy and half drawn at temperature 1.

    A reply that ended by itself is followed by the token that ended it. Each is kept as it comes, and asked for only
    where the same question has no reply yet.
    """
    rows = []
    for i, prompt in enumerate(prompts):
        question = Question(source=source, prompt=tuple(prompt), temperature=i % 2, tokens=options.tokens,
                            seed=options.seed + i)  # fmt: skip
        reply = replies.get(question)
        if reply is None:
            result = engine.generate(prompt, max_tokens=options.tokens, sampling=question.sampling, seed=question.seed)
            reply = result.tokens + ([] if result.stop_token is None else [result.stop_token])
            replies.add(question, reply)
        rows.append([*prompt, *reply])
        yield Stage("replies", i + 1, len(prompts))
    return rows


def _rows(own: list[list[int]], other: np.ndarray, options: Adapting) -> tuple[np.ndarray, np.ndarray]:
    """Ids to learn from, replies and then replay, and the last tenth of the replies to watch."""
    cut = max(1, len(own) // 10)
    learned, watched = np.concatenate(own[:-cut] or own), np.concatenate(own[-cut:])
    if len(watched) < 2 * options.length:
        watched = learned
    learned = np.concatenate([learned, other[: _wanted(len(learned), options)]])
    return learned.astype(np.int32), watched.astype(np.int32)


def _wanted(own: int, options: Adapting) -> int:
    """Tokens of other text beside so many of the target's own."""
    return int(own * options.rehearsal / (1.0 - options.rehearsal))


def _replay(
    documents: list[Document], engine: Engine, prompts: list[list[int]], options: Adapting
) -> np.ndarray:
    """Ids of other text, enough for the longest replies there can be; DataError where even those are too little."""
    most = sum(len(prompt) + options.tokens + 1 for prompt in prompts)
    ids = np.zeros(0, np.int32)
    if wanted := _wanted(most, options):
        from mlx_lm.tokenizer_utils import load as load_tokenizer

        ids = pack(_enough(documents, 8 * wanted), load_tokenizer(engine.target.path))[:wanted]
    needed = options.batch_size * options.length + 1
    if most + len(ids) < needed:
        raise DataError(
            f"One batch of {options.batch_size} x {options.length} needs at least {needed} tokens, and {len(prompts)} "
            f"prompts and their replies give at most {most + len(ids)}; give more prompts or a smaller batch or length."
        )
    return ids


def _enough(documents: list[Document], characters: int) -> list[Document]:
    """Documents from all over a corpus that hold at least so many characters, where there are so many."""
    order = np.random.default_rng(0).permutation(len(documents))
    chosen, total = [], 0
    for i in order:
        if total >= characters:
            break
        chosen.append(documents[i])
        total += documents[i].characters
    return chosen
