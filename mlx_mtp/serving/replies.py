"""One request's reply, in the engine's thread: prompt to ids, the session to go on with, events to pieces.

What it does: everything about a reply that needs the model or its tokenizer. What it does not do: JSON
(responses.py), HTTP (server.py), or deciding (engine.py).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import partial

import mlx.core as mx

from mlx_mtp.channels import ToolCall
from mlx_mtp.engine import Engine
from mlx_mtp.errors import MLXMTPError
from mlx_mtp.results import Event, Result
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.requests import Generation
from mlx_mtp.serving.sessions import SessionPool
from mlx_mtp.serving.worker import Cancelled, Ticket
from mlx_mtp.template import Dropped
from mlx_mtp.tokens import Tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Spelled:
    """A token as text and, where it is whole characters or a known byte, as bytes; and its logprob."""

    text: str
    data: bytes | None
    logprob: float


@dataclass(frozen=True)
class Scored:
    """A generated token and the likeliest of its place."""

    token: Spelled
    top: list[Spelled]


@dataclass(frozen=True)
class Started:
    """The request was found good; the prompt is about to be run."""

    prompt_tokens: int


@dataclass(frozen=True)
class Piece:
    """What came out of a round."""

    text: str = ""
    thinking: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)


@dataclass(frozen=True)
class Finished:
    """The end. result: the engine's, text and tokens before channels were told apart."""

    result: Result
    finish_reason: str


class Replier:
    """Writes replies with one engine, one after the other; sessions go from one to the next through `pool`."""

    def __init__(self, pool: SessionPool, metrics: Metrics) -> None:
        self.pool, self.metrics = pool, metrics

    def reply(self, asked: Generation, engine: Engine, ticket: Ticket) -> Generator[object, None, None]:
        """Started, then pieces, then Finished. Raises MLXMTPError before anything runs; Cancelled if nobody waits."""
        ids = self._ids(asked, engine)
        session = self.pool.take(ids)
        whole = False
        try:
            events = engine.stream(
                ids, max_tokens=asked.max_tokens, sampling=asked.sampling, stop=asked.stop, seed=asked.seed,
                logprobs=0 if asked.logprobs is None else max(1, asked.logprobs), session=session,
                raw=asked.messages is None,
                on_prefill=lambda done, total: ticket.check(),
            )  # fmt: skip
            self.metrics.add("prompt_tokens_total", len(ids))
            yield Started(len(ids))
            yield from self._pieces(asked, events, engine.tokenizer)
            whole = True
        except (GeneratorExit, Cancelled, MLXMTPError):
            whole = True  # the session knows what it holds
            raise
        finally:
            if whole and self.pool.keep(session):
                mx.clear_cache()  # what was let go of goes back to the system, not into MLX's store of buffers

    def _pieces(
        self, asked: Generation, events: Generator[Event, None, None], tokenizer: Tokenizer | None
    ) -> Generator[object, None, None]:
        """Events to pieces; calls after the first are left out where only one is wanted."""
        called = False
        spell = partial(_scored, tokenizer, asked.logprobs)
        try:
            for event in events:
                calls = event.calls if asked.parallel else event.calls[: 0 if called else 1]
                called = called or bool(calls)
                self.metrics.add("generated_tokens_total", len(event.tokens))
                scored = spell(event) if asked.logprobs is not None else []
                if event.content or event.thinking or calls or scored:
                    yield Piece(event.content, event.thinking, calls, scored)
                if event.result is not None:
                    self._book(event.result)
                    yield Finished(event.result, "tool_calls" if called else event.result.finish_reason)
        finally:
            events.close()

    def _book(self, result: Result) -> None:
        stats, add = result.stats, self.metrics.add
        add("cached_tokens_total", stats.prompt_tokens - stats.prefilled_tokens)
        add("drafted_tokens_total", stats.drafted)
        add("accepted_tokens_total", stats.accepted)
        add("prefill_seconds_total", stats.prefill_seconds)
        add("decode_seconds_total", stats.decode_seconds)

    def _ids(self, asked: Generation, engine: Engine) -> list[int]:
        """The prompt as ids; RequestError for what this checkpoint cannot do."""
        tokenizer, field_name = engine.tokenizer, "prompt" if asked.messages is None else "messages"
        if isinstance(asked.prompt, list):
            ids = asked.prompt
        elif tokenizer is None:
            raise RequestError("Expected token ids as prompt: this checkpoint has no tokenizer.", param=field_name)
        elif asked.messages is None:
            ids = tokenizer.encode(asked.prompt or "")
        else:
            if not tokenizer.has_chat_template:
                raise RequestError(
                    "Expected a checkpoint with a chat template, found none here: use /v1/completions.",
                    param="messages",
                )
            try:
                ids = tokenizer.chat(asked.messages, thinking=asked.thinking, tools=asked.tools, effort=asked.effort)
            except Dropped as error:
                raise RequestError(str(error), param=error.part, code="unsupported_value") from None
            except MLXMTPError as error:
                raise RequestError(str(error)[:1000], param="messages") from None
        if len(ids) >= engine.max_context:
            raise RequestError(
                f"Expected a prompt shorter than the context of {engine.max_context} tokens, found {len(ids)}; "
                "shorten it.", param=field_name, code="context_length_exceeded",
            )  # fmt: skip
        return ids


def _scored(tokenizer: Tokenizer | None, most: int | None, event: Event) -> list[Scored]:
    """An event's tokens with their logprobs and the `most` likeliest of their places."""
    rows: Iterable[dict[int, float]] = event.top_logprobs or [{}] * len(event.tokens)
    return [
        Scored(
            _spelled(tokenizer, token, logprob),
            [_spelled(tokenizer, other, value) for other, value in list(row.items())[: most or 0]],
        )
        for token, logprob, row in zip(event.tokens, event.logprobs or [], rows, strict=True)
    ]


def _spelled(tokenizer: Tokenizer | None, token: int, logprob: float) -> Spelled:
    text, data = (f"token_id:{token}", None) if tokenizer is None else tokenizer.spell(token)
    return Spelled(text, data, logprob)
