"""Tools as requests declare them, and what of them a reply may call; the same in every interface.

A choice says in `chosen` which tools it names (None = all), and how: "auto", "required", "one" or "none".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

from mlx_mtp.serving.schema import Schema, ToolName
from mlx_mtp.text.call_grammar import ToolChoice

Chosen = tuple[list[str] | None, str]
WORDS = ("auto", "none", "required")


class Named(Schema):
    """The name of a tool."""

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


class OfFunction(Schema):
    """The kind of a tool; inherited last, so that a tool of another kind is refused for that first."""

    type: Literal["function"]


class Word(Schema):
    """Whether tools may or must be called."""

    type: Literal["auto", "none", "required"]

    @property
    def chosen(self) -> Chosen:
        """All of them."""
        return None, self.type


def in_words(value: object) -> object:
    """A choice that is one word, as an object."""
    return {"type": value} if isinstance(value, str) and value in WORDS else value


class Choice(Protocol):
    """What of the declared tools may be called."""

    @property
    def chosen(self) -> Chosen: ...


def offered(functions: Sequence[Function], choice: Choice, several: bool) -> dict[str, Any]:
    """The tools of a Generation, and its choice. several: whether a reply may hold more than one call."""
    names, how = choice.chosen
    return {
        "tools": [] if how == "none" else [function.declared() for function in functions],
        "choice": ToolChoice(names, how in ("required", "one"), several and how != "one"),
    }
