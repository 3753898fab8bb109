"""Known pairs of target and assistant: which drafter belongs to which name, how large both are, what fits.

What it does: reads the table (pairs.json beside this file, the user's own in front of it) and answers from it. What
it does not do: reach the hub (hub.py), or trust the table's sizes where the hub can be asked.

The user's table is mlx-mtp/pairs.json in $XDG_CONFIG_HOME or ~/.config, in the same form; its entries come first, so
that they override ours and are preferred.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_mtp.checkpoints import memory
from mlx_mtp.errors import OptionError

OURS = Path(__file__).with_name("pairs.json")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A target and its assistant (None: the user wants none), by hub name or folder.

    bits: of the target's weights, 16 = not quantised. download_bytes: both folders. weight_bytes: what both hold in
    memory on Metal. Both approximate, 0 = unknown. source: where name and sizes were seen.
    """

    target: str
    assistant: str | None
    bits: int = 16
    download_bytes: int = 0
    weight_bytes: int = 0
    source: str = ""

    @property
    def memory_bytes(self) -> int:
        """Memory to run both here, head-room included; 0 = unknown.

        On a CPU half precision takes more than on Metal: all of an unquantised model, of a quantised one the scale
        and the offset of each 64 weights (half a bit a weight).
        """
        if not self.weight_bytes:
            return 0
        factor = 1.0
        if memory.on_cpu():
            halves = 1.0 if self.bits == 16 else 0.5 / (self.bits + 0.5)
            factor += halves * (memory.CPU_HALF_FACTOR - 1)
        return memory.needed_bytes(int(self.weight_bytes * factor))


def known_pairs() -> list[Pair]:
    """Every pair with a name of its own, in order of preference; OptionError for a user's table that is unusable."""
    found: dict[str, Pair] = {}
    for table, file in _tables():
        for entry in table["pairs"]:
            found.setdefault(entry["target"].casefold(), _pair(entry, file))
    return list(found.values())


def best_pair(memory_bytes: int) -> Pair | None:
    """The first pair of the table that runs in so much memory (`memory.available_bytes()`), None where none does.

    What `chat` offers when no model is named. Nothing is downloaded and nobody is asked.
    """
    sized = (pair for pair in known_pairs() if pair.assistant and pair.memory_bytes)
    return next((pair for pair in sized if pair.memory_bytes <= memory_bytes), None)


def assistant_of(target: str) -> str | None:
    """The drafter made for a target's name (case does not matter), None where none is known."""
    if "assistant" in target.rpartition("/")[2].casefold():
        return None
    for table, _ in _tables():
        for entry in (*table["pairs"], *table["patterns"]):
            wanted = os.path.expanduser(entry["target"]).casefold()
            if target.casefold() == wanted or fnmatchcase(target.casefold(), wanted):
                assistant = entry["assistant"]
                return assistant.replace("{target}", target) if assistant else None
    return None


def beside(folder: Path) -> Path | None:
    """The drafter next to a local target, in TARGET/assistant, TARGET-assistant or a sibling `assistant`; else None."""
    places = (folder / "assistant", Path(f"{folder}-assistant"), folder.parent / "assistant")
    return next((place for place in places if os.path.isfile(place / "config.json")), None)


def hub_name_of(folder: Path) -> str | None:
    """The name of a folder in the hub's cache (.../models--google--gemma-4-E2B-it/snapshots/...), else None."""
    for part in reversed(folder.absolute().parts):
        if found := SNAPSHOT.fullmatch(part):
            return f"{found[1]}/{found[2]}"
    return None


def instead(available: int, weights: int) -> str:
    """What fits in so much memory in place of a model with weights of so many bytes, as a part of a sentence."""
    sized = (pair for pair in known_pairs() if 0 < pair.weight_bytes < weights)
    pair = next((pair for pair in sized if pair.memory_bytes <= available), None)
    return f"'{pair.target}' fits" if pair else "the embedded model fits (leave out the name)"


def user_table() -> Path:
    """Where the user's own table is looked for."""
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(config) / "mlx-mtp" / "pairs.json"


def _tables() -> list[tuple[dict[str, list[dict[str, Any]]], Path]]:
    files = [user_table(), OURS] if user_table().is_file() else [OURS]
    return [(_read(file), file) for file in files]


def _read(file: Path) -> dict[str, list[dict[str, Any]]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(file, f"something else ({error})") from error
    if not isinstance(found, dict):
        raise _unusable(file, f"a {type(found).__name__}")
    table = {key: found.get(key, []) for key in ("pairs", "patterns")}
    for key, entries in table.items():
        if not isinstance(entries, list):
            raise _unusable(file, f"{reprlib.repr(entries)} as '{key}'")
        for entry in entries:
            names = isinstance(entry, dict) and isinstance(entry.get("target"), str) and "assistant" in entry
            if not names or not isinstance(entry["assistant"], str | None) or not entry["target"]:
                raise _unusable(file, f"{reprlib.repr(entry)} in '{key}'")
            _pair(entry, file)
    return table


def _pair(entry: dict[str, Any], file: Path) -> Pair:
    numbers = {"bits": 16, "download_bytes": 0, "weight_bytes": 0}
    numbers = {key: entry.get(key, default) for key, default in numbers.items()}
    for key, value in numbers.items():
        if type(value) is not int or not 0 <= value < 2**60 or (key == "bits" and not 1 <= value <= 32):
            raise _unusable(file, f"{reprlib.repr(value)} as '{key}' of '{entry['target']}'")
    return Pair(target=entry["target"], assistant=entry["assistant"], source=str(entry.get("source", "")), **numbers)


def _unusable(file: Path, found: str) -> OptionError:
    form = '{"pairs": [{"target": "NAME", "assistant": "NAME"}]}'
    return OptionError(f"{file}: expected a table of pairs like {form}, found {found}; correct the file or remove it.")
