"""What a model writes besides its answer: thoughts and calls of tools, told apart while the text streams.

Streamed text is split at the markers of the formats; an answer is never held back longer than a marker needs.

Thoughts: Gemma 4 `<|channel>thought\\n...<channel|>`; `<think>...</think>` (Qwen 3, DeepSeek R1 and others). Calls:
Gemma 4 `<|tool_call>call:NAME{key:value,...}<tool_call|>` with strings between `<|"|>` (gemma4.md, section 5), read
here; every other format by mlx-lm's parser of it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

QUOTE = '<|"|>'
THOUGHTS = (("<|channel>", "<channel|>"), ("<think>", "</think>"))


@dataclass(frozen=True)
class ThoughtTokens:
    """The tokens around a thought. is_open: whether the prompt has opened one."""

    opening: int
    closing: int
    is_open: bool = False


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: dict[str, Any]

    @classmethod
    def of(cls, call: Mapping[str, Any]) -> ToolCall:
        """From a dict whose arguments may be JSON; ValueError and others where they are none by name."""
        arguments = call["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        if not isinstance(call["name"], str) or not isinstance(arguments, dict):
            raise ValueError("a call needs a name and arguments by name")
        return cls(call["name"], arguments)


@dataclass(frozen=True)
class CallFormat:
    """How a checkpoint writes calls of tools: between two markers, the second "" where a call ends with the reply.

    parse: as mlx-lm's parsers: what stands between them and the declared tools -> one call or several, as dicts; any
    Exception where it is none. tools: in OpenAI's form, for formats whose arguments carry no types.
    """

    opening: str
    closing: str
    parse: Callable[[str, Any], Any]
    tools: Sequence[Mapping[str, Any]] | None = None

    def read(self, body: str) -> list[ToolCall]:
        """The calls of a body; empty where it is none, or not all of it can be read."""
        try:
            found = self.parse(body, self.tools)
            return [ToolCall.of(call) for call in (found if isinstance(found, list) else [found])]
        except Exception:  # parsers of other people's, over whatever a model wrote
            return []


@dataclass(frozen=True)
class Pieces:
    """What a stretch of text was: answer, thought, finished calls.

    raw: the stretch as the model wrote it. answer: whether it is the answer's own text; a call that cannot be read is
    shown as text, too, but stays markup.
    """

    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    raw: str = ""
    answer: bool = False


class Channels:
    """Splits one reply. `thinking`: the marker of a thought that the prompt has opened (templates that end in
    `<think>`). calls: how calls of tools are written; None where what looks like one is text.
    """

    def __init__(self, thinking: str | None = None, calls: CallFormat | None = None) -> None:
        self._calls = calls
        self._closing = dict(THOUGHTS) | ({calls.opening: calls.closing} if calls else {})
        self._open = thinking  # the marker that opened what is being read, None in the answer
        self._held = ""  # never longer than a marker
        self._naming = False  # a channel's name, up to the end of its line, is no thought
        self._answered = False
        self._body: list[str] = []  # of the open call

    def split(self, text: str, final: bool = False) -> Iterator[Pieces]:
        """New text of the reply, stretch by stretch: all `raw` in order is the text but for what is held back, which
        might become a marker. final: nothing can follow; a call without its end is shown as it was written."""
        self._held += text
        while self._held:
            markers = [*self._closing] if self._open is None else [*filter(None, [self._closing[self._open]])]
            places = [(at, marker) for marker in markers if (at := self._held.find(marker)) >= 0]
            at, marker = min(places, default=(0, ""))
            if marker:
                taken, self._held = self._held[:at], self._held[at + len(marker) :]
            else:
                taken, self._held = (self._held, "") if final else without_beginnings(self._held, markers)
            if taken:
                yield self._answer(taken) if self._open is None else self._inside(taken)
            if not marker:
                break
            yield self._marked(marker)
        if final and self._in_call:
            yield self._called(ended=not self._closing[str(self._open)])

    @property
    def _in_call(self) -> bool:
        return self._calls is not None and self._open == self._calls.opening

    def _called(self, ended: bool) -> Pieces:
        """The open call, once it is over; text that is none is shown as it was written."""
        assert self._calls is not None
        self._open, body = None, "".join(self._body)
        if ended and (calls := self._calls.read(body)):
            return Pieces(calls=calls)
        return Pieces(text=self._calls.opening + body + (self._calls.closing if ended else ""))

    def _answer(self, text: str) -> Pieces:
        """Answer text; the empty lines between a thought and the answer belong to neither."""
        shown = text if self._answered else text.lstrip("\n")
        self._answered |= bool(shown)
        return Pieces(text=shown, raw=text, answer=True)

    def _inside(self, text: str) -> Pieces:
        """A part of a thought, without its channel's name, or of a call."""
        if self._in_call:
            self._body.append(text)
            return Pieces(raw=text)
        thought = text
        if self._naming:
            _, end, thought = text.partition("\n")
            self._naming = not end
        return Pieces(thinking=thought, raw=text)

    def _marked(self, marker: str) -> Pieces:
        """A marker, which opens a thought or a call, or closes it."""
        if self._open is None:
            self._open, self._naming, self._body = marker, marker == THOUGHTS[0][0], []
            return Pieces(raw=marker)
        if self._in_call:
            return replace(self._called(ended=True), raw=marker)
        self._open = None
        return Pieces(raw=marker)


def joined(found: Sequence[Pieces]) -> Pieces:
    return Pieces(
        "".join(p.text for p in found), "".join(p.thinking for p in found), [call for p in found for call in p.calls],
        "".join(p.raw for p in found),
    )  # fmt: skip


def without_beginnings(text: str, markers: Iterable[str]) -> tuple[str, str]:
    """The text in front of its longest end that may begin a marker, and that end."""
    begun = (
        next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
        for marker in markers
    )
    at = len(text) - max(begun, default=0)
    return text[:at], text[at:]


def _gemma_call(body: str, tools: Any) -> dict[str, Any]:
    """ValueError where a body is no call in Gemma's notation: JSON with bare names, and strings between QUOTEs."""
    matched = re.fullmatch(r"\s*call:([\w.\-/]+)\s*(\{.*\})\s*", body, re.DOTALL)
    if matched is None:
        raise ValueError("no call")
    parts = matched[2].split(QUOTE)
    parts[::2] = [re.sub(r"[^,{}\[\]]+", _bare, part) for part in parts[::2]]
    parts[1::2] = map(json.dumps, parts[1::2])
    # NaN and its like are words: JSON has no such numbers.
    return {"name": matched[1], "arguments": json.loads("".join(parts), parse_constant=str)}


def _bare(found: re.Match[str]) -> str:
    """What stands between two brackets or commas, as JSON: a name, a colon and a value, or some of these."""
    name, colon, value = found[0].partition(":")
    name, value = (name.strip().strip('"'), value.strip()) if colon else ("", name.strip())
    try:
        json.loads(value)
    except json.JSONDecodeError:
        value = json.dumps(value) if value else ""
    return (json.dumps(name) if name else "") + colon + value


GEMMA = CallFormat("<|tool_call>", "<tool_call|>", _gemma_call)
