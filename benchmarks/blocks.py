"""What the marked blocks of README.md and docs/ show: one function a block, from a result file to Markdown or SVG.

What it does: turns the JSON of one benchmark into rows. What it does not do: read or write files (tables.py), or
measure anything.

A new block is a function here and an entry in TABLES (Markdown, between the marks) or CHARTS (an SVG file).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Results = Mapping[str, Any]
Rows = tuple[Sequence[str], Sequence[Sequence[str]]]

STOCK, PLAIN = "stock mlx-lm", "depth 0"
OURS = {"depth 0": "mlx_mtp, plain", "depth 4": "mlx_mtp, 4 drafts", "mlx-vlm, depth 4": "mlx-vlm, 4 drafts",
        "depth auto": "mlx_mtp, auto"}  # fmt: skip


@dataclass(frozen=True)
class Block:
    """file: in benchmarks/results. command: what made it, where the file itself has none under about.command."""

    file: str
    command: str
    show: Callable[[Results], Any]

    def made_by(self, results: Results) -> str:
        """The command that gave these results."""
        about = results.get("about")
        found = about.get("command") if isinstance(about, Mapping) else None
        return str(found or self.command)


def ratio(row: Results) -> str:
    """'2.01 [1.55, 2.62]': median and 95 % interval."""
    low, high = row["interval"]
    return f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def shares(values: Sequence[float]) -> str:
    """'66 58 49 %'."""
    return " ".join(f"{100 * value:.0f}" for value in values) + " %"


def sets(results: Results) -> dict[str, Results]:
    """Prompt sets of a speed file by name."""
    return {name: arms for name, arms in results.items() if name != "about"}


def compared(base: str) -> Callable[[Results], Rows]:
    """A row for every prompt set: each arm's speed over that of `base`."""

    def show(results: Results) -> Rows:
        found = sets(results)
        arms = [name for name in next(iter(found.values())) if name != base]
        heads = ["prompts", OURS.get(base, base), *(OURS.get(name, name) for name in arms), "tokens a round, mlx_mtp"]
        rows = []
        for name, row in found.items():
            per_round = [arm["tokens_per_round"] for arm in row.values() if "tokens_per_round" in arm]
            one = f"1.00 ({row[base]['tokens_per_second']:.0f} tokens/s)"
            rows.append([name, one, *(ratio(row[arm]) for arm in arms), f"{per_round[-1]:.2f}"])
        return heads, rows

    return show


def verify_cost(results: Results) -> Rows:
    """Milliseconds of a pass of M rows."""
    times = results["verify_milliseconds"]
    rows = [[str(m), f"{time:.2f}", f"{time / times[0]:.2f}"] for m, time in enumerate(times, 1)]
    rows.append(["1, stock mlx-lm", f"{results['mlx_lm_step_milliseconds']:.2f}",
                 f"{results['mlx_lm_step_milliseconds'] / times[0]:.2f}"])  # fmt: skip
    return ("rows of the pass", "ms", "over one row"), rows


def rounds(results: Results) -> Rows:
    """What a round of each depth is made of."""
    heads = ("drafts", "round, ms", "of it one draft step", "in the loop, ms", "device idle", "built in Python, ms")
    rows = [
        [depth, f"{row['device_milliseconds']:.2f}", f"{row['draft_step_milliseconds']:.2f}" if depth != "0" else "",
         f"{row['wall_milliseconds']:.2f}", f"{row['idle_share']:.0%}", f"{row['host_milliseconds']:.2f}"]
        for depth, row in results["rounds"].items()
    ]  # fmt: skip
    return heads, rows


def memory(results: Results) -> Rows:
    """Active megabytes early and late in long replies, and over many short requests."""
    rows = []
    for reply in sorted({row["reply"] for row in results["long"]}):
        mine = [row for row in results["long"] if row["reply"] == reply]
        first, last = mine[0], mine[-1]
        rows.append([f"reply {reply + 1}: after {first['tokens']:,.0f} and {last['tokens']:,.0f} tokens",
                     f"{first['active_megabytes']:.1f}", f"{last['active_megabytes']:.1f}"])  # fmt: skip
    short = results["requests"]
    rows.append(["short requests, a third of them dropped: the first 50 and the last 50",
                 f"{short['first 50']:.1f}", f"{short['last 50']:.1f}"])  # fmt: skip
    return ("", "active MB", "active MB"), rows


def context(results: Results) -> Rows:
    """What a round costs behind a short and a long context."""
    short, long = ((n, results["context"][n]) for n in sorted(results["context"], key=int))
    rows = [[name, f"{short[1][name]:.2f}", f"{long[1][name]:.2f}", f"{long[1][name] / short[1][name]:.2f}"]
            for name in short[1]]  # fmt: skip
    return ("", f"ms at {int(short[0]):,} tokens", f"ms at {int(long[0]):,}", "ratio"), rows


def compiled(results: Results) -> Rows:
    """Rounds compiled once against rounds whose graph is built anew."""
    rows = [[f"{depth} drafts, {name}", f"{row['build_milliseconds']:.2f}", f"{row['wall_milliseconds']:.2f}"]
            for depth, ways in results.items() for name, row in ways.items()]  # fmt: skip
    return ("round", "built in Python, ms", "in the loop, ms"), rows


def training(results: Results) -> Rows:
    """Training speed beside mlx-lm's trainer."""
    base = results["tokens_per_second"]["mlx-lm"]
    rows = [[name, f"{speed:,.0f}", f"{speed / base:.2f}"] for name, speed in results["tokens_per_second"].items()]
    return ("trainer", "tokens/s", "ratio"), rows


def training_memory(results: Results) -> Rows:
    """Peak memory of a training step by number of heads."""
    counts = list(next(iter(results["peak_bytes"].values())))
    rows = [[f"logits {name}", *(f"{peaks[n] / 1e6:.0f} MB" for n in counts)]
            for name, peaks in results["peak_bytes"].items()]  # fmt: skip
    return ("", *(f"{n} heads" if n != "1" else "1 head" for n in counts)), rows


def families(results: Results) -> Rows:
    """The drafter families on one target."""
    heads = ("drafter", "speed over stock mlx-lm", "drafts", "tokens a round", "drafts that stood, by position",
             "parameters")  # fmt: skip
    rows = []
    for name, row in results["arms"].items():
        drafted = "tokens_per_round" in row
        rows.append([
            name, ratio(row), str(row["depth"]) if drafted else "",
            f"{row['tokens_per_round']:.2f}" if drafted else "", shares(row["acceptance"]) if drafted else "",
            f"{row['parameters'] / 1e6:.2f} M" if "parameters" in row else "",
        ])  # fmt: skip
    return heads, rows


def adapted(results: Results) -> Rows:
    """What fine-tuning a drafter won back."""
    gain = results["after"] / results["before"] - 1
    row = [f"{results['before']:.2f}", f"{results['after']:.2f}", f"{gain:+.0%}", f"{results['minutes']:.0f} min"]
    return ("tokens a round before", "after", "gain", "time"), [row]


def speed_chart(results: Results) -> str:
    """Bars with intervals, one group a prompt set; its own light background, for pages of any colour."""
    groups = sets(results)
    names = [*next(iter(groups.values()))]
    colours = dict(zip(names, ("#8a8f98", "#7aa6d6", "#1f5fa8", "#d08a3c"), strict=False))
    left, width, bar, gap, top = 210, 560, 15, 16, 74
    step = len(names) * bar + gap
    scale = width / (1.05 * max(arm["interval"][1] for arms in groups.values() for arm in arms.values()))
    height = top + len(groups) * step + 50
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 40} {height}" '
        'font-family="Helvetica, Arial, sans-serif" font-size="12" fill="#222">',
        '<rect width="100%" height="100%" rx="8" fill="#fbfbf9"/>',
        '<text x="16" y="24" font-size="15" font-weight="bold">Speed over stock mlx-lm decoding the same weights'
        "</text>",
    ]
    at = 16.0
    for name in names:
        label = OURS.get(name, name)
        out.append(f'<rect x="{at:.0f}" y="38" width="11" height="11" fill="{colours[name]}"/>'
                   f'<text x="{at + 16:.0f}" y="48">{label}</text>')  # fmt: skip
        at += 36 + 6.4 * len(label)
    one = left + scale
    out.append(f'<path d="M{one:.1f} {top - 6}V{height - 48}" stroke="#222" stroke-dasharray="3 3"/>')
    for g, (group, arms) in enumerate(groups.items()):
        y = top + g * step
        out.append(f'<text x="{left - 10}" y="{y + len(names) * bar / 2 + 4:.0f}" text-anchor="end">{group}</text>')
        for i, name in enumerate(names):
            row, x = arms[name], y + i * bar
            low, high = (left + scale * end for end in row["interval"])
            middle = x + bar / 2 - 1
            out.append(f'<rect x="{left}" y="{x}" width="{scale * row["ratio"]:.1f}" height="{bar - 2}" '
                       f'fill="{colours[name]}"/>'
                       f'<path d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {middle - 3}v6M{high:.1f} {middle - 3}v6" '
                       f'stroke="#222" fill="none"/>'
                       f'<text x="{high + 6:.1f}" y="{x + 11}" font-size="11" paint-order="stroke" stroke="#fbfbf9" '
                       f'stroke-width="4">{row["ratio"]:.2f}</text>')  # fmt: skip
    about = results["about"]
    notes = (  # of the machine that the committed results are from
        f"Embedded model, {about['tokens']} tokens, median of {about['repeats']} interleaved runs, 95 % intervals.",
        f"Two CPU cores of a Linux machine ({about['machine']}, {about['blas'].split(' (')[0]}). "
        "No Mac was measured here.",
    )
    for i, note in enumerate(notes):
        out.append(f'<text x="16" y="{height - 28 + 16 * i}" font-size="11" fill="#555">{note}</text>')
    out.append("</svg>\n")
    return "\n".join(out)


SPEED = "python benchmarks/speed.py --depths 4 --json benchmarks/results/speed.json"
COST = "python benchmarks/verify_cost.py --json benchmarks/results/verify-cost.json"
SOAK = "python benchmarks/soak.py --json benchmarks/results/soak.json"

TABLES = {
    "speed": Block("speed.json", SPEED, compared(STOCK)),
    "speed-unfriendly": Block(
        "speed-unfriendly.json", "python benchmarks/speed.py --unfriendly --no-vlm --depths auto --repeats 9 "
        "--json benchmarks/results/speed-unfriendly.json", compared(PLAIN),
    ),
    "verify-cost": Block("verify-cost.json", COST, verify_cost),
    "rounds": Block("verify-cost.json", COST, rounds),
    "memory": Block("soak.json", SOAK, memory),
    "context": Block("soak.json", SOAK, context),
    "compiled": Block(
        "compiled.json", "python benchmarks/compiled.py --json benchmarks/results/compiled.json", compiled
    ),
    "training": Block(
        "training.json", "python benchmarks/training.py --json benchmarks/results/training.json", training
    ),
    "training-memory": Block(
        "training-memory.json",
        "python benchmarks/training_memory.py --json benchmarks/results/training-memory.json", training_memory,
    ),
    "families": Block(
        "families.json", "python benchmarks/families.py --json benchmarks/results/families.json", families
    ),
    "adapt": Block("adapt.json", "python benchmarks/adapt.py --out runs/adapt --json benchmarks/results/adapt.json",
                   adapted),
}  # fmt: skip
CHARTS = {"docs/images/speed.svg": Block("speed.json", SPEED, speed_chart)}
