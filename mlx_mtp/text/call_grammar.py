"""Calls of tools as a grammar, so that a reply can be held to one: required, named, with arguments by their schema.

How a checkpoint writes calls is found out by rendering some with its chat template, never from a list of models. Two
kinds are known: arguments as one JSON object (Hermes, Qwen, Mistral, Llama), and one place for each argument (Gemma's
`call:NAME{key:value}`, the XML of Qwen Coder and GLM). The text is lark as llguidance reads it.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_mtp.errors import OptionError
from mlx_mtp.text.json_schema import CALL_SPACE, held

Schema = Mapping[str, Any]
NAME, OTHER = "first_tool", "second_tool"
KEY, KEY2, VALUE, VALUE2, NUMBER = "alpha", "gamma", "beta", "delta", 7
# Keywords of JSON Schema that a place for each argument can be held to, or that ask for nothing.
PLAIN = frozenset({
    "type", "enum", "const", "properties", "required", "items", "anyOf", "oneOf", "$ref", "$defs", "definitions",
    "minLength", "maxLength", "additionalProperties", "title", "description", "default", "examples", "$schema", "$id",
    "strict", "nullable", "deprecated",
})  # fmt: skip
NUMERIC = PLAIN | {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "format"}
ANY = ("string", "number", "boolean", "null")  # where a schema names no type


@dataclass(frozen=True)
class ToolChoice:
    """What a reply may call. names: of the declared tools, None = all. required: it is a call, never an answer.

    several: whether it may hold more than one call.
    """

    names: Collection[str] | None = None
    required: bool = False
    several: bool = True

    @classmethod
    def of(cls, value: ToolChoice | str, declared: Sequence[Schema]) -> ToolChoice:
        """From "auto", "required" or a tool's name; OptionError for a name that is not declared."""
        names = {tool["function"]["name"] for tool in declared}
        if isinstance(value, str):
            value = cls(required=value == "required") if value in ("auto", "required") else cls([value], True, False)
        if not isinstance(value, cls):
            raise OptionError("tool_choice must be 'auto', 'required', a tool's name or a ToolChoice.")
        if unknown := set(value.names or ()) - names:
            raise OptionError(f"tool_choice names '{min(unknown)}', which is none of the declared tools.")
        if value.required and not (names if value.names is None else value.names):
            raise OptionError("tool_choice requires a call, but there is no tool to call; declare one.")
        return value

    def holds(self, declared: Sequence[Schema]) -> bool:
        strict = any(tool["function"].get("strict") for tool in declared)
        return bool(declared) and (self.required or not self.several or self.names is not None or strict)


@dataclass(frozen=True)
class Notation:
    """How one checkpoint writes a call: marker + opening + NAME + middle + arguments + closing.

    between: of two calls; None where there can be no second. places: None where the arguments are one JSON object.
    """

    marker: str
    opening: str
    middle: str
    closing: str
    between: str | None
    places: Places | None = None


@dataclass(frozen=True)
class Places:
    """One place for each argument: KEY + colon + value + end, `comma` between two.

    quote: around strings. own: whether objects and lists inside are written the same way; they are JSON otherwise.
    empty: what follows the name of a call without arguments. in_order: as they are given; sorted by name otherwise.
    """

    colon: str
    end: str
    comma: str
    quote: tuple[str, str]
    own: bool
    empty: str
    in_order: bool


def notation(render: Callable[[Sequence[tuple[str, dict[str, Any]]]], str | None], opening: str,
             closing: str) -> Notation | None:  # fmt: skip
    """How calls are written, None where it is neither of the two kinds.

    render: calls (name, arguments) to the reply that holds them, None where the template refuses. opening, closing:
    the markers around a call, the second "" where it ends with the reply.
    """

    def written(*calls: tuple[str, dict[str, Any]]) -> str:
        text = render(calls) or ""
        begin = text.find(opening)
        end = text.rfind(closing) + len(closing) if closing else len(text.rstrip())
        return text[begin:end] if 0 <= begin < end else ""

    one = written((NAME, {KEY: VALUE}))
    head, named, rest = one.removeprefix(opening).partition(NAME)
    if not named:
        return None
    two, other = written((NAME, {KEY: VALUE}), (OTHER, {KEY: VALUE})), one.replace(NAME, OTHER)
    between = two[len(one) : -len(other)] if two.startswith(one) and two.endswith(other) else None
    if found := re.search(rf'\{{\s*"{KEY}"\s*:\s*"{VALUE}"\s*\}}', rest):
        before, after = rest[: found.start()], rest[found.end() :]
        if closing:
            return Notation(opening, head, before, after, between)
        # Nothing marks its end: as many brackets close it as were opened before the arguments.
        return Notation(opening, head, before, after[: before.count("{") - before.count("}")], None)
    given: list[dict[str, Any]] = [{KEY2: VALUE2, KEY: VALUE}, {KEY: NUMBER}, {KEY: {KEY2: VALUE}}, {}]
    places = _places(rest, *(written((NAME, one)).partition(NAME)[2] for one in given))
    return places and Notation(opening, head, rest.partition(KEY)[0], places[1], between, places[0])


def _places(one: str, pair: str, number: str, nested: str, none: str) -> tuple[Places, str] | None:
    """The places, and what closes a call, from what follows the name in calls with one string, with two, with a
    number, with an object and with nothing."""
    _, key, after = one.partition(KEY)
    colon, value, end = after.partition(VALUE)
    bare = re.search(f"{KEY}(.*?){NUMBER}(.*)", number, re.DOTALL)
    joint = re.search(f"(?:{VALUE}|{VALUE2})(.*?)(?:{KEY2}|{KEY})", pair, re.DOTALL)
    if not (key and value and bare and joint and colon.startswith(bare[1]) and end.endswith(bare[2])):
        return None
    quote = colon[len(bare[1]) :], end[: len(end) - len(bare[2])]
    comma = joint[1].removeprefix(quote[1])
    after = os.path.commonprefix([comma, bare[2]])  # ends a value, whatever comes then
    if not (all(quote) or after):
        return None  # nothing says where a string ends
    found = Places(
        colon=bare[1], end=after, comma=comma[len(after) :], quote=quote, own=f'"{VALUE}"' not in nested, empty=none,
        in_order=pair.index(KEY2) < pair.index(KEY),
    )  # fmt: skip
    return found, bare[2][len(after) :]


@dataclass
class CallGrammar:
    """The lark text for a notation. special: a text to its parts, strings and ids of tokens of their own."""

    notation: Notation
    special: Callable[[str], Sequence[str | int]]
    _rules: dict[str, str] = field(default_factory=dict)  # what comes after a rule's name -> the name

    def text(self, tools: Sequence[Schema], choice: ToolChoice, answer: Schema | None = None) -> str:
        """Replies that may call tools (declared in OpenAI's form). answer: the schema of what is no call, None = any.

        OptionError, with its place, where the arguments of a tool cannot be held to their schema.
        """
        declared = {tool["function"]["name"]: tool["function"] for tool in tools}
        names = list(declared) if choice.names is None else [name for name in declared if name in choice.names]
        bodies = [self.rule(f"tool{i}", self._call(declared[name])) for i, name in enumerate(names)]
        one = self.rule("call", " | ".join(bodies)) if names else ""
        marker, between = self.literal(self.notation.marker), self.notation.between
        calls = one
        if choice.several and between is not None and names:
            calls = f"{one} ({self.literal(between + self.notation.marker)} {one})*"
        if choice.required:
            lines = [f"start: {marker} {calls}"]
        elif answer is not None:
            lines = [f"start: answer | {marker} {calls}" if names else "start: answer", f"answer: %json {held(answer)}"]
        else:
            lines = self._free(calls)
        return "\n".join([*lines, *(name + rest for rest, name in self._rules.items())])

    def _free(self, calls: str) -> list[str]:
        """Text that may go over into calls."""
        marker = self.notation.marker
        if isinstance(self.special(marker)[0], int):  # no text can spell it
            after = f" ({self.literal(marker)} {calls})?" if calls else ""
            return [f"start: TEXT?{after}", "TEXT: /(?s:.+)/"]
        text = f"TEXT: /(?s:.*)/ & ~/(?s:.*){_regex(marker)}(?s:.*)/"
        if not calls:
            return ["start: TEXT", text]
        return [f"start: TEXT | before {calls}", text, f"before[lazy]: /(?s:.*){_regex(marker)}/"]

    def _call(self, function: Schema) -> str:
        parameters = {"type": "object", "properties": {}} | dict(function.get("parameters") or {})
        strict, shape = bool(function.get("strict")), self.notation
        named = shape.opening + function["name"]
        begin, closing = self.literal(named + shape.middle), self.literal(shape.closing)
        if shape.places is None:
            arguments = self.rule("arguments", f"%json {held(parameters, CALL_SPACE, lenient=not strict)}")
            return f"{begin} {arguments} {closing}".strip()
        inside = _PlaceGrammar(self, shape.places, parameters, strict, function["name"]).members(
            parameters, "parameters")  # fmt: skip
        nothing = self.literal(named + shape.places.empty)
        if inside is None:
            return nothing
        return f"{begin} {inside[0]} {closing}" + (f" | {nothing}" if inside[1] else "")

    def rule(self, name: str, body: str, attributes: str = "") -> str:
        """The name of the rule with this body, which is written once."""
        return self._rules.setdefault(f"{attributes}: {body}", f"{name}_{len(self._rules)}")

    def upto(self, end: str, count: str) -> str:
        """So many characters (as a regex counts) up to and with the first `end`."""
        if isinstance(self.special(end)[0], int):  # no text can spell it
            return f"{self.rule('string', f'/(?s:.{count})/')} {self.literal(end)}"
        return self.rule("upto", f"/(?s:.{count}){_regex(end)}/", "[lazy]")

    def literal(self, text: str) -> str:
        return " ".join(f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in self.special(text))


@dataclass(frozen=True)
class _PlaceGrammar:
    """Arguments with a place for each, of one tool. schema: the whole, for references; tool: its name, for messages."""

    grammar: CallGrammar
    places: Places
    schema: Schema
    strict: bool
    tool: str

    def members(self, schema: Schema, at: str) -> tuple[str, bool] | None:
        """The rule of an object's fields in their declared order, and whether there may be none; None where there are
        no fields."""
        properties, required = schema.get("properties") or {}, set(schema.get("required") or ())
        if missing := required - set(properties):
            self._refuse(at, f"requires '{min(missing)}', which is no property")
        made = [
            (f"{self.grammar.literal(key + self.places.colon)} {self.value(value, f'{at}.{key}')}", key in required)
            for key, value in (properties.items() if self.places.in_order else sorted(properties.items()))
        ]
        if not made:
            return None
        # after: what may follow a field; first: the same where no field was written yet.
        comma = self.grammar.literal(self.places.comma)
        after, first = "", list[str]()
        for i, (one, needed) in enumerate(reversed(made)):
            begin = f"{one} {after}".strip()
            first = [begin] if needed else [begin, *first]
            follow = f"{comma} {one} {after}".strip()
            if not needed:
                follow = f"{follow} | {after}" if after else f"({follow})?"
            after = self.grammar.rule(f"field{i}", follow)
        return self.grammar.rule("fields", " | ".join(first)), not required

    def value(self, schema: Any, at: str) -> str:
        """One value, its quotes included."""
        schema = self._resolved(schema if isinstance(schema, Mapping) else {}, at)
        known = NUMERIC if schema.get("type") in ("number", "integer") else PLAIN
        if self.strict and (unknown := set(schema) - known):
            self._refuse(at, f"has '{min(unknown)}'")
        if options := schema.get("anyOf") or schema.get("oneOf"):
            return "(" + " | ".join(self.value(one, at) for one in options) + ")"
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return "(" + " | ".join(self._constant(value) for value in values) + ")"
        kinds = schema.get("type", ANY)
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if schema.get("nullable"):
            kinds.append("null")
        return "(" + " | ".join(dict.fromkeys(self._typed(kind, schema, at) for kind in kinds)) + ")"

    def _typed(self, kind: str, schema: Schema, at: str) -> str:
        if kind == "string":
            return self._string(schema)
        end = self.grammar.literal(self.places.end)
        if kind not in ("array", "object") or not self.places.own:
            named = {**self.schema.get("definitions", {}), **self.schema.get("$defs", {})}
            whole = {**schema, "$defs": named, "type": kind}
            found = self.grammar.rule("json", f"%json {held(whole, CALL_SPACE, lenient=not self.strict)}")
        elif kind == "array":
            item = self.value(schema.get("items", {}), f"{at}[]")
            found = self.grammar.rule("list", f'"[" ({item} ("," {item})*)? "]"')
        elif inside := self.members(schema, at):
            found = f'"{{" {inside[0]}{"?" if inside[1] else ""} "}}"'
        else:  # fields of any name
            more = schema.get("additionalProperties")
            one = f"/[\\w\\-]+/ {self.grammar.literal(self.places.colon)} {self.value(more, at)}"
            found = self.grammar.rule("map", f'"{{" ({one} ("," {one})*)? "}}"')
        return f"{found} {end}".strip()

    def _string(self, schema: Schema) -> str:
        opening, closing = self.places.quote
        until = closing + self.places.end
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        return f"{self.grammar.literal(opening)} {self.grammar.upto(until, f'{{{least},{most}}}')}".strip()

    def _constant(self, value: Any) -> str:
        opening, closing = self.places.quote
        text = f"{opening}{value}{closing}" if isinstance(value, str) else json.dumps(value)
        return self.grammar.literal(text + self.places.end)

    def _resolved(self, schema: Schema, at: str) -> Schema:
        found, seen = schema, 0
        while isinstance(path := found.get("$ref"), str):
            here: Any = self.schema
            for step in path.removeprefix("#").strip("/").split("/"):
                here = here.get(step) if isinstance(here, Mapping) else None
            seen += 1
            if not isinstance(here, Mapping) or seen > 32:
                self._refuse(at, f"refers to '{path}', which is not there")
            found = here
        return found

    def _refuse(self, at: str, what: str) -> None:
        raise OptionError(f"The arguments of the tool {self.tool} cannot be held to their schema: {at} {what}.")


def _regex(text: str) -> str:
    return "".join(f"\\x{ord(one):02x}" if one.isascii() and not one.isalnum() else one for one in text)
