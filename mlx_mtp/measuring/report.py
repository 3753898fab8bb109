"""Figures from the runs: one JSON object that holds everything tables (summary.py) and plots (plots.py) are made of.

Times in this object are milliseconds where the name says so, else seconds; memory is bytes.
"""

from __future__ import annotations

import math
import os
import platform
import shlex
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_mtp.generation.types import Stats, acceptance, total
from mlx_mtp.measuring import diagnosis, machine
from mlx_mtp.measuring.advice import SCATTERED
from mlx_mtp.measuring.arms import PLAIN, STOCK, BenchArm
from mlx_mtp.measuring.prompts import categories_of
from mlx_mtp.measuring.run import Bench, Measured
from mlx_mtp.measuring.turns import Difference, Record, differences, ratio

FORMAT = 2
BY_POSITION = ("drafted_by_position", "verified_by_position", "accepted_by_position")
ALL = "all"
# Where more of the cores than this were busy before the run began, figures are rough.
BUSY = 0.25

DEFINITIONS = {
    "tokens/s": "(N - 1) / (t_N - t_1) of one run of a fixed number of tokens, endings ignored; median, lowest and "
    "highest of all runs",
    "ratio": "seconds a token of the other configuration over this one's in the same turn, median of the turns; of "
    "several prompts the other's seconds over what this one would take for them; 95 % interval by bootstrap over "
    "prompts and turns; of one prompt, as a category has by default, over its turns only",
    "tokens per round": "tokens emitted after the first / forward passes of the target after the prompt, in replies "
    "apart from the timed ones, {tokens_for_acceptance} tokens at most, whose endings are honoured; passes that an "
    "ending made useless included",
    "acceptance": "share of the drafts at a position that were accepted, of those whose predecessors in the round "
    "were, in the same replies",
    "ms a round": "seconds of a timed run from its first token to its last / its rounds, median of all runs",
    "first token": "from the request to the first token, the prompt's pass included",
    "memory": "peak of a run less what was loaded before it, the weights of all configurations: K/V and activations",
    "energy": "joules of the chip and its memory, whatever runs on them, over the tokens of a run, the prompt's pass "
    "included, idle power not taken off",
    "logit gap": "the plain target's logit of its own token less that of the other configuration's, where greedy "
    "outputs first differ",
}  # fmt: skip


@dataclass
class Setting:
    """What was there before the run: facts and the command that asked for it."""

    command: Sequence[str] = ()
    notes: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    here: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        load = os.getloadavg()[0]
        self.here = asdict(machine.describe()) | {
            "power_source": machine.power_source(), "python": platform.python_version(), "load_average": load,
        }  # fmt: skip
        if load > BUSY * (os.cpu_count() or 1):
            self.notes.append(
                f"The machine was not idle when this began (load average {load:.1f} on {os.cpu_count()} cores): take "
                "every figure as rough."
            )


def build(bench: Bench, setting: Setting, interrupted: bool = False) -> dict[str, Any]:
    """The whole report, of what was measured so far."""
    engine, plan = bench.lineup.engine, bench.plan
    notes = [*setting.notes, *bench.lineup.left_out]
    if (share := _scatter(bench)) > SCATTERED:
        notes.append(f"Times of one and the same run scattered by {share:.0%}: run this again on an idle machine.")
    samplings = [_sampling(bench, name, done) for name, done in bench.results.items()]
    return {
        "format": FORMAT,
        "verdict": verdict(samplings),
        "command": shlex.join(setting.command),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(setting.started)),
        "seconds": time.time() - setting.started,
        "interrupted": interrupted,
        "machine": setting.here,
        "idle_watts": bench.idle_watts,
        "pair": asdict(diagnosis.describe_pair(engine.target, engine.drafter)),
        "settings": {
            "model": plan.model or "embedded", "drafter": plan.drafter, "mode": engine.mode, "tokens": plan.max_tokens,
            "tokens_for_acceptance": plan.tokens_for_acceptance, "repeats": plan.repeats, "cool_down": plan.cool_down,
            "seed": plan.seed, "max_context": engine.max_context,
        },
        "definitions": {
            name: text.format(tokens_for_acceptance=plan.tokens_for_acceptance) for name, text in DEFINITIONS.items()
        },
        "notes": notes,
        "samplings": samplings,
    }  # fmt: skip


def verdict(samplings: Sequence[dict[str, Any]]) -> str:
    """One sentence: what was fastest, by how much, and whether that may be chance."""
    told = [f"at {one['name']} {_fastest(one['groups'][0]['arms'])}" for one in samplings if one["groups"]]
    sentence = "; ".join(told) or "no turn was finished, so there is nothing to compare"
    return f"{sentence[0].upper()}{sentence[1:]}."


def base_of(arms: Sequence[dict[str, Any]]) -> str:
    """What ratios are over: 'over_stock' where stock mlx-lm takes part, else 'over_plain'."""
    return "over_stock" if any(row["over_stock"] for row in arms) else "over_plain"


def _fastest(arms: Sequence[dict[str, Any]]) -> str:
    base = base_of(arms)
    against, name = (STOCK, "stock mlx-lm") if base == "over_stock" else (PLAIN, "plain decoding")
    others = [row for row in arms if row["arm"] != against and row[base]]
    if not others:
        best = max(arms, key=lambda row: row["tokens_per_second"]["median"])
        return f"{best['arm']} decoded {best['tokens_per_second']['median']:.1f} tokens/s"
    best = max(others, key=lambda row: row[base]["ratio"])
    over, low, high = (best[base][key] for key in ("ratio", "low", "high"))
    interval = "" if low is None else f" [{low:.2f}, {high:.2f}]"
    if (over if low is None else low) > 1.0:
        return f"{best['arm']} is fastest, {over:.2f} times {name}{interval}"
    return f"nothing is faster than {name} beyond chance (the best is {best['arm']}, {over:.2f} times{interval})"


def _scatter(bench: Bench) -> float:
    """How much times of the same work scatter: of greedy runs at one depth the middle half over the median; or 0."""
    found = []
    for measured in (one for done in bench.results.values() for one in done if not one.job.sampling.temperature):
        for name, runs in measured.timings.items():
            if len(runs) >= 4 and bench.lineup.arms[name].depth != "auto":
                low, middle, high = statistics.quantiles([run.seconds for run in runs], n=4)
                found.append((high - low) / middle)
    return statistics.median(found) if found else 0.0


def _sampling(bench: Bench, name: str, done: list[Measured]) -> dict[str, Any]:
    finished = [measured for measured in done if measured.turns]
    groups, parted = {ALL: finished}, _parted(bench, finished)
    for category in categories_of(measured.prompt for measured in finished):
        groups[category] = [measured for measured in finished if measured.prompt.category == category]
    return {
        "name": name,
        "sampling": asdict(done[0].job.sampling) if done else None,
        "groups": [
            {"category": category, "prompts": len(group), "arms": _rows(bench, group, parted)}
            for category, group in groups.items()
            if group
        ],
        "prompts": [_prompt(measured) for measured in done],
    }


def _records(bench: Bench, group: list[Measured]) -> dict[str, Record]:
    """The turns that every arm finished, by arm."""
    return {name: Record([m.timings[name][: m.turns] for m in group]) for name in bench.lineup.arms}


def _parted(bench: Bench, group: list[Measured]) -> dict[str, dict[int, Difference]]:
    """Where greedy tokens first differ from ours plain: by arm and the prompt's id(); empty without `plain`."""
    if not group or group[0].job.sampling.temperature or PLAIN not in bench.lineup.arms:
        return {}
    jobs = [measured.job for measured in group]
    records = _records(bench, group)
    return {
        name: {id(group[one.job]): one for one in differences(bench.lineup.engine.target, jobs, records[PLAIN], record)}
        for name, record in records.items()
        if name != PLAIN
    }


def _prompt(measured: Measured) -> dict[str, Any]:
    """Everything raw of one prompt, so that any other figure can be computed from it."""
    return {
        "category": measured.prompt.category,
        "where": measured.prompt.where,
        "prompt_tokens": len(measured.job.prompt),
        "seed": measured.job.seed,
        "replies": {arm: stats.as_dict() for arm, stats in measured.replies.items()},
        "runs": {
            arm: [
                {
                    "tokens": len(run.tokens), "seconds": run.seconds, "first_seconds": run.first_seconds,
                    "peak_bytes": run.peak_bytes, "held_bytes": run.held_bytes, "joules": run.joules,
                    "depth_counts": run.stats.depth_counts if run.stats else None,
                }
                for run in runs
            ]
            for arm, runs in measured.timings.items()
        },
    }  # fmt: skip


def _rows(
    bench: Bench, group: list[Measured], parted: dict[str, dict[int, Difference]]
) -> list[dict[str, Any]]:
    """The figures of a category, or of everything; one row an arm."""
    records = _records(bench, group)
    return [
        {
            **_timed(arm, records[arm.name]),
            "over_stock": _ratio(records, arm, STOCK), "over_plain": _ratio(records, arm, PLAIN),
            **_drafting(arm, group, records[arm.name]),
            "output": _output(group, parted.get(arm.name)),
        }
        for arm in bench.lineup.arms.values()
    ]  # fmt: skip


def _timed(arm: BenchArm, record: Record) -> dict[str, Any]:
    runs = [run for repeats in record.timings for run in repeats]
    joules = [run.joules / len(run.tokens) for run in runs if run.joules is not None]
    each = [1e3 * run.seconds / run.stats.rounds for run in runs if run.stats and run.stats.rounds]
    return {
        "arm": arm.name, "drafter": arm.drafter, "depth": arm.depth,
        "tokens_per_second": _spread([run.tokens_per_second for run in runs]),
        "milliseconds_per_round": statistics.median(each) if each else None,
        "first_token_milliseconds": _spread([1e3 * run.first_seconds for run in runs]),
        "run_bytes": max(max(0, run.peak_bytes - run.held_bytes) for run in runs),
        "joules_per_token": statistics.median(joules) if joules else None,
    }  # fmt: skip


def _ratio(records: dict[str, Record], arm: BenchArm, base: str) -> dict[str, float | None] | None:
    if base not in records:
        return None
    record = records[arm.name]
    middle, low, high = ratio(record, records[base])
    if len(record.timings) == 1 and len(record.timings[0]) == 1:  # nothing to draw from
        return {"ratio": middle, "low": None, "high": None}
    return {"ratio": middle, "low": low, "high": high}


def _drafting(arm: BenchArm, group: list[Measured], record: Record) -> dict[str, Any]:
    replies = [measured.replies[arm.name] for measured in group if arm.name in measured.replies]
    timed = [run.stats for runs in record.timings for run in runs if run.stats]
    emitted, rounds = sum(max(0, s.tokens - 1) for s in replies), sum(s.rounds for s in replies)
    return {
        "tau": emitted / rounds if rounds and emitted else None,
        "timed_tokens_per_round": record.tokens_per_round if timed else None,
        "acceptance": acceptance(replies),
        **dict(zip(BY_POSITION, total(replies, *BY_POSITION), strict=True)),
        "depth_counts": _depths(timed),
    }  # fmt: skip


def _output(group: list[Measured], parted: dict[int, Difference] | None) -> dict[str, Any] | None:
    """Greedy tokens against ours plain; None where there is nothing to compare."""
    if parted is None:
        return None
    found = [(measured, parted[id(measured)]) for measured in group if id(measured) in parted]
    places = [
        {"where": measured.prompt.where, "token": one.token + 1, "logit_gap": None if math.isnan(one.gap) else one.gap}
        for measured, one in found
    ]
    return {"identical": not found, "prompts": len(group), "differences": places}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _depths(stats: Iterable[Stats]) -> dict[int, int]:
    found: dict[int, int] = {}
    for one in stats:
        for depth, count in one.depth_counts.items():
            found[depth] = found.get(depth, 0) + count
    return dict(sorted(found.items()))
