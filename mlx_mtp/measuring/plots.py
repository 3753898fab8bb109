"""A bench's report as a picture: speed-up by category, and acceptance by position.

Needs matplotlib (optional extra `plot`) for drawing only; everything drawn is in the JSON object of report.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mlx_mtp.errors import OptionError
from mlx_mtp.measuring.report import base_of
from mlx_mtp.measuring.summary import BASES, facts_of


def check_matplotlib() -> None:
    """Raises OptionError where it is not installed, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise OptionError("Expected matplotlib for --plot, found none installed; run: pip install 'mlx-mtp[plot]'.")


def plot(report: dict[str, Any], file: Path) -> None:
    """Draws the first sampling of a report that has figures (greedy, by default) as a PNG; an empty one as such."""
    check_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # No pyplot: it would choose a window system and keep the figure alive.
    figure = Figure(figsize=(14.0, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2)
    told = facts_of(report)
    figure.suptitle(f"{told['model']}  ·  {told['chip']}  ·  {told['versions']}", fontsize=10)
    found = [sampling for sampling in report["samplings"] if sampling["groups"]]
    if found:
        _speed_up(axes[0], found[0])
        _acceptance(axes[1], found)
    figure.savefig(file, dpi=110, format="png")


def _speed_up(axis: Any, sampling: dict[str, Any]) -> None:
    """Bars by category, with their intervals."""
    groups = sampling["groups"]
    base = base_of(groups[0]["arms"])
    arms = [row["arm"] for row in groups[0]["arms"] if row[base] is not None]
    width = 0.8 / max(1, len(arms))
    for i, arm in enumerate(arms):
        ratios = [next(row[base] for row in group["arms"] if row["arm"] == arm) for group in groups]
        middle = [one["ratio"] for one in ratios]
        errors = [[max(0.0, one["ratio"] - (one["low"] or one["ratio"])) for one in ratios],
                  [max(0.0, (one["high"] or one["ratio"]) - one["ratio"]) for one in ratios]]  # fmt: skip
        places = [at + (i - (len(arms) - 1) / 2) * width for at in range(len(groups))]
        axis.bar(places, middle, width, yerr=errors, label=arm, color=f"C{i % 10}", error_kw={"linewidth": 0.7})
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.margins(y=0.25)
    axis.set_xticks(range(len(groups)), [group["category"] for group in groups], rotation=20)
    axis.set(title=f"Speed-up over {BASES[base]}, {sampling['name']}", ylabel="times")
    axis.legend(fontsize="x-small", ncols=2)


def _acceptance(axis: Any, samplings: list[dict[str, Any]]) -> None:
    """Conditional acceptance of every arm that drafts at a fixed depth; with 'auto' where there is no other."""
    for style, sampling in zip(("-", "--", ":"), samplings, strict=False):
        rows = [row for row in sampling["groups"][0]["arms"] if row["acceptance"]]
        deepest: dict[str, dict[str, Any]] = {}
        for row in rows:
            if row["drafter"] not in deepest or _fixed_depth(row) > _fixed_depth(deepest[row["drafter"]]):
                deepest[row["drafter"]] = row
        for i, row in enumerate(deepest.values()):
            axis.plot(range(1, len(row["acceptance"]) + 1), row["acceptance"], style, marker="o", color=f"C{i}",
                      label=f"{row['arm']}, {sampling['name']}")  # fmt: skip
    axis.set(title="Acceptance by position (once those before are accepted)", xlabel="draft position", ylabel="share",
             ylim=(0, 1.02))  # fmt: skip
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize="x-small")


def _fixed_depth(row: dict[str, Any]) -> int:
    """Depth "auto" comes last: its positions are from different rounds, few of them deep."""
    return -1 if row["depth"] == "auto" else int(row["depth"])
