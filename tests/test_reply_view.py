"""Replies on a terminal: what is there at the end does not depend on how the text came; nothing is printed twice."""

import io
import re
from collections.abc import Iterable, Iterator
from itertools import pairwise

import pyte
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from mlx_mtp import Event
from mlx_mtp.cli import reply_view
from mlx_mtp.cli.reply_view import MarkdownView, PlainView, split

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


@pytest.fixture(scope="module", autouse=True)
def draw_always() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TERM", "xterm-256color")
        patch.setattr(reply_view, "INTERVAL", 0.0)
        patch.setattr(reply_view, "REST", 0.0)
        yield


def cut(text: str, size: int) -> list[str]:
    return [text[at : at + size] for at in range(0, len(text), size)]


def shown(
    parts: Iterable[str], columns: int = 80, rows: int = 200, thoughts: str = "", thinking: str = "show"
) -> Terminal:
    """A reply that comes in these parts; every letter of a thought is a token."""
    terminal = Terminal(columns, rows)
    view = MarkdownView(terminal.console, thinking)
    for letter in thoughts:
        view.show(Event("", [1], thinking=letter))
    for part in parts:
        view.show(Event(part, []))
    view.close()
    terminal.console.print("END")
    assert view.thoughts == thoughts
    return terminal


@pytest.mark.parametrize("columns", [24, 80, 120])
@settings(max_examples=5, deadline=None)
@given(st.sets(st.integers(0, len(SAMPLE)), max_size=20))
def test_how_the_text_comes_does_not_matter(columns: int, cuts: set[int]) -> None:
    places = [0, *sorted(cuts), len(SAMPLE)]
    expected = shown([SAMPLE], columns).rows
    assert expected[-1] == "END" and shown([SAMPLE[a:b] for a, b in pairwise(places)], columns).rows == expected


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("a `~#*-+>|1.)\n\t<&_[](=ö日")), max_size=60))
def test_any_text(text: str) -> None:
    """What is cut off early is what would be cut off in the end."""
    assert "\n".join(split(text)) in ("", text)
    assert shown(text, 20, 50).rows == shown([text], 20, 50).rows


@pytest.mark.parametrize("rows", [4, 10])
def test_on_a_low_screen_nothing_is_lost_or_doubled(rows: int) -> None:
    """But for a table, whose columns widen after its first rows have left the screen."""
    text = SAMPLE.replace("| a longer cell | 22222 |", "| 1 | 2 |")
    assert shown(cut(text, 4), 80, rows).rows == shown([text]).rows


def test_every_word_is_there() -> None:
    words = re.findall(r"[\w']+", " ".join(shown([SAMPLE]).rows))
    assert [word for word in re.findall(r"[\w']+", SAMPLE) if word not in words] == []


def test_finished_parts_are_left_alone() -> None:
    raw = shown(cut("\n\n".join(f"Paragraph {i} with **bold** text." for i in range(30)), 8)).raw
    assert max(raw.count(f"Paragraph {i} ") for i in range(30)) < 9  # as it grows, and when it is done


@pytest.mark.parametrize("language", ["", "nosuchlanguage", "text", "python"])
def test_long_code_in_any_language(language: str) -> None:
    lines = ["", "    x = '''", *(f"line {i}" if i % 5 else "" for i in range(60)), "'''", "", "last"]
    text = f"```{language}\n" + "\n".join(lines) + "\n```"
    assert shown(cut(text, 6), rows=20).rows == [f"```{language}", *lines, "```", "END"]


def test_thoughts_shown_hidden_and_counted() -> None:
    rows = shown(["Yes."], 20, thoughts="The user wants the thing.\n\nSo I do it").rows
    assert rows == ["▌ The user wants", "▌ the thing.", "", "▌ So I do it", "", "Yes.", "END"]
    count = f"thought for {len(THOUGHT)} tokens"
    assert shown(["Yes."], thoughts=THOUGHT, thinking="hide").rows == [count, "Yes.", "END"]
    assert shown([], thoughts=THOUGHT, thinking="off").rows == [count, "END"]


def test_the_terminal_is_not_steered_by_the_model() -> None:
    terminal = shown(["\x1b[2J\x1b]0;title\x07 a\x08\x9b5m\rb"])
    assert "\x1b[2J" not in terminal.raw and "\x07" not in terminal.raw and "\x9b" not in terminal.raw
    assert "␛[2J" in terminal.rows[0] and terminal.rows[-1] == "END"
    for isatty, expected in ((True, "␛[2J"), (False, "\x1b[2J")):
        stream = Terminal(80, 5) if isatty else io.StringIO()
        view = PlainView(stream, "off", lambda text: None)
        view.show(Event("\x1b[2J", []))
        view.close()
        assert (stream.raw if isinstance(stream, Terminal) else stream.getvalue()) == expected + "\n"


def test_a_terminal_that_changes_its_size_in_mid_reply() -> None:
    terminal = Terminal(80, 24)
    view = MarkdownView(terminal.console, "off")
    text = " ".join(f"word{i:03}" for i in range(120))
    for at, size in ((0, (24, 80)), (1, (8, 30)), (2, (8, 100)), (3, (20, 40))):
        terminal.screen.resize(*size)
        terminal.console.height, terminal.console.width = size
        for letter in text[at * 240 : (at + 1) * 240]:
            view.show(Event(letter, []))
    view.close()
    seen = "\n".join(terminal.rows)
    assert all(f"word{i:03}" in seen for i in range(60, 120)) and seen.count("word119") == 1


@pytest.mark.parametrize(
    ("thinking", "expected", "notes"),
    [
        ("show", f"Thinking:\n{THOUGHT}\n\nAnswer:\nYes.\n", []),
        ("hide", "Yes.\n", ["thought for 2 tokens"]),
    ],
)
def test_plain_text(thinking: str, expected: str, notes: list[str]) -> None:
    stream, said = io.StringIO(), []
    view = PlainView(stream, thinking, said.append)
    for event in (Event("", [1], thinking=THOUGHT[:5]), Event("", [1], thinking=THOUGHT[5:]), Event("Yes.", [])):
        view.show(event)
    view.close()
    assert (stream.getvalue(), said, view.thoughts) == (expected, notes, THOUGHT)
