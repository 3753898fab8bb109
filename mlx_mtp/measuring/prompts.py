"""Prompts to measure with: the built-in set, and files as others publish them.

What it does: reads prompts with their category and turns them into token ids. What it does not do: download
anything, or answer one turn of a conversation to ask the next.

    built-in          prompts.jsonl beside this file, written for this project
    Spec-Bench        question.jsonl: `turns` (the first is asked), `category`
    HumanEval         jsonl or jsonl.gz: `prompt`
    chat              jsonl: `messages`; replies at the end are dropped, so that the last turn is the user's
    plain text        anything else: one file, one prompt

A record's `category` counts where it has one, else the file's name. A text is asked as `mlx-mtp generate` asks it:
as one user message, or with `raw` (the option, or true in a record) continued as it stands.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.errors import DataError, OptionError, PromptError
from mlx_mtp.text.tokenizer import Prompt, Tokenizer, prompt_ids
from mlx_mtp.training.data import JSON, JSON_LINES, decode_text, json_object, json_rows, string_of, turns_of

BUILT_IN = Path(__file__).with_name("prompts.jsonl")


@dataclass(frozen=True)
class BenchPrompt:
    """One prompt. text: a string or chat messages. raw: continue a string as it stands. where: file and line."""

    category: str
    text: Prompt
    raw: bool
    where: str

    def ids(self, tokenizer: Tokenizer | None) -> list[int]:
        """Its token ids; PromptError where the model cannot be asked so."""
        if tokenizer is None:
            raise PromptError("Expected a checkpoint with a tokenizer, found none; these prompts are text.")
        try:
            return prompt_ids(self.text, tokenizer, self.raw)
        except PromptError as error:
            raise PromptError(f"{self.where}: {error}") from error

    def fits(self, tokenizer: Tokenizer | None) -> bool:
        """Whether this checkpoint can be asked so: messages need a chat template."""
        return isinstance(self.text, str) or tokenizer is None or tokenizer.has_chat_template


def read_prompts(
    files: Sequence[str | Path] = (), categories: Sequence[str] = (), per_category: int | None = None, raw: bool = False
) -> list[BenchPrompt]:
    """The prompts of these files, or the built-in ones, grouped by category in the order they first come.

    categories: only these; case does not matter. per_category: at most so many of each, evenly chosen; None = all.
    Raises DataError with file and line for what cannot be read, OptionError for a category that is not there.
    """
    found: dict[str, list[BenchPrompt]] = {}
    for file in files or [BUILT_IN]:
        for prompt in _read(Path(file).expanduser(), raw):
            found.setdefault(prompt.category, []).append(prompt)
    wanted = {name.casefold() for name in categories}
    if missing := wanted - {name.casefold() for name in found}:
        raise OptionError(
            f"Expected --category as one of {', '.join(map(repr, found))}, "
            f"found {', '.join(map(repr, sorted(missing)))}; change it."
        )
    groups = [prompts for name, prompts in found.items() if not wanted or name.casefold() in wanted]
    return [prompt for group in groups for prompt in evenly(group, per_category)]


def evenly(prompts: Sequence[BenchPrompt], most: int | None) -> list[BenchPrompt]:
    """At most so many of them, spread over the whole."""
    if most is None or len(prompts) <= most:
        return list(prompts)
    return [prompts[i * len(prompts) // most] for i in range(most)]


def _read(file: Path, raw: bool) -> Iterator[BenchPrompt]:
    count = 0
    unpacked = Path(file.name[:-3] if file.suffix.lower() == ".gz" else file.name)
    suffix, name = unpacked.suffix.lower(), unpacked.stem
    if suffix in JSON_LINES:
        for number, line in enumerate(_content(file).split(b"\n"), start=1):
            text = decode_text(line, file, number)
            if text.strip():
                count += 1
                yield _record(json_object(text, f"{file}, line {number}"), name, raw, f"{file}, line {number}")
    elif suffix == JSON:
        for record, where in json_rows(decode_text(_content(file), file), file):
            count += 1
            yield _record(record, name, raw, where)
    elif text := decode_text(_content(file), file).strip("\n"):
        count += 1
        yield BenchPrompt(file.stem, text, raw, str(file))
    if not count:
        raise DataError(f"{file}: expected at least one prompt, found an empty file; write one into it.")


def _content(file: Path) -> bytes:
    try:
        content = file.read_bytes()
        return gzip.decompress(content) if file.suffix.lower() == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: expected a whole gzip file, found another ({error}); fetch it again.") from error
    except OSError as error:
        raise DataError(f"{file}: expected a readable file, found '{error.strerror}'; check the path.") from error


def _record(record: dict[str, Any], name: str, raw: bool, where: str) -> BenchPrompt:
    category = string_of(record, "category", where) if "category" in record else name
    if "turns" in record:
        return BenchPrompt(category, _filled(_first_turn(record["turns"], where), where), raw, where)
    if "messages" in record:
        messages = turns_of(record["messages"], where)
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages:
            raise DataError(f"{where}: expected `messages` with a turn of the user's, found none; write one.")
        return BenchPrompt(category, messages, False, where)
    if "prompt" in record:
        text = _filled(string_of(record, "prompt", where), where)
        return BenchPrompt(category, text, raw or record.get("raw") is True, where)
    keys = ", ".join(map(repr, record)) or "no keys"
    raise DataError(f"{where}: expected `turns`, `prompt` or `messages`, found {keys}; rename the keys.")


def _first_turn(turns: object, where: str) -> str:
    if not isinstance(turns, list) or not turns:
        raise DataError(f"{where}: expected `turns` as a list of questions, found {turns!r:.60}; write a list.")
    return string_of({"turns": turns[0]}, "turns", where)


def _filled(text: str, where: str) -> str:
    if not text.strip():
        raise DataError(f"{where}: expected a prompt, found an empty text; write one or delete the line.")
    return text


def categories_of(prompts: Iterable[BenchPrompt]) -> list[str]:
    """Each category once, in order."""
    return list(dict.fromkeys(prompt.category for prompt in prompts))
