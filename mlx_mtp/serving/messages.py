"""Messages and tools in OpenAI's form to those that chat templates take.

What it does: checks roles and contents, joins parts of text, gives a tool's arguments as an object and a tool's
answer the name of its call, as Gemma's template and others want them. What it does not do: know a template; whether
it takes these roles in this order is its own affair (Tokenizer.chat).
"""

from __future__ import annotations

import re
from typing import Any

from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.fields import Fields, shown, strict

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
# Marks where Anthropic's API, which clients of many servers write for too, shall cache; no reply could differ by it.
CACHING = "cache_control"
TOOL_NAME = re.compile(r"[\w.\-/]{1,128}")
MOST_TOOLS = 512


def read_messages(body: Fields) -> list[Message]:
    """The field `messages` for a template; RequestError that names the message where something is wrong."""
    given = body.items("messages")
    if not given:
        raise RequestError("Expected messages as a list of at least one message, found none.", param="messages")
    found: list[Message] = []
    calls: dict[str, str] = {}
    for i, value in enumerate(given):
        found.append(_message(Fields(value, f"messages[{i}]"), calls))
    return found


def _message(fields: Fields, calls: dict[str, str]) -> Message:
    """One message; `calls` collects the names of tools by the ids of calls."""
    role = fields.choice("role", ROLES)
    if role is None:
        raise fields.wrong("role", " or ".join(f"'{one}'" for one in ROLES), None)
    message: Message = {"role": "system" if role == "developer" else role}
    content = _content(fields, role)
    fields.take(CACHING)
    if name := fields.text("name"):
        message["name"] = name
    if role == "assistant":
        thought, reasoning = fields.text("reasoning_content"), fields.text("reasoning")
        if thought or reasoning:
            message["reasoning_content"] = thought or reasoning
        if made := fields.items("tool_calls"):
            message["tool_calls"] = [
                _call(Fields(call, f"{fields.path('tool_calls')}[{i}]"), calls) for i, call in enumerate(made)
            ]
        # What OpenAI's clients send back with a message they were given; none of it was ever more than empty.
        for empty in ("annotations", "audio", "function_call"):
            fields.only(empty, "", [], because="replies of this server hold none")
        # A refusal is what was said in place of content; neither is a message that says nothing.
        content = "\n".join(filter(None, (content, fields.text("refusal"))))
    if role == "tool":
        identity = fields.text("tool_call_id")
        if identity is None or (identity not in calls and not name):
            raise fields.wrong("tool_call_id", "the id of a tool call in an earlier message", identity)
        message |= {"tool_call_id": identity, "name": name or calls[identity]}
    if content is None:
        raise fields.wrong("content", "a string or a list of text parts", None)
    fields.finish()
    return message | {"content": content}


def _content(fields: Fields, role: str) -> str | None:
    """A message's text; parts of text become lines of one, an assistant's refusals among them."""
    value = fields.take("content")
    if not isinstance(value, list):
        if value is not None and not isinstance(value, str):
            raise fields.wrong("content", "a string or a list of text parts", value)
        return value
    texts = []
    for i, part in enumerate(value):
        inner = Fields(part, f"{fields.path('content')}[{i}]")
        kind = inner.take("type")
        known = kind == "text" or (kind == "refusal" and role == "assistant")
        text = inner.text(kind) if known else None
        if text is None:
            raise inner.wrong("type", "'text' with a text (this server reads no images, sounds or files)", kind)
        inner.take(CACHING)
        inner.take("prompt_cache_breakpoint")
        inner.finish()
        texts.append(text)
    return "\n".join(texts)


def _call(fields: Fields, calls: dict[str, str]) -> dict[str, Any]:
    """A tool call of the assistant's, its arguments as an object."""
    identity = fields.text("id")
    fields.choice("type", ("function",))
    fields.take("index")  # streamed calls carry it
    function = fields.fields("function")
    if function is None or not identity:
        missing = "id" if function is not None else "function"
        raise fields.wrong(missing, "the id of the call" if missing == "id" else "an object", identity)
    name = _tool_name(function)
    arguments = function.take("arguments")
    if isinstance(arguments, str):
        try:
            arguments = strict(arguments or "{}")
        except ValueError as error:
            raise function.wrong("arguments", f"a JSON object in a string ({error})", arguments) from None
    if not isinstance(arguments, dict):
        raise function.wrong("arguments", "a JSON object in a string", arguments)
    function.finish()
    fields.finish()
    calls[identity] = name
    return {"id": identity, "type": "function", "function": {"name": name, "arguments": arguments}}


def _tool_name(function: Fields) -> str:
    name = function.take("name")
    if not isinstance(name, str) or not TOOL_NAME.fullmatch(name):
        raise function.wrong("name", "up to 128 letters, digits and . _ - /", name)
    return name


def read_tools(body: Fields) -> list[dict[str, Any]]:
    """The fields `tools` and `tool_choice`: declarations for a template, none where none shall be called."""
    declared = []
    for i, value in enumerate(body.items("tools") or []):
        fields = Fields(value, f"tools[{i}]")
        fields.choice("type", ("function",))
        function = fields.fields("function")
        if function is None:
            raise fields.wrong("function", "an object", None)
        name, description = _tool_name(function), function.text("description") or ""
        parameters = function.take("parameters")
        if parameters is not None and not isinstance(parameters, dict):
            raise function.wrong("parameters", "a JSON schema", parameters)
        function.only("strict", False, because="arguments are JSON, but cannot be held to a schema yet")
        for one in (function, fields):
            one.take(CACHING)
        function.finish()
        fields.finish()
        parameters = {"type": "object", "properties": {}} | (parameters or {})
        function_out = {"name": name, "description": description, "parameters": parameters}
        declared.append({"type": "function", "function": function_out})
    if len(declared) > MOST_TOOLS:
        raise body.wrong("tools", f"at most {MOST_TOOLS} tools", len(declared))
    choice = body.take("tool_choice")
    if choice not in (None, "auto", "none"):
        raise RequestError(
            f"Expected tool_choice 'auto' or 'none', found {shown(choice)}: this server cannot force a call.",
            param="tool_choice", code="unsupported_value",
        )  # fmt: skip
    return [] if choice == "none" else declared
