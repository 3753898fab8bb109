"""What an HTTP interface consists of: a body that asks for replies, and the form in which they are sent.

A new interface is one file: a Body and a Form.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlx_mtp.generation.types import Event, Result, Sampling
from mlx_mtp.serving.body import as_json
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.options import ServerOptions
from mlx_mtp.serving.schema import ModelBody
from mlx_mtp.serving.store import ResponseStore
from mlx_mtp.text.call_grammar import ToolChoice
from mlx_mtp.text.tokenizer import Tokenizer

Object = dict[str, Any]
Messages = list[dict[str, Any]]
UNTHINKING = ("none", "minimal")


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What one request asks for. Either messages (with tools, thinking) or prompts, strings or token ids.

    choices: replies to each prompt. tools: declarations in OpenAI's form, `choice` what of them may be called.
    thinking: the model shall think first. effort: the level that was named, for templates with levels. logprobs: None =
    none, n = that of every token and of the n likeliest. echo: the prompt is returned too, with its logprobs. suffix:
    what comes after the reply, for models that fill in. json_schema: what the answer is held to. prediction: what much
    of the reply is expected to repeat.
    """

    messages: Messages | None = None
    prompts: Sequence[str | list[int]] = ("",)
    choices: int = 1
    echo: bool = False
    suffix: str | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)
    choice: ToolChoice = ToolChoice()
    thinking: bool = False
    effort: str | None = None
    max_tokens: int
    sampling: Sampling
    stop: list[str] = field(default_factory=list)
    seed: int | None = None
    logprobs: int | None = None
    json_schema: dict[str, Any] | None = None
    prediction: str = ""


@dataclass(frozen=True)
class Context:
    """What bodies and forms are read and written with. tokenizer: spells tokens with logprobs."""

    options: ServerOptions
    tokenizer: Tokenizer | None
    responses: ResponseStore


class Form(ABC):
    """The response objects of one request, whole or streamed as server-sent events.

    A stream is `begin`, `chunks` of every reply, `end`; `done` is its last line.
    """

    done: ClassVar[str] = ""

    def begin(self, prompt_tokens: int) -> Iterable[Object]:
        """Chunks before the first reply."""
        return ()

    @abstractmethod
    def chunks(self, index: int, events: Iterable[Event]) -> Iterator[Object]:
        """One reply, as it comes."""

    def end(self, results: Sequence[Result]) -> Iterable[Object]:
        """Chunks after the last reply."""
        return ()

    @abstractmethod
    def whole(self, replies: Sequence[Sequence[Event]]) -> Object:
        """The response that is not streamed."""

    def failed(self, error: RequestError) -> Object:
        """The chunk of an error in mid-stream."""
        return error.body

    def line(self, chunk: Object) -> str:
        """A chunk as server-sent event."""
        return f"data: {as_json(chunk)}\n\n"


class TypedForm(Form):
    """A stream whose chunks are events with a `type`, which is their name."""

    def line(self, chunk: Object) -> str:
        return f"event: {chunk['type']}\n{super().line(chunk)}"


class GenerationBody(ModelBody):
    """A request for replies."""

    stream: bool = False

    @abstractmethod
    def generation(self, context: Context) -> Generation:
        """What the engine is asked for; RequestError where two fields do not go together."""

    @abstractmethod
    def form(self, context: Context, asked: Generation) -> Form:
        """How it is answered."""


def result_of(events: Sequence[Event]) -> Result:
    """What the last event carries."""
    found = events[-1].result
    assert found is not None
    return found


def identifier(prefix: str) -> str:
    """A name for an object that nobody has used."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())


def thinks(effort: str | None, switch: bool | None = None) -> bool:
    """Whether a level of effort, or a switch beside it, asks for thoughts."""
    return effort not in UNTHINKING if effort is not None else bool(switch)


def limited(asked: int | None, options: ServerOptions, param: str) -> int:
    """Tokens of a reply; RequestError for more than the server allows."""
    most = options.most_tokens
    if asked is None:
        return min(options.tokens, most or options.tokens)
    if most is not None and asked > most:
        raise RequestError(f"A request may ask this server for 1 to {most} tokens, not {asked}.", param=param)
    return asked
