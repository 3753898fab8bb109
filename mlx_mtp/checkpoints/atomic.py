"""Files and folders that are written beside their place and then take it, so that a reader never sees half of one."""

from __future__ import annotations

import glob
import json
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.errors import explaining

HEADER_BYTES = 1 << 20  # more than any safetensors header of ours


@contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """A path beside `path` to write a file or a folder to, which takes its place where the block ends well.

    Until then an earlier `path` stays whole; a link keeps pointing to what is replaced. A device or a pipe is given as
    it is, to be written into. Raises OSError. durable: a power cut too leaves the old file or the new one; for what
    took long to make, not for what every request writes.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
    _drop_leftovers(path)
    own = f"{os.getpid()}-{threading.get_ident()}"
    fresh, old = (path.with_name(f".{path.stem}.{word}-{own}{path.suffix}") for word in ("partial", "replaced"))
    try:
        yield fresh
        if fresh.is_dir() and path.exists():  # a folder cannot take the place of another in one step
            path.rename(old)
            try:
                fresh.rename(path)
            except BaseException:
                old.rename(path)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            if durable:
                _sync(fresh)
            os.replace(fresh, path)
            if durable:
                _sync(path.parent)
    finally:
        _remove(fresh)


def _drop_leftovers(path: Path) -> None:
    """Removes what processes that were killed had begun to write for this path."""
    for left in path.parent.glob(f".{glob.escape(path.stem)}.partial-*{glob.escape(path.suffix)}"):
        process = left.name.removeprefix(f".{path.stem}.partial-").partition("-")[0]
        if process.isdigit():
            try:
                os.kill(int(process), 0)
            except ProcessLookupError:
                _remove(left)
            except OSError:
                continue  # it runs, and is somebody else's


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replacing_or_refused(file: Path, advice: str) -> Iterator[Path]:
    """As `replacing`, durable, but what goes wrong is a CheckpointError that ends in the `advice`."""
    what = f"{file}: could not be written"
    with explaining(what, advice, OSError, RuntimeError), replacing(file, durable=True) as fresh:
        yield fresh


def write_state(file: Path, tensors: dict[str, mx.array], about: dict[str, Any], advice: str) -> None:
    """Replaces `file` by a safetensors file with `about` as JSON in its metadata field "mlx_mtp"; CheckpointError with
    the `advice` where that fails, and the old file is untouched."""
    needed = sum(tensor.nbytes for tensor in tensors.values()) + HEADER_BYTES
    with replacing_or_refused(file, advice) as fresh:
        free = shutil.disk_usage(file.parent).free
        if free < needed:
            raise OSError(f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")
        mx.save_safetensors(str(fresh), tensors, {"mlx_mtp": json.dumps(about)})
