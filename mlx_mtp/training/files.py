"""A training run's files on disk: one checkpoint that is always whole, a log that ends where it ends, a lock.

What it does: writes so that a kill, a power cut or a full disk leaves the last checkpoint. What it does not do: know
what the tensors are (trainer.py).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.errors import CheckpointError

HEADER_BYTES = 1 << 20  # more than any safetensors header of ours


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` for one run; raises CheckpointError while another process or run holds it.

    The system frees the lock when the process ends, however it ends.
    """
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CheckpointError(
                f"{folder}: expected a folder of its own for this run, found another run training into it; "
                "wait for that one, or choose another folder."
            ) from error
        yield


RESUME = "the last checkpoint is untouched, free some disk space and resume"


def write_state(file: Path, tensors: dict[str, mx.array], about: dict[str, Any], advice: str = RESUME) -> None:
    """Replaces `file` by a safetensors file of these tensors, with `about` in its metadata; on disk when it returns.

    Raises CheckpointError with the `advice` where that fails; the old file is then untouched.
    """
    fresh = file.with_name(f"{file.stem}.part{file.suffix}")
    needed = sum(tensor.nbytes for tensor in tensors.values()) + HEADER_BYTES
    try:
        fresh.unlink(missing_ok=True)  # left by a run that was killed
        free = shutil.disk_usage(file.parent).free
        if free < needed:
            raise OSError(f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")
        mx.save_safetensors(str(fresh), tensors, {"mlx_mtp": json.dumps(about)})
        _sync(fresh)
        os.replace(fresh, file)
        _sync(file.parent)
    except (OSError, RuntimeError) as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise CheckpointError(f"{file}: could not be written ({error}); {advice}.") from error


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_state(file: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """What write_state wrote. Raises CheckpointError for any other file."""
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
    """Drops what a run logged behind step `last`, from which it is about to go on."""
    if not file.exists():
        return
    fresh = file.with_name(f"{file.name}.part")
    fresh.write_text("".join(json.dumps(record) + "\n" for record in read_log(file, last)), encoding="utf-8")
    os.replace(fresh, file)
