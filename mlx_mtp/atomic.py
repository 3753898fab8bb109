"""Files and folders that are written beside their place and then take it, so that a reader never sees half of one."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which becomes `path` where the block ends well and vanishes otherwise.

    It lies in the same folder and keeps the suffix; an earlier `path` stays whole until it is replaced, and a link
    keeps pointing to what is replaced. A device or a pipe is given as it is, to be written into. Raises OSError.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not (path.is_file() or path.is_dir()):
        yield path
        return
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
            os.replace(fresh, path)
    finally:
        if fresh.is_dir():
            shutil.rmtree(fresh, ignore_errors=True)
        else:
            fresh.unlink(missing_ok=True)
