"""Prompts to measure with: the built-in set, and files as others publish them.

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
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.errors import DataError, OptionError, PromptError
from mlx_mtp.text.tokenizer import Prompt, Tokenizer, prompt_ids
from mlx_mtp.training.data import JSON, JSON_LINES, decode_text, json_rows, string_of, turns_of

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
            raise PromptError("This checkpoint has no tokenizer, and these prompts are text; name another model.")
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
        for prompt in _read(Path(os.path.expanduser(file)), raw):
            found.setdefault(prompt.category, []).append(prompt)
    wanted = {name.casefold() for name in categories}
    if missing := wanted - {name.casefold() for name in found}:
        there, asked = (", ".join(map(repr, names)) for names in (found, sorted(missing)))
        raise OptionError(f"There is no category {asked} among the prompts; --category takes {there}.")
    groups = [prompts for name, prompts in found.items() if not wanted or name.casefold() in wanted]
    counts = [len(group) if per_category is None else min(per_category, len(group)) for group in groups]
    return [group[i * len(group) // n] for group, n in zip(groups, counts, strict=True) for i in range(n)]


def _read(file: Path, raw: bool) -> Iterator[BenchPrompt]:
    unpacked = file.with_suffix("") if file.suffix.lower() == ".gz" else file
    records = list(_records(file, unpacked.suffix.lower()))
    if not records:
        raise DataError(f"{file}: there is no prompt in this file; write one into it.")
    for record, where in records:
        text = _text(record, where)
        category = string_of(record, "category", where) if "category" in record else unpacked.stem
        yield BenchPrompt(category, text, isinstance(text, str) and (raw or record.get("raw") is True), where)


def _records(file: Path, suffix: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file and where each is; a text is the `prompt` of one."""
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if file.suffix.lower() == ".gz" else content
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file}: this is no whole gzip file ({error}); fetch it again.") from error
    except OSError as error:
        raise DataError(f"{file}: the file cannot be read ({error.strerror}); check the path.") from error
    if suffix == JSON or suffix in JSON_LINES:
        yield from json_rows(content, file, suffix)
    elif text := decode_text(content, file).strip("\n"):
        yield {"prompt": text}, str(file)


def _text(record: dict[str, Any], where: str) -> Prompt:
    if "messages" in record:
        messages = turns_of(record["messages"], where)
        while messages and messages[-1]["role"] != "user":
            messages.pop()
        if not messages:
            raise DataError(f"{where}: `messages` has no turn of the user's; write one.")
        return messages
    if "turns" in record:
        if not isinstance(record["turns"], list) or not record["turns"]:
            raise DataError(f"{where}: `turns` is no list of questions but {record['turns']!r:.60}; write a list.")
        record = {"prompt": record["turns"][0]}
    if "prompt" not in record:
        keys = ", ".join(map(repr, record)) or "no keys"
        raise DataError(f"{where}: a prompt needs `turns`, `prompt` or `messages`, not {keys}; rename the keys.")
    text = string_of(record, "prompt", where)
    if not text.strip():
        raise DataError(f"{where}: this prompt is an empty text; write one or delete the line.")
    return text
