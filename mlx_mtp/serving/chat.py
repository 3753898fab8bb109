"""OpenAI's Chat Completions: messages, tools, and their replies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from mlx_mtp.generation.types import Event
from mlx_mtp.serving.body import as_json
from mlx_mtp.serving.conversation import Conversation, Function, Messages, Named, Word, filled, in_words, offered
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.interface import Context, Generation, Object, identifier, thinks
from mlx_mtp.serving.openai import ChoicesForm, OpenAIBody, scored
from mlx_mtp.serving.schema import CACHING, Arguments, Part, Parts, Schema, Several, ToolName, Whole, only
from mlx_mtp.text.call_grammar import ToolChoice
from mlx_mtp.text.channels import ToolCall


class AssistantPart(Schema):
    """A refusal is what was said in place of text."""

    type: Literal["text", "refusal"]
    text: str = ""
    refusal: str = ""


class Said(Schema):
    role: Literal["system", "developer", "user"]
    content: Parts[Part]
    name: str | None = None


class CalledFunction(Schema):
    name: ToolName
    arguments: Arguments


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
    content: Parts[AssistantPart] = []
    name: str | None = None
    refusal: str = ""
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: Several[Call] = []
    annotations: Empty = None
    audio: Empty = None
    function_call: Empty = None


class Answered(Schema):
    role: Literal["tool"]
    content: Parts[Part]
    name: str | None = None
    tool_call_id: str


Message = Annotated[Said | Replied | Answered, Field(discriminator="role")]


class Tool(Schema):
    type: Literal["function"] = "function"
    function: Function


class NamedTool(Schema):
    type: Literal["function"]
    function: Named

    @property
    def chosen(self) -> ToolChoice:
        return ToolChoice([self.function.name], required=True, several=False)


class Allowed(Schema):
    """The tools that may, or must, be called, of those that are declared."""

    mode: Literal["auto", "required"]
    tools: Annotated[Several[NamedTool], Field(min_length=1)]


class AllowedTools(Schema):
    type: Literal["allowed_tools"]
    allowed_tools: Allowed

    @property
    def chosen(self) -> ToolChoice:
        allowed = self.allowed_tools
        return ToolChoice([tool.function.name for tool in allowed.tools], allowed.mode == "required")


Choice = Annotated[Word | NamedTool | AllowedTools, Field(discriminator="type")]


class TemplateOptions(Schema):
    enable_thinking: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatBody(OpenAIBody):
    messages: Annotated[Several[Message], Field(min_length=1)]
    tools: Annotated[Several[Tool], Field(max_length=512)] = []
    tool_choice: Annotated[Choice, BeforeValidator(in_words)] = Word(type="auto")
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] = 0
    reasoning_effort: Effort | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    modalities: Annotated[Any, only(["text"], because="this server only writes text")] = None
    audio: Annotated[Any, only(because="this server only writes text")] = None
    verbosity: Annotated[Any, only("medium", because="this server has no such dial")] = None
    web_search_options: Annotated[Any, only(because="this server searches nothing")] = None
    moderation: Annotated[Any, only(because="this server moderates nothing")] = None
    functions: Annotated[Any, only([], because="it was replaced by tools and tool_choice")] = None
    function_call: Annotated[Any, only("none", "auto", because="it was replaced by tools and tool_choice")] = None

    def generation(self, context: Context) -> Generation:
        if self.top_logprobs and not self.logprobs:
            raise RequestError("top_logprobs need logprobs true beside them.", param="top_logprobs")
        effort, switch = self.reasoning_effort, self.chat_template_kwargs.enable_thinking
        if effort is not None and switch is not None and thinks(effort) != switch:
            raise RequestError(f"reasoning_effort '{effort}' and enable_thinking {switch} contradict each other.",
                               param="reasoning_effort")  # fmt: skip
        return Generation(
            messages=for_template(self.messages), effort=effort, thinking=thinks(effort, switch),
            logprobs=self.top_logprobs if self.logprobs else None, **self.common(context),
            **offered([tool.function for tool in self.tools], self.tool_choice.chosen, self.parallel_tool_calls),
        )  # fmt: skip


def for_template(messages: list[Said | Replied | Answered]) -> Messages:
    """Messages as chat templates take them: parts of text as lines of one."""
    found = Conversation()
    for i, said in enumerate(messages):
        text = "\n".join(text for part in said.content for text in (part.text, part.refusal) if text)
        if isinstance(said, Answered):
            found.answer(said.tool_call_id, text, f"messages[{i}].tool_call_id", said.name)
        elif isinstance(said, Replied):
            text = "\n".join(filter(None, [text, said.refusal]))
            found.add("assistant", text, name=said.name, reasoning_content=said.reasoning_content or said.reasoning)
            for made in said.tool_calls:
                found.call(made.id, made.function.name, made.function.arguments)
        else:
            found.add(said.role, text, name=said.name)
    return found.messages


class ChatForm(ChoicesForm):
    """A message a choice; calls of tools are streamed as a head and their arguments."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"
    empty: ClassVar[Object] = {"delta": {}}

    def begin(self, prompt_tokens: int) -> list[Object]:
        return [self.chunk(i, {"delta": {"role": "assistant", "content": ""}}) for i in range(self.asked.choices)]

    def _choice(self, index: int, events: Sequence[Event]) -> Object:
        text, thinking = "".join(e.content for e in events), "".join(e.thinking for e in events)
        calls = [made(one) for event in events for one in event.calls]
        message: Object = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        self._called[index] = len(calls)
        return {"message": message | filled(reasoning_content=thinking, tool_calls=calls)}

    def _parts(self, index: int, event: Event) -> Iterator[Object]:
        if event.thinking or event.content:
            yield {"delta": filled(reasoning_content=event.thinking, content=event.content)}
        for one in event.calls:
            number, whole = {"index": self._called[index]}, made(one)
            self._called[index] += 1
            head = number | whole | {"function": whole["function"] | {"arguments": ""}}
            rest = number | {"function": {"arguments": whole["function"]["arguments"]}}
            yield from ({"delta": {"tool_calls": [delta]}} for delta in (head, rest))

    def _logprobs(self, index: int, events: Sequence[Event]) -> Object:
        return {"content": scored(self._context.tokenizer, self.asked.logprobs or 0, events), "refusal": None}


def arguments_of(call: ToolCall) -> str:
    try:
        return as_json(call.arguments)
    except ValueError:  # a model may write NaN, which no JSON reader takes: every value as a string then
        return as_json({name: str(value) for name, value in call.arguments.items()})


def made(call: ToolCall) -> Object:
    """A call of the reply, with an id of its own."""
    function = {"name": call.name, "arguments": arguments_of(call)}
    return {"id": identifier("call_"), "type": "function", "function": function}
