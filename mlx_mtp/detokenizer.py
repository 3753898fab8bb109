"""Tokens to text as they come: the same text as `Tokenizer.decode` of all of them, at a constant cost per token.

A token's text may depend on its neighbours: bytes of one character are spread over tokens, a space may belong to the
next word. So a few tokens are decoded together, behind the last ones whose text is known, and text that the next token
may still change is held back. mlx-lm's streaming detokenisers copy the whole text with every token.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Protocol

# Bytes that follow each other are read together, as one that is wrong may spoil those around it; of a run that is this
# long and right so far no more is awaited.
MOST_BYTES = 16
# Most tokens that are held back at all: so many make no character.
MOST_HELD = 64
# Most tokens without text that are decoded again in front of new ones.
CONTEXT = 8
# What may change once more is known: half a character, and a space in front of punctuation where such spaces go.
HALF_CHARACTER = re.compile("\ufffd$")
HALF_OR_SPACE = re.compile(r"(?:\ufffd| (?:'[vr]?|n'?)?)$")


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    @property
    def cleans_spaces(self) -> bool:
        """Whether decoding may drop a space once the text after it is known."""

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text."""

    def is_byte(self, token: int) -> bool:
        """Whether a token is one byte of a character: such bytes are only read together."""


class Detokenizer:
    """Decodes one reply. `feed` and `flush` give the texts of the tokens that became known, oldest first."""

    def __init__(self, tokenizer: Decodes) -> None:
        self._tokenizer = tokenizer
        self._unsettled = HALF_OR_SPACE if tokenizer.cleans_spaces else HALF_CHARACTER
        self._context: list[int] = []
        self._before = 0  # characters of the context
        self._held: list[int] = []
        self._looks: list[str] = []  # the text of all held tokens, as it looked when each of them came
        self._singles: dict[int, tuple[int, bool]] = {}  # characters of a token alone, and whether it is a byte

    def feed(self, token: int) -> list[str]:
        """One more token; the texts of all held ones, or nothing while the next token may change them."""
        self._held.append(token)
        text = self._tokenizer.decode([*self._context, *self._held])[self._before :]
        self._looks.append(text)
        wait = self._unsettled.search(text) or (self._single(token)[1] and len(self._held) < MOST_BYTES)
        return [] if wait and len(self._held) < MOST_HELD else self._settled()

    def flush(self) -> list[str]:
        """The texts of the tokens that were held back, once nothing can follow."""
        return self._settled() if self._held else []

    def _settled(self) -> list[str]:
        """Every held token's text: what was there when it came and stayed."""
        whole, found, start = self._looks[-1], [], 0
        for look in self._looks[:-1]:
            end = max(start, len(os.path.commonprefix((look, whole))))
            found.append(whole[start:end])
            start = end
        found.append(whole[start:])
        # Decoded again in front of the next ones, as a text's first space may be dropped, and bytes be read together.
        self._context = self._held if whole else [*self._context, *self._held][-CONTEXT:]
        first, *more = self._context
        self._before = len(self._tokenizer.decode(self._context)) if more else self._single(first)[0]
        self._held, self._looks = [], []
        return found

    def _single(self, token: int) -> tuple[int, bool]:
        found = self._singles.get(token)
        if found is None:
            found = self._singles[token] = len(self._tokenizer.decode([token])), self._tokenizer.is_byte(token)
        return found
