"""Anthropic's Messages: blocks of text, thoughts and uses of tools."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from mlx_mtp.generation.types import Event, Result, Stats
from mlx_mtp.serving.body import strict
from mlx_mtp.serving.chat import arguments_of
from mlx_mtp.serving.conversation import Conversation, Function, Messages, offered
from mlx_mtp.serving.errors import RequestError, anthropic
from mlx_mtp.serving.interface import Context, Generation, GenerationBody, Object, TypedForm, identifier
from mlx_mtp.serving.schema import CACHING, Part, Parts, Schema, Several, Stops, Tokens, ToolName, only
from mlx_mtp.text.call_grammar import ToolChoice


class TextBlock(Part):
    ignored = CACHING | {"citations"}


class ThinkingBlock(Schema):
    """Thoughts of the assistant's; a signature proves nothing here."""

    ignored = CACHING | {"signature"}
    type: Literal["thinking"]
    thinking: str


class ToolUseBlock(Schema):
    ignored = CACHING | {"caller"}
    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1)]
    name: ToolName
    input: dict[str, Any]


class ToolResultBlock(Schema):
    type: Literal["tool_result"]
    tool_use_id: str
    content: Parts[TextBlock] = []
    is_error: bool = False


class UserMessage(Schema):
    """A turn of the user's, answers of tools among it."""

    role: Literal["user", "system"]
    content: Parts[Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]]


class AssistantMessage(Schema):
    role: Literal["assistant"]
    content: Parts[Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]]


Message = Annotated[UserMessage | AssistantMessage, Field(discriminator="role")]


class Tool(Function):
    ignored = CACHING | {"eager_input_streaming", "input_examples"}
    type: Literal["custom"] = "custom"
    parameters: Annotated[dict[str, Any], Field(alias="input_schema")]


class Choice(Schema):
    """Whether tools may or must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool = False

    @property
    def chosen(self) -> ToolChoice | None:
        if self.type == "none":
            return None
        names = [self.name] if self.name else None
        return ToolChoice(names, self.type in ("any", "tool"), not self.disable_parallel_tool_use)


class Thinking(Schema):
    """Whether the model thinks first; how much is up to it."""

    ignored = CACHING | {"budget_tokens", "display"}
    type: Literal["enabled", "disabled", "adaptive"]


class OutputFormat(Schema):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Schema):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class MessagesBody(GenerationBody):
    ignored: ClassVar[frozenset[str]] = CACHING | {"metadata", "service_tier", "inference_geo", "speed"}
    messages: Annotated[Several[Message], Field(min_length=1)]
    max_tokens: Tokens
    system: Parts[TextBlock] = []
    tools: Annotated[Several[Tool], Field(max_length=512)] = []
    tool_choice: Choice = Choice(type="auto")
    thinking: Thinking = Thinking(type="disabled")
    output_config: OutputConfig = OutputConfig()
    output_format: OutputFormat | None = None
    stop_sequences: Stops = []
    container: Annotated[Any, only(because="this server runs no code")] = None
    mcp_servers: Annotated[Any, only([], because="this server calls no others")] = None
    context_management: Annotated[Any, only(because="nothing is cut out of a conversation")] = None

    def generation(self, context: Context) -> Generation:
        choice = self.tool_choice
        if (choice.type == "tool") != (choice.name is not None):
            raise RequestError("tool_choice has a name with the type 'tool', and only there.", param="tool_choice")
        if self.messages[-1].role == "assistant":
            raise RequestError("The last message must be the user's: a reply that was begun cannot be gone on with.",
                               param="messages")  # fmt: skip
        answer = self.output_config.format or self.output_format
        return Generation(
            messages=for_template(self.system, self.messages), thinking=self.thinking.type != "disabled",
            effort=self.output_config.effort if self.thinking.type != "disabled" else None,
            **offered(self.tools, choice.chosen),
            **self.resolved(context.options, self.max_tokens, "max_tokens"), stop=self.stop_sequences,
            json_schema=answer.schema_ if answer else None,
        )  # fmt: skip


class PromptBody(MessagesBody):
    """/v1/messages/count_tokens."""

    max_tokens: Tokens = 1


def for_template(system: list[TextBlock], messages: Sequence[UserMessage | AssistantMessage]) -> Messages:
    """Messages as chat templates take them: answers of tools become messages of their own."""
    found = Conversation(_joined(system))
    for i, message in enumerate(messages):
        text = _joined([block for block in message.content if isinstance(block, TextBlock)])
        if isinstance(message, AssistantMessage):
            thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
            found.add("assistant", text, reasoning_content="\n".join(thoughts))
            for block in message.content:
                if isinstance(block, ToolUseBlock):
                    found.call(block.id, block.name, block.input)
            continue
        results = [block for block in message.content if isinstance(block, ToolResultBlock)]
        for result in results:
            said = ("Error: " if result.is_error else "") + _joined(result.content)
            found.answer(result.tool_use_id, said, f"messages[{i}]")
        if text or not results:
            found.add(message.role, text)
    return found.messages


def _joined(blocks: Sequence[TextBlock]) -> str:
    return "\n".join(block.text for block in blocks)


class MessagesForm(TypedForm):
    """A message whose content is a list of blocks."""

    def __init__(self, body: MessagesBody, context: Context, asked: Generation) -> None:
        super().__init__(body, context, asked)
        self.response = {
            "id": identifier("msg_"), "type": "message", "role": "assistant", "model": context.options.model,
            "content": [], "stop_reason": None, "stop_sequence": None,
        }  # fmt: skip

    def begin(self, prompt_tokens: int) -> list[Object]:
        usage = _usage(Stats(prompt_tokens=prompt_tokens, prefilled_tokens=prompt_tokens))
        # A copy: it is sent while the reply is being written.
        return [{"type": "message_start", "message": {**self.response, "content": [], "usage": usage}}]

    def chunks(self, index: int, events: Iterable[Event]) -> Iterator[Object]:
        content = self.response["content"]
        for event in events:
            if event.thinking:
                yield from self._grow("thinking", event.thinking)
            if event.content:
                yield from self._grow("text", event.content)
            for made in event.calls:
                yield from self._close()
                arguments = arguments_of(made)
                use = {"type": "tool_use", "id": identifier("toolu_"), "name": made.name, "input": strict(arguments)}
                content.append(use)
                yield self._event("start", content_block={**use, "input": {}})
                yield self._event("delta", delta={"type": "input_json_delta", "partial_json": arguments})
                yield self._event("stop")
            if event.result is not None:
                yield from self._close()
                reason = self._reason(event.result)
                figures = {"usage": _usage(event.result.stats), "stats": event.result.stats.as_dict()}
                self.response |= reason | figures
                yield {"type": "message_delta", "delta": reason, **figures}
                yield {"type": "message_stop"}

    def failed(self, error: RequestError) -> Object:
        return anthropic(error.body)

    def _event(self, kind: str, **fields: Object) -> Object:
        return {"type": f"content_block_{kind}", "index": len(self.response["content"]) - 1, **fields}

    def _grow(self, kind: str, text: str) -> Iterator[Object]:
        """More text of a thought or of the answer."""
        content = self.response["content"]
        if not content or content[-1]["type"] != kind:
            yield from self._close()
            content.append({"type": kind, kind: ""} | ({"signature": ""} if kind == "thinking" else {}))
            yield self._event("start", content_block=dict(content[-1]))
        content[-1][kind] += text
        yield self._event("delta", delta={"type": f"{kind}_delta", kind: text})

    def _close(self) -> Iterator[Object]:
        """The text or thought that is being written is whole."""
        content = self.response["content"]
        if content and content[-1]["type"] != "tool_use":
            yield self._event("stop")

    def _reason(self, result: Result) -> Object:
        if result.finish_reason != "stop":
            reason = "max_tokens"
        elif any(block["type"] == "tool_use" for block in self.response["content"]):
            reason = "tool_use"
        else:
            reason = "end_turn" if result.stop_string is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": result.stop_string if reason == "stop_sequence" else None}


def _usage(stats: Stats) -> Object:
    return {
        "input_tokens": stats.prefilled_tokens, "output_tokens": stats.tokens, "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": stats.prompt_tokens - stats.prefilled_tokens,
    }  # fmt: skip
