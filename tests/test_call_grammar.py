"""Calls of tools as grammars: found from the template, never too narrow for it, never too wide for who reads them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from tokenizers import AddedToken
from tokenizers_at_hand import byte_level, write
from tool_templates import CODER, GEMMA, HERMES, MISTRAL, PLAIN

import mlx_mtp
from mlx_mtp.generation.constraint import Constraint, Grammar
from mlx_mtp.text.call_grammar import ToolChoice
from mlx_mtp.text.channels import Channels, joined
from mlx_mtp.text.tokenizer import Tokenizer

MARKS = ["<tool_call>", "</tool_call>"]
NOTATIONS = {  # template, tokens of its own
    "json": (HERMES, MARKS),
    "json, markers as text": (HERMES, []),
    "xml": (CODER, MARKS),
    "xml, markers as text": (CODER, []),
    "no end": (MISTRAL, ["[TOOL_CALLS]", "[ARGS]"]),
    "gemma": (GEMMA, ["<|tool_call>", "<tool_call|>", '<|"|>']),
}
WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "days": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}},
        "place": {
            "type": "object", "additionalProperties": False, "required": ["north"],
            "properties": {"north": {"type": "boolean"}, "side": {"enum": ["left", "right"]}},
        },
        "unit": {"$ref": "#/$defs/unit"},
        "when": {"anyOf": [{"type": "null"}, {"const": "now"}]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"unit": {"type": "string", "enum": ["C", "F"]}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather", "strict": True, "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}},
]
GIVEN = {"city": "a < b", "days": 3, "tags": ["x", "y"], "place": {"north": True, "side": "left"}, "unit": "C"}
TOOL, OTHER = ("weather", GIVEN), ("now", dict[str, Any]())


def read(calls: Calls, text: str) -> tuple[str, list[tuple[str, dict[str, Any]]]]:
    """The answer and the calls of a reply, by mlx-lm's parser or Gemma's."""
    channels = Channels(calls=calls.tokenizer.call_format(TOOLS))
    found = joined([*channels.split(text, final=True)])
    return found.text, [(call.name, call.arguments) for call in found.calls]


class Calls:
    """A tokenizer whose template writes calls in one notation."""

    def __init__(self, folder: Path, name: str) -> None:
        template, marks = NOTATIONS[name]
        made = byte_level()
        made.add_special_tokens([AddedToken(mark, normalized=False) for mark in marks])
        self.tokenizer = Tokenizer.load(write(folder, made, template))
        self.stops = self.tokenizer.stop_tokens
        self.size = made.get_vocab_size()

    def written(self, *calls: tuple[str, dict[str, Any]]) -> str:
        return str(self.tokenizer.reply(calls)).removesuffix("<|im_end|>\n").lstrip("\n")

    def grammar(self, choice: ToolChoice, tools: list[dict[str, Any]] = TOOLS, answer: Any = None) -> Grammar:
        text = self.tokenizer.call_grammar().text(tools, choice, answer)
        table = self.tokenizer.grammar_table(self.size, self.stops)
        return Grammar.of(table, self.size, self.stops, "tools", text)

    def takes(self, grammar: Grammar, text: str) -> bool:
        """Whether a reply may be this text."""
        constraint = Constraint(grammar)
        for token in self.tokenizer.encode(text, special=False):
            if not constraint.masks([])[0][token // 32] >> (token % 32) & 1:
                return False
            constraint.add([token])
        return constraint.complete


@pytest.fixture(params=NOTATIONS)
def calls(request: pytest.FixtureRequest, tmp_path: Path) -> Calls:
    return Calls(tmp_path, request.param)


def test_what_the_template_writes(calls: Calls) -> None:
    """Calls that the template writes may be written, and calls that no one declared, or without what is required, may
    not."""
    may, must, named = ToolChoice(), ToolChoice(required=True), ToolChoice(["now"], required=True, several=False)
    few = ("weather", {"city": "b", "unit": "F"})
    for choice, tool, other, text, two in ((may, 1, 1, 1, 1), (must, 1, 1, 0, 1), (named, 0, 1, 0, 0)):
        grammar = calls.grammar(choice)
        assert calls.takes(grammar, calls.written(TOOL)) == calls.takes(grammar, calls.written(few)) == bool(tool)
        assert calls.takes(grammar, calls.written(OTHER)) == bool(other)
        assert calls.takes(grammar, "Let me see.") == bool(text)
        assert calls.takes(grammar, "So: " + calls.written(few)) == bool(text)
        for wrong in (("weather", {}), ("weather", {"unit": "F"}), ("weather", {"city": "b"}),
                      ("weather", few[1] | {"unit": "K"}), ("weather", few[1] | {"days": -1}),
                      ("later", {}), ("weather", few[1] | {"place": {}})):  # fmt: skip
            assert not calls.takes(grammar, calls.written(wrong)), wrong
        if calls.tokenizer.call_grammar().notation.between is not None:
            assert calls.takes(grammar, calls.written(few, OTHER)) == bool(two)
            assert calls.takes(grammar, calls.written(OTHER, OTHER)) == choice.several


def test_an_answer_by_a_schema_or_a_call(calls: Calls) -> None:
    answer = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    grammar = calls.grammar(ToolChoice(), answer=answer)
    assert calls.takes(grammar, '{"a": 1}') and calls.takes(grammar, calls.written(TOOL))
    assert not calls.takes(grammar, '{"b": 1}') and not calls.takes(grammar, "No.")


@pytest.mark.parametrize("required", [True, False])
def test_whatever_is_written_can_be_read(calls: Calls, required: bool) -> None:
    """Random tokens of those that may follow: the parser finds calls of declared tools, whose arguments keep to the
    schema by another library's judgement."""
    schemas = {"weather": WEATHER, "now": {"type": "object"}}
    grammar, met, chance = calls.grammar(ToolChoice(required=required)), set[str](), random.Random(5)
    for _ in range(12):
        constraint, tokens = Constraint(grammar), list[int]()
        while not (constraint.complete and (not required or chance.random() < 0.5)) and len(tokens) < 400:
            words = constraint.masks([])[0]
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: calls.size]
            allowed = [int(token) for token in np.flatnonzero(bits) if token not in calls.stops]
            if not allowed:
                break
            ends = [token for token in allowed if token >= 420]  # marks, which free text would hardly ever end in
            tokens.append(chance.choice(ends if ends and chance.random() < 0.3 else allowed))
            constraint.add(tokens[-1:])
        if not constraint.complete:
            continue
        text, found = read(calls, calls.tokenizer.decode(tokens))
        assert not required or (found and not text.strip())
        for name, arguments in found:
            met.add(name)
            jsonschema.validate(arguments, schemas[name])
    assert met or not required


def test_what_cannot_be_held(tmp_path: Path) -> None:
    gemma = Calls(tmp_path / "gemma", "gemma")
    pattern = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x"}}}
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": pattern}}
    with pytest.raises(mlx_mtp.OptionError, match=r"tool f cannot be held .*parameters\.a has 'pattern'"):
        gemma.grammar(ToolChoice(required=True), [tool])
    loose = {"type": "function", "function": {"name": "f", "parameters": pattern}}
    assert gemma.takes(gemma.grammar(ToolChoice(required=True), [loose]), gemma.written(("f", {"a": "y"})))
    missing = {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}
    with pytest.raises(mlx_mtp.OptionError, match=r"'#/\$defs/none', which is not there"):
        gemma.grammar(ToolChoice(), [{"type": "function", "function": {"name": "f", "parameters": missing}}])
    with pytest.raises(mlx_mtp.OptionError, match="'later', which is none of the declared"):
        ToolChoice.of("later", TOOLS)
    with pytest.raises(mlx_mtp.OptionError, match="requires a call, but there is no tool"):
        ToolChoice.of("required", [])
    plain = Tokenizer.load(write(tmp_path / "plain", byte_level(), PLAIN))
    assert plain.call_grammar() is None


def test_the_parser_reads_what_the_template_writes(calls: Calls) -> None:
    """The template's own text, read back by the parser."""
    assert read(calls, calls.written(TOOL)) == ("", [TOOL])
