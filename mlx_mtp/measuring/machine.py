"""What this computer is: device, memory, versions, and what slows MLX down here, as far as it can be asked.

What it does: reads facts. What it does not do: load a model, time anything (diagnosis.py) or judge (advice.py).

A fact that this system does not give is None, never a guess.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_mtp.backend import blas
from mlx_mtp.checkpoints import memory
from mlx_mtp.version import __version__


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Memory in bytes.

    device: "cpu" or "gpu", MLX's default device. gpu_generation: NN of Metal's architecture applegpu_gNN (13 = M1,
    14 = M2, ... 17 = M5). recommended_bytes: what Metal recommends to use at most. wired_limit_bytes: how much MLX
    keeps resident, 0 = nothing; Metal only. blas matters on the CPU alone.
    """

    name: str
    system: str
    cores: int
    device: str
    metal: bool
    architecture: str | None
    gpu_generation: int | None
    memory_bytes: int | None
    recommended_bytes: int | None
    wired_limit_bytes: int | None
    mlx: str
    mlx_lm: str
    mlx_mtp: str
    blas: str
    mlx_imported_too_early: bool
    compile_works: bool
    low_power_mode: bool | None

    @property
    def usable_bytes(self) -> int | None:
        """What Metal recommends, else all there is."""
        return self.recommended_bytes or self.memory_bytes


def describe() -> Machine:
    """This machine, as it is now."""
    info = mx.device_info()
    gpu, metal = mx.default_device() == mx.Device(mx.gpu), memory.on_metal()
    architecture = str(info["architecture"]) if "architecture" in info else None
    recommended = info.get("max_recommended_working_set_size")
    used = blas.name()
    return Machine(
        name=str(info.get("device_name") or architecture or platform.machine()),
        system=f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        cores=os.cpu_count() or 1,
        device="gpu" if gpu else "cpu",
        metal=metal,
        architecture=architecture,
        gpu_generation=generation_of(architecture or ""),
        memory_bytes=int(info.get("total_memory") or memory.physical_bytes()),
        recommended_bytes=int(recommended) if recommended else None,
        wired_limit_bytes=_wired_limit() if metal else None,
        mlx=importlib.metadata.version("mlx"),
        mlx_lm=importlib.metadata.version("mlx-lm"),
        mlx_mtp=__version__,
        blas=used,
        mlx_imported_too_early=used == blas.TOO_LATE,
        compile_works=compile_works(),
        low_power_mode=_low_power_mode(),
    )


def generation_of(architecture: str) -> int | None:
    """15 for 'applegpu_g15s'; None for anything but an Apple GPU."""
    found = re.fullmatch(r"applegpu_g(\d+)[a-z]*", architecture)
    return int(found[1]) if found else None


def compile_works() -> bool:
    """Whether mx.compile keeps what it traced: where it is switched off, or has no compiler, it traces every call."""
    traced = []

    def function(x: mx.array) -> mx.array:
        traced.append(x.shape)
        return mx.exp(x) * 2.0 + 1.0

    compiled = mx.compile(function)
    try:
        for _ in range(2):
            mx.eval(compiled(mx.zeros((2,))))
    except RuntimeError:  # MLX's CPU backend found a compiler that fails
        return False
    return len(traced) == 1


def power_mode_is_low(settings: str) -> bool | None:
    """Reads the output of `pmset -g`: 'lowpowermode 1' or 'powermode 1'; None where it names neither."""
    found = re.search(r"^\s*(?:low)?powermode\s+(\d)", settings, re.MULTILINE)
    return found[1] == "1" if found else None


def _low_power_mode() -> bool | None:
    settings = _pmset()
    return None if settings is None else power_mode_is_low(settings)


def power_source() -> str | None:
    """'AC Power' or 'Battery Power', in macOS's words; None where the system does not tell (a server seldom does)."""
    if sys.platform == "darwin":
        return drawn_from(_pmset("batt") or "")
    for supply in sorted(Path("/sys/class/power_supply").glob("*")):
        try:
            kind, online = (supply / "type").read_text().strip(), (supply / "online").read_text().strip()
        except OSError:  # a battery has no 'online'
            continue
        if kind == "Mains":
            return "AC Power" if online == "1" else "Battery Power"
    return None


def drawn_from(report: str) -> str | None:
    """Reads the output of `pmset -g batt`: "Now drawing from 'AC Power'"."""
    found = re.search(r"Now drawing from '([^']+)'", report)
    return found[1] if found else None


def _pmset(*what: str) -> str | None:
    """What macOS says of its power settings; None elsewhere."""
    if sys.platform != "darwin":
        return None
    command = ["/usr/bin/pmset", "-g", *what]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _wired_limit() -> int:
    """MLX tells the limit only to whoever sets it: set, then put back."""
    before = mx.set_wired_limit(0)
    mx.set_wired_limit(before)
    return before
