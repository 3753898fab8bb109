"""Joules of a stretch of time on Apple silicon, through the package zeus-apple-silicon; needs no root.

All that runs on the chip is measured, by the chip's own model of itself, and neither display nor disk: compare on one
Mac only, with nothing else running.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

WINDOW = "mlx-mtp bench"
# The total of each part; a part the chip does not report is None.
PARTS = ("cpu_total_mj", "gpu_mj", "gpu_sram_mj", "dram_mj", "ane_mj")


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
