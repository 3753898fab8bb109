"""mlx_mtp.backend.allocation: freed memory stays while it shall, and goes back afterwards."""

import ctypes
import resource
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_mtp.backend.allocation import freed_memory_kept

MEGABYTES = 256


def resident() -> float:
    """Megabytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def used() -> None:
    """An array that is freed at once."""
    np.ones(MEGABYTES << 17)


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="for glibc only"
)
def test_freed_memory_stays_until_the_end() -> None:
    used()
    before = resident()
    with freed_memory_kept():
        used()
        assert resident() > before + 0.9 * MEGABYTES
        used()
        assert resident() < before + 1.1 * MEGABYTES  # the same once more
    assert resident() < before + 0.1 * MEGABYTES
    used()
    assert resident() < before + 0.1 * MEGABYTES


def test_where_there_is_no_such_library_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", None)  # nobody may ask for one
    with freed_memory_kept():
        used()
