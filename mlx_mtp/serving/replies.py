"""One request's reply: prompt to ids in any thread; then the session to go on with, and events to response objects."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import chain
from typing import Any

import mlx.core as mx

from mlx_mtp.engine import Engine
from mlx_mtp.errors import MLXMTPError
from mlx_mtp.generation.request import GenerationRequest
from mlx_mtp.generation.types import Event
from mlx_mtp.serving.conversation import Messages
from mlx_mtp.serving.errors import MOST_MESSAGE, RequestError
from mlx_mtp.serving.interface import Form, Generation, Object
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.queue import Cancelled, Ticket
from mlx_mtp.serving.schema import UNSUPPORTED
from mlx_mtp.serving.sessions import SessionPool
from mlx_mtp.text.call_grammar import ToolChoice
from mlx_mtp.text.template import Dropped
from mlx_mtp.text.tokenizer import Tokenizer


class Replier:
    """Writes replies with one engine, one after the other; sessions go from one to the next through `pool`."""

    def __init__(self, engine: Engine, pool: SessionPool, metrics: Metrics) -> None:
        self.engine, self.pool, self.metrics = engine, pool, metrics

    def prepare(self, asked: Generation) -> list[GenerationRequest]:
        """The engine's requests, one a reply. Whatever can be refused before its turn raises an MLXMTPError here.

        In any thread, also while a reply is written: only the tokenizer and plain values are used.
        """
        found: list[GenerationRequest] = []
        for ids in self.prompts(asked):
            first = self._request(asked, ids, None if asked.seed is None else (asked.seed + len(found)) % 2**64)
            # Checked, and its grammar compiled, once; the others differ by their seeds alone.
            found += [first, *(replace(first, seed=(first.seed + i) % 2**64) for i in range(1, asked.choices))]
        return found

    def _request(self, asked: Generation, ids: list[int], seed: int | None) -> GenerationRequest:
        request = self.engine.request(
            ids, max_tokens=asked.max_tokens, sampling=asked.sampling, stop=asked.stop, seed=seed,
            logprobs=0 if asked.logprobs is None else max(1, asked.logprobs), raw=asked.messages is None,
            tools=asked.tools or True, tool_choice=asked.choice, json_schema=asked.json_schema,
            prediction=asked.prediction if self.engine.tokenizer else (),
        )  # fmt: skip
        return self.engine.after_thought(request, asked.thinking)

    def reply(self, form: Form, requests: Sequence[GenerationRequest], ticket: Ticket) -> Generator[Object, None, None]:
        """The response to prepared requests, its chunks where it is streamed; Cancelled if nobody waits for it."""
        asked, replies = form.asked, list[list[Event]]()
        for i, request in enumerate(requests):
            if not i % asked.choices:
                before = [self._echoed(asked, i // asked.choices, request, ticket)] if asked.echo else []
            with closing(self._events(request, ticket)) as events:
                if form.streamed:
                    yield from form.chunks(i, chain(before, events))
                else:
                    replies.append([*before, *events])
        yield from form.end() if form.streamed else [form.whole(replies)]

    def _echoed(self, asked: Generation, index: int, request: GenerationRequest, ticket: Ticket) -> Event:
        """A prompt as the beginning of what is returned."""
        prompt, tokenizer = asked.prompts[index], self.engine.tokenizer
        text = prompt if isinstance(prompt, str) else tokenizer.decode(prompt) if tokenizer else ""
        if asked.logprobs is None:
            return Event(text, [], content=text)
        found = self.engine.prompt_logprobs(request.ids, max(1, asked.logprobs), ticket.check)
        logprobs, tops = zip((0.0, {}), *found, strict=True)
        return Event(text, request.ids, logprobs=list(logprobs), top_logprobs=list(tops), content=text)

    def _events(self, request: GenerationRequest, ticket: Ticket) -> Generator[Event, None, None]:
        """One reply's events, with the session that knows most of its prompt."""

        def on_prefill(done: int, total: int) -> None:
            ticket.progress = f"prefill {done}/{total} tokens" if done < total else "generating"
            ticket.check()

        session = self.pool.take(request.ids)
        ticket.progress = "prefill"
        try:
            with closing(self.engine.run(replace(request, session=session, on_prefill=on_prefill))) as events:
                self.metrics.add(prompt_tokens_total=len(request.ids))
                for event in events:
                    self.metrics.add(generated_tokens_total=len(event.tokens))
                    if event.result is not None:
                        stats = event.result.stats
                        self.metrics.add(cached_tokens_total=stats.prompt_tokens - stats.prefilled_tokens)
                        self.metrics.add(drafted_tokens_total=stats.drafted, accepted_tokens_total=stats.accepted)
                        self.metrics.add(prefill_seconds_total=stats.prefill_seconds)
                        self.metrics.add(decode_seconds_total=stats.decode_seconds)
                    yield event
                    ticket.check()
        except BaseException as error:
            if not isinstance(error, (Cancelled, MLXMTPError, GeneratorExit)):
                session.clear()  # what is in the buffers is anybody's guess
            raise
        finally:
            if self.pool.keep(session, len(request.ids)):
                mx.clear_cache()  # what was let go of goes back to the system, not into MLX's store of buffers

    def prompts(self, asked: Generation) -> list[list[int]]:
        """The prompts as ids; RequestError for what this checkpoint cannot do."""
        if asked.messages is None:
            param, found = "prompt", [self._ids(prompt, asked.suffix) for prompt in asked.prompts]
        else:
            param, found = "messages", [self._conversation(asked, asked.messages)]
        for ids in found:
            self._check_tokens(len(ids), param)
        return found

    def _ids(self, prompt: str | list[int], suffix: str | None) -> list[int]:
        if isinstance(prompt, list):
            if suffix is not None:
                raise RequestError("suffix needs a prompt that is text.", param="suffix")
            return prompt
        tokenizer = self.tokenizer("prompt")
        self._check_length([prompt, suffix or ""], "prompt")
        if suffix is None:
            return tokenizer.encode(prompt)
        if (ids := tokenizer.fill_in(prompt, suffix)) is None:
            raise RequestError("This checkpoint has no tokens for filling in: leave out suffix.", param="suffix",
                               code=UNSUPPORTED)  # fmt: skip
        return ids

    def _conversation(self, asked: Generation, messages: Messages) -> list[int]:
        tokenizer = self.tokenizer("messages")
        if not tokenizer.has_chat_template:
            raise RequestError("This checkpoint has no chat template: use /v1/completions.", param="messages")
        self._check_length([message["content"] for message in messages], "messages")
        try:
            ToolChoice.of(asked.choice, asked.tools)
        except MLXMTPError as error:
            raise RequestError(str(error), param="tool_choice") from None
        tools = [_without_strict(tool) for tool in asked.tools]
        try:
            ids = tokenizer.chat(messages, thinking=asked.thinking, tools=tools, effort=asked.effort)
        except Dropped as error:
            raise RequestError(str(error), param=error.part, code=UNSUPPORTED) from None
        except MLXMTPError as error:
            raise RequestError(str(error)[:MOST_MESSAGE], param="messages") from None
        if tools and tokenizer.call_format() is None:
            raise RequestError(
                "This checkpoint writes calls of tools in a form that cannot be read here; leave out tools.",
                param="tools", code=UNSUPPORTED,
            )  # fmt: skip
        return ids

    def tokenizer(self, param: str | None = None) -> Tokenizer:
        """The checkpoint's; RequestError where it has none."""
        if self.engine.tokenizer is None:
            message = "This checkpoint has no tokenizer: use /v1/completions, with the prompt as token ids."
            raise RequestError(message, param=param)
        return self.engine.tokenizer

    def _check_length(self, texts: list[str], param: str) -> None:
        """Refuses what no tokenizer could bring into the context before it takes seconds to be tokenised.

        Blanks do not count, as templates and tokenizers may drop them.
        """
        count = sum(len(text) - sum(map(text.count, " \t\r\n")) for text in texts)
        if count > self.engine.max_context:
            self._check_tokens(count // self.tokenizer().longest_token, param, "at least ")

    def _check_tokens(self, count: int, param: str, about: str = "") -> None:
        if count >= self.engine.max_context:
            raise RequestError(
                f"The prompt has {about}{count} tokens and must be shorter than the context of "
                f"{self.engine.max_context}; shorten it.", param=param, code="context_length_exceeded",
            )  # fmt: skip


def _without_strict(tool: dict[str, Any]) -> dict[str, Any]:
    """A declaration as the model sees it: what calls are held to is not its affair."""
    return {**tool, "function": {name: value for name, value in tool["function"].items() if name != "strict"}}
