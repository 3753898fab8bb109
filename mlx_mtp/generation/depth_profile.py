"""What the depth control learned, kept in a file for the next start; `mlx-mtp doctor --forget` drops it.

Kept are costs relative to a plain round, never seconds, and only if the machine was quiet; and how often drafts were
accepted, which no clock can spoil. Several processes may write at once: each replaces the whole file, so that an update
may get lost but never half of one.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from mlx_mtp.checkpoints.atomic import replacing
from mlx_mtp.checkpoints.packaged import cache_folder

log = logging.getLogger(__name__)

VERSION = 2
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


@dataclass(frozen=True)
class ProfileFile:
    """The profile of one machine and pair, under `key` in `path`."""

    path: Path
    key: str

    def load(self, deepest: int) -> Profile | None:
        """What an earlier run learned of 0 to `deepest` drafts; None where nothing usable is kept."""
        known: Any = kept(self.path).get(self.key)
        try:
            found = Profile(
                [float(cost) for cost in known["costs"] or ()], float(known["noise"]),
                [float(count) for count in known["verified"]], [float(count) for count in known["accepted"]],
            )  # fmt: skip
        except (KeyError, TypeError, ValueError):
            return None
        counts = zip(found.verified, found.accepted, strict=False)
        sane = all(0 <= accepted <= verified < math.inf for verified, accepted in counts)
        if not sane or {len(found.verified), len(found.accepted)} != {deepest}:
            return None
        if len(found.costs or ()) != deepest + 1 or not possible(found.costs or ()) or not 0 <= found.noise <= CALM:
            found.costs = None
        return found

    def save(self, profile: Profile) -> None:
        """Keeps a profile, with the former costs where those are better; a read-only or full disk costs no more."""
        former = self.load(len(profile.verified))
        ours = profile.costs is not None and profile.noise <= CALM and possible(profile.costs)
        if former is not None and former.costs and (not ours or former.noise < profile.noise / 2):
            profile = replace(profile, costs=former.costs, noise=former.noise)
        elif not ours:
            profile = replace(profile, costs=None, noise=CALM)
        keep(self.path, self.key, asdict(profile))


def possible(costs: Sequence[float]) -> bool:
    """Whether rounds can cost that: more drafts no less, and a draft no more than two passes of one row."""
    rising = all(1.0 <= one <= other for one, other in pairwise([1.0, *costs]))
    return rising and all(cost <= 1.0 + 2.0 * depth for depth, cost in enumerate(costs))


def forget(path: Path) -> list[str]:
    """Drops everything kept in a file; the keys of what it was. OSError where the file cannot be removed."""
    known = sorted(kept(path))
    path.unlink(missing_ok=True)
    return known


def profile_path() -> Path:
    """The file of all profiles."""
    return cache_folder() / "depth.json"


def keep(path: Path, key: str, value: dict[str, Any]) -> None:
    """Keeps a value beside the others of a file; a read-only or full disk costs no more than that."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiles = kept(path) | {key: value}
        with replacing(path) as fresh:
            fresh.write_text(json.dumps({"version": VERSION, "profiles": profiles}, indent=2))
    except OSError as error:
        log.debug("%s was not kept: %s", path, error)


def kept(path: Path) -> dict[str, Any]:
    """By key; empty where there is no file, a damaged one, or one of another version."""
    try:
        found = json.loads(path.read_text())
        return dict(found["profiles"]) if found["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
