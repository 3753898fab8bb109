"""A target's replies to prompts, kept in a file and used again where nothing has changed that they depend on.

What it does: one JSON object a line, each with what its reply depends on, so that replies of other targets, options
or seeds stay in the file and are left alone. What it does not do: ask (adapt.py).

Lines are only ever appended. A kill may leave a last line without its end: where it is whole it is kept, else dropped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.engine import Engine
from mlx_mtp.errors import DataError
from mlx_mtp.generation.types import Sampling
from mlx_mtp.training.files import hashed, model_digest


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
    """What stands for the engine in a reply's record: the contents of its models and its own settings.

    The drafter is part of it, because the same seed draws another reply from the same distribution with another one.
    """
    assert engine.target.path is not None
    settings = asdict(Question(source="", prompt=(), temperature=0, tokens=1, seed=0).sampling.over(engine.defaults))
    parts = (model_digest(engine.target.path), model_digest(drafter), engine.depth, engine.mode, engine.max_context,
             sorted(engine.stop_tokens), settings)  # fmt: skip
    return hashed(parts)


class Replies:
    """The replies in `file`. Raises DataError, with the line, for one that is damaged."""

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
            if (row := _row(line)) is None:
                raise DataError(
                    f"{self._file}, line {number}: expected a reply, found {line[:40].decode(errors='replace')!r}; "
                    "delete the line."
                )
            self._keep(row)
        if last and (row := _row(last)) is not None:
            self._keep(row)
            with self._file.open("ab") as end:
                end.write(b"\n")
        elif last:
            os.truncate(self._file, self._file.stat().st_size - len(last))

    def _keep(self, row: dict[str, Any]) -> None:
        """Rows that do not say what they depend on, from before this was noted, answer no question."""
        if "source" in row and "seed" in row:
            fields = {name: row[name] for name in ("source", "temperature", "tokens", "seed")}
            self._known[Question(**fields, prompt=tuple(row["prompt"]))] = row["reply"]


def _row(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None for anything but a reply."""
    try:
        row: dict[str, Any] = json.loads(line)
        ids = [*row["prompt"], *row["reply"], row["temperature"], row["tokens"], row.get("seed", 0)]
        whole = isinstance(row.get("source", ""), str) and all(type(i) is int and i >= 0 for i in ids)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return row if whole else None
