"""Requests of OpenAI's API as schemas: checked and turned into what the engine is asked for.

A field is honoured, refused with a sentence, or in a schema's `ignored` because no reply could differ by it; null means
"not given". The table in docs/server.md has every field.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mlx_mtp.errors import OptionError
from mlx_mtp.generation.types import Sampling
from mlx_mtp.serving.body import parsed, shown, strict
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.options import ServerOptions

# Marks where Anthropic's API, which clients of many servers write for too, shall cache; no reply could differ by them.
CACHING = frozenset({"cache_control", "prompt_cache_breakpoint"})
UNTHINKING = ("none", "minimal")
MOST_TOKENS = 2**63 - 1
UNKNOWN, UNSUPPORTED = "unknown_field", "unsupported_value"


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One request. Either messages (with tools, thinking) or a prompt, a string or token ids.

    logprobs: None = none, n = that of every token and of the n likeliest. parallel: whether a reply may hold several
    tool calls. thinking: the model shall think first. effort: the level that was named, for templates with levels.
    json_schema: what the answer is held to.
    """

    messages: list[dict[str, Any]] | None = None
    prompt: str | list[int] = ""
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    effort: str | None = None
    parallel: bool = True
    max_tokens: int
    sampling: Sampling
    stop: list[str]
    seed: int | None
    logprobs: int | None
    stream: bool
    include_usage: bool
    json_schema: dict[str, Any] | None = None


def fault(message: str, code: str | None = None) -> PydanticCustomError:
    """What is wrong with a field, in a message of our own."""
    return PydanticCustomError("fault", "{message}", {"message": message, "code": code})


def only(*neutral: object, because: str) -> AfterValidator:
    """A field that may be there as long as it asks for nothing special."""

    def check(value: object) -> object:
        if any(value == one and type(value) is type(one) for one in neutral):
            return value
        raise fault(f"another value than the usual one is not supported, as {because}; leave it out", UNSUPPORTED)

    return AfterValidator(check)


class Schema(BaseModel):
    """A JSON object: its types as they are, and no field that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ignored: ClassVar[frozenset[str]] = CACHING

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        """Without what is null or has no effect."""
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None and name not in cls.ignored}


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # JSON knows one kind of number


def _parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _arguments(value: object) -> object:
    try:
        return strict(value or "{}") if isinstance(value, str) else value
    except ValueError as error:
        raise fault(f"should be a JSON object in a string ({error})") from None


def _prompt(value: object) -> str | list[int]:
    """A string or token ids; a list of one of these is that one."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return value
        if all(isinstance(one, (str, list)) for one in value):
            raise fault("several prompts are not supported, as one reply is written for a request; send one for each",
                        UNSUPPORTED)  # fmt: skip
    raise fault("should be a string or a list of token ids, not empty")


Whole = Annotated[int, BeforeValidator(_whole)]
ToolName = Annotated[str, Field(pattern=r"^[\w.\-/]{1,128}$")]


class Part(Schema):
    """A part of a message; this server reads no images, sounds or files."""

    type: Literal["text"]
    text: str
    refusal: ClassVar[str] = ""


class AssistantPart(Schema):
    """A refusal is what was said in place of text."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class Said(Schema):
    """A message of the system's, the developer's or the user's."""

    role: Literal["system", "developer", "user"]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_parts)]
    name: str | None = None


class CalledFunction(Schema):
    """A tool's name and the arguments it was given."""

    name: ToolName
    arguments: Annotated[dict[str, Any], BeforeValidator(_arguments)]


class Call(Schema):
    """A call of a tool; streamed ones carry an index."""

    ignored = CACHING | {"index"}
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"] = "function"
    function: CalledFunction


Empty = Annotated[Any, only("", [], because="replies of this server hold none")]


class Replied(Schema):
    """A message of the assistant's: OpenAI's clients send back what they were given, with fields that are empty."""

    role: Literal["assistant"]
    content: Annotated[list[AssistantPart], FailFast(), BeforeValidator(_parts)] = []
    name: str | None = None
    refusal: str = ""
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: Annotated[list[Call], FailFast()] = []
    annotations: Empty = None
    audio: Empty = None
    function_call: Empty = None


class Answered(Schema):
    """What a tool answered."""

    role: Literal["tool"]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_parts)]
    name: str | None = None
    tool_call_id: str


ROLES = ("system", "developer", "user", "assistant", "tool")
Message = Annotated[Said | Replied | Answered, Field(discriminator="role")]


class Function(Schema):
    """A tool's declaration."""

    name: ToolName
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: Annotated[Any, only(False, because="arguments cannot be held to a schema yet")] = None


class Tool(Schema):
    """A tool: always a function."""

    type: Literal["function"] = "function"
    function: Function

    def for_template(self) -> dict[str, Any]:
        """With the parameters that templates ask for."""
        parameters = {"type": "object", "properties": {}} | self.function.parameters
        function = {"name": self.function.name, "description": self.function.description, "parameters": parameters}
        return {"type": "function", "function": function}


class JsonSchema(Schema):
    """A schema that an answer keeps to, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]{1,64}$")] = "answer"
    description: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool = True


class ResponseFormat(Schema):
    """What an answer is: free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of(self) -> dict[str, Any] | None:
        """What the answer is held to; RequestError where the schema is missing."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError("response_format needs json_schema with the type 'json_schema', and only there.",
                               param="response_format")  # fmt: skip
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Schema):
    """What a stream tells besides the reply."""

    ignored = frozenset({"include_obfuscation"})
    include_usage: bool = False


class TemplateOptions(Schema):
    """Variables of chat templates."""

    enable_thinking: bool | None = None


SAMPLED = (
    "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


class GenerationBody(Schema):
    """What both endpoints take."""

    ignored = CACHING | {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "prediction",
    }  # fmt: skip
    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Whole, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1, le=MOST_TOKENS)] | None = None
    temperature: float | None = None
    top_k: Whole | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=4096),
    ] = {}
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1)]], FailFast(), Field(max_length=16),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    ] = []  # fmt: skip
    n: Annotated[Any, only(1, because="one reply is written for a request")] = None
    response_format: ResponseFormat | None = None

    @field_validator(*SAMPLED)
    @classmethod
    def _in_range(cls, value: float | None, info: ValidationInfo) -> float | None:
        if info.field_name == "top_p" and value == 0:
            return value  # nothing but the likeliest token
        try:
            Sampling(**{str(info.field_name): value})  # type: ignore[arg-type]
        except OptionError as error:
            raise fault(str(error).removeprefix(f"{info.field_name} ").rstrip(".")) from None
        return value

    def _sampling(self, options: ServerOptions) -> Sampling:
        given: dict[str, Any] = self.model_dump(include=set(SAMPLED), exclude_none=True)
        if given.get("top_p") == 0:
            del given["top_p"]
            given["temperature"] = 0.0
        bias = {int(token): added for token, added in self.logit_bias.items()}
        return Sampling(**given, logit_bias=bias or None).over(options.sampling)

    def _most(self, options: ServerOptions) -> int:
        most, old, new = options.most_tokens or MOST_TOKENS, self.max_tokens, self.max_completion_tokens
        if old and new and old != new:
            raise RequestError(f"max_tokens and max_completion_tokens differ ({old}, {new}); give one of them.",
                               param="max_tokens")  # fmt: skip
        asked = new or old or min(options.tokens, most)
        if asked > most:
            raise RequestError(f"A request may ask this server for 1 to {most} tokens, not {asked}.",
                               param="max_completion_tokens" if new else "max_tokens")  # fmt: skip
        return asked

    def _common(self, options: ServerOptions) -> dict[str, Any]:
        if self.stream_options and not self.stream:
            raise RequestError("stream_options are only for a request with stream true.", param="stream_options")
        return {
            "max_tokens": self._most(options), "sampling": self._sampling(options), "stop": self.stop,
            "seed": options.seed if self.seed is None else self.seed % 2**64, "stream": self.stream,
            "include_usage": bool(self.stream_options and self.stream_options.include_usage),
            "json_schema": self.response_format and self.response_format.schema_of(),
        }  # fmt: skip

    @abstractmethod
    def generation(self, options: ServerOptions) -> Generation:
        """What the engine is asked for; RequestError where two fields do not go together."""


class ChatBody(GenerationBody):
    """/v1/chat/completions."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1)]
    tools: Annotated[list[Tool], FailFast(), Field(max_length=512)] = []
    tool_choice: Annotated[Any, only("auto", "none", because="this server cannot force a call")] = "auto"
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] = 0
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    modalities: Annotated[Any, only(["text"], because="this server only writes text")] = None
    audio: Annotated[Any, only(because="this server only writes text")] = None
    verbosity: Annotated[Any, only("medium", because="this server has no such dial")] = None
    web_search_options: Annotated[Any, only(because="this server searches nothing")] = None
    moderation: Annotated[Any, only(because="this server moderates nothing")] = None
    functions: Annotated[Any, only([], because="it was replaced by tools and tool_choice")] = None
    function_call: Annotated[Any, only("none", "auto", because="it was replaced by tools and tool_choice")] = None

    def generation(self, options: ServerOptions) -> Generation:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs need logprobs true beside them.", param="top_logprobs")
        effort, switch = self.reasoning_effort, self.chat_template_kwargs.enable_thinking
        by_effort = None if effort is None else effort not in UNTHINKING
        if by_effort is not None and switch is not None and by_effort != switch:
            raise RequestError(f"reasoning_effort '{effort}' and enable_thinking {switch} contradict each other.",
                               param="reasoning_effort")  # fmt: skip
        return Generation(
            messages=for_template(self.messages), effort=effort, thinking=by_effort or switch or False,
            tools=[] if self.tool_choice == "none" else [tool.for_template() for tool in self.tools],
            parallel=self.parallel_tool_calls, logprobs=self.top_logprobs if self.logprobs else None,
            **self._common(options),
        )  # fmt: skip


class CompletionBody(GenerationBody):
    """/v1/completions."""

    prompt: Annotated[str | list[int], PlainValidator(_prompt)]
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: Annotated[Any, only(False, because="the prompt is not sent back")] = None
    suffix: Annotated[Any, only("", because="this server cannot fill in")] = None
    best_of: Annotated[Any, only(1, because="one reply is written and returned")] = None

    def generation(self, options: ServerOptions) -> Generation:
        return Generation(prompt=self.prompt, logprobs=self.logprobs, **self._common(options))


def for_template(messages: list[Said | Replied | Answered]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: parts of text as lines of one, a tool's answer with the name of its call.

    Whether a template takes these roles in this order is its own affair.
    """
    found, tools = [], dict[str, str]()
    for i, said in enumerate(messages):
        texts = [text for part in said.content for text in (part.text, part.refusal) if text]
        one: dict[str, Any] = {"role": "system" if said.role == "developer" else said.role}
        one |= {"name": said.name} if said.name else {}
        if isinstance(said, Replied):
            texts += [said.refusal] if said.refusal else []
            if thought := said.reasoning_content or said.reasoning:
                one["reasoning_content"] = thought
            if said.tool_calls:
                one["tool_calls"] = [call.model_dump() for call in said.tool_calls]
            tools |= {call.id: call.function.name for call in said.tool_calls}
        if isinstance(said, Answered):
            if not (name := said.name or tools.get(said.tool_call_id)):
                raise RequestError("tool_call_id names no call of a tool in an earlier message.",
                                   param=f"messages[{i}].tool_call_id")  # fmt: skip
            one |= {"name": name, "tool_call_id": said.tool_call_id}
        found.append(one | {"content": "\n".join(texts)})
    return found


Body = TypeVar("Body", bound=GenerationBody)


def read(body: bytes, schema: type[Body]) -> Body:
    """A request's body; RequestError that names the first field with a fault."""
    try:
        return schema.model_validate(parsed(body))
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    """The first fault; of all, one in a known field comes before an unknown one, which may be the consequence."""
    first = min(error.errors(include_url=False), key=lambda one: one["type"] == "extra_forbidden")
    place, context = list(first["loc"]), first.get("ctx", {})
    if first["type"].startswith("union_tag"):
        place.append(context["discriminator"].strip("'"))
    # pydantic names the branch of a union, here a message's role, after the message's number.
    after = [None, *place]
    steps = [step for before, step in zip(after, place, strict=False)
             if step != "[key]" and not (isinstance(before, int) and step in ROLES)]  # fmt: skip
    path = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
    code: str | None = context.get("code")
    if first["type"] == "extra_forbidden":
        code, message = UNKNOWN, "this server does not know the field and would have to drop it; leave it out"
    elif first["type"] == "missing":
        message = "the field is required"
    else:
        message = re.sub(r" dictionary.*", " object", first["msg"])
        message = f"{message[0].lower()}{message[1:]}, found {shown(first['input'])}"
    path = path[:100]
    return RequestError(f"{path or 'body'}: {message[:800]}.", param=path or None, code=code)
