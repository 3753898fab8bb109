"""How many tokens to draft: measured round times x observed acceptance -> the depth with most tokens per second.

What it does: chooses a depth before every round, 0 (plain decoding) included, and learns from every round that was
read. What it does not do: touch the device or measure anything itself. Pure Python.

Expected tokens of a round of depth d: 1 + a1 + a1 a2 + ... + a1..ad, with a_i the chance that draft i stands once
those before it do. Divided by the round's time this is what the controller maximises.
"""

from __future__ import annotations

import json
import logging
import math
import os
import statistics
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

# How much one round of the depth in use moves the times of all depths (a warmer chip, a longer context).
COMMON = 0.1
# However late a round comes (something else interrupted it), or early (that before it was late), it counts as this
# share of the expected time later or earlier at most.
LATEST, EARLIEST = 0.5, 0.6
# A depth's own time is the median of so many rounds, of two middle ones the shorter: rounds are late for many reasons
# and early for few. What was known before any of them counts as one.
WINDOW = 9
# Acceptance is a share of rounds that fade by this factor: within a request with every round, over all requests with
# every round that drafted.
FADE = 0.97
# How many rounds of its own the earlier requests count for in a new one, and the position before for a position.
MEMORY, NEIGHBOUR = 4.0, 1.0
PRIOR = 0.6
# A change must promise this much.
GAIN = 1.02
# The first rounds of a depth that has just been chosen tell how far its own time was wrong: the machine hardly changed
# its speed in that very moment.
# So many, because a time that was far off must be mended before the whole curve is scaled by it.
NEW = 6
# Share of the time that may be lost on seeing whether another depth would pay, the fewest rounds in between, and the
# rounds of a try: while one round runs the next is built, so only a round followed by one like it shows what it takes.
PROBING, PAUSE, TRY = 0.005, 6, 2
# What a depth is thought to cost may have been measured in a bad minute: a try is due when this share of the loss it
# would bring has been saved up; what it really lost is then taken off, down to a debt of 80 rounds. A round is never
# thought to lose more than WORST, or one depth that looks absurdly dear would keep all others waiting.
HOPE, DEBT, WORST = 0.25, 0.4, 2.0


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
    """Seconds of a round by depth: measured at some depths, straight lines between and beyond them.

    Every depth keeps the times of its latest rounds, as they would be at today's pace, and their median counts: of
    noisy times no single one does. Never falling, since more drafts take no less time: of two depths that say
    otherwise the one that rests on fewer rounds gives way.
    """

    seconds: dict[int, float]

    def __post_init__(self) -> None:
        self._pace = 1.0
        self._rounds = {depth: deque([time], WINDOW) for depth, time in self.seconds.items()}
        self._fit()

    def at(self, depth: int) -> float:
        """Expected seconds of a round of this depth."""
        if depth in self.seconds:
            return self.seconds[depth]
        known = sorted(self.seconds)
        if len(known) == 1:
            return self.seconds[known[0]]
        below = max((d for d in known[:-1] if d < depth), default=known[0])
        above = next(d for d in known if d > below)
        slope = (self.seconds[above] - self.seconds[below]) / (above - below)
        return self.seconds[below] + slope * (depth - below)

    def learn(self, depth: int, seconds: float, usual: bool) -> None:
        """Moves the estimates towards a round that took so long.

        usual: whether this depth is the one in use. Its rounds tell how fast the machine is now, and scale the whole
        curve; the few rounds of other depths, and its own first one, tell the curve's shape. If each round moved its
        own depth only, the one in use would look better than the rest whenever the machine got faster, and stay in use
        for ever.
        """
        expected = self.at(depth)
        drift = max(-EARLIEST, min(seconds / expected - 1.0, LATEST))
        if usual and len(self._rounds.get(depth, ())) > 1:  # as nearly every round: the medians are left alone
            faster_or_slower = 1.0 + COMMON * drift
            self._pace *= faster_or_slower
            self.seconds = {d: time * faster_or_slower for d, time in self.seconds.items()}
            return
        rounds = self._rounds.setdefault(depth, deque([expected / self._pace], WINDOW))
        rounds.append(expected * (1.0 + drift) / self._pace)
        self._fit()

    def _fit(self) -> None:
        fitted: dict[int, float] = {}
        for depth in sorted(self._rounds, key=lambda depth: -len(self._rounds[depth])):
            low = max((time for d, time in fitted.items() if d < depth), default=0.0)
            high = min((time for d, time in fitted.items() if d > depth), default=math.inf)
            fitted[depth] = min(max(low, statistics.median_low(self._rounds[depth])), high)
        self.seconds = {depth: self._pace * time for depth, time in sorted(fitted.items())}


@dataclass
class Acceptance:
    """How many drafts were judged at each position, and how many of them stood; older rounds count less."""

    seen: list[float]
    stood: list[float]

    @classmethod
    def unknown(cls, positions: int) -> Acceptance:
        """Nothing judged yet."""
        return cls([0.0] * positions, [0.0] * positions)

    def fade(self, factor: float) -> None:
        """Makes all rounds so far count less."""
        self.seen = [factor * count for count in self.seen]
        self.stood = [factor * count for count in self.stood]

    def book(self, depth: int, accepted: int) -> None:
        """A round of `depth` drafts of which the first `accepted` stood; those behind the first loss tell nothing."""
        for i in range(min(depth, accepted + 1)):
            self.seen[i] += 1.0
            self.stood[i] += float(i < accepted)

    def shares(self) -> list[float]:
        """Chance of each position once those before it stand; where little was seen, that of the position before."""
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
    """Tokens of a round of `depth` drafts, from each position's chance to stand once those before it do."""
    total = stands = 1.0
    for share in shares[:depth]:
        stands *= share
        total += stands
    return total


def best_depth(curve: Curve, shares: Sequence[float], allowed: Sequence[int]) -> int:
    """The depth with most expected tokens per second; drafting must beat plain decoding by GAIN."""
    return max(allowed, key=lambda d: expected_tokens(shares, d) / curve.at(d) * (1.0 if d else GAIN))


@dataclass
class DepthController:
    """Chooses among `allowed` depths. `long_run` is what all requests so far had accepted."""

    curve: Curve
    deepest: int
    allowed: Sequence[int]
    long_run: Acceptance | None = None
    file: Path | None = None
    key: str = ""

    def __post_init__(self) -> None:
        if self.long_run is None or len(self.long_run.seen) != self.deepest:
            self.long_run = Acceptance.unknown(self.deepest)
        self._everything: Acceptance = self.long_run
        # Counted over all requests: many short ones must find out what a long one does.
        self._since_probe = self._probes = 0
        self._saved = 0.0  # rounds' worth of time that may be lost on tries
        self.begin()

    def begin(self) -> None:
        """Starts from the long run, ready to be convinced otherwise within a few rounds."""
        self._here = Acceptance.unknown(self.deepest)
        self._shares = self._everything.shares()
        self._depth, self._new = self._best(), 0
        self._tried, self._tries = 0, 0  # a depth under trial, and how many rounds of it are still to come

    def tokens(self, depth: int) -> float:
        """Expected tokens of a round."""
        return expected_tokens(self._shares, depth)

    def rate(self, depth: int) -> float:
        """Expected tokens per second."""
        return self.tokens(depth) / self.curve.at(depth)

    @property
    def plain_seconds(self) -> float:
        """Expected seconds of a token decoded plainly: a round of depth 0, as fast as the machine is now."""
        return self.curve.at(0)

    def next(self) -> int:
        """The chosen depth, or now and then some rounds of another one, to see whether that would pay."""
        if self._tries:
            self._tries -= 1
            return self._tried
        best = self._best()
        if best != self._depth and self.rate(best) > GAIN * self.rate(self._depth):
            log.info("depth %d -> %d: %.0f tokens/s expected in place of %.0f",
                     self._depth, best, self.rate(best), self.rate(self._depth))  # fmt: skip
            self._depth, self._since_probe, self._new = best, 0, NEW
        self._since_probe += 1
        others = self._others()
        if not others:
            return self._depth
        other = others[self._probes % len(others)]
        self._saved += PROBING
        lost = min(self._lost(other, self.curve.at(other)), WORST)
        if self._since_probe < PAUSE or self._saved < HOPE * TRY * lost:
            return self._depth
        self._since_probe, self._probes = 0, self._probes + 1
        self._tried, self._tries = other, TRY - 1
        return other

    def _others(self) -> list[int]:
        """Depths worth a try, by turns: the next deeper and shallower ones, and plain decoding."""
        deeper = [depth for depth in self.allowed if depth > self._depth][:1]
        shallower = [depth for depth in self.allowed if depth < self._depth]
        return deeper + shallower[-1:] + shallower[:-1][:1]

    def _lost(self, depth: int, seconds: float) -> float:
        """What a round of this depth costs that takes so long, in rounds of the chosen one."""
        time = seconds / self.curve.at(self._depth)
        return max(0.0, time - self.tokens(depth) / self.tokens(self._depth))

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        """Books a round: which drafts stood, and how long it took."""
        # What a depth that is out of use was found to give fades within a request, so that an unlucky one gets another
        # chance; over all of them only new drafts make old ones count less, or plain decoding would forget why.
        for acceptance, fades in ((self._here, True), (self._everything, depth > 0)):
            acceptance.fade(FADE if fades else 1.0)
            acceptance.book(depth, accepted)
        self._shares = self._here.shares_given(self._everything.shares())
        if depth != self._depth:
            lost = self._lost(depth, self.curve.at(depth) if seconds is None else seconds)
            self._saved = max(-DEBT, self._saved - lost)
        if seconds is not None:
            self.curve.learn(depth, seconds, usual=depth == self._depth and self._new == 0)
            if depth == self._depth:
                self._new = max(0, self._new - 1)

    def _best(self) -> int:
        """The depth with the best rate."""
        return best_depth(self.curve, self._shares, self.allowed)

    def save(self) -> None:
        """Keeps curve and acceptance for the next start; a read-only or full disk costs nothing but that."""
        if self.file is None:
            return
        known = {
            "seconds": {str(depth): time for depth, time in self.curve.seconds.items()},
            "seen": self._everything.seen,
            "stood": self._everything.stood,
        }
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            profiles = _profiles(self.file) | {self.key: known}
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, suffix=".json", delete=False) as fresh:
                json.dump(profiles, fresh, indent=2)
            os.replace(fresh.name, self.file)
        except OSError as error:
            log.debug("the depth profile was not kept: %s", error)


def remembered(file: Path, key: str) -> tuple[Curve, Acceptance] | None:
    """What an earlier run learned about this machine and pair; None where nothing usable is kept."""
    known = _profiles(file).get(key)
    try:
        assert isinstance(known, dict)
        seconds = {int(depth): float(time) for depth, time in known["seconds"].items()}
        seen, stood = ([float(count) for count in known[name]] for name in ("seen", "stood"))
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        return None
    sane = len(seen) == len(stood) and all(0 <= b <= a < math.inf for a, b in zip(seen, stood, strict=True))
    usable = seconds and all(0 < time < math.inf for time in seconds.values()) and sane
    return (Curve(seconds), Acceptance(seen, stood)) if usable else None


def _profiles(file: Path) -> dict[str, object]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def cache_folder() -> Path:
    """Where learned profiles live: $MLX_MTP_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("MLX_MTP_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_mtp"
