"""Figures from the runs: one JSON object that holds everything tables, plots and predictions are made of.

What it does: medians, ratios, acceptance, predictions beside measurements, for every category and over all. What it
does not do: print (markdown.py, cli/bench.py) or draw (plots.py).

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

from mlx_mtp import diagnosis, machine
from mlx_mtp.advice import SCATTERED
from mlx_mtp.benchmark import Difference, Record, Timing, differences, ratio, speed_up
from mlx_mtp.benchmarking import cost_model
from mlx_mtp.benchmarking.arms import PLAIN, STOCK, BenchArm
from mlx_mtp.benchmarking.prompts import categories_of
from mlx_mtp.benchmarking.run import PLAIN_PIECES, Bench, Measured
from mlx_mtp.cache import CAPACITY_STEP
from mlx_mtp.diagnosis import Costs
from mlx_mtp.results import Stats, acceptance, total

FORMAT = 1
BY_POSITION = ("drafted_by_position", "judged_by_position", "accepted_by_position")
ALL = "all"
# Where more of the cores than this were busy before the run began, figures are rough.
BUSY = 0.25

DEFINITIONS = {
    "tokens/s": "(N - 1) / (t_N - t_1) of one run of a fixed number of tokens, endings ignored; median, lowest and "
    "highest of all runs",
    "ratio": "seconds a token of the other arm over this one's in the same turn, median of the turns; of several "
    "prompts the other arm's seconds over what this one would take for them; 95 % interval by bootstrap over prompts "
    "and turns; of one prompt, as a category has by default, over its turns only",
    "tau": "tokens emitted behind the first / forward passes of the target behind the prompt, in replies apart from "
    "the timed ones, {tokens_for_acceptance} tokens at most, whose endings are honoured; passes that an ending made "
    "useless included",
    "acceptance": "share of the drafts at a position that stood, of those whose predecessors in the round stood, in "
    "the same replies",
    "verify, draft, host gap": "of the average round of the arm's depths, timed between the runs, once a turn: the "
    "pass over all its rows, its drafts, and the rest of a whole round, which is timed without drafts and at one depth",
    "first token": "from the request to the first token, the prompt's pass included",
    "memory": "peak of a run less what was loaded before it, the weights of all arms: K/V and activations",
    "energy": "joules of the chip and its memory, whatever runs on them, over the tokens of a run, the prompt's pass "
    "included, idle power not taken off",
    "predicted": "the ratio as above, with what the cost model makes of each turn's pieces and of its run's depths and "
    "acceptance in place of the times of this arm and of plain; stock's are measured; deviation = predicted / measured "
    "- 1",
    "logit gap": "the plain target's logit of its own token less that of the other arm's, where greedy outputs first "
    "part",
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
    scatter = [c.scatter for done in bench.results.values() for m in done for c in m.costs.values()]
    if scatter and statistics.median(scatter) > SCATTERED:
        share = statistics.median(scatter)
        notes.append(f"Times of one and the same pass scattered by {share:.0%}: run this again on an idle machine.")
    return {
        "format": FORMAT,
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
        "samplings": [_sampling(bench, name, done) for name, done in bench.results.items()],
    }  # fmt: skip


def pooled_acceptance(bench: Bench) -> dict[str, list[float]]:
    """Conditional acceptance by position over all replies of the first drafting arm, by where it is from."""
    found = {}
    for name, done in bench.results.items():
        arm = next(arm.name for arm in bench.lineup.arms.values() if arm.drafter)
        replies = [measured.replies[arm] for measured in done if arm in measured.replies]
        if shares := acceptance(replies):
            found[f"counted with this pair, {name}, {len(replies)} prompts"] = shares
    return found


def _sampling(bench: Bench, name: str, done: list[Measured]) -> dict[str, Any]:
    finished = [measured for measured in done if measured.turns]
    groups, parted = {ALL: finished}, _parted(bench, finished)
    for category in categories_of(measured.prompt for measured in finished):
        groups[category] = [measured for measured in finished if measured.prompt.category == category]
    return {
        "name": name,
        "sampling": asdict(done[0].job.sampling) if done else None,
        "groups": [
            {"category": category, "prompts": len(group), "arms": _Group(bench, group, parted).rows()}
            for category, group in groups.items()
            if group
        ],
        "prompts": [_prompt(measured) for measured in done],
    }


def _records(bench: Bench, group: list[Measured]) -> dict[str, Record]:
    """The turns that every arm finished, by arm."""
    return {name: Record([m.timings[name][: m.turns] for m in group]) for name in bench.lineup.arms}


def _parted(bench: Bench, group: list[Measured]) -> dict[str, dict[int, Difference]]:
    """Where the arms' greedy tokens part from ours plain: by arm and the prompt's id(); empty without `plain`."""
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
        "stock_step_milliseconds": None if measured.stock_seconds is None else 1e3 * measured.stock_seconds,
        "pieces": [_pieces(name, costs) for name, costs in measured.costs.items()],
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


def _pieces(name: str, costs: Costs) -> dict[str, Any]:
    drafted, step = costs.drafted, costs.draft_step
    return {
        "drafter": name or None, "context": costs.context,
        "verify_milliseconds": [1e3 * seconds for seconds in costs.verify],
        "verify_ratios": [costs.ratio(rows) for rows in range(1, len(costs.verify) + 1)],
        "plain_round_milliseconds": 1e3 * costs.plain, "drafted_depth": costs.drafted_depth,
        "drafted_round_milliseconds": None if drafted is None else 1e3 * drafted,
        "draft_step_milliseconds": None if step is None else 1e3 * step,
        "host_build_milliseconds": 1e3 * costs.build, "host_submit_milliseconds": 1e3 * costs.submit,
        "scatter": costs.scatter,
    }  # fmt: skip


class _Group:
    """The rows of one category, or of everything."""

    def __init__(self, bench: Bench, group: list[Measured], parted: dict[str, dict[int, Difference]]) -> None:
        self.lineup, self.group, self.parted = bench.lineup, group, parted
        self.tokens = bench.plan.max_tokens
        exact = bench.lineup.engine.exactness
        self.filled = exact.at(CAPACITY_STEP).width if exact else None
        self.records = _records(bench, group)
        # What the model makes of every turn goes through the same statistics as what was measured.
        self.predicted = {arm.name: self._predicted(arm) for arm in bench.lineup.arms.values() if arm.engine}

    def rows(self) -> list[dict[str, Any]]:
        """One an arm."""
        return [self._row(arm) for arm in self.lineup.arms.values()]

    def _row(self, arm: BenchArm) -> dict[str, Any]:
        record = self.records[arm.name]
        runs = [run for repeats in record.timings for run in repeats]
        joules = [run.joules / len(run.tokens) for run in runs if run.joules is not None]
        over_stock, over_plain = self._ratio(record, STOCK), self._ratio(record, PLAIN)
        return {
            "arm": arm.name, "drafter": arm.drafter, "depth": arm.depth,
            "tokens_per_second": _spread([run.tokens_per_second for run in runs]),
            "over_stock": over_stock, "over_plain": over_plain,
            **self._drafting(arm), **self._round(arm),
            "first_token_milliseconds": _spread([1e3 * run.first_seconds for run in runs]),
            "run_bytes": max(max(0, run.peak_bytes - run.held_bytes) for run in runs),
            "joules_per_token": statistics.median(joules) if joules else None,
            "output": self._output(arm),
            "predicted": self._prediction(arm, over_stock, over_plain),
        }  # fmt: skip

    def _ratio(self, record: Record, base: str) -> dict[str, float | None] | None:
        if base not in self.records:
            return None
        middle, low, high = ratio(record, self.records[base])
        if len(record.timings) == 1 and len(record.timings[0]) == 1:  # nothing to draw from
            return {"ratio": middle, "low": None, "high": None}
        return {"ratio": middle, "low": low, "high": high}

    def _drafting(self, arm: BenchArm) -> dict[str, Any]:
        replies = [m.replies[arm.name] for m in self.group if arm.name in m.replies]
        timed = [run.stats for runs in self.records[arm.name].timings for run in runs if run.stats]
        emitted, rounds = sum(max(0, s.tokens - 1) for s in replies), sum(s.rounds for s in replies)
        return {
            "tau": emitted / rounds if rounds and emitted else None,
            "timed_tokens_per_round": self.records[arm.name].tokens_per_round if timed else None,
            "acceptance": acceptance(replies),
            **dict(zip(BY_POSITION, total(replies, *BY_POSITION), strict=True)),
            "depth_counts": _depths(timed),
        }  # fmt: skip

    def _round(self, arm: BenchArm) -> dict[str, float | None]:
        """Average over the prompts of what a round of this arm is made of."""
        names = ("verify", "draft", "gap")
        if arm.engine is None:
            return dict.fromkeys([*(f"{name}_milliseconds" for name in names), "round_milliseconds"])
        parts = [
            cost_model.round_parts(costs, _depths(run.stats for run in runs if run.stats), self.filled)
            for costs, runs in zip(self._costs(arm), self.records[arm.name].timings, strict=True)
        ]
        found: dict[str, float | None] = {
            f"{name}_milliseconds": 1e3 * statistics.fmean(getattr(part, name) for part in parts) for name in names
        }
        return found | {"round_milliseconds": 1e3 * statistics.fmean(part.seconds for part in parts)}

    def _costs(self, arm: BenchArm) -> list[Costs]:
        return [measured.costs[arm.drafter or PLAIN_PIECES] for measured in self.group]

    def _predicted(self, arm: BenchArm) -> Record:
        """A record of every turn's seconds as the cost model gives them."""
        record, tokens = Record(), [0] * self.tokens
        for measured, runs in zip(self.group, self.records[arm.name].timings, strict=True):
            record.timings.append([])
            for pieces, run in zip(measured.pieces, runs, strict=False):
                stats, costs = run.stats or Stats(rounds=1, depth_counts={0: 1}), pieces[arm.drafter or PLAIN_PIECES]
                law = cost_model.tokens_law(stats.rounds, stats.accepted_by_position)
                each = cost_model.seconds_per_token(costs, stats.depth_counts, law, self.tokens, self.filled)
                record.timings[-1].append(Timing(tokens, each * (self.tokens - 1), 0))
        return record

    def _prediction(self, arm: BenchArm, *measured: dict[str, float | None] | None) -> dict[str, float | None] | None:
        if arm.engine is None:
            return None
        mine = self.predicted[arm.name]
        found: dict[str, float | None] = {"tokens_per_second": mine.rate}
        plain = None if arm.name == PLAIN else self.predicted.get(PLAIN)  # over itself it is 1, which predicts nothing
        bases = (("over_stock", self.records.get(STOCK)), ("over_plain", plain))
        for (name, base), real in zip(bases, measured, strict=True):
            expected = speed_up(mine, base) if base else None
            found[name] = expected
            measured_ratio = real["ratio"] if real else None
            found[f"{name}_deviation"] = expected / measured_ratio - 1.0 if expected and measured_ratio else None
        return found

    def _output(self, arm: BenchArm) -> dict[str, Any] | None:
        """Greedy tokens against ours plain; None where there is nothing to compare."""
        if arm.name not in self.parted:
            return None
        mine = self.parted[arm.name]
        found = [(measured, mine[id(measured)]) for measured in self.group if id(measured) in mine]
        places = [
            {"where": measured.prompt.where, "token": one.token + 1,
             "logit_gap": None if math.isnan(one.gap) else one.gap}
            for measured, one in found
        ]  # fmt: skip
        return {"identical": not found, "prompts": len(self.group), "differences": places}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _depths(stats: Iterable[Stats]) -> dict[int, int]:
    found: dict[int, int] = {}
    for one in stats:
        for depth, count in one.depth_counts.items():
            found[depth] = found.get(depth, 0) + count
    return dict(sorted(found.items()))
