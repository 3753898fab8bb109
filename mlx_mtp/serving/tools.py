"""Tools as requests declare them, and what of them a reply may call; the same in every interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from mlx_mtp.serving.schema import Schema, ToolName
from mlx_mtp.text.call_grammar import ToolChoice

WORDS = ("auto", "none", "required")


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
    return {"type": value} if isinstance(value, str) and value in WORDS else value


def offered(functions: Sequence[Function], chosen: ToolChoice | None, several: bool = True) -> dict[str, Any]:
    """The tools of a Generation, and its choice. several: whether a reply may hold more than one call."""
    choice = chosen or ToolChoice()
    return {
        "tools": [] if chosen is None else [function.declared() for function in functions],
        "choice": replace(choice, several=choice.several and several),
    }
