"""What the depth control learned, for the next start: costs in plain rounds, never seconds, and only if the machine was
quiet; and how often drafts were accepted, which no clock can spoil."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise

from mlx_mtp.checkpoints.kept import Kept

# Costs are kept only where rounds scatter by no more than this share.
CALM = 0.2


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
    """Where the profile of one machine and pair is kept."""

    def load(self, deepest: int) -> Profile | None:
        """What an earlier run learned of 0 to `deepest` drafts; None where nothing usable is kept."""
        known = self.read()
        try:
            costs, verified, accepted = (list(map(float, known[name] or ()))
                                         for name in ("costs", "verified", "accepted"))  # fmt: skip
            noise = float(known["noise"])
        except (KeyError, TypeError, ValueError):
            return None
        if {len(verified), len(accepted)} != {deepest}:
            return None
        if not all(0 <= few <= many < math.inf for many, few in zip(verified, accepted, strict=True)):
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
