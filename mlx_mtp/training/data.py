"""Training data: reads documents from files, packs them into one row of token ids, cuts that row into batches.

    documents = read_documents(["notes/", "chats/*.jsonl"])
    ids = pack(documents, tokenizer)
    rows = Batches(ids, batch_size=8, length=512, seed=0).batch(step)

Everything is deterministic: the same files and seed give the same batch at the same step, so a run resumes anywhere.
Nothing is masked: prompts and answers are all learned, and attention may look past a document's `<bos>`.
Marker tokens written out in a text (`<|turn>`) are read as markers: clean untrusted text first.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mtp.errors import DataError, PromptError
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.ranges import check_ranges

# Whatever the case. In folders only the first are looked for: .json files there are mostly somebody's settings.
TEXT, JSON_LINES, JSON = frozenset({".txt", ".md", ".py"}), frozenset({".jsonl", ".ndjson"}), ".json"
PACKED = frozenset({".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"})
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "model": "assistant"}
CHUNK_CHARACTERS = 4_000_000  # tokenized at a time: enough for every core, small enough not to be noticed
HELD_OUT = 25  # every 25th document
# Of the standard library: tests, and tables written by scripts.
SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"})


@dataclass(frozen=True)
class Document:
    """Plain `text`, or chat `messages` with the keys role and content; `module` says where it is from."""

    module: str
    text: str | None = None
    messages: list[dict[str, str]] | None = None

    @property
    def characters(self) -> int:
        """How long it is."""
        return len(self.text or "") + sum(len(turn["content"]) for turn in self.messages or [])


def documents_of(sources: Sequence[str], prompts: bool = False) -> list[Document]:
    """What `sources` hold; the running Python's standard library, as source text, where there are none."""
    return list(read_documents(sources, prompts) if sources else _standard_library())


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents."""
    if len(documents) < HELD_OUT:
        return documents[:-1] or documents, documents[-1:]
    return [document for i, document in enumerate(documents) if i % HELD_OUT], documents[::HELD_OUT]


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        folders = path.relative_to(root).parts[:-1]
        # No identifiers: site-packages, and what belongs to one build of Python (config-3.11-x86_64-linux-gnu).
        if SKIPPED_FOLDERS.isdisjoint(folders) and all(map(str.isidentifier, folders)):
            with contextlib.suppress(DataError):  # a template, or a deliberate error
                yield from _read_text(path)


def read_documents(sources: Sequence[str], prompts: bool = False) -> Iterator[Document]:
    """Documents of text files, folders (recursively .txt .md .py .jsonl, not hidden) and glob patterns, in order.

    A .json file holds one row of JSONL, or a list of them. A file that is named twice is read once. prompts: a `prompt`
    without its `completion` is a document too, for whoever only asks. DataError, with file and line, for what is wrong.
    """
    for path in files_of(sources):
        suffix = path.suffix.lower()
        if suffix in JSON_LINES:
            yield from _read_jsonl(path, prompts)
        elif suffix == JSON:
            yield from _read_json(path, prompts)
        else:
            yield from _read_text(path)


def files_of(sources: Sequence[str]) -> list[Path]:
    """The files that `sources` name, each once; DataError for a source without any."""
    return list({path.resolve(): path for source in sources for path in _files(source)}.values())


def pack(documents: Iterable[Document], tokenizer: Any) -> np.ndarray:
    """All documents' ids in one row, [N]: `<bos>` text `<eos>`, or a chat in the tokenizer's template and `<eos>`;
    in front what the engine puts there, rendered as the engine renders, thinking off.

    `tokenizer` is what transformers' AutoTokenizer or mlx_lm loads; uint16 if its vocabulary fits, else int32.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("expected a tokenizer with an eos token to end documents, found none; set eos_token")
    dtype = np.uint16 if max(tokenizer.get_vocab().values()) < 1 << 16 else np.int32
    rows, reader = [np.zeros(0, dtype)], Tokenizer(tokenizer)
    for chunk in _chunks(documents):
        texts = [_render(document, reader) for document in chunk]
        for document, ids in zip(chunk, _encode(texts, tokenizer), strict=True):
            # A chat template writes its own <bos>.
            start = [] if document.messages is not None else reader.opening(ids)
            rows.append(np.asarray([*start, *ids, tokenizer.eos_token_id], dtype))
    return np.concatenate(rows)


def fingerprint(ids: np.ndarray) -> str:
    """A hash of the ids alone, whatever their type: names the data in a checkpoint's record."""
    digest = hashlib.sha256()
    for start in range(0, len(ids), 1 << 20):
        digest.update(ids[start : start + (1 << 20)].astype("<i4").tobytes())
    return digest.hexdigest()[:16]


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
        most = math.inf
        check_ranges(self, batch_size=(1, most), length=(1, most), seed=(0, most), lookahead=(0, most))
        if self._windows < self.batch_size:
            needed = self.batch_size * self.length + 1 + self.lookahead
            raise DataError(
                f"expected at least {needed} tokens for one batch of {self.batch_size} x {self.length}, "
                f"found {len(self.ids)}; give more data, or a smaller batch or length"
            )

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
        offsets = min(self.length, self._usable - self._windows * self.length + 1)
        offset, order = _epoch(self.seed, epoch, self._windows, offsets)
        windows = order[index * self.batch_size : (index + 1) * self.batch_size]
        width = self.length + 1 + self.lookahead
        starts = offset + windows * self.length
        return np.stack([self.ids[start : start + width] for start in starts]).astype(np.int32)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, windows: int, offsets: int) -> tuple[int, np.ndarray]:
    """An epoch's offset and order of windows; remembered, because every step of the epoch asks for it."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(offsets)), random.permutation(windows)


def _files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return [path]
        if path.is_dir():
            found = _inside(path)
            if not found:
                raise DataError(
                    f"{source}: expected .txt, .md, .py or .jsonl files in the folder, found none; name the files"
                )
            return found
    except OSError as error:
        raise DataError(
            f"{source}: expected a readable path, found {error.strerror}; change its permissions"
        ) from error
    matches = sorted(glob.glob(str(path), recursive=True)) if glob.has_magic(source) else []
    if not matches:
        raise DataError(
            f"{source}: expected a file, a folder or a pattern that matches some, found nothing; check the path"
        )
    return sorted({file for match in matches for file in _matched(Path(match))})


def _matched(match: Path) -> list[Path]:
    """A pattern's match: `**` also matches folders, and one without training files is no mistake there."""
    return _inside(match) if match.is_dir() else [match]


def _inside(folder: Path) -> list[Path]:
    """A folder's training files; hidden ones (.git, .venv) are nobody's documents."""
    files = (file for file in folder.rglob("*") if file.suffix.lower() in TEXT | JSON_LINES and file.is_file())
    return sorted(file for file in files if not any(part[0] == "." for part in file.relative_to(folder).parts))


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a readable file, found {error.strerror}; change its permissions") from error


def decode_text(raw: bytes, path: Path, line: int = 1) -> str:
    """The text of bytes that begin at this line of the file; DataError where they are no UTF-8."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += error.object[: error.start].count(b"\n")
        raise DataError(
            f"{path}, line {line}: expected UTF-8 text, found the byte 0x{error.object[error.start]:02x}; "
            "convert the file to UTF-8"
        ) from error


def _read_text(path: Path) -> Iterator[Document]:
    raw = _read_bytes(path)
    packed = path.suffix.lower() in PACKED
    if packed or b"\0" in raw:
        what, advice = ("a packed file", "unpack it") if packed else ("a binary one", "name text or JSONL files")
        raise DataError(f"{path}: expected a text file, found {what}; {advice}")
    text = decode_text(raw, path)
    if text.strip():
        yield Document(str(path), text=text)


def _read_jsonl(path: Path, prompts: bool) -> Iterator[Document]:
    for number, raw in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if (line := decode_text(raw, path, number)).strip():
            where = f"{path}, line {number}"
            yield from _document(json_object(line, where), where, prompts)


def _read_json(path: Path, prompts: bool) -> Iterator[Document]:
    for record, where in json_rows(decode_text(_read_bytes(path), path), path):
        yield from _document(record, where, prompts)


def json_rows(text: str, path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The objects in a .json file, one or a list of them, and where each is; DataError for anything else."""
    try:
        found = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: expected JSON, found {error}; repair it, or name the file .jsonl where every line is an object"
        ) from error
    for number, record in enumerate(found if isinstance(found, list) else [found], start=1):
        where = f"{path}, item {number}" if isinstance(found, list) else str(path)
        yield _checked_object(record, where, "write a list of objects"), where


def json_object(line: str, where: str) -> dict[str, Any]:
    """The object on a line; DataError for anything else."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: expected one JSON object, found {error}; repair the line") from error
    return _checked_object(record, where, "write one object per line")


def _checked_object(record: object, where: str, advice: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(record).__name__}; {advice}")
    return record


def _document(record: dict[str, Any], where: str, prompts: bool) -> Iterator[Document]:
    if "messages" in record:
        yield Document(where, messages=turns_of(record["messages"], where))
    elif "prompt" in record and "completion" in record:
        pairs = (("user", "prompt"), ("assistant", "completion"))
        turns = [{"role": role, "content": string_of(record, key, where)} for role, key in pairs]
        yield Document(where, messages=turns)
    elif "prompt" in record and prompts:
        yield Document(where, messages=[{"role": "user", "content": string_of(record, "prompt", where)}])
    elif "text" in record:
        text = string_of(record, "text", where)
        if text:
            yield Document(where, text=text)
    else:
        raise DataError(
            f"{where}: expected `text`, `prompt` with `completion`, or `messages`, "
            f"found {', '.join(map(repr, record)) or 'no keys'}; rename the keys"
        )


def turns_of(messages: object, where: str) -> list[dict[str, str]]:
    """Chat messages with the roles this project uses; DataError for anything else."""
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: expected `messages` to be a list of turns, found {messages!r:.60}; write a list")
    turns: list[dict[str, str]] = []
    for turn in messages:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise DataError(
                f"{where}: expected turns with the role system, user or assistant, found {turn!r:.60}; change the role"
            )
        turns.append({"role": ROLES[turn["role"]], "content": string_of(turn, "content", where)})
    return turns


def string_of(record: dict[str, Any], key: str, where: str) -> str:
    """The text under a key; DataError where there is none."""
    value = record.get(key)
    if not isinstance(value, str):
        raise DataError(f"{where}: expected `{key}` to be a string, found {value!r:.60}; write text in quotes")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: expected Unicode text in `{key}`, found half a surrogate pair; repair the escapes")
    return value


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += document.characters
        if size >= CHUNK_CHARACTERS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _render(document: Document, tokenizer: Tokenizer) -> str:
    if document.messages is None:
        return document.text or ""
    try:
        return tokenizer.conversation(document.messages)
    except PromptError as error:
        raise DataError(f"{document.module}: {error}") from error


def _encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each text, without the tokens that the tokenizer adds around a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a tokenizer written in Python
        return [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    # tokenizer.json may carry the truncation of whoever wrote it; transformers resets it on every call as well.
    backend.no_truncation()
    backend.no_padding()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
