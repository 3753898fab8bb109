"""One request's reply: prompt to ids in any thread; then, in the engine's, the session to go on with, events to pieces.

What it does: everything about a reply that needs the model or its tokenizer. What it does not do: JSON
(responses.py), HTTP (server.py), or deciding (engine.py).
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_mtp.engine import Engine
from mlx_mtp.errors import MLXMTPError
from mlx_mtp.generation.types import Event, Result
from mlx_mtp.serving.errors import RequestError, told
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.requests import Generation
from mlx_mtp.serving.sessions import SessionPool
from mlx_mtp.serving.worker import Cancelled, Ticket
from mlx_mtp.text.channels import ToolCall
from mlx_mtp.text.template import Dropped
from mlx_mtp.text.tokenizer import Tokenizer

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

    def prepare(self, asked: Generation, engine: Engine) -> list[int]:
        """The prompt as ids. Whatever can be refused before the request's turn raises a RequestError here.

        In any thread, also while the engine's runs: only the tokenizer and plain values are used.
        """
        try:
            ids = self._ids(asked, engine)
            engine.stream(ids, **_options(asked)).close()  # checks every option; nothing runs before the first event
        except BaseException as error:  # a tokenizer's panic is no Exception
            raise told(error) from None
        return ids

    def reply(self, asked: Generation, ids: list[int], engine: Engine, ticket: Ticket) -> Generator[object, None, None]:
        """Pieces, then Finished, of a prepared request; Cancelled if nobody waits for it any more."""
        session = self.pool.take(ids)
        whole = False

        def on_prefill(done: int, total: int) -> None:
            ticket.progress = f"prefill {done}/{total} tokens" if done < total else "generating"
            ticket.check()

        ticket.progress = "prefill"
        try:
            events = engine.stream(ids, **_options(asked), session=session, on_prefill=on_prefill)
            self.metrics.add("prompt_tokens_total", len(ids))
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
            _check_length([asked.prompt or ""], tokenizer, engine.max_context, field_name)
            ids = tokenizer.encode(asked.prompt or "")
        else:
            if not tokenizer.has_chat_template:
                raise RequestError(
                    "Expected a checkpoint with a chat template, found none here: use /v1/completions.",
                    param="messages",
                )
            texts = [text for message in asked.messages if isinstance(text := message["content"], str)]
            _check_length(texts, tokenizer, engine.max_context, field_name)
            try:
                ids = tokenizer.chat(asked.messages, thinking=asked.thinking, tools=asked.tools, effort=asked.effort)
            except Dropped as error:
                raise RequestError(str(error), param=error.part, code="unsupported_value") from None
            except MLXMTPError as error:
                raise RequestError(str(error)[:1000], param="messages") from None
            if asked.tools and tokenizer.call_format() is None:
                raise RequestError(
                    "This checkpoint writes calls of tools in a form that cannot be read here; leave out tools.",
                    param="tools", code="unsupported_value",
                )  # fmt: skip
        if len(ids) >= engine.max_context:
            raise _too_long(engine.max_context, str(len(ids)), field_name)
        return ids


def _check_length(texts: list[str], tokenizer: Tokenizer, context: int, field_name: str) -> None:
    """Refuses what no tokenizer could bring into the context before it takes seconds to be tokenised.

    Blanks do not count, as templates and tokenizers may drop them.
    """
    count = sum(len(text) - sum(map(text.count, " \t\r\n")) for text in texts)
    if count > context and count >= context * tokenizer.longest_token:
        raise _too_long(context, f"at least {count // tokenizer.longest_token}", field_name)


def _too_long(context: int, found: str, field_name: str) -> RequestError:
    return RequestError(
        f"Expected a prompt shorter than the context of {context} tokens, found {found}; shorten it.",
        param=field_name, code="context_length_exceeded",
    )


def _options(asked: Generation) -> dict[str, Any]:
    """What the engine is asked for."""
    return {
        "max_tokens": asked.max_tokens, "sampling": asked.sampling, "stop": asked.stop, "seed": asked.seed,
        "logprobs": 0 if asked.logprobs is None else max(1, asked.logprobs), "raw": asked.messages is None,
        "tools": asked.tools or True,
    }  # fmt: skip


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
