"""Whether the cost model foretells the measured speed: pieces of a round and whole runs, timed in the same turns.

    .venv/bin/python benchmarks/cost_model.py [--model DIR --drafter DIR] [--arms stock,plain,mtp] [--json FILE]

Speed-up over plain decoding = rounds that plain decoding takes x its round / (rounds needed x the drafted round).
A drafted round = verify(depth + 1) + depth x draft step + host gap. Rounds are pipelined: the gap is what a round
takes in the loop beside passes and drafts, the waiting that Python could not hide and accepting included; it is
measured at one depth and may be below zero where one round begins before the one before ends.

Nothing of the run that is foretold is used beyond its acceptance and its depths. The prompts and the configurations
are those of `mlx-mtp bench`.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import common

from mlx_mtp.cli.loading import load
from mlx_mtp.engine import DEEPEST
from mlx_mtp.generation.cache import CAPACITY_STEP
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.generation.types import Sampling
from mlx_mtp.measuring.configurations import PLAIN, STOCK, Lineup, Plan, line_up, sampling_name
from mlx_mtp.measuring.diagnosis import Costs, measure
from mlx_mtp.measuring.engines import DecodeJob, TimedRun
from mlx_mtp.measuring.prompts import read_prompts
from mlx_mtp.measuring.timing import Passes
from mlx_mtp.measuring.turns import Runs

# Pipelined rounds above all, for those decide; by their mean, since a run's time is the sum of its rounds.
REPEATS, PIPELINED = 3, 16
COUNTED = ("verify", "draft", "gap")


def tokens_distribution(rounds: int, accepted: Sequence[int]) -> list[float]:
    """Chances of a round to give 1, 2, ... tokens; accepted: in how many of the rounds the draft at each position was.

    Of all rounds together, whatever their depths: where the deep ones are those in which much is accepted, as with
    depth auto, the chance at a position given those before it, the same for all depths, would promise too little.
    """
    return [(before - now) / rounds for before, now in pairwise([rounds, *accepted, 0])]


def rounds_needed(chances: Sequence[float], tokens: int) -> float:
    """Expected rounds until so many tokens are there; the last round may give more than is left."""
    needed = [0.0]
    for n in range(1, tokens + 1):
        needed.append(1.0 + sum(chance * needed[max(0, n - got)] for got, chance in enumerate(chances, 1)))
    return needed[tokens]


Parts = tuple[float, float, float]  # seconds of a round: the pass, the drafts, and what else it takes in the loop


def round_parts(costs: Costs, counts: Mapping[int, int], padded: int) -> Parts:
    """Of the average round of these depths (rounds by depth). padded: rows of every pass at least, in exact mode."""

    def mean(seconds: Callable[[int], float]) -> float:
        return sum(count * seconds(depth) for depth, count in counts.items()) / sum(counts.values())

    verify = mean(lambda depth: costs.verify[max(depth + 1, padded) - 1])
    draft = mean(lambda depth: depth * (costs.draft_step or 0.0))
    return verify, draft, mean(lambda depth: costs.round(depth, padded)) - verify - draft


class Foretold:
    """The configurations of a bench beside the pieces of their rounds."""

    def __init__(self, lineup: Lineup) -> None:
        self.lineup, engine = lineup, lineup.engine
        self.padded = (engine.exactness and engine.exactness.at(CAPACITY_STEP).width) or 1
        every = lineup.configurations.values()
        drafting = {one.drafter: one.engine for one in every if one.drafter and one.engine}
        # Made once: each holds the graphs that it has compiled.
        self.passes = Passes(engine.target)
        self.decoders = {"": (Decoder(engine.target, None, FixedDepth(0), engine.exactness), 0)}
        for name, each in drafting.items():
            decoder = Decoder(each.target, each.drafter, FixedDepth(0), each.exactness)
            self.decoders[name] = decoder, max(each.allowed_depths)

    def pieces(self, job: DecodeJob) -> dict[str, Costs]:
        """The verify curve, then rounds of every drafter ("" = without), all after this prompt and so sampled."""
        ids = list(job.prompt)
        passes = self.passes.alone(ids, range(1, DEEPEST + 2), REPEATS)
        return {name: measure(decoder, ids, deepest, REPEATS, PIPELINED, job.sampling, passes, statistics.fmean)
                for name, (decoder, deepest) in self.decoders.items()}  # fmt: skip

    def rows(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> dict[str, dict[str, Any]]:
        """Times everything; a row for every configuration."""
        plan, every = self.lineup.plan, self.lineup.configurations
        jobs = [DecodeJob(ids, plan.max_tokens, sampling, plan.seed + i) for i, ids in enumerate(prompts)]
        contenders: dict[str, Callable[[DecodeJob], Any]] = {name: one.decode for name, one in every.items()}
        for measured in common.interleave({"": self.pieces, **contenders}, jobs, plan.repeats, plan.cool_down):
            done = len(measured[""].by_job)
            print(f"{sampling_name(sampling)}: {done} of {len(jobs)} prompts", file=sys.stderr)
        pieces: list[Any] = measured[""].by_job
        predicted, parts = dict[str, Runs](), dict[str, list[Parts]]()
        for name, one in every.items():
            if one.engine:
                turns = [[self.foretold(costs[one.drafter or ""], run) for costs, run in zip(*job, strict=True)]
                         for job in zip(pieces, measured[name].by_job, strict=True)]  # fmt: skip
                predicted[name] = Runs([[run for run, _ in job] for job in turns])
                parts[name] = [average for job in turns for _, average in job]
        return rows_of(measured, predicted, parts)

    def foretold(self, costs: Costs, run: TimedRun) -> tuple[TimedRun, Parts]:
        """The run with the seconds that the model gives it, and its average round."""
        assert run.stats is not None
        parts = round_parts(costs, run.stats.depth_counts, self.padded)
        chances = tokens_distribution(run.stats.rounds, run.stats.accepted_by_position)
        return replace(run, seconds=rounds_needed(chances, len(run.tokens) - 1) * sum(parts)), parts


def rows_of(
    measured: dict[str, Runs], predicted: dict[str, Runs], parts: dict[str, list[Parts]]
) -> dict[str, dict[str, Any]]:
    """By configuration: parts of its average round, its speed over stock mlx-lm (else over plain), and the model's."""
    base = STOCK if STOCK in measured else PLAIN
    # Stock's own time is measured; over plain decoding the model has to foretell both.
    against, rows = predicted[PLAIN] if base == PLAIN else measured[base], {}
    for name in (name for name in predicted if name != base):
        over, low, high = measured[name].ratio(measured[base])
        foretold, _, _ = predicted[name].ratio(against)
        seconds = map(statistics.fmean, zip(*parts[name], strict=True))
        rows[name] = {f"{part}_milliseconds": 1e3 * mean for part, mean in zip(COUNTED, seconds, strict=True)} | {
            "over": base, "measured": over, "interval": [low, high], "predicted": foretold,
            "deviation": foretold / over - 1.0,
        }  # fmt: skip
    return rows


def main() -> None:
    args = common.options(
        __doc__, model=str, drafter="auto", arms="stock,plain,mtp,lookup@auto", category=(), max_tokens=64, repeats=6
    )
    if not {STOCK, PLAIN} & set(args.arms.split(",")):
        raise SystemExit(f"--arms needs '{STOCK}' or '{PLAIN}' to compare with; add one.")
    plan = Plan(model=args.model, drafter=args.drafter, names=tuple(args.arms.split(",")), max_tokens=args.max_tokens,
                repeats=args.repeats)  # fmt: skip
    lineup = line_up(plan, load)
    chosen = read_prompts(categories=args.category, per_category=1)
    tokenizer = lineup.engine.tokenizer
    prompts = [prompt.ids(tokenizer) for prompt in chosen if prompt.fits(tokenizer)]
    results: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "samplings": {}}
    foretold = Foretold(lineup)
    for sampling in lineup.samplings():
        rows = results["samplings"][sampling_name(sampling)] = foretold.rows(prompts, sampling)
        for name, row in rows.items():
            print(f"{sampling_name(sampling)}, {name}: measured {row['measured']:.2f} over {row['over']}, predicted "
                  f"{row['predicted']:.2f} ({row['deviation']:+.0%})")  # fmt: skip
    common.save(args.json, results)


if __name__ == "__main__":
    main()
