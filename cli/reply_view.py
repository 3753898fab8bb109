"""A reply on the screen while it grows: rendered Markdown on a terminal, or plain text.

What it does: shows answers and thoughts as they come, each finished block once; only rows at the end that changed are
written again, and never so often that it would cost the model time. What it does not do: parse Markdown (markdown.py),
or decide when a reply ends (chat.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol, TextIO

from rich.console import Console
from rich.text import Text

from mlx_mtp import Event
from mlx_mtp.cli.markdown import THOUGHT, Block, Blocks, Lines, rows

THINKING = ("show", "hide", "off")
# Least seconds between two drawings, and the multiple of its own time that a drawing must wait for the next.
INTERVAL, REST = 1 / 15, 4.0
# Text of a model must not steer the terminal: control characters appear as their pictures.
CONTROLS: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
CONTROLS |= {13: None, 127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)


class View(Protocol):
    """What shows one reply."""

    @property
    def thoughts(self) -> str:
        """What the model thought, shown or not."""

    def show(self, event: Event) -> None:
        """More of the reply."""

    def close(self) -> None:
        """The reply is over; the cursor is at the start of a line afterwards."""


class Tail:
    """The rows at the end of a terminal's output that may still change. The cursor stays at the end of the last one."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[str] = []
        self._started = False

    def draw(self, fresh: list[str]) -> None:
        """Shows these rows in place of those there are; rows that left the screen stay as they are."""
        old = self._rows
        same = next((i for i, pair in enumerate(zip(old, fresh, strict=False)) if pair[0] != pair[1]), None)
        same = min(len(old), len(fresh)) if same is None else same
        if same == len(fresh) < len(old):  # fewer rows: the last one is written again, for the cursor's sake
            same = max(same - 1, 0)
        start = max(same, len(old) - self._console.height + 1)
        below = fresh[start:] if start == len(old) else fresh[start:] or [""]
        if not below:
            return
        if start == len(old):
            self._write(("\n" if self._started else "") + "\n".join(below))
        elif start == len(old) - 1 and below[0].startswith(old[start]):
            self._write("\n".join(below).removeprefix(old[start]))
        else:
            up = len(old) - 1 - start
            self._write((f"\x1b[{up}A" if up else "") + "\r\x1b[J" + "\n".join(below))
        self._rows, self._started = old[:start] + below, True

    def settle(self, count: int) -> None:
        """The first `count` rows will not change any more."""
        del self._rows[:count]

    def end(self) -> None:
        """Nothing will change any more."""
        if self._started:
            self._write("\n")
        self._rows, self._started = [], False

    def _write(self, text: str) -> None:
        self._console.file.write(text)
        self._console.file.flush()


class _Thoughts:
    """What the model thought; its tokens are counted piece by piece, as they are shown again and again."""

    def __init__(self, count: Callable[[str], int]) -> None:
        self._count, self._text, self._counted, self._tokens = count, list[str](), 0, 0

    def add(self, text: str) -> None:
        self._text.append(text)

    def __str__(self) -> str:
        return "".join(self._text)

    def so_far(self) -> int:
        """About how many tokens there are."""
        self._tokens += self._count("".join(self._text[self._counted :]))
        self._counted = len(self._text)
        return self._tokens

    def summary(self) -> str:
        return f"thought for {self._count(str(self))} tokens"


class MarkdownView:
    """On a terminal. thinking: "show" or anything else; count: how many tokens a text has."""

    def __init__(self, console: Console, thinking: str, count: Callable[[str], int]) -> None:
        self._thoughts = _Thoughts(count)
        self._console, self._shown = console, thinking == "show"
        self._tail, self._blocks = Tail(console), Blocks()
        self._thought_line, self._thinking = Lines(), False
        self._done: list[Block | str] = []  # finished and not drawn yet; a string is a row of its own
        self._before: Block | None = None
        self._next_drawing = 0.0

    @property
    def thoughts(self) -> str:
        """What the model thought."""
        return str(self._thoughts)

    def show(self, event: Event) -> None:
        """More of the reply."""
        if event.thinking:
            self._think(event.thinking.translate(CONTROLS))
        if event.text:
            self._end_thought()
            self._done += self._blocks.feed(event.text.translate(CONTROLS))
        began = time.monotonic()
        if began >= self._next_drawing:
            self._draw(self._blocks.open())
            now = time.monotonic()
            self._next_drawing = now + max(INTERVAL, REST * (now - began))

    def close(self) -> None:
        """The reply is over."""
        self._end_thought()
        self._done += self._blocks.finish()
        self._draw(None)
        self._tail.end()

    def _think(self, text: str) -> None:
        self._thoughts.add(text)
        self._thinking = True
        if self._shown:
            self._done += [Block(THOUGHT, line) for line in self._thought_line.feed(text)]

    def _end_thought(self) -> None:
        if not self._thinking:
            return
        self._thinking = False
        if not self._shown:
            self._done.append(self._quiet(self._thoughts.summary()))
        elif line := self._thought_line.take():
            self._done.append(Block(THOUGHT, line))

    def _quiet(self, text: str) -> str:
        with self._console.capture() as capture:
            self._console.print(Text(text, style="dim"), end="")
        return capture.get()

    def _draw(self, unfinished: Block | None) -> None:
        fresh: list[str] = []
        for done in self._done:
            fresh += [done] if isinstance(done, str) else self._spaced(done)
            if not isinstance(done, str):
                self._before = done
        self._done, settled = [], len(fresh)
        if self._thinking and not self._shown:
            fresh.append(self._quiet(f"thinking: {self._thoughts.so_far()} tokens"))
        elif self._thinking and (line := self._thought_line.last):
            fresh += self._spaced(Block(THOUGHT, line))
        elif unfinished is not None:
            fresh += self._spaced(unfinished)
        self._tail.draw(fresh)
        self._tail.settle(settled)

    def _spaced(self, block: Block) -> list[str]:
        return ([] if block.follows(self._before) else [""]) + rows(self._console, block)


class PlainView:
    """Anywhere: the text as it is. On a terminal its control characters are made visible.

    note: where a hidden thought is mentioned; None = nowhere.
    """

    def __init__(self, stream: TextIO, thinking: str, count: Callable[[str], int], note: Callable[[str], None]) -> None:
        self._thoughts = _Thoughts(count)
        self._stream, self._shown, self._note = stream, thinking == "show", note
        self._table: dict[int, int | None] = CONTROLS if stream.isatty() else {}
        self._thinking, self._last = False, "\n"

    @property
    def thoughts(self) -> str:
        """What the model thought."""
        return str(self._thoughts)

    def show(self, event: Event) -> None:
        """More of the reply."""
        if event.thinking:
            if self._shown and not self._thinking:
                self._write("Thinking:\n")
            self._thinking = True
            self._thoughts.add(event.thinking)
            if self._shown:
                self._write(event.thinking)
        if event.text:
            self._end_thought()
            self._write(event.text)

    def close(self) -> None:
        """The reply is over."""
        self._end_thought()
        if self._last != "\n":
            self._write("\n")

    def _end_thought(self) -> None:
        if self._thinking and self._shown:
            self._write(("" if self._last == "\n" else "\n") + "\nAnswer:\n")
        elif self._thinking:
            self._note(self._thoughts.summary())
        self._thinking = False

    def _write(self, text: str) -> None:
        print(text.translate(self._table), end="", file=self._stream, flush=True)
        self._last = text[-1:] or self._last
