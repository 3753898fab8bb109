"""A bench's report as Markdown, ready to paste: what it ran on, what came out, what was predicted, and what counts.

What it does: text from the JSON object that report.py builds (or that was read back from a file). What it does not
do: compute a figure.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from mlx_mtp.benchmarking.report import ALL

Rows = list[list[str]]
SPEED_HEADS = ("arm", "tokens/s (range)", "over stock [95 %]", "over plain [95 %]", "tau", "acceptance by position",
               "output")  # fmt: skip
COST_HEADS = ("arm", "verify ms", "draft ms", "host gap ms", "first token ms", "memory MB", "J/token")
MODEL_HEADS = ("arm", "over stock", "predicted", "deviation", "over plain", "predicted", "deviation")

PREDICTION_HEADS = ("figures of", "what was measured", "drafts: times plain", "best", "source", "note")


def markdown(report: dict[str, Any]) -> str:
    """The whole text."""
    lines = ["## mlx-mtp bench", "", *_facts(report), ""]
    if report["interrupted"]:
        lines += ["**Interrupted: what follows is what had been measured by then.**", ""]
    for sampling in report["samplings"]:
        lines += [f"### {sampling['name']}", ""]
        if not sampling["groups"]:
            lines += ["No turn was finished.", ""]
            continue
        everything = sampling["groups"][0]
        lines += [f"{everything['prompts']} prompts, {report['settings']['tokens']} tokens each, "
                  f"{turns(sampling)} turns.", ""]  # fmt: skip
        lines += [*table(SPEED_HEADS, speed_rows(everything)), "", *table(COST_HEADS, cost_rows(everything)), ""]
        lines += ["By category, over stock mlx-lm:" if has_stock(everything) else "By category, over ours plain:", ""]
        lines += [*table(*category_table(sampling)), ""]
        if rows := model_rows(everything):
            lines += ["Cost model beside measurement:", "", *table(MODEL_HEADS, rows), ""]
    lines += ["Definitions:", "", *(f"- {name}: {text}." for name, text in report["definitions"].items())]
    if report["notes"]:
        lines += ["", "Notes:", "", *(f"- {note}" for note in report["notes"])]
    return "\n".join(lines) + "\n"


def turns(sampling: dict[str, Any]) -> str:
    """'6', or '4 to 6' where a run was interrupted."""
    counts = [min(map(len, prompt["runs"].values())) for prompt in sampling["prompts"] if prompt["runs"]]
    done = [count for count in counts if count]
    return f"{min(done)}" if min(done) == max(done) else f"{min(done)} to {max(done)}"


def prediction_markdown(report: dict[str, Any]) -> str:
    """What `bench --predict` says, from the JSON object of published.prediction_report."""
    title = f"## {report['chip']}: predicted speed-up over plain decoding there"
    lines = [title, "", f"**{report['prediction']}**", ""]
    for case in report["cases"]:
        shares = " ".join(f"{share:.0%}" for share in case["acceptance"])
        lines += [f"Acceptance {shares} ({case['acceptance_from']}):", ""]
        lines += [*table(PREDICTION_HEADS, prediction_rows(case)), ""]
    return "\n".join([*lines, *prediction_notes(report)]) + "\n"


def prediction_rows(case: dict[str, Any]) -> Rows:
    """One row a published curve, under PREDICTION_HEADS."""
    return [
        [
            one["figures_of"], one["what"],
            ", ".join(f"{depth}: {gain:.2f}" for depth, gain in enumerate(one["speed_up_by_depth"], 1)),
            f"{one['speed_up']:.2f} at {one['best_depth']}" if one["best_depth"] else "1.00, plain decoding",
            one["source"], one["note"],
        ]
        for one in case["predictions"]
    ]  # fmt: skip


def prediction_notes(report: dict[str, Any]) -> list[str]:
    """Sentences on what was assumed."""
    chip, draft = report["chip"], report["assumed_draft_share"]
    predictions = [one for case in report["cases"] for one in case["predictions"]]
    found = [
        f"Published memory bandwidth of an {chip}: {report['bandwidth_gigabytes_per_second']} GB/s. Python's part of a "
        "round is not in these figures, and your model's passes may cost more or less than those of the published ones."
    ]
    if any(one["figures_of"] != chip for one in predictions):
        found.append(f"No figures are published for an {chip}: these are of chips of the same GPU generation.")
    if any(one["assumed_draft_share"] for one in predictions):
        found.append(f"Where the source does not say, a draft is taken to cost {draft['value']:.1%} of a plain step "
                     f"({draft['source']}).")  # fmt: skip
    return found


def facts(report: dict[str, Any]) -> dict[str, str]:
    """What it ran on and with."""
    here, pair, asked = report["machine"], report["pair"], report["settings"]
    chip = f"{here['name']}, {here['cores']} cores" + (f", {here['architecture']}" if here["metal"] else "")
    device = here["device"].upper() + (" (Metal)" if here["metal"] else f", {here['blas']}")
    drafter = "none" if pair["family"] is None else f"{pair['family']}, {stored(pair['drafter_quantisation'])}"
    power = here["power_source"] or "power source not told by this system"
    if here["low_power_mode"] is not None:
        power += ", Low Power Mode " + ("on" if here["low_power_mode"] else "off")
    return {
        "chip": chip,
        "memory": f"{here['memory_bytes'] / 1e9:.1f} GB" if here["memory_bytes"] else "unknown",
        "system": f"{here['system']}, Python {here['python']}",
        "MLX device": device,
        "versions": f"mlx_mtp {here['mlx_mtp']}, MLX {here['mlx']}, mlx-lm {here['mlx_lm']}",
        "power": power,
        "model": f"{asked['model']}, {pair['bytes'] / 1e6:.0f} MB, {stored(pair['quantisation'])}",
        "drafter": f"{asked['drafter']}: {drafter}",
        "mode": asked["mode"],
        "date": f"{report['started']}, {report['seconds']:.0f} s",
        "command": f"`{report['command']}`",
    }


def _facts(report: dict[str, Any]) -> list[str]:
    return table(("", ""), [[name, value] for name, value in facts(report).items()])


def stored(kinds: Iterable[dict[str, Any]]) -> str:
    """'4-bit affine (groups of 64)', most bytes first."""
    found = [f"{kind['bits']}-bit {kind['mode']} (groups of {kind['group_size']})" for kind in kinds]
    return " and ".join(found) or "not quantised"


def speed_rows(group: dict[str, Any]) -> Rows:
    """One row an arm, under SPEED_HEADS."""
    found = []
    for row in group["arms"]:
        speed = row["tokens_per_second"]
        found.append([
            row["arm"],
            f"{speed['median']:.1f} ({speed['low']:.1f} to {speed['high']:.1f})",
            _ratio(row["over_stock"]), _ratio(row["over_plain"]),
            "" if row["tau"] is None else f"{row['tau']:.2f}",
            " ".join(f"{share:.0%}" for share in row["acceptance"]),
            _output(row["output"]),
        ])  # fmt: skip
    return found


def cost_rows(group: dict[str, Any]) -> Rows:
    """One row an arm, under COST_HEADS."""
    found = []
    for row in group["arms"]:
        parts = [row[f"{name}_milliseconds"] for name in ("verify", "draft", "gap")]
        energy = row["joules_per_token"]
        found.append([
            row["arm"], *("" if part is None else f"{part:.2f}" for part in parts),
            f"{row['first_token_milliseconds']['median']:.0f}", f"{row['run_bytes'] / 1e6:.1f}",
            "" if energy is None else f"{energy:.3f}",
        ])  # fmt: skip
    return found


def has_stock(group: dict[str, Any]) -> bool:
    """Whether ratios are over stock mlx-lm; without it they are over ours plain."""
    return any(row["over_stock"] is not None for row in group["arms"])


def category_table(sampling: dict[str, Any]) -> tuple[Sequence[str], Rows]:
    """Heads and rows: an arm a row, a category a column."""
    groups = [group for group in sampling["groups"] if group["category"] != ALL]
    base = "over_stock" if has_stock(sampling["groups"][0]) else "over_plain"
    rows = [
        [row["arm"], *(_ratio(group["arms"][at][base]) for group in groups)]
        for at, row in enumerate(sampling["groups"][0]["arms"])
    ]
    return ["arm", *(group["category"] for group in groups)], rows


def model_rows(group: dict[str, Any]) -> Rows:
    """Prediction beside measurement, under MODEL_HEADS; arms of this engine only."""
    found = []
    for row in group["arms"]:
        if row["predicted"]:
            cells = [row["arm"]]
            for name in ("over_stock", "over_plain"):
                expected, off = row["predicted"][name], row["predicted"][f"{name}_deviation"]
                cells += [
                    f"{row[name]['ratio']:.2f}" if row[name] else "",
                    "" if expected is None else f"{expected:.2f}",
                    "" if off is None else f"{off:+.0%}",
                ]
            found.append(cells)
    return found


def table(heads: Sequence[str], rows: Rows) -> list[str]:
    """Lines of a Markdown table."""
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [list(heads), *rows]]
    lines = [f"| {' | '.join(row)} |" for row in safe]
    return [lines[0], "|" + " --- |" * len(heads), *lines[1:]]


def _ratio(found: dict[str, float | None] | None) -> str:
    if found is None:
        return ""
    interval = "" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]"
    return f"{found['ratio']:.2f}{interval}"


def _output(found: dict[str, Any] | None) -> str:
    if found is None:
        return ""
    if found["identical"]:
        return "as plain"
    places = found["differences"]
    gaps = [abs(place["logit_gap"]) for place in places if place["logit_gap"] is not None]
    widest = f", logit gap up to {max(gaps):.1e}" if gaps else ""
    return f"differs in {len(places)} of {found['prompts']}, first at token {min(p['token'] for p in places)}{widest}"
