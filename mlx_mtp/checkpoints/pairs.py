"""Known pairs of target and assistant: which drafter belongs to which name, how large both are, what fits.

The table is pairs.json beside this file. The user's own is mlx-mtp/pairs.json in $XDG_CONFIG_HOME or ~/.config, in the
same form; its entries come first, so that they override ours and are preferred.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from mlx_mtp.checkpoints import memory
from mlx_mtp.checkpoints.kept import user_folder
from mlx_mtp.errors import OptionError, explaining

OURS = Path(__file__).with_name("pairs.json")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class KnownPair:
    """A target and its assistant (None: the user wants none), by hub name or folder.

    bits: of the target's weights, 16 = not quantised. download_bytes: both folders. weight_bytes: what both hold in
    memory on Metal. Both approximate, 0 = unknown. source: where name and sizes were seen. pattern: the target is one.
    """

    target: str
    assistant: str | None
    bits: int = 16
    download_bytes: int = 0
    weight_bytes: int = 0
    source: str = ""
    pattern: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.target, str) or not self.target or not isinstance(self.assistant, str | None):
            raise ValueError(f"{reprlib.repr(self.target)} with {reprlib.repr(self.assistant)}")
        for size, high in ((self.bits, 32), (self.download_bytes, 2**60), (self.weight_bytes, 2**60)):
            if type(size) is not int or not 0 <= size <= high:
                raise ValueError(f"{reprlib.repr(size)} as a size of '{self.target}'")

    @property
    def memory_bytes(self) -> int:
        """Memory to run both here, head-room included; 0 = unknown."""
        if not self.weight_bytes:
            return 0
        # In half precision is all of a plain model, and of a quantised one half a bit a weight: scales and offsets.
        halves = 1.0 if self.bits == 16 else 0.5 / (self.bits + 0.5)
        more = halves * (memory.CPU_HALF_FACTOR - 1) if memory.on_cpu() else 0.0
        return memory.needed_bytes(int(self.weight_bytes * (1.0 + more)))


def known_pairs() -> list[KnownPair]:
    """Every pair with a name of its own, in order of preference; OptionError for a user's table that is unusable."""
    found: dict[str, KnownPair] = {}
    for pair in _table():
        if not pair.pattern:
            found.setdefault(pair.target.casefold(), pair)
    return list(found.values())


def best_pair(memory_bytes: int) -> KnownPair | None:
    """The first pair of the table that runs in so much memory, None where none does."""
    return next((pair for pair in known_pairs() if pair.assistant and 0 < pair.memory_bytes <= memory_bytes), None)


def assistant_of(target: str) -> str | None:
    """The drafter made for a target's name (case does not matter), None where none is known."""
    if "assistant" in target.rpartition("/")[2].casefold():
        return None
    for pair in _table():
        wanted = os.path.expanduser(pair.target).casefold()
        if target.casefold() == wanted or fnmatchcase(target.casefold(), wanted):
            return pair.assistant and pair.assistant.replace("{target}", target)
    return None


def beside(folder: Path) -> Path | None:
    """The drafter next to a local target, in TARGET/assistant, TARGET-assistant or a sibling `assistant`; else None."""
    places = (folder / "assistant", Path(f"{folder}-assistant"), folder.parent / "assistant")
    return next((place for place in places if os.path.isfile(place / "config.json")), None)


def hub_name_of(folder: Path) -> str | None:
    """The name of a folder in the hub's cache (.../models--google--gemma-4-E2B-it/snapshots/...), else None."""
    found = filter(None, map(SNAPSHOT.fullmatch, reversed(folder.absolute().parts)))
    return next((f"{place[1]}/{place[2]}" for place in found), None)


def instead(weights: int) -> str:
    """What fits here in place of a model with weights of so many bytes, as a part of a sentence."""
    smaller, available = (pair for pair in known_pairs() if 0 < pair.weight_bytes < weights), memory.available_bytes()
    fitting = (f"'{pair.target}' fits" for pair in smaller if pair.memory_bytes <= available)
    return next(fitting, "the embedded model fits (leave out the name)")


def user_table() -> Path:
    return user_folder("XDG_CONFIG_HOME", ".config") / "mlx-mtp" / "pairs.json"


def _table() -> list[KnownPair]:
    """Every entry, the user's first; in a file patterns come after names."""
    found: list[KnownPair] = []
    kinds = (OSError, ValueError, TypeError, AttributeError, RecursionError)
    for file in filter(Path.is_file, (user_table(), OURS)):
        what = f'{file} is no table of pairs like {{"pairs": [{{"target": "NAME", "assistant": "NAME"}}]}}'
        with explaining(what, "correct or remove it", *kinds, raised=OptionError):
            table = json.loads(file.read_text(encoding="utf-8-sig"))
            found += [KnownPair(**entry) for entry in table.get("pairs", [])]
            found += [KnownPair(**entry, pattern=True) for entry in table.get("patterns", [])]
    return found
