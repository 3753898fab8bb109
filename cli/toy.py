"""The embedded model is a toy: unless its user names a number, replies are short and end where it repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

TOKENS = 96
WINDOW, TIMES = 6, 3  # tokens in a row, and how often they come before that is a loop
DEFAULT = f"{{usual}}; {TOKENS} of the embedded model"
NOTE = f"The embedded model is a toy: replies end after {TOKENS} tokens or where it repeats itself; -n N changes that."


def is_short(model: str | None, asked: int | None) -> bool:
    """Whether this model's replies are such: the embedded one's (None), where nobody asked for a number of tokens."""
    return model is None and asked is None


def most_tokens(model: str | None, asked: int | None, usual: int) -> int:
    """Of a reply."""
    return TOKENS if is_short(model, asked) else usual if asked is None else asked


@dataclass
class Repetition:
    """Listens to one reply."""

    ids: list[int] = field(default_factory=list)

    def heard(self, tokens: Sequence[int]) -> bool:
        """Whether the reply goes round in circles once these have come."""
        self.ids += tokens
        last = self.ids[-WINDOW:]
        return sum(self.ids[i : i + WINDOW] == last for i in range(len(self.ids) - WINDOW + 1)) >= TIMES
