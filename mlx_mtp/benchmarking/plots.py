"""A bench's report in one picture of four panels.

What it does: speed-up by category, acceptance by position, the verify-cost curve, and the timeline of a round, from
the JSON object of report.py. What it does not do: compute a figure, or need matplotlib for anything but drawing
(optional extra `plot`).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mlx_mtp.benchmarking.markdown import facts, has_stock
from mlx_mtp.errors import OptionError

SHOWN_ROUNDS = 3
COLOURS = {"draft": "#ee8866", "verify": "#4477aa", "gap": "#bbbbbb", "build": "#44aa99", "submit": "#aa4499"}
PARTS = {
    "draft": "drafts", "verify": "verify", "gap": "host gap", "build": "build the next round",
    "submit": "hand it over, or wait",
}  # fmt: skip


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
    figure = Figure(figsize=(14.0, 9.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    told = facts(report)
    figure.suptitle(f"{told['model']}  ·  {told['chip']}  ·  {told['versions']}", fontsize=10)
    found = [sampling for sampling in report["samplings"] if sampling["groups"]]
    if found:
        _speed_up(axes[0][0], found[0])
        _acceptance(axes[0][1], found)
        _verify(axes[1][0], found[0])
        _timeline(axes[1][1], found[0])
    figure.savefig(file, dpi=110, format="png")


def _speed_up(axis: Any, sampling: dict[str, Any]) -> None:
    """Bars by category, with their intervals."""
    stock = has_stock(sampling["groups"][0])
    base = "over_stock" if stock else "over_plain"
    groups = sampling["groups"]
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
    axis.set(title=f"Speed-up over {'stock mlx-lm' if stock else 'ours plain'}, {sampling['name']}", ylabel="times")
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
    axis.set(title="Acceptance by position (once those before stand)", xlabel="draft position", ylabel="share",
             ylim=(0, 1.02))  # fmt: skip
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    if axis.lines:
        axis.legend(fontsize="x-small", loc="lower left")


def _fixed_depth(row: dict[str, Any]) -> int:
    """Depth "auto" comes last: its positions are from different rounds, few of them deep."""
    return -1 if row["depth"] == "auto" else int(row["depth"])


def _verify(axis: Any, sampling: dict[str, Any]) -> None:
    """A pass of M rows over one row, a line a prompt."""
    for i, prompt in enumerate(sampling["prompts"]):
        if prompt["pieces"]:
            ratios = prompt["pieces"][0]["verify_ratios"]
            axis.plot(range(1, len(ratios) + 1), ratios, marker=".", color=f"C{i % 10}",
                      label=f"{prompt['category']}, {prompt['prompt_tokens']} tokens")  # fmt: skip
    axis.set(title="Verify cost", xlabel="rows of the pass (drafts + 1)", ylabel="over one row", ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")


def _timeline(axis: Any, sampling: dict[str, Any]) -> None:
    """Rounds in flight: what the device does, and the host building the next round meanwhile."""
    prompt = next((one for one in sampling["prompts"] if one["pieces"]), None)
    if prompt is None:
        return
    lanes: list[str] = []
    pieces = [one for one in prompt["pieces"] if one["drafter"] is None or one["drafted_depth"]]
    for one in pieces:
        depth = one["drafted_depth"] if one["drafter"] else 0
        name = f"{one['drafter']}, {depth} drafts" if depth else "plain"
        whole = one["drafted_round_milliseconds"] if depth else one["plain_round_milliseconds"]
        draft = min(whole, depth * (one["draft_step_milliseconds"] or 0.0))
        # Rounds overlap, so the parts measured apart may take longer than the round: what is seen of them is the rest.
        verify = min(whole - draft, one["verify_milliseconds"][depth])
        device = {"draft": draft, "verify": verify, "gap": whole - draft - verify}
        build = min(whole, one["host_build_milliseconds"])
        host = {"build": build, "submit": min(whole - build, one["host_submit_milliseconds"])}
        for lane, spans in ((f"{name}: device", device), (f"{name}: host", host)):
            for turn in range(SHOWN_ROUNDS):
                left = turn * whole
                for part, long in spans.items():
                    axis.barh(len(lanes), long, left=left, color=COLOURS[part], edgecolor="white", height=0.7)
                    left += long
            lanes.append(lane)
    axis.set_yticks(range(len(lanes)), lanes, fontsize="small")
    axis.invert_yaxis()
    for part, colour in COLOURS.items():
        axis.barh(0, 0, color=colour, label=PARTS[part])
    axis.set_xlim(0, 1.4 * axis.get_xlim()[1])  # room for the legend
    axis.legend(fontsize="x-small", loc="upper right")
    where = f"behind {prompt['prompt_tokens']} tokens ({prompt['category']})"
    axis.set(title=f"{SHOWN_ROUNDS} rounds in the loop, {where}", xlabel="milliseconds")
