"""What an acceptance would give on an Apple chip, by what other people published about it.

What it does: reads published.json, and multiplies. What it does not do: measure, or know tokens per second there:
only the speed-up over plain decoding on the same chip follows from these figures.

Every result is a prediction, and is to be shown as one, with its source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlx_mtp.depth import expected_tokens
from mlx_mtp.errors import OptionError

FILE = Path(__file__).with_name("published.json")
MARK = "Prediction from published figures, not measured on such a chip by this project."


@dataclass(frozen=True, kw_only=True)
class PublishedCurve:
    """Cost of a pass (or of a whole round) by rows, over one plain step.

    rows: rows -> ratio, 1 -> 1.0 among them. draft_share: a draft over a plain step; assumed where `assumed_draft`.
    """

    chip: str
    what: str
    rows: dict[int, float]
    whole_round: bool
    draft_share: float
    assumed_draft: bool
    source: str
    note: str

    @property
    def deepest(self) -> int:
        """Most drafts a round these figures cover."""
        return max(self.rows) - 1

    def cost(self, depth: int) -> float:
        """A round of so many drafts over a plain one; straight lines between published rows, nothing beyond them."""
        rows = depth + 1
        if rows in self.rows:
            ratio = self.rows[rows]
        else:
            below, above = max(m for m in self.rows if m < rows), min(m for m in self.rows if m > rows)
            ratio = self.rows[below] + (self.rows[above] - self.rows[below]) * (rows - below) / (above - below)
        return ratio if self.whole_round else ratio + depth * self.draft_share


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """For one chip and one curve. by_depth: speed-up over plain decoding there at 1, 2, ... drafts a round.

    chip: asked for. curve.chip: whose figures these are; another of the same GPU generation where the chip has none.
    depth, speed_up: the best, 0 and 1.0 where plain decoding is.
    """

    chip: str
    curve: PublishedCurve
    by_depth: tuple[float, ...]
    depth: int
    speed_up: float
    tokens_per_round: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON, marked as what it is."""
        curve = self.curve
        return {
            "prediction": MARK, "chip": self.chip, "figures_of": curve.chip, "what": curve.what, "source": curve.source,
            "note": curve.note, "draft_share": None if curve.whole_round else curve.draft_share,
            "assumed_draft_share": curve.assumed_draft and not curve.whole_round,
            "speed_up_by_depth": list(self.by_depth), "best_depth": self.depth, "speed_up": self.speed_up,
            "tokens_per_round": self.tokens_per_round,
        }  # fmt: skip


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def curves() -> list[PublishedCurve]:
    """All of them."""
    table = _table()
    return [
        PublishedCurve(
            chip=one["chip"], what=one["what"],
            rows={1: 1.0} | {int(rows): float(ratio) for rows, ratio in one["rows"].items()},
            whole_round=one["whole_round"],
            draft_share=one["draft_share"] or table["default_draft_share"]["value"],
            assumed_draft=one["draft_share"] is None, source=one["source"], note=one["note"],
        )
        for one in table["curves"]
    ]  # fmt: skip


def assumed_draft_share() -> tuple[float, str]:
    """What a draft is taken to cost where a source does not say, over a plain step; and where that is from."""
    default = _table()["default_draft_share"]
    return default["value"], default["source"]


def known_chips() -> list[str]:
    """Chips with a curve of their own or of one of the same GPU generation."""
    return [chip for chip in _table()["chips"] if curves_for(chip)]


def bandwidth(chip: str) -> int:
    """Published memory bandwidth, GB/s."""
    return int(_table()["chips"][canonical(chip)]["bandwidth"])


def canonical(chip: str) -> str:
    """'apple m4 pro' -> 'M4 Pro'; OptionError with the known ones for any other name."""
    wanted = " ".join(chip.casefold().removeprefix("apple").split())
    for name in _table()["chips"]:
        if name.casefold() == wanted and curves_for(name):
            return str(name)
    raise OptionError(
        f"Expected a chip of which figures are published ({', '.join(known_chips())}), found '{chip}'; name one."
    )


def curves_for(chip: str) -> list[PublishedCurve]:
    """The chip's own curves, else those of its GPU generation, whose kernels it shares."""
    own = [curve for curve in curves() if curve.chip == chip]
    chips = _table()["chips"]
    generation = chips[chip]["generation"]
    return own or [curve for curve in curves() if chips[curve.chip]["generation"] == generation]


def predict(chip: str, acceptance: Sequence[float], most: int = 8) -> list[Prediction]:
    """What these chances of each position to stand, once those before it do, would give on a chip.

    Depths beyond the last position are not predicted. Raises OptionError for an unknown chip or a share outside 0..1.
    """
    chip = canonical(chip)
    if not acceptance or not all(0.0 <= share <= 1.0 for share in acceptance):
        raise OptionError(
            f"Expected --acceptance as shares from 0 to 1, found {list(acceptance) or 'none'}; change it."
        )
    shares = list(acceptance)
    found = []
    for curve in curves_for(chip):
        depths = range(1, min(curve.deepest, len(shares), most) + 1)
        gains = tuple(expected_tokens(shares, depth) / curve.cost(depth) for depth in depths)
        best = max(range(len(gains) + 1), key=lambda depth: gains[depth - 1] if depth else 1.0)
        found.append(Prediction(
            chip=chip, curve=curve, by_depth=gains, depth=best, speed_up=gains[best - 1] if best else 1.0,
            tokens_per_round=expected_tokens(shares, best),
        ))  # fmt: skip
    return found


def prediction_report(chip: str, acceptances: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The JSON object of `bench --predict`. acceptances: by what they are from, conditional, by position."""
    share, source = assumed_draft_share()
    return {
        "prediction": MARK,
        "chip": canonical(chip),
        "bandwidth_gigabytes_per_second": bandwidth(chip),
        "assumed_draft_share": {"value": share, "source": source},
        "cases": [
            {"acceptance_from": label, "acceptance": list(shares),
             "predictions": [one.as_dict() for one in predict(chip, shares)]}
            for label, shares in acceptances.items()
        ],
    }  # fmt: skip
