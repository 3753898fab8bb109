"""OpenAI's Responses: a conversation as a list of items, kept in memory where it is to be gone on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, FailFast, Field

from mlx_mtp.generation.types import Event, Result
from mlx_mtp.serving.body import strict
from mlx_mtp.serving.chat import Effort, arguments_of
from mlx_mtp.serving.conversation import Conversation, Messages
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.interface import Context, Generation, GenerationBody, Object, TypedForm, identifier, now, thinks
from mlx_mtp.serving.openai import scored
from mlx_mtp.serving.schema import CACHING, Arguments, JsonSchema, Schema, Tokens, ToolName, Whole, only
from mlx_mtp.serving.store import Items, Stored
from mlx_mtp.serving.tools import Function, Named, OfFunction, Word, in_words, offered
from mlx_mtp.text.call_grammar import ToolChoice


def _parts(value: object) -> object:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _items(value: object) -> object:
    """A text as one message; messages and references may come without their type."""
    if isinstance(value, str):
        return [{"type": "message", "role": "user", "content": value}]
    if not isinstance(value, list):
        return value
    return [
        {"type": "message" if "role" in one else "item_reference", **one}
        if isinstance(one, dict) and one.get("type") is None and ("role" in one or set(one) == {"id"}) else one
        for one in value
    ]  # fmt: skip


class Part(Schema):
    """A part of a message; this server reads no images, sounds or files."""

    ignored = CACHING | {"annotations", "logprobs"}
    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text", "summary_text"]
    text: str = ""
    refusal: str = ""


class MessageItem(Schema):
    """A message of anyone's."""

    ignored = CACHING | {"id", "status", "phase"}
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Part], FailFast(), BeforeValidator(_parts)]


class CallItem(Schema):
    """A call of a tool."""

    ignored = CACHING | {"id", "status"}
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: ToolName
    arguments: Arguments


class OutputItem(Schema):
    """What a tool answered."""

    ignored = CACHING | {"id", "status"}
    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[list[Part], FailFast(), BeforeValidator(_parts)]


class ReasoningItem(Schema):
    """Thoughts of the assistant's."""

    ignored = CACHING | {"id", "status", "encrypted_content"}
    type: Literal["reasoning"]
    summary: Annotated[list[Part], FailFast()] = []
    content: Annotated[list[Part], FailFast()] = []


class ReferenceItem(Schema):
    """An item of a response that is kept."""

    type: Literal["item_reference"]
    id: str


Item = Annotated[MessageItem | CallItem | OutputItem | ReasoningItem | ReferenceItem, Field(discriminator="type")]


class FunctionTool(Function, OfFunction):
    """A tool: always a function."""


class NamedTool(Named, OfFunction):
    """The one tool to call."""

    @property
    def chosen(self) -> ToolChoice:
        """This one."""
        return ToolChoice([self.name], required=True, several=False)


class AllowedTools(Schema):
    """The tools that may, or must, be called, of those that are declared."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], FailFast(), Field(min_length=1)]

    @property
    def chosen(self) -> ToolChoice:
        """These."""
        return ToolChoice([tool.name for tool in self.tools], self.mode == "required")


class Plain(Schema):
    """Free text, or any JSON object."""

    type: Literal["text", "json_object"]


class BySchema(JsonSchema):
    """JSON by a schema."""

    type: Literal["json_schema"]


class Text(Schema):
    """What an answer is."""

    format: Annotated[Plain | BySchema, Field(discriminator="type")] = Plain(type="text")
    verbosity: Annotated[Any, only("medium", because="this server has no such dial")] = None


class Reasoning(Schema):
    """Whether, and at which level, the model thinks first; its thoughts are never summed up."""

    ignored = CACHING | {"summary", "generate_summary"}
    effort: Effort | None = None


Include = Literal[
    "reasoning.encrypted_content", "message.output_text.logprobs", "file_search_call.results",
    "web_search_call.results", "web_search_call.action.sources", "message.input_image.image_url",
    "computer_call_output.output.image_url", "code_interpreter_call.outputs",
]  # fmt: skip
LOGPROBS = "message.output_text.logprobs"


class ResponsesBody(GenerationBody):
    """/v1/responses."""

    ignored = CACHING | {
        "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "stream_options", "max_tool_calls", "client_metadata",
    }  # fmt: skip
    input: Annotated[list[Item], FailFast(), BeforeValidator(_items)] = []
    instructions: str = ""
    previous_response_id: str | None = None
    store: bool = True
    max_output_tokens: Tokens | None = None
    tools: Annotated[list[FunctionTool], FailFast(), Field(max_length=512)] = []
    tool_choice: Annotated[
        Annotated[Word | NamedTool | AllowedTools, Field(discriminator="type")], BeforeValidator(in_words)
    ] = Word(type="auto")
    parallel_tool_calls: bool = True
    text: Text = Text()
    reasoning: Reasoning = Reasoning()
    include: Annotated[list[Include], FailFast()] = []
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] = 0
    truncation: Annotated[Any, only("disabled", because="nothing is cut out of a conversation")] = None
    background: Annotated[Any, only(False, because="replies are written while their client waits")] = None
    conversation: Annotated[Any, only(because="conversations are gone on from by previous_response_id")] = None
    prompt: Annotated[Any, only(because="this server keeps no prompts")] = None

    def items(self, context: Context) -> tuple[Items, Items]:
        """Items of the conversation before, and those of this request; RequestError for one that is not kept."""
        before: Items = []
        if self.previous_response_id is not None:
            before = context.responses.get(self.previous_response_id, "previous_response_id").conversation
        given = [
            context.responses.item(one.id, f"input[{i}].id") if isinstance(one, ReferenceItem)
            else {"id": identifier("item_"), **one.model_dump()}
            for i, one in enumerate(self.input)
        ]  # fmt: skip
        if not before and not given:
            raise RequestError("input: the field is required.", param="input")
        return before, given

    def generation(self, context: Context) -> Generation:
        before, given = self.items(context)
        answer = self.text.format
        return Generation(
            messages=for_template([*before, *given], self.instructions), effort=self.reasoning.effort,
            thinking=thinks(self.reasoning.effort),
            **offered(self.tools, self.tool_choice.chosen, self.parallel_tool_calls),
            **self.resolved(context.options, self.max_output_tokens, "max_output_tokens"),
            logprobs=self.top_logprobs if self.top_logprobs or LOGPROBS in self.include else None,
            json_schema=answer.schema_ if isinstance(answer, BySchema) else
            {"type": "object"} if answer.type == "json_object" else None,
        )  # fmt: skip


def for_template(items: Items, instructions: str) -> Messages:
    """Items as chat templates take them: what the assistant thought, said and called in a row is one message."""
    found = Conversation(instructions)
    for item in items:
        kind, role = item["type"], item.get("role", "")
        parts = item.get("content") or item.get("output") or item.get("summary") or []
        text = "\n".join(part.get("text") or part.get("refusal") or "" for part in parts)
        if kind == "message" and role != "assistant":
            found.add(role, text)
        elif kind == "function_call_output":
            found.answer(item["call_id"], text, "input")
        else:
            if not found.messages or found.messages[-1]["role"] != "assistant":
                found.add("assistant", "")
            if kind == "function_call":
                given: Any = item["arguments"]
                given = strict(given) if isinstance(given, str) else given
                found.call(item["call_id"], item["name"], given)
            else:
                said, field = found.messages[-1], "reasoning_content" if kind == "reasoning" else "content"
                said[field] = "\n".join(filter(None, [said.get(field), text]))
    return found.messages


class ResponsesForm(TypedForm):
    """A response whose output is a list of items: thoughts, messages and calls of tools, in their order."""

    def __init__(self, body: ResponsesBody, context: Context, asked: Generation) -> None:
        super().__init__(body, context, asked)
        self._before, self._given = body.items(context)
        self._number, self._thought = 0, 0  # of the next event; tokens of thoughts
        given = body.model_dump(include={
            "instructions", "max_output_tokens", "temperature", "top_p", "top_logprobs", "parallel_tool_calls", "store",
            "previous_response_id", "reasoning",
        })  # fmt: skip
        choice = body.tool_choice
        self.response = {
            "id": identifier("resp_"), "object": "response", "created_at": now(), "status": "in_progress",
            "model": context.options.model, "output": [], "error": None, "incomplete_details": None, "metadata": {},
            "tools": [tool.model_dump() for tool in body.tools], "truncation": "disabled", "background": False,
            "completed_at": None, "service_tier": "default", "prompt_cache_diagnostics": None,
            "tool_choice": choice.type if isinstance(choice, Word) else choice.model_dump(),
            "text": {"format": body.text.format.model_dump(by_alias=True), "verbosity": "medium"}, "usage": None,
            **given, "instructions": body.instructions or None,
        }  # fmt: skip

    def begin(self, prompt_tokens: int) -> list[Object]:
        empty = {**self.response, "output": []}  # a copy: it is sent while the reply is being written
        return [self._event(f"response.{what}", response=empty) for what in ("created", "in_progress")]

    def chunks(self, index: int, events: Iterable[Event]) -> Iterator[Object]:
        for event in events:
            if event.thinking:
                yield from self._grow("reasoning", event.thinking, None)
                self._thought += 0 if event.content else len(event.tokens)
            if event.content:
                yield from self._grow("message", event.content, self._logprobs(event))
            for one in event.calls:
                yield from self._close()
                yield from self._call(one.name, arguments_of(one))
            if event.result is not None:
                if not self.response["output"]:
                    yield from self._grow("message", "", [])
                yield from self._close()
                yield self._ended(event.result)

    def failed(self, error: RequestError) -> Object:
        told = error.body["error"]
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": told["message"]}}
        return self._event("response.failed", response=self.response)

    def _event(self, kind: str, **fields: Any) -> Object:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _open(self) -> Object | None:
        """The item that is being written."""
        output = self.response["output"]
        return output[-1] if output and output[-1]["status"] == "in_progress" else None

    def _grow(self, kind: str, text: str, logprobs: list[Object] | None) -> Iterator[Object]:
        """More text of a thought or a message."""
        item = self._open()
        if item is None or item["type"] != kind:
            yield from self._close()
            yield from self._begin(kind)
        item = self.response["output"][-1]
        place = self._place(item) | {"content_index": 0}
        item["content"][0]["text"] += text
        if kind == "message":
            item["content"][0]["logprobs"] += logprobs or []
            yield self._event("response.output_text.delta", **place, delta=text, logprobs=logprobs or [])
        else:
            yield self._event("response.reasoning_text.delta", **place, delta=text)

    def _begin(self, kind: str) -> Iterator[Object]:
        output, is_message = self.response["output"], kind == "message"
        item: Object = {"id": identifier("msg_" if is_message else "rs_"), "type": kind, "status": "in_progress"}
        item |= {"role": "assistant", "content": []} if is_message else {"summary": [], "content": []}
        part: Object = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        if not is_message:
            part = {"type": "reasoning_text", "text": ""}
        output.append(item)
        yield self._event("response.output_item.added", output_index=len(output) - 1, item={**item, "content": []})
        item["content"] = [part]
        yield self._event("response.content_part.added", **self._place(item), content_index=0, part=dict(part))

    def _close(self) -> Iterator[Object]:
        """The item that is being written is whole."""
        item = self._open()
        if item is None:
            return
        part, place = item["content"][0], self._place(item) | {"content_index": 0}
        item["status"] = "completed"
        if item["type"] == "message":
            yield self._event("response.output_text.done", **place, text=part["text"], logprobs=part["logprobs"])
        else:
            yield self._event("response.reasoning_text.done", **place, text=part["text"])
        yield self._event("response.content_part.done", **place, part=part)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _call(self, name: str, arguments: str) -> Iterator[Object]:
        item: Object = {
            "id": identifier("fc_"), "type": "function_call", "status": "completed", "call_id": identifier("call_"),
            "name": name, "arguments": arguments,
        }  # fmt: skip
        self.response["output"].append(item)
        place = self._place(item)
        begun = {**item, "arguments": "", "status": "in_progress"}
        yield self._event("response.output_item.added", output_index=place["output_index"], item=begun)
        yield self._event("response.function_call_arguments.delta", **place, delta=arguments)
        yield self._event("response.function_call_arguments.done", **place, name=name, arguments=arguments)
        yield self._event("response.output_item.done", output_index=place["output_index"], item=item)

    def _place(self, item: Object) -> Object:
        return {"item_id": item["id"], "output_index": len(self.response["output"]) - 1}

    def _logprobs(self, event: Event) -> list[Object]:
        if self.asked.logprobs is None:
            return []
        return scored(self._context.tokenizer, self.asked.logprobs, [event])

    def _ended(self, result: Result) -> Object:
        stats, whole = result.stats, result.finish_reason == "stop"
        self.response |= {
            "status": "completed" if whole else "incomplete", "stats": stats.as_dict(), "completed_at": now(),
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "usage": {
                "input_tokens": stats.prompt_tokens, "output_tokens": stats.tokens,
                "total_tokens": stats.prompt_tokens + stats.tokens,
                "input_tokens_details": {"cached_tokens": stats.prompt_tokens - stats.prefilled_tokens},
                "output_tokens_details": {"reasoning_tokens": self._thought},
            },
        }  # fmt: skip
        if self._body.store:
            self._context.responses.keep(Stored(self.response, self._before, self._given))
        return self._event(f"response.{self.response['status']}", response=self.response)
