"""How many tokens to draft: what a round costs x how often drafts are accepted -> the depth with most tokens a second.

Chooses a depth before every round, 0 (plain decoding) included, and learns from every round that was read. Touches no
device and no clock. What was learned is kept for the next start (ProfileFile).

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
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import numpy as np

from mlx_mtp.checkpoints.kept import Kept
from mlx_mtp.errors import plural

log = logging.getLogger(__name__)

# Where nothing is known a draft is thought to add this share of a plain round.
SLOPE = 0.25
# How far off (as a logarithm) what nobody knows yet may be: a draft's cost, a time, the pace after a pause. Where the
# first round of a depth is further off what is remembered of it, all remembered costs are dropped.
VAGUE = 0.3
# From round to round the pace may change by this share.
PACE = 0.01
# Differences below this share mean nothing: times scatter by it at least, and a change of depth must promise more.
LITTLE = 0.02
# From how many of the latest times it is found how far they scatter.
SCATTER = 15
# Acceptance is a share of rounds that fade by this factor: within a request with every round, over all requests with
# every round that drafted.
FADE, LONG_FADE = 0.97, 0.99
# The chance of a draft where none was made; and for how many rounds of a request counts what all others have taught.
# Replies differ, but less than the first rounds of each: with fewer the depth follows chance (1 is 2 % slower over a
# hundred recorded replies of SmolLM2), with more it notices late that nothing is accepted.
PRIOR, EXPECTED = 0.6, 4.0
# Any change lasts so many rounds: two between others of its depth are timed.
HOLD = 4
# Share of the time that may be lost on trying other depths.
TRYING = 0.008
# Costs are kept only where rounds scatter by no more than this share.
CALM = 0.2


class DepthPolicy(Protocol):
    """What the decode loop asks before a round and tells after it."""

    deepest: int

    @property
    @abstractmethod
    def reason(self) -> str:
        """One sentence: how much it drafts, and why."""

    @property
    def plain_seconds(self) -> float | None:
        """Seconds a round without drafts is expected to take; None where that is not known."""
        return None

    def for_seed(self, most: int) -> DepthPolicy:
        """The policy of a request whose reply must not depend on a clock: at most `most` drafts, always as many."""
        return self

    def begin(self) -> None:
        """A new request."""
        return None

    @abstractmethod
    def next(self) -> int:
        """Depth of the next round."""

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        """A round of `depth` drafts was read; seconds None = its time says nothing about this depth."""
        return None

    def save(self) -> None:
        """The request is over: keeps what was learned, where anything was."""
        return None


@dataclass
class FixedDepth(DepthPolicy):
    """Always the same."""

    deepest: int

    @property
    def reason(self) -> str:
        if not self.deepest:
            return "Not drafting: the depth is fixed at 0."
        return f"Drafting {plural(self.deepest, 'token')} a round: the depth is fixed."

    def next(self) -> int:
        return self.deepest


class RoundCosts:
    """What a round of each depth costs in plain rounds, and how fast plain rounds are now: a Kalman filter.

    log(seconds of a round of d drafts) = pace + log cost(d) + noise, cost(0) = 1. A time shows only the sum of two
    unknowns. Its surprise is shared between them by how uncertain each of them is, and makes both more certain; that
    is what the covariance keeps. The pace becomes uncertain again with every round, costs do not. Costs are
    uncertain together: a draft more adds something unknown to all deeper rounds, so that one depth tells of the others.

    remembered: what 0, 1, ... drafts cost in an earlier run; a prior that a few rounds outweigh.
    """

    def __init__(self, deepest: int, remembered: Sequence[float] | None = None) -> None:
        self.remembered, self.timed = remembered is not None, [0] * (deepest + 1)
        # A round that costs more than the tokens it can yield never pays, and how much more is of no interest.
        sane = [min(cost, 1.0 + depth) for depth, cost in enumerate(accumulate(remembered or (), max, initial=1.0), -1)]
        self._expect(0.0, 1e3, sane[1:])  # nobody knows how fast the machine is
        self._changes: deque[float] = deque(maxlen=SCATTER)
        self._before: float | None = None  # log seconds of the round before, where this one is of the same depth

    def _expect(self, pace: float, variance: float, costs: Sequence[float] | None) -> None:
        """What is thought before the first rounds. Index 0 is the pace, the others log costs."""
        depths = np.arange(len(self.timed))
        self._mean = np.log(costs or 1.0 + SLOPE * depths)
        self._covariance = VAGUE**2 * np.minimum.outer(depths, depths)
        self._mean[0], self._covariance[0, 0] = pace, variance

    @property
    def known(self) -> bool:
        """Whether rounds can be compared with plain ones: some of both were timed, now or in an earlier run."""
        return self.remembered or (self.timed[0] > 0 and any(self.timed[1:]))

    @property
    def plain_seconds(self) -> float | None:
        """Of a plain round, as fast as the machine is now and no more than any other; None before that can be known."""
        known = self.timed[0] or (self.remembered and any(self.timed))
        return float(np.exp(self._mean[0] + min(0.0, *self._mean[1:]))) if known else None

    @property
    def scatter(self) -> float:
        """The share by which times of rounds in a row differ, 0 before that is known.

        Half of the differences of two normal times are below 0.95 of their standard deviation.
        """
        few = len(self._changes) < SCATTER // 3
        return 0.0 if few else max(LITTLE, statistics.median(self._changes) / 0.95)

    def cost(self, depth: int) -> float:
        """In plain rounds: not below that of fewer drafts, nor above the tokens it can yield, where it cannot pay."""
        return min(1.0 + depth, float(np.exp(max(0.0, *self._mean[1 : depth + 1])))) if depth else 1.0

    def uncertainty(self, depth: int, other: int) -> float:
        """Standard deviation of the logarithm of cost(depth) / cost(other)."""
        weights = np.zeros(len(self.timed))
        weights[depth] += 1.0
        weights[other] -= 1.0
        weights[0] = 0.0  # a plain round's cost is 1
        return float(np.sqrt(max(0.0, (weights[:, None] * self._covariance * weights).sum())))

    def pause(self) -> None:
        """Time went by, with whatever else the machine did."""
        self._covariance[0, 0] += VAGUE**2
        self._before = None

    def learn(self, depth: int, seconds: float | None) -> None:
        """A round took so long; None = that cannot be told.

        Of two in a row the faster one counts: whatever else runs only ever makes a round slower.
        """
        before, self._before = self._before, math.log(seconds) if seconds else None
        if before is None or self._before is None:
            return
        self._changes.append(abs(self._before - before))
        time, parts = min(before, self._before), sorted({0, depth})  # of what the time is the sum
        self._covariance[0, 0] += PACE**2
        off = abs(time - self._mean[parts].sum()) > VAGUE
        if off and self.remembered and any(self.timed) and not self.timed[depth]:
            log.info("what rounds cost in an earlier run is not what they cost now: forgotten")
            self.remembered = False
            self._expect(self._mean[0], self._covariance[0, 0], None)
        gains = self._covariance[:, parts].sum(axis=1)
        gains, shared = gains / (gains[parts].sum() + (self.scatter or VAGUE) ** 2), gains
        self._mean += gains * (time - self._mean[parts].sum())
        self._covariance -= np.multiply.outer(gains, shared)
        self.timed[depth] += 1


@dataclass
class Acceptance:
    """How many drafts were verified at each position, and how many of them accepted; older rounds count less."""

    verified: list[float]
    accepted: list[float]

    def count(self, depth: int, accepted: int, fade: float) -> None:
        """A round of `depth` drafts, of which so many were accepted; those after the first loss tell nothing.

        fade: by what factor all rounds so far count less.
        """
        for i in range(len(self.verified)):
            self.verified[i] = fade * self.verified[i] + (i < min(depth, accepted + 1))
            self.accepted[i] = fade * self.accepted[i] + (i < accepted)

    def reach(self) -> int:
        """Twice as many drafts as were ever accepted in a row: nobody starts with eight."""
        return 2 * sum(accepted > 0.5 for accepted in self.accepted) or 1

    def rates(self, expected: Sequence[float] | None = None) -> list[float]:
        """Of each position, once those before it were accepted; where little was seen as expected, or, where nothing
        is, as at the position before."""
        found, rate = [], PRIOR
        for i, (verified, accepted) in enumerate(zip(self.verified, self.accepted, strict=True)):
            weight, prior = (EXPECTED, expected[i]) if expected else (1.0, rate)
            rate = (weight * prior + accepted) / (weight + verified)
            found.append(rate)
        return found


def expected_tokens(rates: Sequence[float], depth: int) -> float:
    """Tokens of a round of `depth` drafts, from each position's chance once those before it were accepted."""
    total = reached = 1.0
    for rate in rates[:depth]:
        reached *= rate
        total += reached
    return total


def best_depth(cost: Callable[[int], float], rates: Sequence[float], allowed: Sequence[int]) -> int:
    """The depth with most expected tokens per cost of a round; drafting must promise more than LITTLE."""
    return max(allowed, key=lambda d: expected_tokens(rates, d) / cost(d) * (1.0 if d else 1.0 + LITTLE))


@dataclass
class Profile:
    """costs: of a round of 0, 1, ... drafts, in plain rounds; None where they are not known well.

    noise: by what share the rounds they come from scattered. verified, accepted: drafts at each position, older ones
    counting less.
    """

    costs: list[float] | None
    noise: float
    verified: list[float]
    accepted: list[float]


class ProfileFile(Kept):
    """Where the profile of one machine and pair is kept: costs only if the machine was quiet, never seconds."""

    def load(self, deepest: int) -> Profile | None:
        """What an earlier run learned of 0 to `deepest` drafts; None where nothing usable is kept."""
        known = self.read()
        try:
            costs, verified, accepted = (list(map(float, known[name] or ()))
                                         for name in ("costs", "verified", "accepted"))  # fmt: skip
            noise, counts = float(known["noise"]), list(zip(verified, accepted, strict=True))
        except (KeyError, TypeError, ValueError):
            return None
        if len(counts) != deepest or not all(0 <= few <= many < math.inf for many, few in counts):
            return None
        usable = len(costs) == deepest + 1 and possible(costs) and 0 <= noise <= CALM
        return Profile(costs if usable else None, noise, verified, accepted)

    def save(self, profile: Profile) -> None:
        """Keeps a profile, with the former costs where those are better."""
        former = self.load(len(profile.verified))
        ours = profile.costs is not None and profile.noise <= CALM and possible(profile.costs)
        if former is not None and former.costs and (not ours or former.noise < profile.noise / 2):
            profile = replace(profile, costs=former.costs, noise=former.noise)
        elif not ours:
            profile = replace(profile, costs=None, noise=CALM)
        self.write(asdict(profile))


def possible(costs: Sequence[float]) -> bool:
    """Whether rounds can cost that: more drafts no less, and a draft no more than two passes of one row."""
    rising = all(1.0 <= one <= other for one, other in pairwise([1.0, *costs]))
    return rising and all(cost <= 1.0 + 2.0 * depth for depth, cost in enumerate(costs))


class DepthController(DepthPolicy):
    """Chooses among `allowed` depths, 0 among them. kept: where what it learns stays for the next start."""

    def __init__(self, allowed: Sequence[int], kept: ProfileFile | None = None) -> None:
        self.allowed, self.kept, self.deepest = allowed, kept, max(allowed)
        self._nothing = [0.0] * self.deepest  # counts where nothing was verified yet
        known = kept and kept.load(self.deepest) or Profile(None, 0.0, self._nothing, self._nothing)
        self.costs = RoundCosts(self.deepest, known.costs)
        self.long_run = Acceptance([*known.verified], [*known.accepted])
        # Counted over all requests: many short ones must find out what a long one does.
        self._rounds, self._tried_at = 0, dict.fromkeys(self.allowed, 0)
        self._saved = 1.0  # rounds' worth of time that may be lost on tries
        self.begin()

    @property
    def plain_seconds(self) -> float | None:
        return self.costs.plain_seconds

    def for_seed(self, most: int) -> DepthPolicy:
        return FixedDepth(max(depth for depth in self.allowed if depth <= most))

    def begin(self) -> None:
        self.costs.pause()
        self._here = Acceptance([*self._nothing], [*self._nothing])
        self._rates = self.long_run.rates()
        self._chosen = 0
        if self.costs.known:
            self._chosen = self._best()
        self._now = self._chosen  # the depth of the round, which may be a try
        # Rounds of it in a row: some more where plain ones come first, with which all others will be compared.
        self._run = 0 if self.costs.known else -2
        self._learned = -1  # the depth of the round that was read last

    def _tokens(self, depth: int) -> float:
        return expected_tokens(self._rates, depth)

    def _speed_up(self, depth: int) -> float:
        """Expected tokens in the time of a plain round."""
        return self._tokens(depth) / self.costs.cost(depth)

    def next(self) -> int:
        self._rounds += 1
        self._run += 1
        if self._run <= HOLD:
            return self._now
        tried, best = self._now if self._now != self._chosen else None, self._best()
        if best != self._chosen and self._speed_up(best) > (1.0 + LITTLE) * self._speed_up(self._chosen):
            log.info("depth %d -> %d: %.2f times plain decoding expected in place of %.2f",
                     self._chosen, best, self._speed_up(best), self._speed_up(self._chosen))  # fmt: skip
            self._chosen = best
        self._saved += TRYING * self._speed_up(self._chosen)
        depth = self._chosen
        if tried is not None:
            self._saved = max(-1.0, self._saved - (self._run - 1) * self._loss(tried, self.costs.cost(tried)))
            self._tried_at[tried] = self._rounds
        else:
            depth = self._worth_a_try()
        if depth != self._now:
            self._now, self._run = depth, 1
        return depth

    def _worth_a_try(self) -> int:
        """The depth that was tried longest ago of those whose loss is saved, or the one in use.

        The loss is by the hopeful end of what its cost is thought to be: one that may well be better loses nothing.
        """
        turns = sorted(self._within_reach(), key=lambda depth: self._tried_at[depth])
        affordable = (depth for depth in turns if depth != self._chosen
                      and self._saved >= HOLD * self._loss(depth, self._hope(depth)))  # fmt: skip
        return next(affordable, self._chosen)

    def _hope(self, depth: int) -> float:
        """What a round may cost at best: a deviation below what is thought, and a memory may be quite wrong."""
        cost = self.costs.cost(depth) * math.exp(-self.costs.uncertainty(depth, self._chosen))
        if self.costs.timed[depth]:
            return cost
        return min(cost, self.costs.cost(self._chosen) + SLOPE * max(0, depth - self._chosen))

    def _loss(self, depth: int, cost: float) -> float:
        """What a round of this depth loses if it costs so much, in rounds of the depth in use."""
        return max(0.0, cost / self.costs.cost(self._chosen) - self._tokens(depth) / self._tokens(self._chosen))

    def _best(self) -> int:
        return best_depth(self.costs.cost, self._rates, self._within_reach())

    def _within_reach(self) -> list[int]:
        """Plain decoding, the shallowest drafts, and what acceptance so far makes worth a thought."""
        reach = max(self.long_run.reach(), self._chosen)
        return [depth for place, depth in enumerate(self.allowed) if place < 2 or depth <= reach]

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        # What a depth that is out of use was found to give fades within a request, so that an unlucky one gets another
        # chance; over all of them only new drafts make old ones count less, or plain decoding would forget why.
        self._here.count(depth, accepted, FADE)
        self.long_run.count(depth, accepted, LONG_FADE if depth else 1.0)
        self._rates = self._here.rates(self.long_run.rates())
        # The first round of a depth may be charged with the end of the one before.
        self.costs.learn(depth, seconds if depth == self._learned else None)
        self._learned = depth

    @property
    def reason(self) -> str:
        depth = self._chosen or max((d for d in self.allowed if d), key=self._speed_up)
        if not self.costs.known:
            return "Not enough rounds yet to say whether drafting pays."
        cost, tokens = self.costs.cost(depth), self._tokens(depth)
        takes = f"takes {cost:.1f} times a plain one and yields"
        if self._chosen:
            return f"Drafting {plural(depth, 'token')} a round: a round {takes} {tokens:.1f} tokens."
        return f"Not drafting: a round of {plural(depth, 'draft')} {takes} only {tokens:.1f} tokens."

    def save(self) -> None:
        if self.kept is None:
            return
        costs = [self.costs.cost(depth) for depth in range(self.deepest + 1)]
        enough = self.costs.known and sum(self.costs.timed) >= SCATTER
        noise = self.costs.scatter if enough else math.inf
        self.kept.save(Profile(costs, noise, self.long_run.verified, self.long_run.accepted))
