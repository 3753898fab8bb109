"""What the measured pieces of a round predict: seconds a token, without having decoded any.

What it does: E[tokens a round] over what a round takes, from passes, draft step, host gap and acceptance. What it
does not do: measure (diagnosis.py), or see the run it predicts beyond its acceptance and depths.

Speed-up over plain decoding = rounds that plain decoding takes x its round / (rounds needed x the drafted round).
A drafted round = verify(depth + 1) + depth x draft step + host gap. Rounds are pipelined: the gap is what a round
takes in the loop beside passes and drafts, the waiting that Python could not hide and accepting included; it is
measured at one depth and may be below zero where one round's beginning hides behind the end of the one before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from mlx_mtp.depth import Curve
from mlx_mtp.diagnosis import Costs


def tokens_law(rounds: int, stood: Sequence[int]) -> list[float]:
    """Chances of a round to give 1, 2, ... tokens; stood: in how many of the rounds the draft at each position stood.

    Of all rounds together, whatever their depths: where the deep ones are those in which much stands, as with depth
    auto, the chance at a position once those before it stand, the same for all depths, would promise too little.
    """
    return [(before - now) / rounds for before, now in pairwise([rounds, *stood, 0])]


def rounds_needed(law: Sequence[float], tokens: int) -> float:
    """Expected rounds until so many tokens are there; the last round may give more than is left."""
    needed = [0.0]
    for n in range(1, tokens + 1):
        needed.append(1.0 + sum(chance * needed[max(0, n - got)] for got, chance in enumerate(law, 1)))
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


def shares_of(counts: Mapping[int, int]) -> dict[int, float]:
    """Rounds by depth -> shares of all rounds."""
    total = sum(counts.values())
    return {depth: count / total for depth, count in counts.items()}


def round_parts(costs: Costs, counts: Mapping[int, int], filled: int | None = None) -> Parts:
    """The average round of these depths. filled: rows every pass is filled up to in exact mode."""
    curve = costs.curve(filled)
    verify = draft = whole = 0.0
    for depth, share in shares_of(counts).items():
        verify += share * pass_seconds(costs, max(depth + 1, filled or 1))
        draft += share * depth * (costs.draft_step or 0.0)
        whole += share * curve.at(depth)
    return Parts(verify, draft, whole - verify - draft)


def pass_seconds(costs: Costs, rows: int) -> float:
    """A pass of so many rows; beyond the widest that was timed by a straight line."""
    passes = {at: seconds for at, seconds in enumerate(costs.verify)}
    return Curve(passes).at(rows - 1)


def seconds_per_token(
    costs: Costs, counts: Mapping[int, int], law: Sequence[float], tokens: int, filled: int | None = None
) -> float:
    """Predicted for a reply of `tokens` tokens, from the first to the last.

    counts: rounds by depth, or {depth: 1} for a fixed one. law: chances of a round to give 1, 2, ... tokens.
    """
    return rounds_needed(law, tokens - 1) * round_parts(costs, counts, filled).seconds / (tokens - 1)
