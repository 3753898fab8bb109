"""Fine-tuning a drafter to a target: the target's own replies to the user's prompts are what it learns to foresee.

What it does: lets the target answer (with the drafter it has, so by MTP), trains the drafter on the answers and a
share of other text for rehearsal, measures tokens per round before and after on prompts held out, and writes the new
drafter only where it is the better one. What it does not do: change the target; its output law stays what it was.

A drafter loses acceptance where its target was quantised or fine-tuned; words of the target itself win it back
(FastMTP, arXiv 2509.18362, section 3.2).

    out/                       the new drafter
    out.work/replies.jsonl     prompt and reply ids, a line each; kept and used again
    out.work/<run>/            log, curves, checkpoint of one set of replies and options
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mlx_mtp
from mlx_mtp.checkpoint import Checkpoint, visible
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.parallel import ParallelModel
from mlx_mtp.engine import Engine
from mlx_mtp.errors import DataError, MLXMTPError, OptionError
from mlx_mtp.training.corpus import Document
from mlx_mtp.training.data import fingerprint, pack, read_documents
from mlx_mtp.training.families import FAMILIES, QUANTISED, family_of, for_training, write_drafter
from mlx_mtp.training.pipeline import DECAY, Recipe, Stage, run_stage, split
from mlx_mtp.training.trainer import TrainOptions

FEWEST_PROMPTS = 4
HELD_OUT_SHARE, MOST_HELD_OUT = 8, 24  # every eighth prompt
CUT = 3  # a text is an opening of a third of its piece; the target writes the rest


class NotBetter(MLXMTPError):
    """The adapted drafter is no better than the one there is; nothing was replaced."""


@dataclass(frozen=True, kw_only=True)
class Adapting:
    """What a user may turn.

    prompts: most that are answered. tokens: most of a reply. rehearsal: share of what is learned that is other text
    (`rehearsal_data`, the standard library where there is none). label_share: share of the loss on the tokens that
    stand in the text, the rest on the target's law. depth: drafts a round when measuring.
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
        for name, least in (("prompts", FEWEST_PROMPTS), ("tokens", 8), ("drafts", 1), ("depth", 1), ("length", 16)):
            if getattr(self, name) < least:
                raise OptionError(f"Expected {name} of at least {least}, found {getattr(self, name)}; raise it.")
        if not 0.0 <= self.rehearsal < 1.0:
            raise OptionError(f"Expected a rehearsal share from 0 to below 1, found {self.rehearsal}.")
        if not 0.0 <= self.label_share <= 1.0:
            raise OptionError(f"Expected a label share from 0 to 1, found {self.label_share}.")
        TrainOptions(steps=self.steps, learning_rate=self.learning_rate)


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
    call left in `out`.work.
    """
    work = out.with_name(f"{out.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    engine = mlx_mtp.load(model, drafter=drafter, depth=options.depth, draft_head_bits=0)
    source, tokenizer = _source(engine, drafter), _tokenizer(engine)
    prompts = prompts_of(read_documents(data, prompts=True), tokenizer, options)
    held = prompts[::HELD_OUT_SHARE][:MOST_HELD_OUT]
    learned = [prompt for i, prompt in enumerate(prompts) if i % HELD_OUT_SHARE]
    before = yield from _measure("before", engine, held, options)
    standing = before
    if (out / "config.json").exists():
        other = mlx_mtp.load(model, drafter=out, depth=options.depth, draft_head_bits=0)
        standing = max(before, (yield from _measure("the one there is", other, held, options)))
    own = yield from _replies(work / "replies.jsonl", engine, learned, options)
    ids, fixed = _rows(own, tokenizer, options)
    config = Checkpoint.open(source).config
    module = for_training(load_drafter(Checkpoint.open(source)))
    drafts = len(module.heads) if isinstance(module, ParallelModel) else options.drafts
    loss = FAMILIES[family_of(config, str(source))].objective(
        engine.target, drafts, decay=DECAY, label_share=options.label_share
    )
    recipe = Recipe(batch_size=options.batch_size, length=options.length, learning_rate=options.learning_rate,
                    seed=options.seed)  # fmt: skip
    # Another source, other prompts or options are another run; the same goes on where it was stopped.
    run = work / _key(source, ids, options)
    yield from run_stage("adapt", run, module, loss, ids, fixed, recipe, steps=options.steps, lookahead=drafts,
                         figures=tuple(f"agreement_{j + 1}" for j in range(drafts)))  # fmt: skip
    written = {key: value for key, value in config.items() if key not in QUANTISED}
    write_drafter(work / "candidate", written, module)
    fresh = mlx_mtp.load(model, drafter=work / "candidate", depth=options.depth, draft_head_bits=0)
    after = yield from _measure("after", fresh, held, options)
    if after <= standing:
        raise NotBetter(
            f"Expected more than the {standing:.2f} tokens per round of the drafter there is, found {after:.2f} on "
            f"{len(held)} held-out prompts: nothing was replaced; give more prompts or steps (the new one is in "
            f"{work / 'candidate'})."
        )
    write_drafter(out, written, module)
    return Report(before, after, fresh.depth if isinstance(fresh.depth, int) else options.depth, len(held))


def _key(source: Path, ids: np.ndarray, options: Adapting) -> str:
    files = visible(source.glob("*.safetensors"))
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr((source, weights, fingerprint(ids), options)).encode()).hexdigest()[:12]


def prompts_of(documents: Iterator[Document], tokenizer: Any, options: Adapting) -> list[list[int]]:
    """Token ids of at most options.prompts prompts: conversations up to the last reply, and the openings of texts.

    Spread evenly over the documents; DataError where there are too few.
    """
    found: list[list[int]] = []
    for document in documents:
        if document.messages is not None:
            messages = list(document.messages)
            while len(messages) > 1 and messages[-1]["role"] == "assistant":
                messages.pop()
            found.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True))
            continue
        ids = tokenizer.encode(document.text or "")
        for start in range(0, max(1, len(ids) - options.length // 2), options.length):
            found.append(ids[start : start + max(1, min(options.length, len(ids) - start) // CUT)])
    found = [prompt for prompt in found if prompt]
    if len(found) < FEWEST_PROMPTS:
        raise DataError(f"Expected at least {FEWEST_PROMPTS} prompts in the data, found {len(found)}; give more.")
    count = min(options.prompts, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def _source(engine: Engine, drafter: str | Path) -> Path:
    """The folder of a drafter that was loaded."""
    folder = getattr(engine.drafter, "name", None)
    if folder is None or not (Path(folder) / "config.json").exists():
        raise OptionError(f"Expected a drafter with weights, found '{drafter}'; name a folder or hub name.")
    return Path(folder)


def _tokenizer(engine: Engine) -> Any:
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    if engine.tokenizer is None or engine.target.path is None:
        raise OptionError("Expected a target with a tokenizer, found none; it must read the prompts.")
    return load_tokenizer(engine.target.path)


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
    file: Path, engine: Engine, prompts: list[list[int]], options: Adapting
) -> Generator[Stage, None, list[list[int]]]:
    """Prompt and reply of every prompt, half of the replies greedy and half drawn at temperature 1.

    Kept in `file` as they come; those already there for the same prompt are used again.
    """
    known = _known(file)
    rows = []
    with file.open("a", encoding="utf-8") as lines:
        for i, prompt in enumerate(prompts):
            key = json.dumps([prompt, i % 2, options.tokens])
            if key not in known:
                sampling = mlx_mtp.Sampling(temperature=float(i % 2), top_k=0, top_p=1.0, min_p=0.0)
                result = engine.generate(prompt, max_tokens=options.tokens, sampling=sampling, seed=options.seed + i)
                ended = [min(engine.end_tokens)] if result.finish_reason == "stop" and engine.end_tokens else []
                known[key] = [*result.tokens, *ended]
                line = {"prompt": prompt, "temperature": i % 2, "tokens": options.tokens, "reply": known[key]}
                lines.write(json.dumps(line) + "\n")
                lines.flush()
            rows.append([*prompt, *known[key]])
            yield Stage("replies", i + 1, len(prompts))
    return rows


def _known(file: Path) -> dict[str, list[int]]:
    """Replies of an earlier run; a last line that was cut off by a kill is dropped from the file."""
    known: dict[str, list[int]] = {}
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            known[json.dumps([row["prompt"], row["temperature"], row["tokens"]])] = list(row["reply"])
        except (ValueError, KeyError, TypeError) as error:
            if number < len(lines):
                raise DataError(f"{file}, line {number}: expected a reply, found {line[:40]!r}; delete it.") from error
            file.write_text("".join(f"{whole}\n" for whole in lines[:-1]), encoding="utf-8")
    return known


def _rows(own: list[list[int]], tokenizer: Any, options: Adapting) -> tuple[np.ndarray, np.ndarray]:
    """Ids to learn from, replies and rehearsal one behind the other, and the last tenth of the replies to watch."""
    cut = max(1, len(own) // 10)
    learned, watched = np.concatenate(own[:-cut] or own), np.concatenate(own[-cut:])
    if len(watched) < 2 * options.length:
        watched = learned
    wanted = int(len(learned) * options.rehearsal / (1.0 - options.rehearsal))
    if wanted:
        documents, _ = split(options.rehearsal_data)
        packed = pack(_enough(documents, 8 * wanted), tokenizer)[:wanted]
        learned = np.concatenate([learned, packed])
    return learned.astype(np.int32), watched.astype(np.int32)


def _enough(documents: list[Document], characters: int) -> list[Document]:
    """Documents from all over a corpus that hold at least so many characters, where there are so many."""
    order = np.random.default_rng(0).permutation(len(documents))
    chosen, total = [], 0
    for i in order:
        if total >= characters:
            break
        chosen.append(documents[i])
        total += len(documents[i].text or "") + sum(len(m["content"]) for m in documents[i].messages or [])
    return chosen
