"""What is kept in the user's cache folder from one run to the next; `mlx-mtp doctor --forget` drops what was learned.

Several processes may write at once: each replaces the whole file, so that an update may get lost but never half of one.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_mtp.checkpoints.atomic import replacing

log = logging.getLogger(__name__)

VERSION = 2  # of the files; another one is not read


def user_folder(variable: str, below: str) -> Path:
    """A user's folder for one kind of files: $variable, else `below` in the home folder.

    Users without a home, as in some containers, get a place that is nowhere, where nothing is found or kept.
    """
    if chosen := os.environ.get(variable):
        return Path(chosen)
    home = os.path.expanduser("~")
    return Path("/nonexistent" if home == "~" else home, below)


def cache_folder() -> Path:
    """$MLX_MTP_CACHE, else the user's cache folder."""
    if chosen := os.environ.get("MLX_MTP_CACHE"):
        return Path(chosen)
    return user_folder("XDG_CACHE_HOME", ".cache") / "mlx_mtp"


def profiles_path() -> Path:
    return cache_folder() / "depth.json"


def probes_path() -> Path:
    return cache_folder() / "exactness.json"


@dataclass(frozen=True)
class Kept:
    """A value under `key` among those of the JSON file `path`. The key names all that the value depends on."""

    path: Path
    key: str

    def read(self) -> Any:
        """The value, whatever somebody has made of it; None where there is none."""
        return _values(self.path).get(self.key)

    def write(self, value: dict[str, Any]) -> None:
        """Keeps a value beside the others; a read-only or full disk costs no more than that."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            values = _values(self.path) | {self.key: value}
            with replacing(self.path) as fresh:
                fresh.write_text(json.dumps({"version": VERSION, "profiles": values}, indent=2))
        except OSError as error:
            log.debug("%s was not kept: %s", self.path, error)


def forget(path: Path) -> list[str]:
    """Drops everything kept in a file; the keys of what it was. OSError where the file cannot be removed."""
    known = sorted(_values(path))
    path.unlink(missing_ok=True)
    return known


def _values(path: Path) -> dict[str, Any]:
    """By key; empty where there is no file or a damaged one."""
    try:
        found = json.loads(path.read_text())
        return dict(found["profiles"]) if found["version"] == VERSION else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
