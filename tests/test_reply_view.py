"""Replies on a terminal: what is there at the end does not depend on how the text came; nothing is written twice."""

from __future__ import annotations

import io
import re

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlx_mtp import Event
from mlx_mtp.cli import reply_view
from mlx_mtp.cli.markdown import CODE, PART_LINES, Blocks
from mlx_mtp.cli.reply_view import MarkdownView, PlainView, Tail

SAMPLE = """# Title with `code`

A paragraph with **bold**, *em*, a [link](https://example.com/x?y=1), <T> and <b>html</b>,
that goes on in the next line and is long enough to wrap around at eighty columns for certain.

1. First item with a long text that wraps at forty columns, surely
   continued here
2. Second:
   - nested one

   ```sh
   echo "hi"

   ls
   ```

3. Third
```python
def f(x):
    '''Doc.

    More.'''

    return x  # a very long line that must be wrapped when the terminal only has forty columns
```
4. Fourth

Setext
======

| a | b |
|---|---:|
| a longer cell | 22222 |

> quote

---
Plain text
- bullet right below
lazy line

10) ten

~~~
tilde ``` inside
~~~

日本語 text and an unclosed **bold and `code"""
THOUGHT = "The user wants\nthe thing.\n\nSo I do it"


class Terminal(io.StringIO):
    """Everything written goes to a terminal of this size."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(columns, rows, history=10_000, ratio=0.001)
        self.feeder, self.raw = pyte.Stream(self.screen), ""
        self.console = Console(
            file=self, force_terminal=True, width=columns, height=rows, color_system="256", emoji=False, markup=False,
            highlight=False,
        )  # fmt: skip

    def write(self, text: str) -> int:
        self.raw += text
        self.feeder.feed(text.replace("\n", "\r\n"))
        return len(text)

    def isatty(self) -> bool:
        return True

    @property
    def rows(self) -> list[str]:
        """Everything there is to see, what has left the screen included."""
        columns = range(self.screen.columns)
        gone = ["".join(line[x].data for x in columns).rstrip() for line in self.screen.history.top]
        return "\n".join([*gone, *(row.rstrip() for row in self.screen.display)]).rstrip().split("\n")


@pytest.fixture(autouse=True)
def draw_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply_view, "INTERVAL", 0.0)
    monkeypatch.setattr(reply_view, "REST", 0.0)


def shown(parts: list[str], columns: int = 80, rows: int = 200, thoughts: str = "", thinking: str = "show") -> Terminal:
    terminal = Terminal(columns, rows)
    view = MarkdownView(terminal.console, thinking, len)
    for part in thoughts:
        view.show(Event("", [], thinking=part))
    for part in parts:
        view.show(Event(part, []))
    view.close()
    terminal.console.print("END")
    assert view.thoughts == thoughts
    return terminal


@pytest.mark.parametrize("columns", [24, 40, 80])
def test_how_the_text_comes_does_not_matter(columns: int) -> None:
    expected = shown([SAMPLE], columns).rows
    assert expected[-1] == "END"
    for step in (1, 3, 50):
        parts = [SAMPLE[i : i + step] for i in range(0, len(SAMPLE), step)]
        assert shown(parts, columns).rows == expected


@settings(max_examples=25, deadline=None)
@given(st.sets(st.integers(0, len(SAMPLE)), max_size=60))
def test_any_cut(cuts: set[int]) -> None:
    places = [0, *sorted(cuts), len(SAMPLE)]
    parts = [SAMPLE[a:b] for a, b in zip(places, places[1:], strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reply_view, "INTERVAL", 0.0)
        patch.setattr(reply_view, "REST", 0.0)
        assert shown(parts).rows == shown([SAMPLE]).rows


@pytest.mark.parametrize("rows", [4, 10])
def test_on_a_low_screen_nothing_is_lost_or_doubled(rows: int) -> None:
    """But for a table, whose columns widen after its first rows have left the screen."""
    text = SAMPLE.replace("| a longer cell | 22222 |", "| 1 | 2 |")
    assert shown(list(text), 80, rows).rows == shown([text]).rows


def test_every_word_is_there() -> None:
    words = re.findall(r"[\w']+", " ".join(shown(list(SAMPLE)).rows))
    # Code inside a list item does not show its fence.
    assert [word for word in re.findall(r"[\w']+", SAMPLE) if word not in words] == ["sh"]


def test_a_growing_line_is_not_drawn_anew_for_every_piece() -> None:
    """Only where a word moves to the next row is the row before written again."""
    text = " ".join(f"word{i}" for i in range(100))
    terminal = shown(list(text))
    assert len(terminal.raw) < 2.2 * len(text)


def test_finished_blocks_are_left_alone() -> None:
    text = "\n\n".join(f"Paragraph {i} with **bold** text." for i in range(30))
    raw = shown(list(text)).raw
    assert raw.count("Paragraph 7 ") <= 3 and raw.count("Paragraph 29 ") <= 3


def test_long_code_is_finished_in_parts_but_never_inside_a_string() -> None:
    string = ['"""', *(f"text {i}" for i in range(70)), '"""']
    body = [*(f"x{i} = {i}" for i in range(PART_LINES - 8)), *string, "y = 1"]
    text = "```python\n" + "\n".join(body) + "\n" + "\n".join(f"z{i} = 1" for i in range(60)) + "\n```\nEnd"
    blocks = Blocks()
    found = [block for line in text.splitlines(True) for block in blocks.feed(line)] + blocks.finish()
    code = [block for block in found if block.kind == CODE]
    assert len(code) > 2 and [block.opens for block in code] == [True] + [False] * (len(code) - 1)
    assert [block.closes for block in code] == [False] * (len(code) - 1) + [True]
    assert "\n".join(block.text for block in code) == "\n".join(text.split("\n")[1:-2])
    assert all(block.text.count('"""') % 2 == 0 for block in code)
    assert shown(list(text)).rows == ["```python", *text.split("\n")[1:-2], "```", "", "End", "END"]


@pytest.mark.parametrize("language", ["", "nosuchlanguage", "text"])
def test_code_in_any_language(language: str) -> None:
    lines = [f"line {i}" if i % 5 else "" for i in range(2 * PART_LINES)] + ["", "last"]
    text = f"```{language}\n" + "\n".join(lines) + "\n```"
    assert shown(list(text)).rows == [f"```{language}", *lines, "```", "END"]


@settings(max_examples=150, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("a `~#*-+>|1.)\n\t<&_[](=ö日")), max_size=80))
def test_no_text_breaks_the_blocks(text: str) -> None:
    whole, split = Blocks(), Blocks()
    first = whole.feed(text) + whole.finish()
    second = []
    for letter in text:
        second += split.feed(letter)
        split.open()
    assert second + split.finish() == first
    terminal = Terminal(20, 50)
    view = MarkdownView(terminal.console, "off", len)
    view.show(Event(text, []))
    view.close()


def test_thoughts_shown_hidden_and_counted() -> None:
    rows = shown(["Yes."], thoughts=THOUGHT).rows
    assert rows == ["│ The user wants", "│ the thing.", "│", "│ So I do it", "", "Yes.", "END"]
    count = f"thought for {len(THOUGHT)} tokens"
    assert shown(["Yes."], thoughts=THOUGHT, thinking="hide").rows == [count, "Yes.", "END"]
    assert shown([], thoughts=THOUGHT, thinking="off").rows == [count, "END"]


def test_the_terminal_is_not_steered_by_the_model() -> None:
    terminal = shown(["\x1b[2J\x1b]0;title\x07 a\x08\x9b5m\rb"])
    assert "\x1b[2J" not in terminal.raw and "\x07" not in terminal.raw and "\x9b" not in terminal.raw
    assert "␛[2J" in terminal.rows[0] and terminal.rows[-1] == "END"
    for isatty, expected in ((True, "␛[2J"), (False, "\x1b[2J")):
        stream = Terminal(80, 5) if isatty else io.StringIO()
        view = PlainView(stream, "off", len, lambda text: None)
        view.show(Event("\x1b[2J", []))
        view.close()
        assert (stream.raw if isinstance(stream, Terminal) else stream.getvalue()) == expected + "\n"


def test_a_terminal_that_changes_its_size_in_mid_reply() -> None:
    terminal = Terminal(80, 24)
    view = MarkdownView(terminal.console, "off", len)
    text = " ".join(f"word{i:03}" for i in range(60))
    for at, size in ((0, (24, 80)), (1, (24, 30)), (2, (8, 100))):
        terminal.screen.resize(*size)
        terminal.console.height, terminal.console.width = size
        for letter in text[at * 160 : (at + 1) * 160 if at < 2 else None]:
            view.show(Event(letter, []))
    view.close()
    seen = " ".join(terminal.rows)
    assert all(f"word{i:03}" in seen for i in range(30, 60)) and "\n".join(terminal.rows).count("word059") == 1


def test_rows_that_left_the_screen_are_not_written_again() -> None:
    terminal = Terminal(20, 4)
    tail = Tail(terminal.console)
    tail.draw([f"old {i}" for i in range(10)])
    tail.draw([f"new {i}" for i in range(10)])
    tail.end()
    assert terminal.rows == [f"old {i}" for i in range(7)] + [f"new {i}" for i in (7, 8, 9)]
    tail.draw(["one", "two", "three"])
    tail.draw(["one"])
    tail.draw(["one", "four"])
    tail.end()
    assert terminal.rows[-2:] == ["one", "four"]


@pytest.mark.parametrize(
    ("thinking", "expected", "notes"),
    [
        ("show", f"Thinking:\n{THOUGHT}\n\nAnswer:\nYes.\n", []),
        ("hide", "Yes.\n", [f"thought for {len(THOUGHT)} tokens"]),
    ],
)
def test_plain_text(thinking: str, expected: str, notes: list[str]) -> None:
    stream, said = io.StringIO(), []
    view = PlainView(stream, thinking, len, said.append)
    for event in (Event("", [], thinking=THOUGHT[:5]), Event("", [], thinking=THOUGHT[5:]), Event("Yes.", [])):
        view.show(event)
    view.close()
    assert (stream.getvalue(), said, view.thoughts) == (expected, notes, THOUGHT)
