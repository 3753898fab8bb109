"""What the C library does with freed memory on Linux, where MLX's arrays on a CPU come from it.

glibc gives every array above 32 MB back to the system when it is freed, and the next one costs a page fault for each
4 KB of it again. A training step makes dozens of such arrays: on two cores a third of its time went there.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

# Options of mallopt (malloc.h).
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
# Where glibc ends up by itself in a program with large arrays; once options were set it no longer adapts them.
USUAL = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within: freed memory stays with the process, for its next arrays; at the end it goes back to the system.

    Does nothing where the C library is another than glibc.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    if not hasattr(library, "mallopt"):
        yield
        return
    assert library is not None
    for option, value in KEPT.items():
        library.mallopt(option, value)
    try:
        yield
    finally:
        for option, value in USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(0)
