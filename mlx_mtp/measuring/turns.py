"""Fair turns, A B C, C B A, ..., and what follows from runs that took them: rates, ratios, where outputs differ.

Speeds are only ever compared within a run: what slows the machine down slows all configurations of a turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from mlx_mtp.generation.interfaces import Target
from mlx_mtp.generation.types import Stats
from mlx_mtp.measuring.engines import DecodeJob, TimedRun

RESAMPLES = 400


def fair_turns(names: Iterable[str], count: int, pause: float = 0.0) -> Iterator[tuple[int, str]]:
    """Turns and whose they are, every second turn in reverse; pause: seconds before each, for chips to cool down."""
    order = list(names)
    for turn in range(count):
        time.sleep(pause)
        for name in order if turn % 2 == 0 else order[::-1]:
            yield turn, name


@dataclass
class Runs:
    """All runs of one configuration: by_job[job][turn]."""

    by_job: list[list[TimedRun]] = field(default_factory=list)

    @property
    def all(self) -> list[TimedRun]:
        """Of every job."""
        return [run for runs in self.by_job for run in runs]

    @property
    def stats(self) -> list[Stats]:
        """Of the runs that have any: those of this engine."""
        return [run.stats for run in self.all if run.stats]

    def ratio(self, base: Runs) -> tuple[float, float, float]:
        """How much faster this is than `base`, and a 95 % interval by bootstrap over the jobs and turns.

        Of a job the median over its turns of base over this counts, since the runs of one turn met the same machine.
        All jobs together: seconds a token of the base, each the median of the turns, over what this would take.
        """
        # Seconds a token by job: [2, turns], the base's and these.
        pairs, chance = zip(base.by_job, self.by_job, strict=True), np.random.default_rng(0)
        seconds = [np.array([[run.seconds_per_token for run in runs] for runs in pair]) for pair in pairs]

        def drawn() -> Iterator[np.ndarray]:
            for job in chance.integers(len(seconds), size=len(seconds)):
                turns = chance.integers(seconds[job].shape[1], size=seconds[job].shape[1])
                yield seconds[job][:, turns]

        low, high = np.quantile([_speed_up(drawn()) for _ in range(RESAMPLES)], (0.025, 0.975))
        return _speed_up(seconds), float(low), float(high)


def tokens_per_round(stats: Sequence[Stats]) -> float:
    """Of all of these replies: tokens after the first of each over passes of the target."""
    return sum(max(0, s.tokens - 1) for s in stats) / max(1, sum(s.rounds for s in stats))


def _speed_up(seconds: Iterable[np.ndarray]) -> float:
    medians = np.array([(np.median(theirs), np.median(theirs / mine)) for theirs, mine in seconds])
    return float(medians[:, 0].sum() / (medians[:, 0] / medians[:, 1]).sum())


@dataclass(frozen=True)
class Difference:
    """Where a greedy output first differs from the reference's.

    token: its index. gap: the reference's logit of its own token less that of the other's; near-ties are rounding. NaN
    where the logits are no measure: penalties or a bias stand between them and the choice.
    """

    token: int
    gap: float


def difference(
    target: Target, job: DecodeJob, expected: Sequence[TimedRun], found: Iterable[TimedRun]
) -> Difference | None:
    """The first difference in the first turn that has one; None = identical output."""
    mine = expected[0].tokens
    for its in (run.tokens for run in found):
        for at, (a, b) in enumerate(zip(mine, its, strict=False)):
            if a != b:
                return Difference(at, _logit_gap(target, job, mine[:at], a, b))
    return None


def _logit_gap(target: Target, job: DecodeJob, said: list[int], mine: int, its: int) -> float:
    """Of two tokens after these; the head is run on the last of them only, since a vocabulary can be large."""
    asked, ids = job.sampling, [*job.prompt, *said]
    if asked.logit_bias or (asked.repetition_penalty, asked.presence_penalty, asked.frequency_penalty) != (1, 0, 0):
        return float("nan")
    try:
        logits = target.head(target.forward(mx.array([ids]), target.new_cache(len(ids)), 1).hidden)[0, -1]
        return float(np.array(logits[mine] - logits[its]))
    except RuntimeError:  # as MLX says that memory is short: no reason to lose what was measured
        return float("nan")
