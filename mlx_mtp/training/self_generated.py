"""Self-generated data: what a target itself writes, on which a drafter is trained to agree with it.

A drafter meets its target's own output in use, which differs from any corpus (FastMTP, arXiv 2509.18362, section 3.2).
Continuations of a corpus are many at once, by plain decoding; replies to prompts come one by one and are kept in a
file, to be used again where nothing has changed that they depend on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.engine import Engine
from mlx_mtp.errors import DataError
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.generation.types import Sampling
from mlx_mtp.training.run_folder import hashed, model_digest

BATCH = 32


def openings(ids: np.ndarray, count: int, length: int, marker: list[int], seed: int) -> np.ndarray:
    """`count` windows [N, length] of a corpus: half end anywhere, half where `marker` does (a reply begins there)."""
    random = np.random.default_rng(seed)
    ends = random.integers(length, len(ids) + 1, count)
    places = np.lib.stride_tricks.sliding_window_view(ids, len(marker)) if marker else ids[:0, None]
    replies = np.flatnonzero((places == marker).all(axis=-1)) + len(marker)
    replies = replies[replies >= length]
    if len(replies):
        ends = np.where(np.arange(count) % 2 == 0, ends, random.choice(replies, count))
    return np.stack([ids[end - length : end] for end in ends])


def continuations(
    target: Target, prompts: np.ndarray, tokens: int, seed: int, sampled_share: float = 0.5
) -> Iterator[np.ndarray]:
    """Prompts [N, P] followed by what the target writes, [n, P + tokens] at a time.

    sampled_share 0..1 of it is drawn at temperature 1, the rest is greedy.
    """
    for start in range(0, len(prompts), BATCH):
        batch = mx.array(prompts[start : start + BATCH].astype(np.int32))
        # Spread evenly over pairs of rows, because openings come in two kinds by turns.
        pairs = np.arange(start, start + len(batch)) // 2
        sampled = mx.array(np.floor((pairs + 1) * sampled_share) > np.floor(pairs * sampled_share))
        yield np.array(_continue(target, batch, tokens, mx.random.key(seed + start), sampled[:, None]))


def _continue(target: Target, prompts: mx.array, tokens: int, key: mx.array, sampled: mx.array) -> mx.array:
    """One batch, [B, P] -> [B, P + tokens]. sampled: [B, 1], which rows are drawn."""
    count, length = prompts.shape
    cache = target.new_cache(length + tokens, count)

    def step(rows: mx.array, key: mx.array, arrays: object) -> tuple[mx.array, mx.array, object]:
        inner = cache.around(arrays)  # type: ignore[arg-type]
        logits = target.head(target.forward(rows, inner, 1).hidden)
        inner.advance(rows.shape[1])
        key, draw = mx.random.split(key)
        chosen = mx.where(sampled, mx.random.categorical(logits, key=draw), mx.argmax(logits, axis=-1))
        return chosen.astype(mx.int32), key, inner.arrays

    written = [prompts]
    rows, key, arrays = step(prompts, key, cache.arrays)
    compiled = mx.compile(step)
    for _ in range(tokens - 1):
        written.append(rows)
        rows, key, arrays = compiled(rows, key, arrays)
        mx.async_eval(rows, key, arrays)
    return mx.concatenate([*written, rows], axis=1)


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a reply depends on. source: of `source_of`; seed: of this reply; tokens: the most it may have."""

    source: str
    prompt: tuple[int, ...]
    temperature: int
    tokens: int
    seed: int

    @property
    def sampling(self) -> Sampling:
        """Greedy, or drawn from the target's own distribution."""
        return Sampling(temperature=float(self.temperature), top_k=0, top_p=1.0, min_p=0.0)


def source_of(engine: Engine, drafter: Path) -> str:
    """A hash of what an engine's replies depend on: the contents of its models and its own settings.

    The drafter is part of it, because the same seed draws another reply from the same distribution with another one.
    """
    assert engine.target.path is not None
    settings = asdict(Question(source="", prompt=(), temperature=0, tokens=1, seed=0).sampling.over(engine.defaults))
    parts = (model_digest(engine.target.path), model_digest(drafter), engine.depth, engine.mode, engine.max_context,
             sorted(engine.stop_tokens), settings)  # fmt: skip
    return hashed(parts)


class Replies:
    """The replies in `file`, one JSON object a line; lines are only ever appended.

    A kill may leave a last line without its end: where it is whole it is kept, else dropped. Raises DataError, with the
    line, for one that is damaged.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._known: dict[Question, list[int]] = {}
        if file.exists():
            self._read()

    def get(self, question: Question) -> list[int] | None:
        """The reply to exactly this, None where there is none yet."""
        return self._known.get(question)

    def add(self, question: Question, reply: Sequence[int]) -> None:
        """Keeps a reply; it is in the file when this returns."""
        self._known[question] = list(reply)
        with self._file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(asdict(question) | {"reply": list(reply)}) + "\n")

    def _read(self) -> None:
        *lines, last = self._file.read_bytes().split(b"\n")
        for number, line in enumerate(lines, 1):
            if not self._keep(line):
                raise DataError(f"{self._file}, line {number}: this is no reply; delete the line.")
        if last and self._keep(last):
            with self._file.open("ab") as end:
                end.write(b"\n")
        elif last:
            os.truncate(self._file, self._file.stat().st_size - len(last))

    def _keep(self, line: bytes) -> bool:
        """Whether a line holds a reply. One that does not say what it depends on, from before this was noted, is left
        alone and answers no question."""
        try:
            row: dict[str, Any] = json.loads(line)
            ids = [*row["prompt"], *row["reply"], row["temperature"], row["tokens"], row.get("seed", 0)]
            if not isinstance(row.get("source", ""), str) or not all(type(i) is int and i >= 0 for i in ids):
                return False
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        if "source" in row and "seed" in row:
            asked = {name: row[name] for name in ("source", "temperature", "tokens", "seed")}
            self._known[Question(**asked, prompt=tuple(row["prompt"]))] = row["reply"]
        return True
