"""Thoughts, answers and calls told apart: the same pieces however the text is cut, and nothing of an answer lost."""

import importlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_mtp.text.channels import GEMMA, CallFormat, Channels, Pieces, ToolCall, joined

MARKERS = ["<|channel>", "<channel|>", "<think>", "</think>", "<|tool_call>", "<tool_call|>", "thought\n", '<|"|>']
WORDS = ["a", "answer ", "\n", "\n\n", "<", "<|", "|>", "call:f{", "}", "x:1", ",", "ö", "[", "]", "NaN", "<chan"]
THOUGHT = "<|channel>thought\nFirst this.\nThen that.<channel|>\n\nThe answer."
CALL = '<|tool_call>call:search{query:<|"|>a, {b}: "c"<|"|>,n:3,deep:{list:[1,2.5,true,null,<|"|>x<|"|>]}}<tool_call|>'


def whole(text: str, thinking: str | None = None, calls: bool = True) -> Pieces:
    return pieces([text], thinking, calls)


def fed(channels: Channels, parts: list[str]) -> list[Pieces]:
    return [*(piece for part in parts for piece in channels.split(part)), *channels.split("", final=True)]


def pieces(parts: list[str], thinking: str | None = None, calls: bool = True) -> Pieces:
    channels = Channels(thinking, GEMMA if calls else None)
    found = fed(channels, parts)
    return Pieces(
        "".join(piece.text for piece in found),
        "".join(piece.thinking for piece in found),
        [call for piece in found for call in piece.calls],
    )


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.sampled_from(MARKERS + WORDS), max_size=20), st.sampled_from([None, "<think>", "<|channel>"]),
    st.booleans(), st.data(),
)  # fmt: skip
def test_any_cut_gives_the_same(parts: list[str], thinking: str | None, calls: bool, data: st.DataObject) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=12)))
    cut = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert pieces(cut, thinking, calls) == whole(text, thinking, calls)
    assert pieces(list(text), thinking, calls) == whole(text, thinking, calls)


@pytest.mark.parametrize(
    ("text", "answer", "thinking"),
    [
        (THOUGHT, "The answer.", "First this.\nThen that."),
        ("<think>\nHm.\n</think>\n\nYes.", "Yes.", "\nHm.\n"),
        ("<|channel>thought\n<channel|>Yes.", "Yes.", ""),
        ("Yes.<|channel>thought\nreally?<channel|> No.", "Yes. No.", "really?"),
        ("<|channel>thought\nnever ends", "", "never ends"),
        ("<|channel>tho", "", ""),
        ("\n\nYes.\n\n", "Yes.\n\n", ""),
        ("1 < 2 <| and <chan", "1 < 2 <| and <chan", ""),
        ("a closing <channel|> alone", "a closing <channel|> alone", ""),
        ("Well <|tool_call>call:f{a:1}", "Well <|tool_call>call:f{a:1}", ""),
    ],
)
def test_thoughts(text: str, answer: str, thinking: str) -> None:
    assert whole(text) == Pieces(answer, thinking)


def test_what_the_prompt_opened_and_offered() -> None:
    assert whole("Hm.</think>Yes.", "<think>") == Pieces("Yes.", "Hm.")
    assert whole("Hm.<channel|>Yes.", "<|channel>") == Pieces("Yes.", "Hm.")
    assert whole("Yes. " + CALL, calls=False) == Pieces("Yes. " + CALL)  # no tools
    assert whole(THOUGHT + CALL, calls=False).thinking == "First this.\nThen that."


def test_a_call() -> None:
    found = whole("I look.\n" + CALL + "Done.")
    arguments = {"query": 'a, {b}: "c"', "n": 3, "deep": {"list": [1, 2.5, True, None, "x"]}}
    assert found == Pieces("I look.\nDone.", "", [ToolCall("search", arguments)])
    assert whole("<|tool_call>call:now{}<tool_call|>" * 2).calls == [ToolCall("now", {})] * 2
    (call,) = whole("<|tool_call>call:f{a:NaN,b:-Infinity,c:1e3}<tool_call|>").calls
    assert call.arguments == {"a": "NaN", "b": "-Infinity", "c": 1000.0}  # JSON lacks the first two
    assert whole('<|tool_call> call:a.b-c/d { <|"|>k<|"|> : bare word , m : [ ] } <tool_call|>').calls == [
        ToolCall("a.b-c/d", {"k": "bare word", "m": []})
    ]


@pytest.mark.parametrize(
    "body",
    [
        "", "call:", "call:f", "call:f{", "call:f}", "call:f{a}", "call:f{a:}", "call:f{a:1", "call:f{a:1}}",
        "call:f{a:1 b:2}{", "call:f{a:<|\"|>open}", "call:f{a:[1,2}", "call:f[1]", "f{a:1}", "call:{a:1}", "call:f{,}",
        "call:f{a:[[1]}", "call:f{a:" + "[" * 100_000 + "}", "call:f{a:" + "9" * 5000 + "}",
    ],
)  # fmt: skip
def test_broken_calls_are_shown_as_they_were_written(body: str) -> None:
    text = f"Before.<|tool_call>{body}<tool_call|>After."
    assert whole(text) == Pieces(text)


# Other formats, read by mlx-lm's parsers

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {
    "n": {"type": "integer"}, "s": {"type": "string"}, "on": {"type": "boolean"}}}}}]  # fmt: skip
FIRST, SECOND = ToolCall("f", {"n": 3, "s": "a b", "on": True}), ToolCall("f", {"n": 4})
CALLS = {
    "json_tools": ('<tool_call>\n{"name": "f", "arguments": {"n": 3, "s": "a b", "on": true}}\n</tool_call>', [FIRST]),
    "qwen3_coder": ("<tool_call>\n<function=f>\n<parameter=n>\n3\n</parameter>\n<parameter=s>\na b\n</parameter>\n"
                    "<parameter=on>\ntrue\n</parameter>\n</function>\n</tool_call>", [FIRST]),
    "glm47": ("<tool_call>f<arg_key>n</arg_key><arg_value>3</arg_value><arg_key>s</arg_key><arg_value>a b</arg_value>"
              "<arg_key>on</arg_key><arg_value>true</arg_value></tool_call>", [FIRST]),
    "mistral": ('[TOOL_CALLS][{"name": "f", "arguments": {"n": 3, "s": "a b", "on": true}}, '
                '{"name": "f", "arguments": {"n": 4}}]', [FIRST, SECOND]),
    "pythonic": ("<|tool_call_start|>[f(n=3, s='a b', on=True), f(n=4)]<|tool_call_end|>", [FIRST, SECOND]),
    "minicpm5": ('<function name="f"><param name="n">3</param><param name="s">a b</param><param name="on">true</param>'
                 "</function>", [FIRST]),
}  # fmt: skip


def of_mlx_lm(name: str) -> CallFormat:
    parser = importlib.import_module(f"mlx_lm.tool_parsers.{name}")
    return CallFormat(parser.tool_call_start, parser.tool_call_end, parser.parse_tool_call, TOOLS)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("name", CALLS)
def test_calls_in_other_formats(name: str, size: int) -> None:
    text, expected = CALLS[name]
    channels, text = Channels(calls=of_mlx_lm(name)), "Well. " + text
    found = joined(fed(channels, [text[i : i + size] for i in range(0, len(text), size)]))
    assert (found.text, found.calls) == ("Well. ", expected)
    assert found.raw == text


@pytest.mark.parametrize(("name", "body"), [
    ("json_tools", '{"name": 3, "arguments": {}}'), ("json_tools", '["f"]'), ("json_tools", "{"),
    ("qwen3_coder", "<function=f>\n<parameter=n>\nmany\n</parameter>\n</function>"), ("pythonic", "f(*x)"),
])  # fmt: skip
def test_what_is_no_call_stays_text(name: str, body: str) -> None:
    form = of_mlx_lm(name)
    channels, text = Channels(calls=form), form.opening + body + form.closing
    found = joined(fed(channels, [text]))
    assert (found.text, found.calls) == (text, [])
