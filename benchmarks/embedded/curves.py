"""Learning curves: the log.jsonl of any training run drawn into one picture.

    .venv/bin/python benchmarks/embedded/curves.py RUN/train-assistant/log.jsonl [PICTURE.png]

The loss (every step, smoothed, held out), and each figure of the log beside it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlx_mtp.errors import DataError
from mlx_mtp.training.run_folder import read_log

TIMES = ("step", "tokens_per_second", "seconds", "held_out")
SMOOTHING = 50  # smoothed over about this share of the run: 1 / 50


def plot_log(log: Path, picture: Path | None = None) -> Path:
    """Draws `log` into `picture` (by default curves.png beside it) and returns that path.

    Raises DataError for a log without a step.
    """
    if not log.exists() or not (records := read_log(log)):
        raise DataError(f"{log}: expected the log of a training run, found no step in it; train first.")
    picture = picture or log.with_name("curves.png")
    panels = groups([name for name in records[-1] if name not in TIMES])
    # No pyplot: it would choose a window system and keep the figure alive.
    figure = Figure(figsize=(5.5 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        _draw(axis, records, names)
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(picture, dpi=110, format="png")
    return picture


def groups(names: list[str]) -> dict[str, list[str]]:
    """Figures that differ only in a number at the end (agreement_1, agreement_2) share a panel."""
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(re.sub(r"_\d+$", "", name), []).append(name)
    return panels


def smoothed(values: list[float], span: float) -> list[float]:
    """Exponential average over about `span` values, without a pull to the first (bias-corrected)."""
    keep, total, weight, found = 1 - 1 / max(1.0, span), 0.0, 0.0, []
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        found.append(total / weight)
    return found


def _draw(axis: Any, records: list[dict[str, Any]], names: list[str]) -> None:
    for i, name in enumerate(names):
        color = f"C{i % 10}"
        points = [(r["step"], r[name]) for r in records if name in r]
        steps, values = zip(*points, strict=True)
        if len(names) == 1:
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smoothed(list(values), len(values) / SMOOTHING), color=color, label=name)
        held = [(r["step"], r["held_out"][name]) for r in records if name in r.get("held_out", {})]
        if held:
            axis.plot(*zip(*held, strict=True), color=color, linestyle="--", marker="o", markersize=4,
                      markeredgecolor="black", label=f"{name}, held out")  # fmt: skip


if __name__ == "__main__":
    print(plot_log(*map(Path, sys.argv[1:])))
