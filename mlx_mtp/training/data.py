"""Training data: reads documents from files, packs them into one row of token ids, cuts that row into batches.

Everything is deterministic: the same files and seed give the same batch at the same step, so a run resumes anywhere.
Nothing is masked: prompts and answers are all learned, and attention may look past a document's `<bos>`.
Marker tokens written out in a text (`<|turn>`) are read as markers: clean untrusted text first.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mlx_mtp.errors import DataError, PromptError
from mlx_mtp.generation import checks
from mlx_mtp.text.tokenizer import Tokenizer

# Whatever the case. In folders only the first are looked for: .json files there are mostly somebody's settings.
TEXT, JSON_LINES, JSON = frozenset({".txt", ".md", ".py"}), frozenset({".jsonl", ".ndjson"}), ".json"
PACKED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"})
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "model": "assistant"}
HELD_OUT_SHARE, MOST_HELD_OUT = 8, 24  # every eighth, or fewer
# Of the standard library: tests, and tables written by scripts.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"})
Item = TypeVar("Item")


@dataclass(frozen=True)
class Document:
    """Plain `text`, or chat `messages` with the keys role and content; `module` says where it is from."""

    module: str
    text: str | None = None
    messages: list[dict[str, str]] | None = None

    @property
    def plain(self) -> str:
        """All that is said."""
        return self.text or "\n".join(message["content"] for message in self.messages or [])


def split(items: list[Item]) -> tuple[list[Item], list[Item]]:
    """Training and held-out documents or prompts, these from all over the data."""
    every = max(HELD_OUT_SHARE, -(-len(items) // MOST_HELD_OUT))
    return [item for i, item in enumerate(items) if i % every] or items, items[::every]


def standard_library() -> Iterator[Document]:
    """The running Python's standard library, as source text: what is learned where no data are named."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        # No identifiers: site-packages, and what belongs to one build of Python (config-3.11-x86_64-linux-gnu).
        if SKIPPED_FOLDERS.isdisjoint(folders) and all(map(str.isidentifier, folders)):
            with contextlib.suppress(DataError):  # a template, or a deliberate error
                yield from _read(path, prompts=False)


def read_documents(sources: Sequence[str], prompts: bool = False) -> Iterator[Document]:
    """Documents of text files, folders (recursively .txt .md .py .jsonl, not hidden) and glob patterns, in order.

    A .json file holds one row of JSONL, or a list of them. A file that is named twice is read once. prompts: a `prompt`
    without its `completion` is a document too, for whoever only asks. DataError, with file and line, for what is wrong.
    """
    for path in files_of(sources):
        yield from _read(path, prompts)


def files_of(sources: Sequence[str]) -> list[Path]:
    """The files that `sources` name, each once; DataError for a source without any."""
    return list({path.resolve(): path for source in sources for path in _files(source)}.values())


def pack(documents: Iterable[Document], tokenizer: Any) -> np.ndarray:
    """All documents' ids in one row, [N]: `<bos>` text `<eos>`, or a chat in the tokenizer's template and `<eos>`;
    in front what the engine puts there, rendered as the engine renders, thinking off.

    `tokenizer` is what transformers' AutoTokenizer or mlx_lm loads; uint16 if its vocabulary fits, else int32.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("The tokenizer has no eos token to end documents with; set eos_token.")
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32
    rows, reader = [np.zeros(0, dtype)], Tokenizer(tokenizer)
    for document in documents:
        if document.messages is None:
            ids = reader.encode(document.text or "")
        else:
            try:
                # A chat template writes its own <bos>.
                ids = reader.encode(reader.conversation(document.messages), special=False)
            except PromptError as error:
                raise DataError(f"{document.module}: {error}") from error
        rows.append(np.asarray([*ids, end], dtype))
    return np.concatenate(rows)


@dataclass(frozen=True)
class Batches:
    """Batches as a pure function of (seed, step).

    An epoch visits windows of `length` tokens that do not overlap, once each, in a seeded order; each epoch starts the
    first window at another offset. The few windows that do not fill the last batch are left out of that epoch.
    A row holds the window, the next token as the last one's target, and `lookahead` tokens for heads that see further.
    """

    ids: np.ndarray
    batch_size: int
    length: int
    seed: int
    lookahead: int = 0

    def __post_init__(self) -> None:
        checks.whole("batch_size", self.batch_size, 1)
        checks.whole("length", self.length, 1)
        if self._windows < self.batch_size:
            needed = self.batch_size * self.length + 1 + self.lookahead
            raise DataError(
                f"One batch of {self.batch_size} x {self.length} takes at least {needed} tokens, and there are "
                f"{len(self.ids)}; give more data, or a smaller batch or length."
            )

    @property
    def name(self) -> str:
        """A hash of the ids alone, whatever their type."""
        return hashlib.sha256(self.ids.astype("<i4").tobytes()).hexdigest()[:16]

    @property
    def _usable(self) -> int:
        return len(self.ids) - 1 - self.lookahead

    @property
    def _windows(self) -> int:
        # One window is given up so that the offset is free, unless the data are just one batch.
        full = self._usable // self.length
        return full - 1 if full > self.batch_size else full

    @property
    def steps_per_epoch(self) -> int:
        return self._windows // self.batch_size

    def batch(self, step: int) -> np.ndarray:
        """Rows for one step, int32 [batch_size, length + 1 + lookahead]."""
        epoch, index = divmod(step, self.steps_per_epoch)
        random = np.random.default_rng((self.seed, epoch))
        offset = int(random.integers(min(self.length, self._usable - self._windows * self.length + 1)))
        windows = random.permutation(self._windows)[index * self.batch_size : (index + 1) * self.batch_size]
        width = self.length + 1 + self.lookahead
        return np.stack([self.ids[start : start + width] for start in offset + windows * self.length]).astype(np.int32)


# Files


def _wrong(where: object, expected: str, found: object, advice: str) -> DataError:
    return DataError(f"{where}: expected {expected}, found {found}; {advice}")


def _files(source: str) -> list[Path]:
    path = Path(os.path.expanduser(source))
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            if found := _inside(path):
                return found
            raise _wrong(source, ".txt, .md, .py or .jsonl files in the folder", "none", "name the files")
    except OSError as error:
        raise _wrong(source, "a readable path", error.strerror, "change its permissions") from error
    matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(source) else []
    if not matches:
        raise _wrong(source, "a file, a folder or a pattern that matches some", "nothing", "check the path")
    # `**` also matches folders, and one without training files is no mistake there.
    return sorted({file for match in map(Path, matches) for file in (_inside(match) if match.is_dir() else [match])})


def _inside(folder: Path) -> list[Path]:
    """A folder's training files; hidden ones (.git, .venv) are nobody's documents."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in TEXT | JSON_LINES and file.is_file())
    return sorted(file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts))


def _read(path: Path, prompts: bool) -> Iterator[Document]:
    suffix = path.suffix.lower()
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _wrong(path, "a readable file", error.strerror, "change its permissions") from error
    if suffix == JSON or suffix in JSON_LINES:
        for record, where in json_rows(raw, path, suffix):
            yield from _document(record, where, prompts)
        return
    if suffix in PACKED:
        raise _wrong(path, "a text file", "a packed file", "unpack it")
    if b"\0" in raw:
        raise _wrong(path, "a text file", "a binary one", "name text or JSONL files")
    if (text := decode_text(raw, path)).strip():
        yield Document(str(path), text=text)


def decode_text(raw: bytes, path: Path, line: int = 1) -> str:
    """The text of bytes that begin at this line of the file; DataError where they are no UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        found = f"the byte 0x{error.object[error.start]:02x}"
        raise _wrong(f"{path}, line {line}", "UTF-8 text", found, "convert the file to UTF-8") from error


def json_rows(raw: bytes, path: Path, suffix: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects of a file and where each is: one or a list of them in a .json file, else one on every line.

    DataError for anything else.
    """
    if suffix == JSON:
        text = decode_text(raw, path).strip() or "[]"
        found = _json(text, path, "JSON", "repair it, or name the file .jsonl where every line is an object")
        for number, record in enumerate(found if isinstance(found, list) else [found], start=1):
            where = f"{path}, item {number}" if isinstance(found, list) else str(path)
            yield _object(record, where, "write a list of objects"), where
        return
    for number, line in enumerate(raw.split(b"\n"), start=1):
        where = f"{path}, line {number}"
        if text := decode_text(line, path, number).strip():
            found = _json(text, where, "one JSON object", "repair the line")
            yield _object(found, where, "write one object per line"), where


def _json(text: str, where: object, expected: str, advice: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _wrong(where, expected, error, advice) from error


def _object(record: object, where: str, advice: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _wrong(where, "a JSON object", type(record).__name__, advice)
    return record


def _document(record: dict[str, Any], where: str, prompts: bool) -> Iterator[Document]:
    if "messages" in record:
        yield Document(where, messages=turns_of(record["messages"], where))
    elif "prompt" in record and ("completion" in record or prompts):
        pairs = [(role, key) for role, key in (("user", "prompt"), ("assistant", "completion")) if key in record]
        yield Document(where, messages=[{"role": r, "content": string_of(record, key, where)} for r, key in pairs])
    elif "text" in record:
        if text := string_of(record, "text", where):
            yield Document(where, text=text)
    else:
        keys = ", ".join(map(repr, record)) or "no keys"
        raise _wrong(where, "`text`, `prompt` with `completion`, or `messages`", keys, "rename the keys")


def turns_of(messages: object, where: str) -> list[dict[str, str]]:
    """Chat messages with the roles this project uses; DataError for anything else."""
    if not isinstance(messages, list) or not messages:
        raise _wrong(where, "`messages` to be a list of turns", f"{messages!r:.60}", "write a list")
    turns: list[dict[str, str]] = []
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise _wrong(where, "turns with the role system, user or assistant", f"{turn!r:.60}", "change the role")
        turns.append({"role": ROLES[turn["role"]], "content": string_of(turn, "content", where)})
    return turns


def string_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text under a key; DataError where there is none."""
    value = record.get(key)
    if not isinstance(value, str):
        raise _wrong(where, f"`{key}` to be a string", f"{value!r:.60}", "write text in quotes")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise _wrong(where, f"Unicode text in `{key}`", "half a surrogate pair", "repair the escapes")
    return value
