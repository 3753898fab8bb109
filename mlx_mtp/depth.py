"""How many tokens to draft: what a round costs x how often drafts are accepted -> the depth with most tokens a second.

Chooses a depth before every round, 0 (plain decoding) included, and learns from every round that was read. Touches no
device and no clock; `depth_profile.py` keeps what was learned.

A worked example. A plain round takes 10 ms, one of 2 drafts 13 ms: it costs 1.3. Drafts are accepted 80 times of 100,
so that a round of 2 yields 1 + 0.8 + 0.8 * 0.8 = 2.44 tokens, and 2.44 / 1.3 = 1.88 times the tokens per second of
plain decoding. Now another program starts, and rounds of 2 take 26 ms. Has the machine become slower, or was the cost
wrong? The time of one round tells only their product. But hundreds of rounds of 2 were timed, so their cost is well
known, while a machine's pace may change at any time: the pace gets the blame, the cost stays 1.3 and the depth 2. Had
they been the first rounds of 2 after a start with an old, uncertain cost, the cost would get the blame and be 2.6.
"""

from __future__ import annotations

import logging
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mlx_mtp.depth_profile import Profile, ProfileFile

log = logging.getLogger(__name__)

# A draft is thought to add this share of a plain round where nothing is known, within a factor of e**STEP.
SLOPE, STEP = 0.25, 0.4
# Remembered costs are all dropped when the first round of another depth takes e**CONTRADICTED times what they say, or
# so many times less.
CONTRADICTED = 0.3
# From round to round the pace may change by this share, and the cost of a draft by this share (a longer context).
PACE, AGE = 0.02, 0.003
# What a new request may find changed of the pace.
PAUSED = 0.3
# A surprise beyond so many standard deviations (a laptop slept, another program began) says nothing about a cost, only
# that the pace may be another from now on.
BELIEVED = 3.0
# Times scatter by at least this share; how much they do is found from so many of the latest.
QUIET, SCATTER = 0.02, 15
# Acceptance is a share of rounds that fade by this factor: within a request with every round, over all requests with
# every round that drafted.
FADE = 0.97
# How many rounds of its own the earlier requests count for in a new one, and the position before for a position.
MEMORY, NEIGHBOUR = 4.0, 1.0
PRIOR = 0.6
# A change must promise this much.
GAIN = 1.02
# Share of the time that may be lost on trying other depths, rounds' worth of it to begin with, rounds between two
# tries, and rounds of a try or any other change: only a round between two of its depth can be timed.
TRYING, CREDIT, BETWEEN, TRY, PATIENCE = 0.01, 2.0, 6, 3, 10


class DepthPolicy(Protocol):
    """What the decode loop asks before a round and tells after it."""

    deepest: int

    def begin(self) -> None:
        """A new request."""

    def next(self) -> int:
        """Depth of the next round."""

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        """A round of `depth` drafts was read; seconds None = its time says nothing about this depth."""


@dataclass
class FixedDepth:
    """Always the same."""

    deepest: int

    def begin(self) -> None:
        """Nothing to prepare."""

    def next(self) -> int:
        """The depth."""
        return self.deepest

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        """Nothing to learn."""


@dataclass
class Curve:
    """Seconds of a round by depth, as measured: straight lines between and beyond, and more drafts take no less."""

    seconds: dict[int, float]

    def at(self, depth: int) -> float:
        """Expected seconds of a round of this depth."""
        known = sorted(self.seconds)
        below = max((d for d in known[:-1] if d <= depth), default=known[0])
        above = next((d for d in known if d > below), below)
        slope = (self.seconds[above] - self.seconds[below]) / max(1, above - below)
        return self.seconds[below] + slope * (depth - below)


class RoundCosts:
    """What a round of each depth costs in plain rounds, and how fast plain rounds are now: a Kalman filter.

    log(seconds of a round of depth d) = pace + cost[d] + noise, cost[0] = 0. A round shows one sum of two unknowns;
    its surprise is shared between them by how uncertain each is (the covariance of all of them), and both become more
    certain. The pace grows uncertain with every round, costs hardly do. Neighbouring depths are uncertain together:
    a draft more adds something unknown to all deeper ones, so one measured depth tells much about the others.
    """

    def __init__(self, deepest: int, costs: Sequence[float] | None = None, noise: float = 0.3) -> None:
        """costs: what depths 0, 1, ... were found to cost by an earlier run, in plain rounds."""
        self._deepest, self._remembered = deepest, costs is not None
        self._expect(0.0, 1e3, costs)  # nobody knows how fast the machine is
        self.timed = [0] * (deepest + 1)
        self.noise = noise
        self._changes: deque[float] = deque([noise] * (SCATTER // 3), maxlen=SCATTER)
        self._before: tuple[int, float] | None = None

    def _expect(self, pace: float, uncertainty: float, costs: Sequence[float] | None) -> None:
        """What is thought before the first rounds, which outweigh it. Index 0 is the pace, the others log costs."""
        depths = range(self._deepest + 1)
        self._mean = [math.log(cost) for cost in costs or [1.0 + SLOPE * depth for depth in depths]]
        self._covariance = [[STEP**2 * min(i, j) for j in depths] for i in depths]
        self._mean[0], self._covariance[0][0] = pace, uncertainty

    @property
    def plain_seconds(self) -> float | None:
        """Of a plain round, as fast as the machine is now; None before any round was timed."""
        return math.exp(self._mean[0]) if any(self.timed) else None

    def cost(self, depth: int) -> float:
        """In plain rounds, never below that of fewer drafts."""
        return math.exp(max(0.0, *self._mean[1 : depth + 1])) if depth else 1.0

    def uncertainty(self, depth: int, other: int) -> float:
        """Standard deviation of the logarithm of cost(depth) / cost(other)."""
        a, b, p = depth, other, self._covariance
        variance = (p[a][a] if a else 0.0) + (p[b][b] if b else 0.0) - (2.0 * p[a][b] if a and b else 0.0)
        return math.sqrt(max(0.0, variance))

    def pause(self) -> None:
        """Time went by, with whatever else the machine did."""
        self._covariance[0][0] += PAUSED**2
        self._before = None

    def learn(self, depth: int, seconds: float) -> None:
        """A round took so long."""
        mean, p, size = self._mean, self._covariance, len(self._mean)
        self._see_scatter(depth, math.log(seconds))
        p[0][0] += PACE**2
        for i in range(1, size):
            for j in range(1, size):
                p[i][j] += AGE**2 * min(i, j)
        shown = [0, depth] if depth else [0]  # what the time is the sum of
        surprise = math.log(seconds) - sum(mean[i] for i in shown)
        if self._remembered and not self.timed[depth] and any(self.timed) and abs(surprise) > CONTRADICTED:
            log.info("costs of rounds remembered from an earlier run are not those of this one: dropped")
            self._remembered = False
            self._expect(mean[0], p[0][0], None)
            return self.learn(depth, seconds)
        shares = [sum(row[i] for i in shown) for row in p]
        variance = sum(shares[i] for i in shown) + self.noise**2
        if surprise**2 > (BELIEVED**2) * variance:
            p[0][0] += surprise**2
            return
        for i in range(size):
            mean[i] += shares[i] / variance * surprise
        for i in range(size):
            for j in range(size):
                p[i][j] -= shares[i] * shares[j] / variance
        self.timed[depth] += 1

    def _see_scatter(self, depth: int, time: float) -> None:
        """The noise is what two rounds one after the other differ by: half of the differences are below 0.95 of it."""
        if self._before is not None and self._before[0] == depth:
            self._changes.append(abs(time - self._before[1]))
            if True:
                self.noise = max(QUIET, statistics.median(self._changes) / 0.95)
        self._before = depth, time


@dataclass
class Acceptance:
    """How many drafts were verified at each position, and how many of them accepted; older rounds count less."""

    seen: list[float]
    stood: list[float]

    @classmethod
    def unknown(cls, positions: int) -> Acceptance:
        """Nothing verified yet."""
        return cls([0.0] * positions, [0.0] * positions)

    def fade(self, factor: float) -> None:
        """Makes all rounds so far count less."""
        self.seen = [factor * count for count in self.seen]
        self.stood = [factor * count for count in self.stood]

    def book(self, depth: int, accepted: int) -> None:
        """A round of `depth` drafts of which the first `accepted` were; those after the first loss tell nothing."""
        for i in range(min(depth, accepted + 1)):
            self.seen[i] += 1.0
            self.stood[i] += float(i < accepted)

    def reach(self) -> int:
        """Depths worth a thought: twice as many drafts as were ever accepted, so that nobody starts with eight."""
        return 2 * sum(stood > 0.5 for stood in self.stood) or 1

    def shares(self) -> list[float]:
        """Chance of each position once those before it were; where little was seen, that of the position before."""
        found, share = [], PRIOR
        for seen, stood in zip(self.seen, self.stood, strict=True):
            share = (NEIGHBOUR * share + stood) / (NEIGHBOUR + seen)
            found.append(share)
        return found

    def shares_given(self, expected: Sequence[float]) -> list[float]:
        """The same, where little was seen as expected."""
        rows = zip(expected, self.seen, self.stood, strict=True)
        return [(MEMORY * share + stood) / (MEMORY + seen) for share, seen, stood in rows]


def expected_tokens(shares: Sequence[float], depth: int) -> float:
    """Tokens of a round of `depth` drafts, from each position's chance once those before it were accepted."""
    total = stands = 1.0
    for share in shares[:depth]:
        stands *= share
        total += stands
    return total


def best_depth(cost: Callable[[int], float], shares: Sequence[float], allowed: Sequence[int]) -> int:
    """The depth with most expected tokens per cost of a round; drafting must beat plain decoding by GAIN."""
    return max(allowed, key=lambda d: expected_tokens(shares, d) / cost(d) * (1.0 if d else GAIN))


@dataclass
class DepthController:
    """Chooses among `allowed` depths. kept: where what is learned stays."""

    allowed: Sequence[int]
    kept: ProfileFile | None = None
    deepest: int = field(init=False)

    def __post_init__(self) -> None:
        self.deepest = max(self.allowed)
        known = self.kept.load(self.deepest) if self.kept else None
        self.costs = RoundCosts(self.deepest, known.costs if known else None)
        self._everything = Acceptance(known.seen, known.stood) if known else Acceptance.unknown(self.deepest)
        self._rounds, self._tried_at = 0, dict.fromkeys(self.allowed, 0)
        self._saved = CREDIT  # rounds' worth of time that may be lost on tries
        self.begin()

    def begin(self) -> None:
        """Starts from the long run, ready to be convinced otherwise within a few rounds."""
        self.costs.pause()
        self._here = Acceptance.unknown(self.deepest)
        self._shares = self._everything.shares()
        self._chosen = 0
        self._chosen = self._now = self._best()
        self._run = 0  # rounds of the depth that runs now
        self._last = -1
        self._since = 0

    def tokens(self, depth: int) -> float:
        """Expected tokens of a round."""
        return expected_tokens(self._shares, depth)

    def rate(self, depth: int) -> float:
        """Expected tokens in the time of a plain round."""
        return self.tokens(depth) / self.costs.cost(depth)

    def next(self) -> int:
        """The chosen depth, or now and then some rounds of another one, to see whether that would pay."""
        self._rounds += 1
        self._run += 1
        self._since += 1
        trying = self._now != self._chosen
        if self._run <= TRY + self.costs.noise * PATIENCE:
            return self._now
        best = self._best()
        if best != self._chosen and self.rate(best) > GAIN * self.rate(self._chosen):
            log.info("depth %d -> %d: %.2f times plain decoding expected in place of %.2f",
                     self._chosen, best, self.rate(best), self.rate(self._chosen))  # fmt: skip
            self._chosen = best
        self._saved += TRYING * self.rate(self._chosen)
        depth = self._chosen if trying else self._worth_a_try()
        if trying:
            self._saved = max(-CREDIT, self._saved - (self._run - 1) * self._lost(self._now, self.costs.cost(self._now)))
            self._since, self._tried_at[self._now] = 0, self._rounds
        if depth != self._now:
            self._now, self._run = depth, 1
        return self._now

    def _worth_a_try(self) -> int:
        """The depth that may well be better than the chosen one, else the others by turns.

        A try is made once its loss is saved, by the hopeful end of what its cost is thought to be.
        """
        if self._since < BETWEEN:
            return self._chosen
        others = [depth for depth in self._allowed() if depth != self._chosen]
        hope = {d: self.rate(d) * math.exp(self.costs.uncertainty(d, self._chosen)) for d in others}
        turns = sorted(others, key=lambda d: self._tried_at[d])
        for depth in (*(d for d in [max(others, key=lambda d: hope[d])] if hope[d] > self.rate(self._chosen)), *turns):
            if self._saved >= TRY * self._lost(depth, self.tokens(depth) / hope[depth]):
                return depth
        return self._chosen

    def _allowed(self) -> list[int]:
        """Depths within reach of what was ever accepted, the chosen one among them."""
        reach = max(self._everything.reach(), self._chosen)
        return [depth for depth in self.allowed if depth <= reach]

    def _lost(self, depth: int, cost: float) -> float:
        """What a round of this depth loses that costs so much, in rounds of the chosen one."""
        return max(0.0, cost / self.costs.cost(self._chosen) - self.tokens(depth) / self.tokens(self._chosen))

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        """Books a round: which drafts were accepted, and how long it took."""
        # What a depth that is out of use was found to give fades within a request, so that an unlucky one gets another
        # chance; over all of them only new drafts make old ones count less, or plain decoding would forget why.
        for acceptance, fades in ((self._here, True), (self._everything, depth > 0)):
            acceptance.fade(FADE if fades else 1.0)
            acceptance.book(depth, accepted)
        self._shares = self._here.shares_given(self._everything.shares())
        if seconds is not None and seconds > 0 and depth == self._last:
            self.costs.learn(depth, seconds)
        self._last = depth

    def _best(self) -> int:
        """The depth with the best rate."""
        return best_depth(self.costs.cost, self._shares, self._allowed())
