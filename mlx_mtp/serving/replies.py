"""One request's reply: prompt to ids in any thread; then the session to go on with, and events to response objects."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from dataclasses import replace

import mlx.core as mx

from mlx_mtp.engine import Engine
from mlx_mtp.errors import MLXMTPError
from mlx_mtp.generation.request import GenerationRequest
from mlx_mtp.generation.types import Event
from mlx_mtp.serving.errors import MOST_MESSAGE, RequestError, told
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.queue import Cancelled, Ticket
from mlx_mtp.serving.responses import Form, Object
from mlx_mtp.serving.schemas import UNSUPPORTED, Generation
from mlx_mtp.serving.sessions import SessionPool
from mlx_mtp.text.template import Dropped
from mlx_mtp.text.tokenizer import Tokenizer


class Replier:
    """Writes replies with one engine, one after the other; sessions go from one to the next through `pool`."""

    def __init__(self, engine: Engine, pool: SessionPool, metrics: Metrics) -> None:
        self.engine, self.pool, self.metrics = engine, pool, metrics

    def prepare(self, asked: Generation) -> GenerationRequest:
        """The engine's request. Whatever can be refused before its turn raises a RequestError here.

        In any thread, also while a reply is written: only the tokenizer and plain values are used.
        """
        try:
            request = self.engine.request(
                self._ids(asked), max_tokens=asked.max_tokens, sampling=asked.sampling, stop=asked.stop,
                seed=asked.seed, logprobs=0 if asked.logprobs is None else max(1, asked.logprobs),
                raw=asked.messages is None, tools=asked.tools or True, json_schema=asked.json_schema,
            )  # fmt: skip
            return self.engine.after_thought(request, asked.thinking)
        except BaseException as error:  # a tokenizer's panic is no Exception
            raise told(error) from None

    def reply(
        self, request: GenerationRequest, streamed: bool, form: Form, ticket: Ticket
    ) -> Generator[Object, None, None]:
        """The response to a prepared request, its chunks where it is streamed; Cancelled if nobody waits for it."""

        def on_prefill(done: int, total: int) -> None:
            ticket.progress = f"prefill {done}/{total} tokens" if done < total else "generating"
            ticket.check()

        def counted(events: Iterable[Event]) -> Generator[Event, None, None]:
            for event in events:
                self.metrics.add("generated_tokens_total", len(event.tokens))
                if event.result is not None:
                    self.metrics.finished(event.result.stats)
                yield event
                ticket.check()

        session, known = self.pool.take(request.ids), False
        ticket.progress = "prefill"
        try:
            with closing(self.engine.run(replace(request, session=session, on_prefill=on_prefill))) as events:
                self.metrics.add("prompt_tokens_total", len(request.ids))
                if streamed:
                    yield from form.chunks(counted(events))
                else:
                    yield form.whole(counted(events))
            known = True
        except (Cancelled, MLXMTPError):
            known = True  # after any other error, what is in the buffers is anybody's guess
            raise
        finally:
            if known and self.pool.keep(session):
                mx.clear_cache()  # what was let go of goes back to the system, not into MLX's store of buffers

    def _ids(self, asked: Generation) -> list[int]:
        """The prompt as ids; RequestError for what this checkpoint cannot do."""
        tokenizer, context = self.engine.tokenizer, self.engine.max_context
        param = "prompt" if asked.messages is None else "messages"
        if isinstance(asked.prompt, list):
            ids = asked.prompt
        elif tokenizer is None:
            raise RequestError("This checkpoint has no tokenizer: give the prompt as token ids.", param=param)
        elif asked.messages is None:
            _check_length([asked.prompt], tokenizer, context, param)
            ids = tokenizer.encode(asked.prompt)
        elif not tokenizer.has_chat_template:
            raise RequestError("This checkpoint has no chat template: use /v1/completions.", param=param)
        else:
            _check_length([message["content"] for message in asked.messages], tokenizer, context, param)
            try:
                ids = tokenizer.chat(asked.messages, thinking=asked.thinking, tools=asked.tools, effort=asked.effort)
            except Dropped as error:
                raise RequestError(str(error), param=error.part, code=UNSUPPORTED) from None
            except MLXMTPError as error:
                raise RequestError(str(error)[:MOST_MESSAGE], param=param) from None
            if asked.tools and tokenizer.call_format() is None:
                raise RequestError(
                    "This checkpoint writes calls of tools in a form that cannot be read here; leave out tools.",
                    param="tools", code=UNSUPPORTED,
                )  # fmt: skip
        if len(ids) >= context:
            raise _too_long(context, str(len(ids)), param)
        return ids


def _check_length(texts: list[str], tokenizer: Tokenizer, context: int, param: str) -> None:
    """Refuses what no tokenizer could bring into the context before it takes seconds to be tokenised.

    Blanks do not count, as templates and tokenizers may drop them.
    """
    count = sum(len(text) - sum(map(text.count, " \t\r\n")) for text in texts)
    if count > context and count >= context * tokenizer.longest_token:
        raise _too_long(context, f"at least {count // tokenizer.longest_token}", param)


def _too_long(context: int, found: str, param: str) -> RequestError:
    return RequestError(
        f"The prompt has {found} tokens and must be shorter than the context of {context}; shorten it.",
        param=param, code="context_length_exceeded",
    )  # fmt: skip
