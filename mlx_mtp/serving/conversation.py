"""What was said and which tools may be called, as chat templates take it; the same in every interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.schema import Schema, ToolName
from mlx_mtp.text.call_grammar import ToolChoice

Messages = list[dict[str, Any]]


class Conversation:
    """Whether a template takes these roles in this order is its own affair."""

    def __init__(self, system: str = "") -> None:
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self._called = dict[str, str]()  # id of a call -> name of its tool

    def add(self, role: str, text: str, **more: object) -> None:
        """A message; of more fields those that are not empty."""
        self.messages.append({"role": "system" if role == "developer" else role, "content": text, **filled(**more)})

    def call(self, number: str, name: str, arguments: dict[str, Any]) -> None:
        """A call of a tool in the last message."""
        made = {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(made)
        self._called[number] = name

    def answer(self, number: str, text: str, place: str, name: str | None = None) -> None:
        """A tool's answer, with the name of the tool; RequestError where no earlier message has the call."""
        if not (name := name or self._called.get(number)):
            raise RequestError(f"{place}: '{number[:100]}' names no call of a tool that came before.", param=place)
        self.messages.append({"role": "tool", "name": name, "tool_call_id": number, "content": text})


def filled(**fields: object) -> dict[str, Any]:
    """Those that are not empty."""
    return {name: value for name, value in fields.items() if value}


class Named(Schema):
    name: ToolName


class Function(Named):
    """A tool's declaration. strict: calls keep to the schema of its parameters."""

    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False

    def declared(self) -> dict[str, Any]:
        """In OpenAI's form, with the parameters that templates ask for."""
        parameters = {"type": "object", "properties": {}} | self.parameters
        function: dict[str, Any] = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function | ({"strict": True} if self.strict else {})}


class Word(Schema):
    """Whether tools may or must be called."""

    type: Literal["auto", "none", "required"]

    @property
    def chosen(self) -> ToolChoice | None:
        """What of the declared tools may be called; None = nothing."""
        return None if self.type == "none" else ToolChoice(required=self.type == "required")


def in_words(value: object) -> object:
    """A choice that is one word, as an object."""
    return {"type": value} if isinstance(value, str) and value in ("auto", "none", "required") else value


def offered(functions: Sequence[Function], chosen: ToolChoice | None, several: bool = True) -> dict[str, Any]:
    """The tools of a Generation, and its choice. several: whether a reply may hold more than one call."""
    choice = chosen or ToolChoice()
    return {
        "tools": [] if chosen is None else [function.declared() for function in functions],
        "choice": replace(choice, several=choice.several and several),
    }
