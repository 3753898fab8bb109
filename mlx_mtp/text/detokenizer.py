"""Token ids to text, token by token and all at once by the same rule, for every kind of tokenizer.

A token adds bytes to the text before it; the text is these bytes read as UTF-8, a broken character as U+FFFD. So a
text that is streamed and one that is decoded whole cannot differ, and a token costs the same wherever it comes.

    the first token       is read as one that continues a text: the space that it begins with stays
    ids without a token   (padded vocabularies) add nothing
    spaces                stay as the model wrote them: no clean-up in front of punctuation
"""

from __future__ import annotations

import codecs
import os.path
import re
from functools import lru_cache
from typing import Any

BROKEN = "\ufffd"
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # SentencePiece's name of a token that is one byte
CACHED = 1 << 16
ORDINARY = ("a", "the", "I", "1", ".", "it")


def _byte_characters() -> dict[str, int]:
    """Byte-level BPE's names of the bytes: printable ones of Latin-1 are themselves, the rest follow from U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTES_BY_CHARACTER = _byte_characters()


class TokenBytes:
    """The bytes that each token of a tokenizer of transformers' (or mlx-lm's wrapper of one) adds to a text."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self._added = {int(token) for token in getattr(wrapped, "added_tokens_decoder", None) or {}}
        # Many tokenizers drop the space in front of a text's first token, so there is always one before: an ordinary
        # one, as after a special or unknown token some write no space.
        ends = [tuple(wrapped.encode(word, add_special_tokens=False)[-1:]) for word in ORDINARY]
        self._front: tuple[int, ...] = next((end for end in ends if not self._added.issuperset(end)), ends[0])
        self._part = lru_cache(CACHED)(self._find_part)
        self._after = lru_cache(CACHED)(self._find_after)

    def of(self, token: int, before: int | None = None) -> bytes | None:
        """What a token adds after the token `before`, or after any text; None for an id that no token has."""
        if self._name(token) is None:
            return None
        if (part := self._part(token)) is not None:
            return part
        # Half a character tells nothing of the spacing after it.
        return self._after(token, None if before is None or self._part(before) is not None else before)

    def _name(self, token: int) -> str | bytes | None:
        try:
            found: str | bytes | None = self._wrapped.convert_ids_to_tokens(int(token))
        except (IndexError, KeyError, ValueError, OverflowError, TypeError):
            return None
        return found

    def _find_after(self, token: int, before: int | None) -> bytes:
        context = self._front if before is None else (before,)
        alone, both = (
            self._wrapped.decode([*context, *more], clean_up_tokenization_spaces=False) for more in ((), (token,))
        )
        added: str = both[len(os.path.commonprefix([alone, both])) :]
        return added.encode("utf-8", "replace")

    def _find_part(self, token: int) -> bytes | None:
        """The bytes of a token that is no whole characters, from its name; None for every other token."""
        if BROKEN not in self._find_after(token, None).decode():
            return None
        name = self._name(token)
        if name is None or isinstance(name, bytes):
            return name
        if token in self._added:
            return name.encode()
        if matched := BYTE.fullmatch(name):
            return bytes.fromhex(matched[1])
        known = BYTES_BY_CHARACTER.keys() >= set(name)
        return bytes(BYTES_BY_CHARACTER[character] for character in name) if known else None


class Detokenizer:
    """One text as it comes: `add_token`, then `last_segment` for what is new and can be shown; `finalize` at the end.

    The beginning of a character is held back until it is whole, three bytes at most.
    """

    def __init__(self, table: TokenBytes) -> None:
        self._table = table
        self._reader = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: int | None = None
        self._fresh: list[str] = []

    def add_token(self, token: int) -> None:
        if (added := self._table.of(token, self._before)) is not None:
            self._before = token
            self._fresh.append(self._reader.decode(added))

    def finalize(self) -> None:
        """Nothing follows: what was held back is a broken character."""
        self._fresh.append(self._reader.decode(b"", final=True))

    @property
    def last_segment(self) -> str:
        """The text since this was last read."""
        text, self._fresh = "".join(self._fresh), []
        return text
