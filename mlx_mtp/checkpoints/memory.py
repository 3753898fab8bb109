"""How much memory this machine gives to a model, how much a model takes, and the limit of what stays resident.

Sizes are bytes; in sentences GB are 10^9 bytes, as on a disk's label.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from mlx_mtp.checkpoints.checkpoint import TOWERS, Checkpoint
from mlx_mtp.errors import DoesNotFit

log = logging.getLogger(__name__)

IGNORE = "MLX_MTP_IGNORE_MEMORY"
# Beside the weights: activations of a prefill chunk whatever the model, and K/V, which grow with it.
HEAD_ROOM_BYTES, HEAD_ROOM_SHARE = 256 * 2**20, 0.1
# On a CPU half precision is cast to float32 while the file's own copy is still there: 2 bytes become 2 + 4.
CPU_HALF_FACTOR = 3
CGROUP_FILES = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def on_metal() -> bool:
    return mx.metal.is_available() and mx.default_device() == mx.Device(mx.gpu)


def on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def available_bytes() -> int:
    """Most bytes a model may take: on Metal what macOS recommends for the GPU, elsewhere the physical memory.

    Other programs' memory counts as free: they can be swapped out.
    """
    return int(mx.device_info()["max_recommended_working_set_size"]) if on_metal() else physical_bytes()


def physical_bytes() -> int:
    """The machine's main memory, or the container's share of it."""
    stated = mx.device_info().get("memory_size")
    limits = [int(stated or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    for file in CGROUP_FILES:
        with suppress(OSError, ValueError):  # no such file, or "max"
            limits.append(int(Path(file).read_text()))
    return min(limits)


def needed_bytes(weights: int) -> int:
    """Weights of so many bytes plus head-room for activations and K/V."""
    return int(weights * (1 + HEAD_ROOM_SHARE)) + HEAD_ROOM_BYTES


def held_bytes(tensors: Iterable[tuple[str, str, int]]) -> int:
    """Memory of stored tensors (name, type, bytes) once loaded here; vision and audio parts are never loaded."""
    factor = CPU_HALF_FACTOR if on_cpu() else 1
    loaded = ((kind, size) for name, kind, size in tensors if not any(part in name for part in TOWERS))
    return sum(size * (factor if kind in ("F16", "BF16") else 1) for kind, size in loaded)


def folder_bytes(folder: Path) -> int:
    """Memory of a local checkpoint's weights, by their headers."""
    return held_bytes(Checkpoint(folder, {}).tensors())


def fits(weights: int) -> bool:
    """Whether weights of so many bytes and their head-room fit this machine."""
    return needed_bytes(weights) <= available_bytes()


def refuse(weights: int, what: str, instead: str) -> None:
    """Raises DoesNotFit for weights too large for this machine; MLX_MTP_IGNORE_MEMORY=1 turns that into a warning."""
    available, needed = available_bytes(), readable(needed_bytes(weights))
    if os.environ.get(IGNORE) == "1":
        log.warning("%s needs %s of memory, %s are there: expect swapping.", what, needed, readable(available))
        return
    where = "the GPU may use" if on_metal() else "this machine has"
    raise DoesNotFit(
        f"{what} needs {needed} of memory, more than the {readable(available)} that {where}; {instead}, "
        f"or set {IGNORE}=1 to load it all the same."
    )


def readable(size: int) -> str:
    """18440000000 -> '18.4 GB'."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


_engines: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()


def keep_resident(engine: object, weights: int) -> None:
    """Sets MLX's wired limit to what all engines alive need, as far as macOS (15) recommends it, on Metal.

    Nothing lowers it before the next load, since it must not change while MLX computes.
    """
    if on_metal():
        _engines[engine] = weights
        mx.synchronize()  # another engine may have a round in flight
        mx.set_wired_limit(min(available_bytes(), needed_bytes(sum(_engines.values()))))
