"""How many tokens to draft: measured round times x observed acceptance -> the depth with most tokens per second.

What it does: chooses a depth before every round, 0 (plain decoding) included, and learns from every round that was
read. What it does not do: touch the device or measure anything itself. Pure Python.

Expected tokens of a round of depth d: 1 + a1 + a1 a2 + ... + a1..ad, with a_i the chance that draft i stands once
those before it do. Divided by the round's time this is what the controller maximises.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

log = logging.getLogger(__name__)

# How much one round moves an estimate: its own time, the times of all depths (a warmer chip, a longer context).
OWN, COMMON = 0.1, 0.03
# A round this many times slower than expected was interrupted by something else.
OUTLIER = 2.5
# What a new request remembers of the ones before: as much as this many rounds; and the least one round counts later.
MEMORY_ROUNDS, LEAST = 6, 0.05
LONG_RUN = 0.01
PRIOR = 0.6
# A change must promise this much. Rounds between two probes: at first, and at most (doubled while probes fail).
GAIN = 1.02
PROBE_EVERY, PROBE_AT_MOST = 48, 384


class DepthPolicy(Protocol):
    """What the decode loop asks before a round and tells after it."""

    deepest: int

    def begin(self) -> None:
        """A new request."""

    def next(self) -> int:
        """Depth of the next round."""

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        """A round of `depth` drafts was read; seconds None = its time says nothing."""


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
    """Seconds of a round by depth: measured at some depths, straight lines between and beyond them."""

    seconds: dict[int, float]

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

    def learn(self, depth: int, seconds: float) -> None:
        """Moves this depth's estimate, and a little all others with it."""
        expected = self.at(depth)
        if seconds > OUTLIER * expected:
            return
        drift = seconds / expected - 1.0
        self.seconds = {d: t * (1.0 + COMMON * drift) for d, t in self.seconds.items()}
        self.seconds[depth] = expected * (1.0 + OWN * drift)


@dataclass
class DepthController:
    """Chooses among `allowed` depths. `long_run` is the acceptance by position over all requests so far."""

    curve: Curve
    deepest: int
    allowed: Sequence[int]
    long_run: list[float] = field(default_factory=list)
    file: Path | None = None
    key: str = ""

    def __post_init__(self) -> None:
        self.long_run = (self.long_run + [PRIOR] * self.deepest)[: self.deepest]
        self.begin()

    def begin(self) -> None:
        """Starts from the long run, ready to be convinced otherwise within a few rounds."""
        self._acceptance = list(self.long_run)
        self._seen = [MEMORY_ROUNDS] * self.deepest
        self._depth = self._best(self.allowed)
        self._since_probe, self._probe_every = 0, PROBE_EVERY

    def tokens(self, depth: int) -> float:
        """Expected tokens of a round."""
        total = stands = 1.0
        for share in self._acceptance[:depth]:
            stands *= share
            total += stands
        return total

    def rate(self, depth: int) -> float:
        """Expected tokens per second."""
        return self.tokens(depth) / self.curve.at(depth)

    def next(self) -> int:
        """The chosen depth, or seldom its neighbour, to see whether that would pay."""
        best = self._best([d for d in self.allowed if d == 0 or abs(d - self._depth) <= 1])
        if best != self._depth and self.rate(best) > GAIN * self.rate(self._depth):
            log.info("depth %d -> %d: %.0f tokens/s expected in place of %.0f",
                     self._depth, best, self.rate(best), self.rate(self._depth))  # fmt: skip
            self._depth, self._since_probe, self._probe_every = best, 0, PROBE_EVERY
        self._since_probe += 1
        if self._since_probe >= self._probe_every:
            self._since_probe = 0
            self._probe_every = min(2 * self._probe_every, PROBE_AT_MOST)
            above = [d for d in self.allowed if d > self._depth]
            return above[0] if above else self._depth
        return self._depth

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        """Books a round: which drafts stood, and how long it took."""
        for i in range(min(depth, accepted + 1)):
            stood = float(i < accepted)
            self._seen[i] += 1
            weight = max(1.0 / self._seen[i], LEAST)
            self._acceptance[i] += weight * (stood - self._acceptance[i])
            self.long_run[i] += LONG_RUN * (stood - self.long_run[i])
        if seconds is not None:
            self.curve.learn(depth, seconds)

    def _best(self, depths: Sequence[int]) -> int:
        return max(depths, key=self.rate)

    def save(self) -> None:
        """Keeps curve and acceptance for the next start; a read-only or full disk costs nothing but that."""
        if self.file is None:
            return
        known = {"seconds": {str(d): t for d, t in self.curve.seconds.items()}, "acceptance": self.long_run}
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            profiles = _profiles(self.file) | {self.key: known}
            with tempfile.NamedTemporaryFile("w", dir=self.file.parent, suffix=".json", delete=False) as fresh:
                json.dump(profiles, fresh, indent=2)
            os.replace(fresh.name, self.file)
        except OSError as error:
            log.debug("the depth profile was not kept: %s", error)


def remembered(file: Path, key: str) -> tuple[Curve, list[float]] | None:
    """What an earlier run learned about this machine and pair; None where nothing usable is kept."""
    known = _profiles(file).get(key)
    try:
        assert isinstance(known, dict)
        seconds = {int(depth): float(time) for depth, time in known["seconds"].items()}
        acceptance = [float(share) for share in known["acceptance"]]
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError):
        return None
    usable = seconds and min(seconds.values()) > 0 and all(0 <= share <= 1 for share in acceptance)
    return (Curve(seconds), acceptance) if usable else None


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
