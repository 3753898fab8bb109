"""What an HTTP interface consists of: a body that asks for replies, and the form in which they are sent.

A new interface is one file: a body and a form.
"""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from mlx_mtp.errors import OptionError
from mlx_mtp.generation.types import RANGES, Event, Sampling
from mlx_mtp.serving.body import as_json
from mlx_mtp.serving.conversation import Messages
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.options import ServerOptions
from mlx_mtp.serving.schema import ModelBody, Whole
from mlx_mtp.serving.store import ResponseStore
from mlx_mtp.text.call_grammar import ToolChoice
from mlx_mtp.text.tokenizer import Tokenizer

Object = dict[str, Any]


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


class GenerationBody(ModelBody):
    """A request for replies; how tokens are chosen has the same names in every interface."""

    stream: bool = False
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None

    @abstractmethod
    def generation(self, context: Context) -> Generation:
        """What the engine is asked for; RequestError where two fields do not go together."""

    def resolved(
        self, options: ServerOptions, asked: int | None, param: str, bias: dict[int, float] | None = None
    ) -> dict[str, Any]:
        """Length, sampling and seed of a Generation: what is given, over the server's own.

        asked: tokens of a reply, from the field `param`; RequestError for more than the server allows.
        """
        most = options.most_tokens
        if asked is not None and most is not None and asked > most:
            raise RequestError(f"A request may ask this server for 1 to {most} tokens, not {asked}.", param=param)
        given: dict[str, Any] = self.model_dump(include=set(RANGES), exclude_none=True)
        if given.get("top_p") == 0:
            del given["top_p"]
            given["temperature"] = 0.0  # nothing but the likeliest token
        try:
            sampling = Sampling(**given, logit_bias=bias or None).over(options.sampling)
        except OptionError as error:  # its first word is the field
            raise RequestError(str(error), param=str(error).partition(" ")[0]) from None
        length = asked or min(options.tokens, most or options.tokens)
        return {"max_tokens": length, "sampling": sampling, "seed": options.seed}


class Form(ABC):
    """The response objects of one request, whole or streamed as server-sent events.

    A stream is `begin`, `chunks` of every reply, `end`; `done` is its last line.
    """

    done: ClassVar[str] = ""

    def __init__(self, body: Any, context: Context, asked: Generation) -> None:
        self._body, self._context, self.asked = body, context, asked
        self.streamed: bool = body.stream

    def begin(self, prompt_tokens: int) -> list[Object]:
        """Chunks before the first reply."""
        return []

    @abstractmethod
    def chunks(self, index: int, events: Iterable[Event]) -> Iterator[Object]:
        """One reply, as it comes."""

    def end(self) -> Iterable[Object]:
        """Chunks after the last reply."""
        return ()

    @abstractmethod
    def whole(self, replies: Sequence[Sequence[Event]]) -> Object:
        """The response that is not streamed."""

    def failed(self, error: RequestError) -> Object:
        """The chunk of an error in mid-stream."""
        return error.body

    def line(self, chunk: Object) -> str:
        return f"data: {as_json(chunk)}\n\n"


class TypedForm(Form):
    """One reply as a response that grows; the chunks of its stream are events with a `type`, which is their name."""

    response: Object

    def whole(self, replies: Sequence[Sequence[Event]]) -> Object:
        for _ in self.chunks(0, replies[0]):
            pass
        return self.response

    def line(self, chunk: Object) -> str:
        return f"event: {chunk['type']}\n{super().line(chunk)}"


def identifier(prefix: str) -> str:
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    return int(time.time())


def thinks(effort: str | None, switch: bool | None = None) -> bool:
    """Whether a level of effort, or a switch beside it, asks for thoughts."""
    return effort not in ("none", "minimal") if effort is not None else bool(switch)
