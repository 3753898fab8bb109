"""One reply as it grows: tokens to text, thoughts and calls of tools told apart once, and the end at a stop string.

Stop strings count in the answer alone, never in thoughts or in the markup of channels and calls, and only where the
model wrote them in one stretch. The reply ends with the token that completes one. Text is read token by token, so it
does not matter in which runs the tokens came. The work for a token does not depend on how long the reply is.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Sequence

from mlx_mtp.generation.loop import Chunk
from mlx_mtp.generation.types import Event, Result
from mlx_mtp.text.channels import Channels, Pieces, joined
from mlx_mtp.text.detokenizer import Detokenizer
from mlx_mtp.text.tokenizer import StopStrings


class Reply:
    """Builds one reply. sure: how many of the tokens belong to it for certain. stop_token: the one that ended it,
    where no stop string did.

    detokenizer: None = there is no text. channels: None = all text is answer. While a stop string is looked for, tokens
    are held back as long as their text is: the reply may turn out to end before them.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: Sequence[str], channels: Channels | None) -> None:
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[dict[int, float]] = []
        self.sure = 0
        self.stop_token: int | None = None
        self._detokenizer, self._channels, self.stops = detokenizer, channels, StopStrings(stop)
        self._ends: list[int] = []  # where in the text each token ends, while stop strings are looked for
        self._written = self._read = 0  # characters of the text, and those that were looked at for a stop
        self._text: list[str] = []
        self._given = 0  # tokens that were in events
        self._fresh: list[Pieces] = []  # what no event had yet

    @property
    def text(self) -> str:
        """All text up to a stop string, as the model wrote it."""
        return "".join(self._text)

    @property
    def over(self) -> bool:
        """Whether an ending token or a stop string ended it."""
        return self.stops.found is not None or self.stop_token is not None

    def extend(self, chunk: Chunk, stop_tokens: Collection[int]) -> None:
        """New tokens, up to a stop token (which belongs to no reply) or to the one that completes a stop string."""
        for i, token in enumerate(chunk.tokens):
            if self.stops.found is None and token in stop_tokens:
                self.stop_token = token
            if self.over:
                return
            self.tokens.append(token)
            self.logprobs += (chunk.logprobs or [])[i : i + 1]
            self.top += (chunk.top or [])[i : i + 1]
            if self._detokenizer:
                self._detokenizer.add_token(token)
                self._take(self._detokenizer.last_segment)
            if not self.stops:
                self.sure = len(self.tokens)

    def finish(self) -> None:
        """Nothing follows: what was held back belongs to the reply, unless a stop string turns up in it."""
        if self.stops.found is not None:
            return
        if self._detokenizer:
            self._detokenizer.finalize()
        self._split(self._detokenizer.last_segment if self._detokenizer else "", final=True)
        if self.stops.found is None:
            self._show(Pieces())  # whatever comes now is not the answer
            self.sure = len(self.tokens)

    @property
    def has_news(self) -> bool:
        """Whether there is anything that was in no event yet."""
        return bool(self._fresh) or self._given < self.sure

    def event(self, result: Result | None = None) -> Event:
        """What is new since the last event."""
        new, self._given = slice(self._given, self.sure), self.sure
        found, self._fresh = joined(self._fresh), []
        return Event(
            found.raw, self.tokens[new], result, self.logprobs[new] or None, self.top[new] or None,
            thinking=found.thinking, content=found.text, calls=found.calls,
        )  # fmt: skip

    def _take(self, text: str) -> None:
        """The text of the newest token."""
        self._written += len(text)
        if self.stops:
            self._ends.append(self._written)
        self._split(text)
        while self.sure < len(self._ends) and self._ends[self.sure] <= self._read:
            self.sure += 1

    def _split(self, text: str, final: bool = False) -> None:
        whole = [Pieces(text, raw=text, answer=True)]
        for piece in whole if self._channels is None else self._channels.split(text, final):
            self._show(piece)
            if self.stops.found is not None:
                return

    def _show(self, piece: Pieces) -> None:
        """A stretch of the text, up to a stop string."""
        if not piece.answer:
            held = self.stops.flush()  # no stop string goes on beyond the answer's own text
            piece = Pieces(held + piece.text, piece.thinking, piece.calls, held + piece.raw)
            self._read += len(piece.raw) - len(held)
        else:
            front = piece.raw[: len(piece.raw) - len(piece.text)]  # empty lines that are not the answer's
            shown = self.stops.feed(piece.text)
            if self.stops.found is not None:
                self._end(self._read + len(front) + self.stops.past)
            self._read += len(piece.raw)
            piece = Pieces(shown, raw=front + shown)
        if piece.raw or piece.text:
            self._fresh.append(piece)
            self._text.append(piece.raw)

    def _end(self, place: int) -> None:
        """The reply ends with the token that wrote the character in front of `place`."""
        self.sure = min(bisect_left(self._ends, place) + 1, len(self.tokens))
        for column in (self.tokens, self.logprobs, self.top, self._ends):
            del column[self.sure :]
