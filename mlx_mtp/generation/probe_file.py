"""What exact mode found out about a target on a device, kept in a file: the probe takes half a minute.

Beside the profiles of the depth control and in their form; `mlx-mtp doctor --forget` drops both.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.checkpoints.packaged import cache_folder
from mlx_mtp.generation.depth_profile import keep, kept
from mlx_mtp.generation.exactness import WIDEST, Exactness


@dataclass(frozen=True)
class ProbeFile:
    """The results of one target, under `key` in `path`. The key names all that the bits of a pass depend on."""

    path: Path
    key: str

    def load(self) -> dict[int, Exactness]:
        """What earlier runs found, by capacity; without what cannot be such a result."""
        known: Any = kept(self.path).get(self.key)
        found = {}
        for capacity, entry in known.items() if isinstance(known, dict) else ():
            try:
                result = Exactness(tuple(map(int, entry["depths"])), entry["width"] and int(entry["width"]))
                if result.depths[0] == 0 and all(0 <= depth < WIDEST for depth in result.depths):
                    found[int(capacity)] = result
            except (KeyError, TypeError, ValueError, IndexError):
                continue
        return found

    def save(self, found: dict[int, Exactness]) -> None:
        """Keeps results beside those of other capacities."""
        every = self.load() | found
        keep(self.path, self.key, {str(capacity): asdict(result) for capacity, result in every.items()})


def probes_path() -> Path:
    """The file of all results."""
    return cache_folder() / "exactness.json"
