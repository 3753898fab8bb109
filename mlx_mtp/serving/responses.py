"""The engine's events to JSON in OpenAI's form, whole or in chunks.

`usage` counts drafts that are in the reply as accepted_prediction_tokens and tokens a kept session had as
cached_tokens; `stats` is an extension with the figures of `mlx-mtp generate --json`.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mlx_mtp.generation.types import Event, Result, Stats
from mlx_mtp.serving.schemas import Generation
from mlx_mtp.text.channels import ToolCall
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.version import __version__

Object = dict[str, Any]
# For a probability of zero, as JSON has no infinity.
LEAST = -9999.0
FINGERPRINT = f"mlx-mtp-{__version__}"


@dataclass(frozen=True)
class Spelled:
    """A token as text and, where it is whole characters or a known byte, as bytes; and its logprob."""

    text: str
    data: bytes | None
    logprob: float

    def as_dict(self) -> Object:
        """OpenAI's form."""
        return {"token": self.text, "logprob": self.logprob, "bytes": None if self.data is None else list(self.data)}


# A generated token and the likeliest of its place.
Scored = tuple[Spelled, list[Spelled]]


class Form(ABC):
    """The response objects of one request; `tokenizer` spells tokens with logprobs."""

    prefix = whole_kind = chunk_kind = ""

    def __init__(self, asked: Generation, model: str, tokenizer: Tokenizer | None) -> None:
        self._asked, self._tokenizer, self._calls = asked, tokenizer, 0
        self._frame: Object = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
            "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    @abstractmethod
    def begin(self) -> list[Object]:
        """Chunks before the first event."""

    @abstractmethod
    def _whole(self, events: Sequence[Event]) -> Object:
        """The fields of the only choice that hold the whole reply."""

    @abstractmethod
    def _part(self, event: Event) -> Object:
        """The fields of the only choice that hold one event."""

    @abstractmethod
    def _logprobs(self, events: Sequence[Event]) -> Object:
        """Of the tokens of events."""

    def whole(self, events: Iterable[Event]) -> Object:
        """The response that is not streamed."""
        said = list(events)
        result = said[-1].result
        assert result is not None
        choice = {"index": 0, **self._whole(said), "logprobs": self._scores(said)}
        choice["finish_reason"] = self._finish_reason(result)
        return {
            **self._frame, "object": self.whole_kind, "choices": [choice], "usage": usage(result.stats),
            "stats": result.stats.as_dict(),
        }  # fmt: skip

    def chunks(self, events: Iterable[Event]) -> Iterator[Object]:
        """The response that is streamed, after `begin`: what events say, then why the reply ended, with the statistics,
        and, where asked for, the usage in a chunk of its own."""
        for event in events:
            scores = self._scores([event]) if event.tokens else None
            if event.content or event.thinking or event.calls or scores:
                yield self._chunk(self._part(event), scores)
            if event.result is not None:
                stats = event.result.stats
                yield self._chunk(self._part(Event("", [])), None, self._finish_reason(event.result), stats.as_dict())
                if self._asked.include_usage:
                    yield {**self._frame, "object": self.chunk_kind, "choices": [], "usage": usage(stats)}

    def _chunk(self, part: Object, scores: Object | None = None, reason: str | None = None,
               stats: Object | None = None) -> Object:  # fmt: skip
        found = {"index": 0, **part, "logprobs": scores, "finish_reason": reason}
        more = ({"usage": None} if self._asked.include_usage else {}) | ({} if stats is None else {"stats": stats})
        return {**self._frame, "object": self.chunk_kind, "choices": [found], **more}

    def _finish_reason(self, result: Result) -> str:
        return "tool_calls" if self._calls else result.finish_reason

    def _made(self, calls: Sequence[ToolCall]) -> list[Object]:
        """Calls of tools with their numbers; those after the first are left out where only one is wanted."""
        calls = calls if self._asked.parallel else calls[: 1 - self._calls]
        first, self._calls = self._calls, self._calls + len(calls)
        return [{"index": first + i, **_call(call)} for i, call in enumerate(calls)]

    def _scores(self, events: Sequence[Event]) -> Object | None:
        return None if self._asked.logprobs is None else self._logprobs(events)

    def _scored(self, events: Sequence[Event]) -> list[Scored]:
        """The tokens of events with their logprobs and as many of the likeliest of their places as were asked for."""
        return [
            (self._spelled(token, logprob),
             [self._spelled(*other) for other in list(row.items())[: self._asked.logprobs]])
            for event in events
            for token, logprob, row in zip(event.tokens, event.logprobs or [],
                                           event.top_logprobs or [{}] * len(event.tokens), strict=True)
        ]  # fmt: skip

    def _spelled(self, token: int, logprob: float) -> Spelled:
        text, data = (f"token_id:{token}", None) if self._tokenizer is None else self._tokenizer.spell(token)
        return Spelled(text, data, max(LEAST, logprob))


class ChatForm(Form):
    """/v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def begin(self) -> list[Object]:
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})]

    def _whole(self, events: Sequence[Event]) -> Object:
        text, thinking = "".join(e.content for e in events), "".join(e.thinking for e in events)
        calls = [{name: value for name, value in call.items() if name != "index"}
                 for call in self._made([call for event in events for call in event.calls])]  # fmt: skip
        message: Object = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        return {"message": message | _filled(reasoning_content=thinking, tool_calls=calls)}

    def _part(self, event: Event) -> Object:
        calls = self._made(event.calls)
        return {"delta": _filled(reasoning_content=event.thinking, content=event.content, tool_calls=calls)}

    def _logprobs(self, events: Sequence[Event]) -> Object:
        content = [{**token.as_dict(), "top_logprobs": [top.as_dict() for top in tops]}
                   for token, tops in self._scored(events)]  # fmt: skip
        return {"content": content, "refusal": None}


class CompletionForm(Form):
    """/v1/completions."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    _offset = 0

    def begin(self) -> list[Object]:
        return []

    def _whole(self, events: Sequence[Event]) -> Object:
        return {"text": "".join(event.content for event in events)}

    def _part(self, event: Event) -> Object:
        return {"text": event.content}

    def _logprobs(self, events: Sequence[Event]) -> Object:
        """The older form: lists side by side; offsets count characters of the reply."""
        scored, offsets = self._scored(events), []
        for token, _ in scored:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.text for token, _ in scored],
            "token_logprobs": [token.logprob for token, _ in scored],
            "top_logprobs": [{top.text: top.logprob for top in reversed(tops)} for _, tops in scored]
            if self._asked.logprobs else None,
            "text_offset": offsets,
        }  # fmt: skip


def usage(stats: Stats) -> Object:
    """Token counts of a finished reply."""
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.tokens,
        "total_tokens": stats.prompt_tokens + stats.tokens,
        "prompt_tokens_details": {"cached_tokens": stats.prompt_tokens - stats.prefilled_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": stats.accepted,
            "rejected_prediction_tokens": stats.drafted - stats.accepted,
        },
    }


def _filled(**fields: Any) -> Object:
    return {name: value for name, value in fields.items() if value}


def _call(call: ToolCall) -> Object:
    try:
        arguments = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a model may write NaN, which no JSON reader takes: every value as a string then
        arguments = json.dumps({name: str(value) for name, value in call.arguments.items()}, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
