"""OpenAI's Responses: a conversation as a list of items, kept in memory where it is to be gone on from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from mlx_mtp.generation.types import Event, Result
from mlx_mtp.serving.body import strict
from mlx_mtp.serving.chat import Effort, arguments_of
from mlx_mtp.serving.conversation import Conversation, Function, Messages, Named, Word, in_words, offered
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.interface import Context, Generation, GenerationBody, Object, TypedForm, identifier, now, thinks
from mlx_mtp.serving.openai import scored
from mlx_mtp.serving.schema import CACHING, Arguments, JsonSchema, Schema, Several, Tokens, ToolName, Whole, only
from mlx_mtp.serving.store import Items, Stored
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
    ignored = CACHING | {"id", "status", "phase"}
    type: Literal["message"]
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Several[Part], BeforeValidator(_parts)]


class CallItem(Schema):
    ignored = CACHING | {"id", "status"}
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: ToolName
    arguments: Arguments


class OutputItem(Schema):
    ignored = CACHING | {"id", "status"}
    type: Literal["function_call_output"]
    call_id: str
    output: Annotated[Several[Part], BeforeValidator(_parts)]


class ReasoningItem(Schema):
    ignored = CACHING | {"id", "status", "encrypted_content"}
    type: Literal["reasoning"]
    summary: Several[Part] = []
    content: Several[Part] = []


class ReferenceItem(Schema):
    """An item of a response that is kept."""

    type: Literal["item_reference"]
    id: str


Item = Annotated[MessageItem | CallItem | OutputItem | ReasoningItem | ReferenceItem, Field(discriminator="type")]


class FunctionTool(Function):
    type: Literal["function"]


class NamedTool(Named):
    type: Literal["function"]

    @property
    def chosen(self) -> ToolChoice:
        return ToolChoice([self.name], required=True, several=False)


class AllowedTools(Schema):
    """The tools that may, or must, be called, of those that are declared."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[Several[NamedTool], Field(min_length=1)]

    @property
    def chosen(self) -> ToolChoice:
        return ToolChoice([tool.name for tool in self.tools], self.mode == "required")


Choice = Annotated[Word | NamedTool | AllowedTools, Field(discriminator="type")]


class Plain(Schema):
    type: Literal["text", "json_object"]


class BySchema(JsonSchema):
    type: Literal["json_schema"]


class Text(Schema):
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


class ResponsesBody(GenerationBody):
    ignored = CACHING | {
        "user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "stream_options", "max_tool_calls", "client_metadata",
    }  # fmt: skip
    input: Annotated[Several[Item], BeforeValidator(_items)] = []
    instructions: str = ""
    previous_response_id: str | None = None
    store: bool = True
    max_output_tokens: Tokens | None = None
    tools: Annotated[Several[FunctionTool], Field(max_length=512)] = []
    tool_choice: Annotated[Choice, BeforeValidator(in_words)] = Word(type="auto")
    parallel_tool_calls: bool = True
    text: Text = Text()
    reasoning: Reasoning = Reasoning()
    include: Several[Include] = []
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] = 0
    truncation: Annotated[Any, only("disabled", because="nothing is cut out of a conversation")] = None
    background: Annotated[Any, only(False, because="replies are written while their client waits")] = None
    conversation: Annotated[Any, only(because="conversations are gone on from by previous_response_id")] = None
    prompt: Annotated[Any, only(because="this server keeps no prompts")] = None

    def items(self, context: Context) -> Items:
        """All input of the conversation; RequestError for what is not kept."""
        given: Items = []
        if self.previous_response_id is not None:
            given += context.responses.get(self.previous_response_id, "previous_response_id").conversation
        for i, one in enumerate(self.input):
            if isinstance(one, ReferenceItem):
                given.append(context.responses.item(one.id, f"input[{i}].id"))
            else:
                given.append({"id": identifier("item_"), **one.model_dump()})
        if not given:
            raise RequestError("input: the field is required.", param="input")
        return given

    def generation(self, context: Context) -> Generation:
        answer = self.text.format
        return Generation(
            messages=for_template(self.items(context), self.instructions), effort=self.reasoning.effort,
            thinking=thinks(self.reasoning.effort),
            **offered(self.tools, self.tool_choice.chosen, self.parallel_tool_calls),
            **self.resolved(context.options, self.max_output_tokens, "max_output_tokens"),
            logprobs=self.top_logprobs if self.top_logprobs or "message.output_text.logprobs" in self.include else None,
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
        self._given = body.items(context)
        self._numbers, self._thought = count(), 0  # of events; tokens of thoughts
        self._open: Object = {}  # the item that is being written
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
        return [self._event(kind, response=empty) for kind in ("created", "in_progress")]

    def chunks(self, index: int, events: Iterable[Event]) -> Iterator[Object]:
        for event in events:
            if event.thinking:
                yield from self._grow("reasoning", event.thinking)
                self._thought += 0 if event.content else len(event.tokens)
            if event.content:
                most = self.asked.logprobs
                scores = [] if most is None else scored(self._context.tokenizer, most, [event])
                yield from self._grow("message", event.content, logprobs=scores)
            for one in event.calls:
                yield from self._close()
                yield from self._call(one.name, arguments_of(one))
            if event.result is not None:
                if not self.response["output"]:
                    yield from self._grow("message", "", logprobs=[])
                yield from self._close()
                yield self._ended(event.result)

    def failed(self, error: RequestError) -> Object:
        told = error.body["error"]
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": told["message"]}}
        return self._event("failed", response=self.response)

    def _event(self, kind: str, **fields: Any) -> Object:
        return {"type": f"response.{kind}", "sequence_number": next(self._numbers), **fields}

    def _item_event(self, kind: str, item: Object) -> Object:
        return self._event(f"output_item.{kind}", output_index=len(self.response["output"]) - 1, item=item)

    def _inner_event(self, kind: str, **fields: Any) -> Object:
        output = self.response["output"]
        place = {"item_id": output[-1]["id"], "output_index": len(output) - 1}
        return self._event(kind, **place, **({"content_index": 0} if "content" in output[-1] else {}), **fields)

    def _grow(self, kind: str, text: str, **more: list[Object]) -> Iterator[Object]:
        """More text of a thought or a message; more: a message's logprobs."""
        if self._open.get("type") != kind:
            yield from self._close()
            yield from self._begin(kind)
        [part] = self._open["content"]
        part["text"] += text
        for name, added in more.items():
            part[name] += added
        yield self._inner_event(f"{part['type']}.delta", delta=text, **more)

    def _begin(self, kind: str) -> Iterator[Object]:
        if kind == "message":
            item: Object = {"id": identifier("msg_"), "type": kind, "status": "in_progress", "role": "assistant"}
            part: Object = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": identifier("rs_"), "type": kind, "status": "in_progress", "summary": []}
            part = {"type": "reasoning_text", "text": ""}
        self._open = item | {"content": [part]}
        self.response["output"].append(self._open)
        yield self._item_event("added", item | {"content": []})
        yield self._inner_event("content_part.added", part=dict(part))

    def _close(self) -> Iterator[Object]:
        """The item that is being written is whole."""
        if not self._open:
            return
        item, self._open = self._open, {}
        item["status"] = "completed"
        [part] = item["content"]
        said = {name: part[name] for name in ("text", "logprobs") if name in part}
        yield self._inner_event(f"{part['type']}.done", **said)
        yield self._inner_event("content_part.done", part=part)
        yield self._item_event("done", item)

    def _call(self, name: str, arguments: str) -> Iterator[Object]:
        item: Object = {
            "id": identifier("fc_"), "type": "function_call", "status": "completed", "call_id": identifier("call_"),
            "name": name, "arguments": arguments,
        }  # fmt: skip
        self.response["output"].append(item)
        yield self._item_event("added", {**item, "arguments": "", "status": "in_progress"})
        yield self._inner_event("function_call_arguments.delta", delta=arguments)
        yield self._inner_event("function_call_arguments.done", name=name, arguments=arguments)
        yield self._item_event("done", item)

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
            self._context.responses.keep(Stored(self.response, self._given))
        return self._event(self.response["status"], response=self.response)
