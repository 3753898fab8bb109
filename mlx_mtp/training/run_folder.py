"""A training run's files on disk, so that a kill, a power cut or a full disk leaves the last checkpoint whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.atomic import replacing_or_refused
from mlx_mtp.errors import CheckpointError

RESUME = "the last checkpoint is untouched, free some disk space and resume"
MODEL_SUFFIXES = frozenset({".json", ".safetensors", ".model", ".jinja", ".txt"})


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder`, which is made where it is not there and goes again if nothing comes into it, for one run.

    CheckpointError while another process or run holds it, or where it cannot be written into. The system frees the
    lock when the process ends, however it ends.
    """
    made = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        opened = (folder / "lock").open("w")
    except OSError as error:
        raise CheckpointError(
            f"'{folder}' is no folder that can be written into ({error.strerror}); choose another."
        ) from error
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: another run is training into it; wait for that one, or choose another folder."
            ) from error
        try:
            yield
        finally:
            if made and os.listdir(folder) == ["lock"]:
                shutil.rmtree(folder)


def hashed(parts: object) -> str:
    """A short hash of plain values: numbers, strings, tuples, lists and dictionaries of them."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def digest(files: Iterable[Path]) -> str:
    """A hash of files' names and contents, in this order; CheckpointError for one that cannot be read."""
    found = []
    for file in files:
        try:
            with file.open("rb") as content:
                found.append((file.name, hashlib.file_digest(content, "sha256").hexdigest()))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error.strerror}); check its rights.") from error
    return hashed(found)


def model_digest(folder: Path) -> str:
    """A hash of all that says how a checkpoint answers: weights, settings, tokenizer, chat template."""
    return digest(sorted(file for file in folder.iterdir() if file.suffix in MODEL_SUFFIXES and file.is_file()))


def read_state(file: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """What checkpoints.atomic.write_state wrote. Raises CheckpointError for any other file."""
    try:
        loaded: Any = mx.load(str(file), return_metadata=True)
        tensors, metadata = loaded
        about: dict[str, Any] = json.loads(metadata["mlx_mtp"])
        mx.eval(tensors)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{file}: not a checkpoint of this trainer ({error}); move it.") from error
    return tensors, about


def read_log(file: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The records of a log in the order of their steps, each step once, up to step `last`.

    A line that was cut short when a run was killed is left out.
    """
    records: list[dict[str, Any]] = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if (not records or step > records[-1]["step"]) and (last is None or step <= last):
            records.append(record)
    return records


def cut_log(file: Path, last: int) -> None:
    """Drops what a run logged after step `last`, from which it is about to go on."""
    if file.exists():
        with replacing_or_refused(file, RESUME) as fresh:
            fresh.write_text("".join(json.dumps(record) + "\n" for record in read_log(file, last)), encoding="utf-8")
