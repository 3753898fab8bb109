"""What this computer is: device, memory, versions, and what slows MLX down here, as far as it can be asked.

And what it takes on Apple silicon: joules, by the package zeus-apple-silicon, which needs no root. All that runs on the
chip is measured, by the chip's own model of itself, and neither display nor disk: compare on one Mac only, with nothing
else running.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlx_mtp.backend import blas
from mlx_mtp.checkpoints import memory
from mlx_mtp.version import __version__

WINDOW = "mlx-mtp bench"
# Where the joules of each part are; of a part that the chip does not report there are none.
PARTS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")


def describe() -> dict[str, Any]:
    """This machine, as it is now: the JSON object "machine". A fact that this system does not give is None.

    device: "cpu" or "gpu", MLX's default device. gpu_generation: NN of Metal's architecture applegpu_gNN (13 = M1,
    14 = M2, ... 17 = M5). Memory in bytes: recommended_bytes is what Metal recommends to use at most,
    wired_limit_bytes how much MLX keeps resident. blas matters on the CPU alone.
    """
    info = mx.device_info()
    gpu, metal = mx.default_device() == mx.Device(mx.gpu), memory.on_metal()
    architecture = str(info["architecture"]) if "architecture" in info else None
    recommended = info.get("max_recommended_working_set_size")
    used, low_power = blas.name(), re.search(r"^\s*(?:low)?powermode\s+(\d)", pmset(), re.MULTILINE)
    return {
        "name": str(info.get("device_name") or architecture or platform.machine()),
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "cores": os.cpu_count() or 1,
        "device": "gpu" if gpu else "cpu",
        "metal": metal,
        "architecture": architecture,
        "gpu_generation": generation_of(architecture or ""),
        "memory_bytes": int(info.get("total_memory") or memory.physical_bytes()),
        "recommended_bytes": int(recommended) if recommended else None,
        "wired_limit_bytes": _wired_limit() if metal else None,
        "mlx": importlib.metadata.version("mlx"),
        "mlx_lm": importlib.metadata.version("mlx-lm"),
        "mlx_mtp": __version__,
        "blas": used,
        "mlx_imported_too_early": used == blas.TOO_LATE,
        "compile_works": compile_works(),
        "low_power_mode": low_power and low_power[1] == "1",
    }


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


def power_source() -> str | None:
    """'AC Power' or 'Battery Power', in macOS's words; None elsewhere."""
    found = re.search(r"Now drawing from '([^']+)'", pmset("batt"))
    return found[1] if found else None


def pmset(*what: str) -> str:
    """What macOS says of its power settings; nothing elsewhere."""
    if sys.platform != "darwin":
        return ""
    command = ["/usr/bin/pmset", "-g", *what]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _wired_limit() -> int:
    """MLX tells the limit only to whoever sets it: set, then put back."""
    before = mx.set_wired_limit(0)
    mx.set_wired_limit(before)
    return before


class EnergyMeter:
    """Measures one stretch at a time."""

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def of(self, run: Callable[[], Any]) -> tuple[Any, float | None]:
        """What `run` returns, and the joules it took; None where no part of the chip reported any."""
        self._monitor.begin_window(WINDOW)
        try:
            found = run()
        finally:
            used = self._monitor.end_window(WINDOW)
        parts = [value for part in PARTS if (value := getattr(used, part, None)) is not None]
        return found, sum(parts) / 1e3 if parts else None


def open_meter() -> tuple[EnergyMeter | None, str | None]:
    """The meter, or None and a sentence that says why there is none."""
    if sys.platform != "darwin":
        return None, "Energy is not measured: zeus-apple-silicon reads it on Apple silicon only."
    try:
        from zeus_apple_silicon import AppleEnergyMonitor

        meter = EnergyMeter(AppleEnergyMonitor())
        meter.of(lambda: None)
    except ImportError:
        return None, "Energy is not measured: `pip install zeus-apple-silicon` would make it so."
    except Exception as error:  # nanobind passes C++ errors on as RuntimeError, ValueError, ...
        return None, f"Energy is not measured: zeus-apple-silicon does not run here ({error})."
    return meter, None
