"""A reply on the screen while it grows: rendered Markdown on a terminal, or plain text.

Finished parts are printed for good; only the part that still grows is written again, and never so often that it would
cost the model time.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from mlx_mtp import Event
from mlx_mtp.cli.markdown import UNDECIDED, ReplyMarkdown, split

THINKING = ("show", "hide", "off")
# Least seconds between two drawings, and the multiple of its own time that a drawing must wait for the next.
INTERVAL, REST = 1 / 15, 9.0
# Text of a model must not steer the terminal: control characters appear as their pictures.
CONTROLS: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
CONTROLS |= {13: None, 127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
TEXT, THOUGHT, NOTE = "text", "thought", "note"
Row = list[Segment]


class View(ABC):
    """What shows one reply."""

    def __init__(self, thinking: str) -> None:
        self._shown = thinking == "show"
        self._thoughts: list[str] = []
        self._thought_tokens = 0

    @property
    def thoughts(self) -> str:
        """What the model thought, shown or not."""
        return "".join(self._thoughts)

    def show(self, event: Event) -> None:
        """More of the reply."""
        if event.thinking:
            self._thoughts.append(event.thinking)
            self._thought_tokens += len(event.tokens)
            self._take(event.thinking, thought=True)
        if event.text:
            self._take(event.text, thought=False)

    @abstractmethod
    def close(self) -> None:
        """The reply is over; the cursor is at the start of a line afterwards."""

    @abstractmethod
    def _take(self, text: str, thought: bool) -> None: ...

    def _summary(self) -> str:
        return f"thought for {self._thought_tokens} tokens"


@dataclass(frozen=True)
class Block:
    """A block of Markdown; item: or an item of a list."""

    kind: str
    text: str
    item: bool = False

    def rows(self, console: Console, before: Block | None) -> list[Row]:
        """It as rows of this terminal, below the part before; an empty row comes between most parts."""
        if self.kind == NOTE:
            return console.render_lines(Text(self.text, style="dim"), pad=False)
        quoted = "> " + self.text.replace("\n", "\n> ")  # its bar makes a thought look like one without colours too
        markdown = ReplyMarkdown(quoted, style="dim") if self.kind == THOUGHT else ReplyMarkdown(self.text)
        rows = [_trimmed(row) for row in console.render_lines(markdown, pad=False)]
        filled = [i for i, row in enumerate(rows) if row]  # tables come with empty rows of their own
        rows = rows[filled[0] : filled[-1] + 1] if filled else []
        close = before is None or before.kind == NOTE or (before.kind == self.kind and before.item and self.item)
        return rows if close or not rows else [[], *rows]


def _trimmed(row: Row) -> Row:
    """Without spaces at its end, which would wrap once the terminal is made narrower."""
    while row and not row[-1].text.strip():
        row = row[:-1]
    return [*row[:-1], Segment(row[-1].text.rstrip(), row[-1].style)] if row else row


def _characters(rows: list[Row]) -> int:
    return sum(len("".join(segment.text.split())) for row in rows for segment in row)


class MarkdownView(View):
    """On a terminal, whose size may change."""

    def __init__(self, console: Console, thinking: str) -> None:
        super().__init__(thinking)
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible")
        self._kind, self._text = "", ""  # what comes in, and all of it that may still change
        self._done: list[Block] = []  # finished and not printed yet
        self._before: Block | None = None  # printed last
        # Of the open part: characters in rows that left the screen, which are printed already. Rows would not do, as
        # they change with the terminal's width.
        self._gone = 0
        self._next_drawing = 0.0

    def show(self, event: Event) -> None:
        """More of the reply."""
        super().show(event)
        began = time.monotonic()
        if began >= self._next_drawing:
            self._draw()
            now = time.monotonic()
            self._next_drawing = now + max(INTERVAL, REST * (now - began))

    def close(self) -> None:
        """The reply is over."""
        self._finish()
        self._draw()
        self._live.stop()

    def _take(self, text: str, thought: bool) -> None:
        kind = TEXT if not thought else THOUGHT if self._shown else NOTE
        if kind != self._kind:
            self._finish()
            self._kind = kind
        self._text += text.translate(CONTROLS)

    def _finish(self) -> None:
        """Nothing can follow what there is."""
        self._done += [Block(NOTE, self._summary())] if self._kind == NOTE else self._parts(self._text)
        self._kind, self._text = "", ""

    def _parts(self, text: str) -> list[Block]:
        return [Block(self._kind, part, item) for part, item in split(text)]

    def _cut(self) -> Block:
        """Moves what is finished out of the text; the part that is open."""
        if self._kind in ("", NOTE):
            return Block(self._kind, f"thinking: {self._thought_tokens} tokens" if self._kind else "")
        whole, _, last = self._text.rpartition("\n")
        *done, still_open = self._parts(whole) or [Block(self._kind, "")]
        self._done += done
        self._text = self._text[sum(len(part.text) + 1 for part in done) :]
        return replace(still_open, text=self._text.removesuffix(last) if UNDECIDED.fullmatch(last) else self._text)

    def _draw(self) -> None:
        """Prints what is finished, and the rows of the open part that do not fit on the screen; shows the others."""
        still_open, rows = self._cut(), list[Row]()
        for part in self._done:
            rows += self._left(part)
            self._before, self._gone = part, 0
        self._done = []
        left = self._left(still_open)
        gone = max(0, len(left) - self._console.height + 1)
        while 0 < gone < len(left) and not left[gone - 1]:  # an empty row has no characters to know it by
            gone += 1
        self._gone += _characters(left[:gone])
        rows += left[:gone]
        self._live.start()
        with self._console:  # what is written leaves in one go
            if rows:
                self._live.update(_segments([]), refresh=True)
                self._console.print(_segments([*rows, []]))
            self._live.update(_segments(left[gone:]), refresh=True)

    def _left(self, part: Block) -> list[Row]:
        """Its rows that are not printed yet."""
        rows, gone = part.rows(self._console, self._before), self._gone
        while rows and 0 < gone >= _characters(rows[:1]):
            gone -= _characters(rows[:1])
            del rows[0]
        return rows


def _segments(rows: list[Row]) -> Segments:
    """Rows with line ends between them."""
    return Segments([segment for i, row in enumerate(rows) for segment in ([Segment.line()] if i else []) + row])


class PlainView(View):
    """Anywhere: the text as it is. On a terminal its control characters are made visible.

    note: where a hidden thought is mentioned.
    """

    def __init__(self, stream: TextIO, thinking: str, note: Callable[[str], None]) -> None:
        super().__init__(thinking)
        self._stream, self._note = stream, note
        self._table: dict[int, int | None] = CONTROLS if stream.isatty() else {}
        self._thinking, self._last = False, "\n"

    def close(self) -> None:
        """The reply is over."""
        self._end_thought()
        if self._last != "\n":
            self._write("\n")

    def _take(self, text: str, thought: bool) -> None:
        if not thought:
            self._end_thought()
        elif not self._thinking:
            self._thinking = True
            text = f"Thinking:\n{text}"
        if self._shown or not thought:
            self._write(text)

    def _end_thought(self) -> None:
        if self._thinking and self._shown:
            self._write(("" if self._last == "\n" else "\n") + "\nAnswer:\n")
        elif self._thinking:
            self._note(self._summary())
        self._thinking = False

    def _write(self, text: str) -> None:
        print(text.translate(self._table), end="", file=self._stream, flush=True)
        self._last = text[-1:] or self._last
