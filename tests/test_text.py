"""Between text and tokens: every kind of tokenizer gives one text, prompts begin once, all ends of a reply are known.

References: the tokenizers library and transformers decode whole texts; here they are decoded token by token.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers_at_hand import CHATML, KINDS, SPECIAL, TEXTS, byte_level, write
from transformers import AutoTokenizer

import mlx_mtp
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.testing import MarkovDrafter, MarkovTarget
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.data import Document, pack

NAMES = [*KINDS, "newlines", "embedded"]
BYTES_OF = {"llama", "gemma", "embedded"}  # kinds with tokens that are one byte


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("kinds")
    found = {name: write(place / name, kind()) for name, kind in KINDS.items()}
    found["newlines"] = write(place / "newlines", byte_level(), tokenizer_class="NewlineTokenizer")
    return found | {"embedded": EMBEDDED / "target"}


@cache
def both(folder: Path) -> tuple[Tokenizer, Any]:
    """Ours and transformers' own."""
    ours = Tokenizer.load(folder)
    assert ours is not None
    return ours, AutoTokenizer.from_pretrained(folder)


def streamed(tokenizer: Tokenizer, ids: list[int], reads: list[bool]) -> str:
    stream, shown = tokenizer.stream(), []
    for token, read in zip(ids, reads, strict=False):
        stream.add_token(token)
        if read:
            shown.append(stream.last_segment)
    stream.finalize()
    return "".join([*shown, stream.last_segment])


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_streamed_text_is_decoded_text(folders: dict[str, Path], name: str, data: st.DataObject) -> None:
    ours, theirs = both(folders[name])
    size = len(theirs)
    ids = data.draw(st.lists(st.integers(0, size + 40), max_size=30))
    reads = data.draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
    text = ours.decode(ids)
    assert streamed(ours, ids, reads) == text
    known = [token for token in ids if token < size]
    assert ours.decode(known) == text  # what has no token adds nothing, wherever it comes
    if name in BYTES_OF:  # transformers breaks every character of a run of bytes in which one is broken
        known = [token for token in known if "<0x" not in theirs.convert_ids_to_tokens(token)]
    front = theirs.encode("it", add_special_tokens=False)[-1:]
    if name != "newlines":  # three tokens that spell <n> are a line's end for it
        whole = theirs.decode([*front, *known], clean_up_tokenization_spaces=False)
        assert theirs.decode(front) + ours.decode(known) == whole


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_prompt_and_reply_read_on(folders: dict[str, Path], name: str, data: st.DataObject) -> None:
    ours, theirs = both(folders[name])
    text = data.draw(st.sampled_from(sorted(set(TEXTS))))
    ids = theirs.encode(text, add_special_tokens=False)
    # Where spaces are marks at the ends of words, a reply begins a word.
    ends = ["</w>" in token or name != "suffixes" for token in theirs.convert_ids_to_tokens(ids)]
    cut = data.draw(st.sampled_from([i + 1 for i, end in enumerate(ends) if end]))
    front = theirs.decode(ids[:cut], clean_up_tokenization_spaces=False)
    if "\ufffd" not in front:  # else a character is cut in two
        assert front + ours.decode(ids[cut:]) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", ["byte level", "gemma", "embedded"])
def test_decoded_text_encodes_to_the_same(folders: dict[str, Path], name: str) -> None:
    ours, _ = both(folders[name])
    for text in TEXTS[:4]:
        assert ours.decode(ours.encode(text, special=False)) == text


def test_broken_characters_are_shown_one_by_one(folders: dict[str, Path]) -> None:
    """As Python and the Unicode standard replace them, in every kind of tokenizer that has bytes."""
    for name in ("byte level", *sorted(BYTES_OF)):
        ours, theirs = both(folders[name])
        raw = "\u6f22".encode() + b"\x80" + "\u5b57".encode()[:2]
        if name == "byte level":
            ids = [next(i for i in range(len(theirs)) if ours.spell(i)[1] == bytes([byte])) for byte in raw]
        else:
            ids = [theirs.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in raw]
        assert ours.decode(ids) == raw.decode("utf-8", "replace") == "\u6f22\ufffd\ufffd"
        assert b"".join(ours.spell(token)[1] or b"" for token in ids) == raw
        # Never more than one character is held back.
        stream = ours.stream()
        for token, shown in zip(ids, ["", "", "\u6f22", "\ufffd", "", ""], strict=True):
            stream.add_token(token)
            assert stream.last_segment == shown


def chain(tokenizer: Tokenizer, ids: list[int], vocabulary: int, drafts: int = 0, **options: Any) -> mlx_mtp.Engine:
    """Writes these ids one after the other, each of which comes once."""
    table = mx.full((vocabulary, vocabulary), -20.0)
    for one, another in zip(ids, ids[1:], strict=False):
        table[one, another] = 20.0
    drafter = MarkovDrafter(table) if drafts else None
    return mlx_mtp.Engine(MarkovTarget(table), drafter, tokenizer, depth=drafts, **options)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_reply_keeps_its_first_space(folders: dict[str, Path], drafts: int) -> None:
    for name in ("byte level", "llama"):
        ours, theirs = both(folders[name])
        whole = ours.encode("hello Paris,", special=False)
        cut = next(i for i, token in enumerate(whole) if i and ours.spell(token)[0].startswith(" "))
        said, reply = whole[:cut], whole[cut:]
        assert theirs.decode(said) == "hello" and len({said[-1], *reply}) == len(reply) + 1
        padded = len(theirs) + 3  # an id without a token, as padded vocabularies have them
        engine = chain(ours, [said[-1], *reply[:1], padded, *reply[1:]], len(theirs) + 10, drafts)
        events = list(engine.stream(said, max_tokens=len(reply) + 1))
        result = events[-1].result
        assert result is not None and padded in result.tokens
        assert result.text == " Paris," == "".join(event.text for event in events) == ours.decode(result.tokens)


# The beginning of a prompt


def test_a_prompt_begins_once(tmp_path: Path) -> None:
    plain, start = byte_level(), SPECIAL.index("<s>")
    ours, theirs = both(write(tmp_path / "bos", plain, bos=True))
    hello = theirs.encode("hello", add_special_tokens=False)
    assert ours.encode("hello") == ours.encode("<s>hello") == [start, *hello]
    assert theirs.encode("<s>hello") == [start, start, *hello]  # what it was
    assert ours.encode("<s><s>hello") == [start, start, *hello]  # as it was written
    assert ours.encode("hello", special=False) == hello
    # A template's text, given as a raw prompt.
    question = [{"role": "user", "content": "hello"}]
    ids = ours.chat(question)
    text = theirs.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert ours.encode("<s>" + text) == [start, *ids] == ours.encode(text)


def test_a_prompt_does_not_end_itself(tmp_path: Path) -> None:
    start, end = SPECIAL.index("<s>"), SPECIAL.index("</s>")
    for bos in (False, True):
        ours, theirs = both(write(tmp_path / f"eos-{bos}", byte_level(), bos=bos, eos=True))
        hello = theirs.encode("hello", add_special_tokens=False)
        assert theirs.encode("hello")[-1] == end
        assert ours.encode("hello") == [start] * bos + hello
        assert ours.encode("hello</s>") == [start] * bos + [*hello, end]  # what the user wrote stays
    ours, _ = both(write(tmp_path / "none", byte_level()))
    assert ours.encode("hello") == hello and ours.encode("<s>hello") == [start, *hello]


def test_a_packed_document_begins_once_and_as_a_prompt(tmp_path: Path) -> None:
    start, end = SPECIAL.index("<s>"), SPECIAL.index("</s>")
    for name, more in (("bos", {"bos": True, "eos": True}), ("none", {})):
        ours, theirs = both(write(tmp_path / name, byte_level(), **more))  # type: ignore[arg-type]
        documents = [Document("m", text="<s>hello"), Document("m", text="hello")]
        packed = pack(documents, theirs).tolist()
        assert packed == [*ours.encode("<s>hello"), end, *ours.encode("hello"), end]
        assert packed.count(start) == (2 if more else 1)


# The tokens that end a reply

TURNS = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama 3": ("{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
                "{% if add_generation_prompt %}<|start|>assistant\n\n{% endif %}", "<|eot_id|>"),
    "gemma 3": ("{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
                "{{ m.content }}<end_of_turn>\n{% endfor %}", "<end_of_turn>"),
    "space before": ("{% for m in messages %}[{{ m.role }}] {{ m.content }} <|end|>{% endfor %}", "<|end|>"),
    "another one before the last turn": (  # as gpt-oss ends a thought and goes on
        "{% for m in messages %}{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}{% endfor %}",
        "<|return|>"),
    "plain text": ("{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}", None),
    "nothing": ("{% for m in messages %}<|start|>{{ m.content }}{% endfor %}", None),
    "it refuses": ("{{ raise_exception('no') }}", None),
    "no template": (None, None),
}  # fmt: skip
MARKS = ["<|start|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|return|>", "\n"]


@pytest.mark.parametrize("name", TURNS)
def test_a_template_s_turn_end_is_an_end(tmp_path: Path, name: str) -> None:
    template, expected = TURNS[name]
    made = byte_level()
    made.add_tokens(MARKS)
    ours, theirs = both(write(tmp_path, made, template))
    more = set() if expected is None else {theirs.convert_tokens_to_ids(expected)}
    assert ours.stop_tokens == {SPECIAL.index("</s>")} | more


def edited(folder: Path, **files: Any) -> Path:
    """The embedded target with other contents of its JSON files; None takes a file away."""
    folder.mkdir(parents=True)
    for file in (EMBEDDED / "target").iterdir():
        (folder / file.name).symlink_to(file)
    for name, change in files.items():
        file = folder / f"{name}.json"
        old = json.loads(file.read_text())
        file.unlink()
        if change is not None:
            file.write_text(json.dumps(old | change))
    return folder


def ends_of(folder: Path) -> frozenset[int]:
    return mlx_mtp.load(folder, drafter=None).stop_tokens


def test_ends_are_those_of_all_files_together(tmp_path: Path) -> None:
    text = json.loads((EMBEDDED / "target" / "config.json").read_text())["text_config"]
    found = ends_of(edited(
        tmp_path / "all", generation_config={"eos_token_id": 11},
        config={"eos_token_id": [12, 10**6, -1], "text_config": text | {"eos_token_id": 13}}))  # fmt: skip
    assert found == {1, 5, 11, 12, 13}  # 1: the tokenizer's, 5: the template's; others can never come
    only = edited(tmp_path / "only", generation_config=None,
                  config={"eos_token_id": None, "text_config": text | {"eos_token_id": None}})  # fmt: skip
    assert ends_of(only) == {1, 5}


@pytest.mark.parametrize("value", [True, [True], "5", [[5]], 5.0, {"a": 5}])
@pytest.mark.parametrize("file", ["generation_config", "config"])
def test_ends_are_whole_numbers(tmp_path: Path, file: str, value: Any) -> None:
    with pytest.raises(mlx_mtp.CheckpointError, match="whole numbers as 'eos_token_id'"):
        ends_of(edited(tmp_path / "x", **{file: {"eos_token_id": value}}))


def test_a_reply_ends_where_only_the_template_says_so(folders: dict[str, Path]) -> None:
    ours, theirs = both(folders["byte level"])
    hello = ours.encode("hello world", special=False)
    start, end = ours.chat([{"role": "user", "content": "?"}])[-1], SPECIAL.index("<|im_end|>")
    engine = chain(ours, [start, *hello, end, 7], len(theirs), stop_tokens=ours.stop_tokens)
    result = engine.generate("?", max_tokens=30)
    assert (result.text, result.finish_reason) == ("hello world", "stop")


# Thinking: one default

SWITCH = CHATML.replace(
    "assistant\n", "assistant\n{% if NAME is defined and NAME is false %}<think>\n\n</think>\n\n{% endif %}"
)
LEVELS = "{{ 'Reasoning: ' + (reasoning_effort or 'medium') }}" + CHATML
OPENED = CHATML.replace("assistant\n", "assistant\n<think>\n")
QUESTION = [{"role": "user", "content": "Why?"}]
EMPTY = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


@pytest.mark.parametrize("switch", ["enable_thinking", "thinking"])
def test_thinking_is_off_unless_it_is_asked_for(tmp_path: Path, switch: str) -> None:
    ours, theirs = both(write(tmp_path, byte_level(), SWITCH.replace("NAME", switch)))
    off, on = ours.chat(QUESTION), ours.chat(QUESTION, thinking=True)
    assert ours.decode(off).endswith(EMPTY) and ours.decode(on).endswith("<|im_start|>assistant\n") and ours.can_think
    engine, seen = chain(ours, [1, 2], len(theirs)), []

    def spy(ids: list[int]) -> list[int]:
        seen.append(ids)
        return ids

    engine._checked = spy  # type: ignore[method-assign]
    engine.generate("Why?", max_tokens=1)
    engine.generate(QUESTION, max_tokens=1)
    list(engine.chat().send("Why?", max_tokens=1))
    assert seen == [off] * 3
    engine.generate("Why?", max_tokens=1, thinking=True)
    list(engine.chat(thinking=True).send("Why?", max_tokens=1))
    assert seen[3:] == [on] * 2
    for wrong in ({"prompt": [1, 2]}, {"prompt": "x", "raw": True}):
        with pytest.raises(mlx_mtp.OptionError, match="thinking only with"):
            engine.generate(**wrong, thinking=True)  # type: ignore[arg-type]


def test_thinking_is_refused_where_nothing_can_ask_for_it(folders: dict[str, Path]) -> None:
    ours, theirs = both(folders["byte level"])
    with pytest.raises(mlx_mtp.OptionError, match="thinking only with"):
        chain(ours, [1, 2], len(theirs)).generate("Why?", thinking=True)
    assert not ours.can_think


def test_what_is_trained_is_what_is_used(tmp_path: Path) -> None:
    from mlx_mtp.training.prompts import prompts_of

    folder = write(tmp_path, byte_level(), SWITCH.replace("NAME", "enable_thinking"))
    ours, theirs = both(folder)
    end = SPECIAL.index("</s>")
    for answer in ("So.", "  So.\n"):
        said = [*QUESTION, {"role": "assistant", "content": answer}]
        packed = pack([Document("m", messages=said)], theirs).tolist()
        prompt = ours.chat(QUESTION)
        assert packed[: len(prompt)] == prompt
        assert ours.decode(packed[len(prompt) : -1]).strip() == "So.<|im_end|>" or answer != "So."
        assert packed[-1] == end
    found = prompts_of(iter([Document("m", messages=said)] * 4), ours, 256)
    assert found == [prompt] * 4


def test_levels_reach_the_templates_that_know_them(tmp_path: Path) -> None:
    ours, _ = both(write(tmp_path / "levels", byte_level(), LEVELS))
    shown = {effort: ours.decode(ours.chat(QUESTION, effort=effort)).partition("<|im_start|>")[0]
             for effort in (None, "minimal", "low", "high")}  # fmt: skip
    assert shown == {None: "Reasoning: medium", "minimal": "Reasoning: minimal", "low": "Reasoning: low",
                     "high": "Reasoning: high"}  # fmt: skip
    ours, _ = both(write(tmp_path / "none", byte_level()))
    assert ours.chat(QUESTION, effort="high") == ours.chat(QUESTION)  # documented: without effect


def test_a_template_that_opens_thoughts_by_itself(tmp_path: Path) -> None:
    ours, _ = both(write(tmp_path, byte_level(), OPENED))
    ids = ours.chat(QUESTION)
    assert ours.can_think and ours.opened_thought(ids) == "<think>"


# What a template drops

CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
TOOL = {"type": "function", "function": {"name": "now", "description": "", "parameters": {"type": "object"}}}
CALLED: list[dict[str, Any]] = [
    *QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "name": "now", "content": "noon"}, *QUESTION,
]  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
MERGED = (  # Gemma 3's way with a system turn
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}{% set said = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set said = messages %}{% endif %}{% for m in said %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ (first if loop.first else '') + m.content | trim }}<|im_end|>\n{% endfor %}"
)
ONLY_FIRST_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)
TWO_ROLES = "{% for m in messages if m.role in ['user', 'assistant'] %}[{{ m.role }}]{{ m.content }}{% endfor %}"
CALLS = (
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}{% endfor %}"
)
FIRST_CALL = CALLS.replace("{% for call in m.tool_calls or [] %}", "{% for call in (m.tool_calls or [])[:1] %}")
DROPPED = {  # template, messages, tools, what is refused
    "a system turn": (TWO_ROLES, [SYSTEM, *QUESTION], None, "no system message:"),
    "a later system turn": (ONLY_FIRST_SYSTEM, [*QUESTION, SYSTEM, *QUESTION], None, "no system message after another"),
    "tools": (CHATML, QUESTION, [TOOL], "no tools:"),
    "calls": (CHATML, CALLED, None, "no tool_calls:"),
    "answers of tools": (TWO_ROLES + "{% for m in messages %}{{ m.tool_calls }}{% endfor %}", CALLED, None,
                         "no tool message:"),
    "a second call": (FIRST_CALL, [*QUESTION, {**CALLED[1], "tool_calls": [CALL, CALL | {"id": "d"}]}], None,
                      "no tool_calls:"),
    "a role of another's": (TWO_ROLES, [{"role": "critic", "content": "x"}, *QUESTION], None, "no critic message:"),
}  # fmt: skip
KEPT = {
    "a merged system turn": (MERGED, [SYSTEM, *QUESTION], None),
    "a system turn": (CHATML, [SYSTEM, *QUESTION], None),
    "tools, calls and answers": (CALLS, CALLED, [TOOL, TOOL]),
    "names and earlier thoughts": (CHATML, [
        {"role": "user", "name": "Ada", "content": "Why?"},
        {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}, *QUESTION], None),
}  # fmt: skip


@pytest.mark.parametrize("name", DROPPED)
def test_what_a_template_drops_is_refused(tmp_path: Path, name: str) -> None:
    template, messages, tools, words = DROPPED[name]
    ours, theirs = both(write(tmp_path, byte_level(), template))
    theirs.apply_chat_template(messages, tools=tools, tokenize=False)  # the template itself says nothing
    for _ in range(2):
        with pytest.raises(mlx_mtp.PromptError, match=words):
            ours.chat(messages, tools=tools)
    ours.chat(QUESTION)
    if not tools:
        with pytest.raises(mlx_mtp.DataError, match=f"file, line 3: .*{words}"):
            pack([Document("file, line 3", messages=messages)], theirs)


@pytest.mark.parametrize("name", KEPT)
def test_what_a_template_keeps_is_rendered(tmp_path: Path, name: str) -> None:
    template, messages, tools = KEPT[name]
    ours, theirs = both(write(tmp_path, byte_level(), template))
    expected = theirs.apply_chat_template(messages, tools=tools, add_generation_prompt=True, return_dict=False)
    assert ours.chat(messages, tools=tools) == expected


def test_a_template_that_refuses_says_so(tmp_path: Path) -> None:
    ours, _ = both(write(tmp_path, byte_level(), MERGED))
    with pytest.raises(mlx_mtp.PromptError, match="roles must alternate"):
        ours.chat([*QUESTION, *QUESTION])


def test_each_kind_of_part_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = both(write(tmp_path, byte_level(), CALLS))
    rendered: list[int] = []
    inner = ours._rendered
    monkeypatch.setattr(ours, "_rendered", lambda *given, **more: rendered.append(1) or inner(*given, **more))
    ours.chat(CALLED * 8, tools=[TOOL])
    first = len(rendered)
    ours.chat(CALLED * 8, tools=[TOOL])
    assert first < 12 and len(rendered) == first + 1


@pytest.mark.parametrize(
    "content", [None, 7, {"text": "x"}, [{"type": "image_url", "image_url": "x"}], [{"type": "text"}], ["x"]]
)
def test_a_message_is_text(folders: dict[str, Path], content: Any) -> None:
    ours, _ = both(folders["byte level"])
    with pytest.raises(mlx_mtp.PromptError, match="content of messages as text"):
        ours.chat([{"role": "user", "content": content}])
    for wrong in ({"content": "x"}, {"role": 1, "content": "x"}, "x"):
        with pytest.raises(mlx_mtp.PromptError, match="give each a role"):
            ours.chat([wrong])  # type: ignore[list-item]


def test_parts_of_text_are_lines_of_one(folders: dict[str, Path]) -> None:
    ours, _ = both(folders["byte level"])
    parts = [{"type": "text", "text": "Why"}, {"type": "text", "text": "so?"}]
    assert ours.chat([{"role": "user", "content": parts}]) == ours.chat([{"role": "user", "content": "Why\nso?"}])


def test_a_chat_with_a_dropped_instruction_is_refused(tmp_path: Path) -> None:
    ours, theirs = both(write(tmp_path, byte_level(), TWO_ROLES))
    chat = chain(ours, [1, 2], len(theirs)).chat(system="Be brief.")
    with pytest.raises(mlx_mtp.PromptError, match="no system message"):
        chat.send("Why?")
    assert chat.messages == [SYSTEM]
