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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import common

from mlx_mtp.cli.loading import load
from mlx_mtp.engine import DEEPEST
from mlx_mtp.generation.cache import CAPACITY_STEP
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.generation.types import Sampling, Stats
from mlx_mtp.measuring.configurations import PLAIN, STOCK, Configuration, Lineup, Plan, line_up, sampling_name
from mlx_mtp.measuring.diagnosis import Costs, measure
from mlx_mtp.measuring.engines import DecodeJob, TimedRun
from mlx_mtp.measuring.prompts import read_prompts
from mlx_mtp.measuring.timing import Passes
from mlx_mtp.measuring.turns import Runs, fair_turns

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


@dataclass(frozen=True)
class Parts:
    """Seconds of one round of a mix of depths: the pass, the drafts, and what else it takes in the loop."""

    verify: float
    draft: float
    gap: float

    @property
    def seconds(self) -> float:
        """The round."""
        return self.verify + self.draft + self.gap


def round_parts(costs: Costs, counts: Mapping[int, int], padded: int | None = None) -> Parts:
    """The average round of these depths (rounds by depth). padded: rows of every pass at least, in exact mode."""
    total = sum(counts.values())
    verify = draft = whole = 0.0
    for depth, count in counts.items():
        verify += count / total * costs.verify[max(depth + 1, padded or 1) - 1]
        draft += count / total * depth * (costs.draft_step or 0.0)
        whole += count / total * costs.round(depth, padded)
    return Parts(verify, draft, whole - verify - draft)


def seconds_per_token(
    costs: Costs, counts: Mapping[int, int], chances: Sequence[float], tokens: int, padded: int | None = None
) -> float:
    """Predicted for a reply of `tokens` tokens, from the first to the last."""
    return rounds_needed(chances, tokens - 1) * round_parts(costs, counts, padded).seconds / (tokens - 1)


@dataclass
class Found:
    """One sampling: of every configuration its runs and what the model makes of the same turns, by job and turn."""

    measured: dict[str, Runs]
    predicted: dict[str, Runs]
    parts: dict[str, list[Parts]] = field(default_factory=dict)


class Foretold:
    """The configurations of a bench beside the pieces of their rounds."""

    def __init__(self, lineup: Lineup, prompts: Sequence[Sequence[int]]) -> None:
        self.plan, self.lineup, self.prompts = lineup.plan, lineup, prompts
        probes = lineup.engine.exactness
        exact = probes.at(CAPACITY_STEP) if probes else None
        self.padded = exact.width if exact else None
        every = lineup.configurations.values()
        self.drafting = {one.drafter: one.engine for one in every if one.drafter and one.engine}
        # Made once: each holds the graphs that it has compiled.
        self.passes = Passes(lineup.engine.target)
        self.decoders = {
            name: Decoder(each.target, each.drafter if name else None, FixedDepth(0), each.exactness)
            for name, each in {"": lineup.engine, **self.drafting}.items()
        }

    def pieces(self, job: DecodeJob) -> dict[str, Costs]:
        """The verify curve, then rounds of every drafter ("" = without), all after this prompt and so sampled."""
        ids = list(job.prompt)
        passes = self.passes.alone(ids, range(1, DEEPEST + 2), REPEATS)
        deepest = {name: max(engine.allowed_depths) for name, engine in self.drafting.items()}
        return {
            name: measure(
                decoder, ids, deepest.get(name, 0), REPEATS, PIPELINED, job.sampling, passes, statistics.fmean
            )
            for name, decoder in self.decoders.items()
        }  # fmt: skip

    def run(self, sampling: Sampling, seed: int) -> Iterator[Found]:
        """Times everything; yields what there is so far after every prompt."""
        every = self.lineup.configurations
        ours = [one for one in every.values() if one.engine]
        found = Found({name: Runs() for name in every}, {one.name: Runs() for one in ours})
        contenders: dict[str, Callable[[DecodeJob], Any]] = {
            "": self.pieces, **{name: one.decode for name, one in every.items()}
        }  # fmt: skip
        for i, ids in enumerate(self.prompts):
            job = DecodeJob(ids, self.plan.max_tokens, sampling, seed + i)
            runs: dict[str, list[Any]] = {name: [] for name in contenders}
            for run in contenders.values():  # warm
                run(job)
            for turn, name in fair_turns(contenders, self.plan.repeats, self.plan.cool_down):
                runs[name].append(contenders[name](job.of_turn(turn)))
            for name, its in found.measured.items():
                its.by_job.append(runs[name])
            for one in ours:
                self._foretell(found, one, runs[""], runs[one.name])
            yield found

    def _foretell(
        self, found: Found, one: Configuration, pieces: list[dict[str, Costs]], runs: list[TimedRun]
    ) -> None:
        turns = []
        for costs, run in zip(pieces, runs, strict=True):
            stats, own = run.stats or Stats(rounds=1, depth_counts={0: 1}), costs[one.drafter or ""]
            chances = tokens_distribution(stats.rounds, stats.accepted_by_position)
            each = seconds_per_token(own, stats.depth_counts, chances, len(run.tokens), self.padded)
            turns.append(replace(run, seconds=each * (len(run.tokens) - 1)))
            found.parts.setdefault(one.name, []).append(round_parts(own, stats.depth_counts, self.padded))
        found.predicted[one.name].by_job.append(turns)


def rows_of(found: Found) -> dict[str, dict[str, Any]]:
    """By configuration: parts of its average round, its speed over stock mlx-lm (else over plain), and the model's."""
    base = STOCK if STOCK in found.measured else PLAIN
    rows = {}
    for name, runs in found.predicted.items():
        if name == base:
            continue
        # Stock's own time is measured; over plain decoding the model has to foretell both.
        against = found.predicted[PLAIN] if base == PLAIN else found.measured[base]
        measured, low, high = found.measured[name].ratio(found.measured[base])
        predicted, _, _ = runs.ratio(against)
        parts = {f"{part}_milliseconds": 1e3 * statistics.fmean(getattr(one, part) for one in found.parts[name])
                 for part in COUNTED}  # fmt: skip
        rows[name] = {**parts, "over": base, "measured": measured, "interval": [low, high], "predicted": predicted,
                      "deviation": predicted / measured - 1.0}  # fmt: skip
    return rows


def main() -> None:
    """Parses options, runs, prints, writes."""
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
    for sampling in lineup.samplings():
        for found in Foretold(lineup, prompts).run(sampling, plan.seed):
            done = len(next(iter(found.measured.values())).by_job)
            print(f"{sampling_name(sampling)}: {done} of {len(prompts)} prompts", file=sys.stderr)
        rows = results["samplings"][sampling_name(sampling)] = rows_of(found)
        for name, row in rows.items():
            print(f"{sampling_name(sampling)}, {name}: measured {row['measured']:.2f} over {row['over']}, predicted "
                  f"{row['predicted']:.2f} ({row['deviation']:+.0%})")  # fmt: skip
    common.save(args.json, results)


if __name__ == "__main__":
    main()
