"""A bench's report as a picture: speed-up by category, and acceptance by position. Needs matplotlib (extra `plot`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlx_mtp.measuring.report import BASES, base_of


def plot(report: dict[str, Any], file: Path) -> None:
    """Draws the first sampling of a report that has figures (greedy, by default) as a PNG; an empty one as such."""
    from matplotlib.figure import Figure  # pyplot would choose a window system and keep the figure alive

    figure = Figure(figsize=(14.0, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    model, here = report["settings"]["model"], report["machine"]
    figure.suptitle(f"{model}  ·  {here['name']}  ·  mlx_mtp {here['mlx_mtp']}, MLX {here['mlx']}")
    found = [sampling for sampling in report["samplings"] if sampling["groups"]]
    if found:
        _speed_up(left, found[0])
        _acceptance(right, found)
    figure.savefig(file, dpi=110, format="png")


def _speed_up(axis: Any, sampling: dict[str, Any]) -> None:
    """Bars by category, with their intervals."""
    groups = sampling["groups"]
    base = base_of(groups[0]["arms"])
    drawn = [rows for rows in zip(*(group["arms"] for group in groups), strict=True) if rows[0][base]]
    width = 0.8 / max(1, len(drawn))
    for i, rows in enumerate(drawn):
        ratios = [row[base] for row in rows]
        middle = [one["ratio"] for one in ratios]
        errors = [[abs((one[end] or one["ratio"]) - one["ratio"]) for one in ratios] for end in ("low", "high")]
        places = [place + (i - (len(drawn) - 1) / 2) * width for place in range(len(groups))]
        axis.bar(places, middle, width, yerr=errors, label=rows[0]["arm"], error_kw={"linewidth": 0.7})
    axis.axhline(1.0, color="black", linewidth=0.8)
    axis.set_xticks(range(len(groups)), [group["category"] for group in groups], rotation=20)
    axis.set(title=f"Speed-up over {BASES[base][1]}, {sampling['name']}", ylabel="times")
    axis.legend(fontsize="x-small", ncols=2)


def _acceptance(axis: Any, samplings: list[dict[str, Any]]) -> None:
    """Conditional acceptance of every drafter at its deepest fixed depth; with 'auto' where there is no other."""
    for style, sampling in zip(("-", "--", ":"), samplings, strict=False):
        rows = [row for row in sampling["groups"][0]["arms"] if row["acceptance"]]
        # "auto" is replaced by any number: its positions are from different rounds, few of them deep.
        rows.sort(key=lambda row: -1 if row["depth"] == "auto" else row["depth"])
        for i, row in enumerate({row["drafter"]: row for row in rows}.values()):
            axis.plot(range(1, len(row["acceptance"]) + 1), row["acceptance"], style, marker="o", color=f"C{i}",
                      label=f"{row['arm']}, {sampling['name']}")  # fmt: skip
    axis.set(title="Acceptance by position (once those before are accepted)", xlabel="draft position", ylabel="share",
             ylim=(0, 1.02))  # fmt: skip
    axis.xaxis.get_major_locator().set_params(integer=True)
    if axis.lines:
        axis.legend(fontsize="x-small")
