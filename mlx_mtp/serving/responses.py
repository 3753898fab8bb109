"""What the engine's thread hands over to JSON in OpenAI's form, whole or in chunks.

What it does: response objects of both endpoints. What it does not do: HTTP (server.py).

`usage` counts drafts that are in the reply as accepted_prediction_tokens and tokens a kept session had as
cached_tokens; `stats` is an extension with the figures of `mlx-mtp generate --json`.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from mlx_mtp.generation.types import Stats
from mlx_mtp.serving.replies import Finished, Piece, Scored, Spelled
from mlx_mtp.serving.requests import Generation
from mlx_mtp.text.channels import ToolCall
from mlx_mtp.version import __version__

Object = dict[str, Any]
# What stands for a probability of zero, as JSON has no infinity.
LEAST = -9999.0
FINGERPRINT = f"mlx-mtp-{__version__}"


class Form(ABC):
    """The response objects of one request."""

    prefix = whole_kind = chunk_kind = ""

    def __init__(self, asked: Generation, model: str) -> None:
        self._asked = asked
        self._frame: Object = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
            "system_fingerprint": FINGERPRINT,
        }  # fmt: skip

    def whole(self, pieces: Sequence[Piece], end: Finished) -> Object:
        """The response that is not streamed."""
        choice = {"index": 0, **self._answer(pieces), "finish_reason": end.finish_reason}
        stats = end.result.stats
        frame = {**self._frame, "object": self.whole_kind}
        return {**frame, "choices": [choice], "usage": usage(stats), "stats": stats.as_dict()}

    @abstractmethod
    def begin(self) -> list[Object]:
        """Chunks before the first piece."""

    @abstractmethod
    def chunks(self, piece: Piece) -> list[Object]:
        """Chunks of one piece."""

    @abstractmethod
    def end(self, end: Finished) -> list[Object]:
        """Chunks behind the last piece."""

    @abstractmethod
    def _answer(self, pieces: Sequence[Piece]) -> Object:
        """The fields of the only choice that hold the whole reply."""

    def _chunk(self, choices: list[Object], **more: Any) -> Object:
        usual = {"usage": None} if self._asked.include_usage else {}
        return {**self._frame, "object": self.chunk_kind, "choices": choices, **usual, **more}

    def _last(self, choice: Object, end: Finished) -> list[Object]:
        """The finish reason with the statistics and, where asked for, the usage in a chunk of its own."""
        stats = end.result.stats
        found = [self._chunk([choice | {"finish_reason": end.finish_reason}], stats=stats.as_dict())]
        return [*found, self._chunk([], usage=usage(stats))] if self._asked.include_usage else found


class ChatForm(Form):
    """/v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, asked: Generation, model: str) -> None:
        super().__init__(asked, model)
        self._calls = 0

    def _answer(self, pieces: Sequence[Piece]) -> Object:
        text, thinking = "".join(p.text for p in pieces), "".join(p.thinking for p in pieces)
        calls = [_call(call) for piece in pieces for call in piece.calls]
        message: Object = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if thinking:
            message["reasoning_content"] = thinking
        if calls:
            message["tool_calls"] = calls
        return {"message": message, "logprobs": self._logprobs([one for p in pieces for one in p.scored])}

    def begin(self) -> list[Object]:
        return [self._delta({"role": "assistant", "content": ""})]

    def chunks(self, piece: Piece) -> list[Object]:
        delta: Object = {"reasoning_content": piece.thinking} if piece.thinking else {}
        if piece.text:
            delta["content"] = piece.text
        if piece.calls:
            first, self._calls = self._calls, self._calls + len(piece.calls)
            delta["tool_calls"] = [{"index": first + i, **_call(call)} for i, call in enumerate(piece.calls)]
        return [self._delta(delta, piece.scored)]

    def end(self, end: Finished) -> list[Object]:
        return self._last({"index": 0, "delta": {}, "logprobs": None}, end)

    def _delta(self, delta: Object, scored: Sequence[Scored] = ()) -> Object:
        logprobs = self._logprobs(scored) if scored else None
        return self._chunk([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}])

    def _logprobs(self, scored: Sequence[Scored]) -> Object | None:
        if self._asked.logprobs is None:
            return None
        content = [{**_token(one.token), "top_logprobs": [_token(top) for top in one.top]} for one in scored]
        return {"content": content, "refusal": None}


class CompletionForm(Form):
    """/v1/completions."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, asked: Generation, model: str) -> None:
        super().__init__(asked, model)
        self._offset = 0

    def _answer(self, pieces: Sequence[Piece]) -> Object:
        scored = [one for piece in pieces for one in piece.scored]
        return {"text": "".join(piece.text for piece in pieces), "logprobs": self._logprobs(scored)}

    def begin(self) -> list[Object]:
        return []

    def chunks(self, piece: Piece) -> list[Object]:
        choice = {"index": 0, "text": piece.text, "logprobs": self._logprobs(piece.scored), "finish_reason": None}
        return [self._chunk([choice])]

    def end(self, end: Finished) -> list[Object]:
        return self._last({"index": 0, "text": "", "logprobs": None}, end)

    def _logprobs(self, scored: Sequence[Scored]) -> Object | None:
        """The older form: lists side by side; offsets count characters of the reply."""
        if self._asked.logprobs is None:
            return None
        offsets = []
        for one in scored:
            offsets.append(self._offset)
            self._offset += len(one.token.text)
        tops = [{top.text: max(LEAST, top.logprob) for top in reversed(one.top)} for one in scored]
        return {
            "tokens": [one.token.text for one in scored],
            "token_logprobs": [max(LEAST, one.token.logprob) for one in scored],
            "top_logprobs": tops if self._asked.logprobs else None,
            "text_offset": offsets,
        }


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


def _call(call: ToolCall) -> Object:
    try:
        arguments = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
    except ValueError:  # a model may write NaN, which no JSON reader takes: every value as a string then
        arguments = json.dumps({name: str(value) for name, value in call.arguments.items()}, ensure_ascii=False)
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _token(spelled: Spelled) -> Object:
    data = None if spelled.data is None else list(spelled.data)
    return {"token": spelled.text, "logprob": max(LEAST, spelled.logprob), "bytes": data}
