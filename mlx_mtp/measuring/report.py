"""Figures from a bench's runs: one JSON object that holds everything tables and plots are made of; and its tables.

Times in this object are milliseconds where the name says so, else seconds; memory is bytes.
"""

from __future__ import annotations

import math
import shlex
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mlx_mtp.generation.interfaces import Target
from mlx_mtp.generation.types import acceptance, total
from mlx_mtp.measuring.bench import Bench, Measured
from mlx_mtp.measuring.configurations import PLAIN, STOCK, Configuration
from mlx_mtp.measuring.diagnosis import describe_pair
from mlx_mtp.measuring.tables import Part, Table, cell, markdown, parts_of
from mlx_mtp.measuring.turns import Runs, difference, tokens_per_round

FORMAT = 2
BY_POSITION = ("drafted_by_position", "verified_by_position", "accepted_by_position")
RAW = ("seconds", "first_seconds", "peak_bytes", "held_bytes", "joules")
ALL = "all"
BASES = {"over_stock": (STOCK, "stock mlx-lm"), "over_plain": (PLAIN, "plain decoding")}
SPEED = ("arm", "tokens_per_second", "over_stock", "over_plain", "tau", "acceptance")
COST = ("arm", "milliseconds_per_round", "first_token_milliseconds", "run_bytes", "joules_per_token", "output")
DEFINITIONS = {
    "tokens/s": "(N - 1) / (t_N - t_1) of one run of a fixed number of tokens, stop tokens ignored; median, lowest and "
    "highest of all runs",
    "ratio": "seconds a token of the other configuration over this one's in the same turn, median of the turns; of "
    "several prompts their sums; 95 % interval by bootstrap over prompts and turns, of one prompt over its turns",
    "tokens per round": "tokens emitted after the first / forward passes of the target after the prompt, in replies "
    "apart from the timed ones, {tokens_for_acceptance} tokens at most, which end where the model ends them",
    "acceptance": "share of the drafts at a position that were accepted, of those whose predecessors in the round "
    "were, in the same replies",
    "ms a round": "seconds of a timed run from its first token to its last / its rounds, median of all runs",
    "first token": "from the request to the first token, the prompt's pass included",
    "memory": "peak of a run less what was loaded before it, the weights of all configurations: K/V and activations",
    "J/token": "joules of the chip and its memory, whatever runs on them, over the tokens of a run, the prompt's pass "
    "included, idle power not taken off",
    "logit gap": "the plain target's logit of its own token less that of the other configuration's, where greedy "
    "outputs first differ",
}  # fmt: skip


def build(bench: Bench, interrupted: bool = False) -> dict[str, Any]:
    """The whole report, of what was measured so far."""
    engine, plan = bench.lineup.engine, bench.lineup.plan
    samplings = [_sampling(bench, name, done) for name, done in bench.results.items()]
    return {
        "format": FORMAT,
        "verdict": verdict(samplings),
        "command": shlex.join(["mlx-mtp", *sys.argv[1:]]),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(bench.started)),
        "seconds": time.time() - bench.started,
        "interrupted": interrupted,
        "machine": bench.machine,
        "idle_watts": bench.idle_watts,
        "pair": describe_pair(engine.target, engine.drafter),
        "settings": {
            "model": plan.model or "embedded", "drafter": plan.drafter, "mode": engine.mode, "tokens": plan.max_tokens,
            "tokens_for_acceptance": plan.tokens_for_acceptance, "repeats": plan.repeats, "cool_down": plan.cool_down,
            "seed": plan.seed, "max_context": engine.max_context,
        },
        "definitions": {
            name: text.format(tokens_for_acceptance=plan.tokens_for_acceptance) for name, text in DEFINITIONS.items()
        },
        "notes": bench.notes,
        "samplings": samplings,
    }  # fmt: skip


def verdict(samplings: Sequence[dict[str, Any]]) -> str:
    """One sentence: what was fastest, by how much, and whether that may be chance."""
    told = [f"at {one['name']} {_fastest(one['groups'][0]['arms'])}" for one in samplings if one["groups"]]
    sentence = "; ".join(told) or "no turn was finished, so there is nothing to compare"
    return f"{sentence[0].upper()}{sentence[1:]}."


def base_of(rows: Sequence[dict[str, Any]]) -> str:
    """What ratios are over: 'over_stock' where stock mlx-lm takes part, else 'over_plain'."""
    return "over_stock" if any(row["over_stock"] for row in rows) else "over_plain"


def _fastest(rows: Sequence[dict[str, Any]]) -> str:
    base = base_of(rows)
    against, name = BASES[base]
    others = [row for row in rows if row["arm"] != against and row[base]]
    if not others:
        best = max(rows, key=lambda row: row["tokens_per_second"]["median"])
        return f"{best['arm']} decoded {best['tokens_per_second']['median']:.1f} tokens/s"
    best = max(others, key=lambda row: row[base]["ratio"])
    over, low = best[base]["ratio"], best[base]["low"]
    interval = cell("", best[base]).removeprefix(f"{over:.2f}")
    if (over if low is None else low) > 1.0:
        return f"{best['arm']} is fastest, {over:.2f} times {name}{interval}"
    return f"nothing is faster than {name} beyond chance (the best is {best['arm']}, {over:.2f} times{interval})"


def _sampling(bench: Bench, name: str, done: list[Measured]) -> dict[str, Any]:
    finished = [measured for measured in done if measured.turns]
    groups = {ALL: finished} if finished else {}
    for measured in finished:
        groups.setdefault(measured.prompt.category, []).append(measured)
    return {
        "name": name,
        "sampling": asdict(done[0].job.sampling) if done else None,
        "groups": [{"category": category, "prompts": len(group), "arms": _rows(bench, group)}
                   for category, group in groups.items()],
        # Everything raw, so that any other figure can be computed from it.
        "prompts": [
            {
                "category": one.prompt.category, "where": one.prompt.where, "prompt_tokens": len(one.job.prompt),
                "seed": one.job.seed, "replies": {name: stats.as_dict() for name, stats in one.replies.items()},
                "runs": {
                    name: [{"tokens": len(run.tokens), **{key: getattr(run, key) for key in RAW},
                            "depth_counts": run.stats.depth_counts if run.stats else None} for run in runs]
                    for name, runs in one.runs.items()
                },
            }
            for one in done
        ],
    }  # fmt: skip


def _rows(bench: Bench, group: list[Measured]) -> list[dict[str, Any]]:
    """The figures of a category, or of everything; one row a configuration."""
    # The turns that every configuration finished.
    runs = {name: Runs([one.runs[name][: one.turns] for one in group]) for name in bench.lineup.configurations}
    return [
        {
            "arm": one.name, "drafter": one.drafter, "depth": one.depth,
            **_speed(runs[one.name]),
            **{base: _ratio(runs, one.name, name) for base, (name, _) in BASES.items()},
            **_drafting(one, group, runs[one.name]),
            "output": _output(bench.lineup.engine.target, group, one.name),
        }
        for one in bench.lineup.configurations.values()
    ]  # fmt: skip


def _speed(runs: Runs) -> dict[str, Any]:
    joules = [run.joules / len(run.tokens) for run in runs.all if run.joules is not None]
    each = [1e3 * run.seconds / run.stats.rounds for run in runs.all if run.stats and run.stats.rounds]
    return {
        "tokens_per_second": _spread([1.0 / run.seconds_per_token for run in runs.all]),
        "milliseconds_per_round": statistics.median(each) if each else None,
        "first_token_milliseconds": _spread([1e3 * run.first_seconds for run in runs.all]),
        "run_bytes": max(max(0, run.peak_bytes - run.held_bytes) for run in runs.all),
        "joules_per_token": statistics.median(joules) if joules else None,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _ratio(runs: dict[str, Runs], name: str, base: str) -> dict[str, float | None] | None:
    if base not in runs:
        return None
    middle, low, high = runs[name].ratio(runs[base])
    single = len(runs[name].all) == 1  # nothing to draw from
    return {"ratio": middle, "low": None if single else low, "high": None if single else high}


def _drafting(one: Configuration, group: list[Measured], runs: Runs) -> dict[str, Any]:
    replies = [measured.replies[one.name] for measured in group if one.name in measured.replies]
    depths = sum((Counter(s.depth_counts) for s in runs.stats), Counter[int]())
    return {
        "tau": tokens_per_round(replies) or None,
        "timed_tokens_per_round": tokens_per_round(runs.stats) if runs.stats else None,
        "acceptance": acceptance(replies),
        **dict(zip(BY_POSITION, total(replies, *BY_POSITION), strict=True)),
        "depth_counts": dict(sorted(depths.items())),
    }  # fmt: skip


def _output(target: Target, group: list[Measured], name: str) -> dict[str, Any] | None:
    """Greedy tokens against ours plain; None where there is nothing to compare."""
    if name == PLAIN or PLAIN not in group[0].runs or group[0].job.sampling.temperature:
        return None
    places = [{"where": one.prompt.where, "token": found.token + 1,
               "logit_gap": None if math.isnan(found.gap) else found.gap}
              for one in group if (found := difference(target, one.job, one.runs[PLAIN], one.runs[name]))]  # fmt: skip
    return {"identical": not places, "prompts": len(group), "differences": places}


def bench_parts(report: dict[str, Any]) -> list[Part]:
    """A report for people, the verdict first: everything but what the figures mean."""
    parts: list[Part] = [report["verdict"]]
    if report["interrupted"]:
        parts.append("### Incomplete: what follows is what had been measured by then")
    for name in ("machine", "pair", "settings"):
        parts += parts_of(name, report[name])
    parts += parts_of("", {name: report[name] for name in ("started", "seconds", "command")})
    for sampling in report["samplings"]:
        parts.append(f"### {sampling['name']}")
        if not sampling["groups"]:
            parts.append("No turn was finished.")
            continue
        everything, *groups = sampling["groups"]
        rows = [row | {"output": compared(row["output"])} for row in everything["arms"]]
        mark = ", incomplete" if report["interrupted"] else ""
        parts += [f"Prompts: {everything['prompts']}", Table.of(f"Speed{mark}", rows, SPEED),
                  Table.of(f"Cost{mark}", rows, COST)]
        base = base_of(rows)
        by_category = [{"arm": row["arm"], **{group["category"]: group["arms"][at][base] for group in groups}}
                       for at, row in enumerate(rows)]  # fmt: skip
        parts.append(Table.of(f"By category, over {BASES[base][1]}{mark}", by_category))
    return [*parts, "\n".join(["Notes:", *(f"- {note}" for note in report["notes"])])] if report["notes"] else parts


def bench_markdown(report: dict[str, Any]) -> str:
    """The whole report ready to paste, with what every figure means."""
    meanings = [f"- {name}: {text}." for name, text in report["definitions"].items()]
    return markdown(["## mlx-mtp bench", *bench_parts(report), "\n".join(["Definitions:", *meanings])])


def compared(found: dict[str, Any] | None) -> str | None:
    """What a row's "output" means in words."""
    if found is None:
        return None
    if found["identical"]:
        return "identical to plain"
    places = found["differences"]
    gaps = [abs(place["logit_gap"]) for place in places if place["logit_gap"] is not None]
    widest = f", logit gap up to {max(gaps):.1e}" if gaps else ""
    return f"differs in {len(places)} of {found['prompts']}, first at token {min(p['token'] for p in places)}{widest}"
