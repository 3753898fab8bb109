"""A bench's report for people: a sentence of verdict, what it ran on, tables, and what every figure means.

Parts for tables.py, from the JSON object that report.py builds (or that was read back from a file); nothing is computed
here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlx_mtp.measuring import tables
from mlx_mtp.measuring.report import ALL, base_of
from mlx_mtp.measuring.tables import Part, Table

SPEED_HEADS = ("configuration", "tokens/s (range)", "over stock [95 %]", "over plain [95 %]", "tokens per round",
               "acceptance by position", "output")  # fmt: skip
COST_HEADS = ("configuration", "ms a round", "first token ms", "memory MB", "J/token")
BASES = {"over_stock": "stock mlx-lm", "over_plain": "ours plain"}


def summary(report: dict[str, Any]) -> list[Part]:
    """Everything but what the figures mean, the verdict first."""
    parts: list[Part] = [report["verdict"]]
    if report["interrupted"]:
        parts.append("**Interrupted: what follows is what had been measured by then.**")
    parts.append(tables.facts("", facts_of(report)))
    for sampling in report["samplings"]:
        parts += _sampling(report, sampling)
    if report["notes"]:
        parts += ["Notes:", *(f"- {note}" for note in report["notes"])]
    return parts


def markdown(report: dict[str, Any]) -> str:
    """The whole report ready to paste, with what every figure means."""
    meanings = [f"- {name}: {text}." for name, text in report["definitions"].items()]
    return tables.markdown(["## mlx-mtp bench", *summary(report), "Definitions:", *meanings])


def _sampling(report: dict[str, Any], sampling: dict[str, Any]) -> Iterator[Part]:
    yield f"### {sampling['name']}"
    if not sampling["groups"]:
        yield "No turn was finished."
        return
    everything = sampling["groups"][0]
    counts = [min(map(len, prompt["runs"].values())) for prompt in sampling["prompts"] if prompt["runs"]]
    done = [count for count in counts if count]
    turns = f"{min(done)}" if min(done) == max(done) else f"{min(done)} to {max(done)}"
    count = everything["prompts"]
    yield f"{count} prompt{'' if count == 1 else 's'}, {report['settings']['tokens']} tokens each, {turns} turns."
    yield Table("Speed", SPEED_HEADS, [_speed(row) for row in everything["arms"]])
    yield Table("Cost", COST_HEADS, [_cost(row) for row in everything["arms"]])
    base, groups = base_of(everything["arms"]), [group for group in sampling["groups"] if group["category"] != ALL]
    rows = [[row["arm"], *(_ratio(group["arms"][at][base]) for group in groups)]
            for at, row in enumerate(everything["arms"])]  # fmt: skip
    yield Table(f"By category, over {BASES[base]}", ["configuration", *(group["category"] for group in groups)], rows)


def facts_of(report: dict[str, Any]) -> dict[str, str]:
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


def stored(kinds: Iterable[dict[str, Any]]) -> str:
    """'4-bit affine (groups of 64)', most bytes first."""
    found = [f"{kind['bits']}-bit {kind['mode']} (groups of {kind['group_size']})" for kind in kinds]
    return " and ".join(found) or "not quantised"


def _speed(row: dict[str, Any]) -> list[str]:
    speed = row["tokens_per_second"]
    return [
        row["arm"],
        f"{speed['median']:.1f} ({speed['low']:.1f} to {speed['high']:.1f})",
        _ratio(row["over_stock"]), _ratio(row["over_plain"]),
        "" if row["tau"] is None else f"{row['tau']:.2f}",
        " ".join(f"{share:.0%}" for share in row["acceptance"]),
        _output(row["output"]),
    ]  # fmt: skip


def _cost(row: dict[str, Any]) -> list[str]:
    each, energy = row["milliseconds_per_round"], row["joules_per_token"]
    return [
        row["arm"], "" if each is None else f"{each:.2f}", f"{row['first_token_milliseconds']['median']:.0f}",
        f"{row['run_bytes'] / 1e6:.1f}", "" if energy is None else f"{energy:.3f}",
    ]  # fmt: skip


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
