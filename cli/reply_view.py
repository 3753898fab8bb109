"""A reply on the screen while it grows: rendered Markdown on a terminal, or plain text.

Markdown is rich's, with nothing of the text dropped, cut into its blocks. Finished ones are printed for good; only the
one that still grows is written again, never so often that it would cost the model time.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TextIO

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import CodeBlock, Markdown, MarkdownElement
from rich.segment import Segment, SegmentLines
from rich.syntax import Syntax
from rich.text import Text

from mlx_mtp import Event

THINKING = ("show", "hide", "off")
# Least seconds between two drawings, and the multiple of its own time that a drawing must wait for the next.
INTERVAL, REST = 1 / 15, 9.0
# Text of a model must not steer the terminal: control characters appear as their pictures.
CONTROLS: dict[int, int | None] = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
CONTROLS |= {13: None, 127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD)
# HTML and the addresses of reference links stay in the text as they were written.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")
TEXT, THOUGHT, HIDDEN = "text", "thought", "hidden thought"
Row = list[Segment]


def split(text: str) -> list[str]:
    """The text cut where its blocks begin; later lines change nothing but the last of them."""
    starts = [token.map[0] for token in PARSER.parse(text) if token.map and token.level == 0]
    lines = text.split("\n")
    cuts = [0, *starts[1:], len(lines)]
    return ["\n".join(lines[cuts[i] : cuts[i + 1]]) for i in range(len(starts))]


class _Code(CodeBlock):
    """Code between its fences, so that it is told apart without colours and in what is copied; no background."""

    fence = ""  # where the code is only indented

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _Code:
        block = cls(token.info.partition(" ")[0], "ansi_dark")
        block.fence = token.markup
        return block

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code, language = str(self.text).removesuffix("\n"), self.lexer_name
        yield Text(self.fence + language, style="dim")
        if code:
            yield Syntax(code, language or "text", theme=self.theme, background_color="default", word_wrap=True)
        yield Text(self.fence, style="dim")


class ReplyMarkdown(Markdown):
    """Markdown as replies have it; links show their addresses."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = Markdown.elements | {"fence": _Code, "code_block": _Code}

    def __init__(self, markup: str, style: str = "none") -> None:
        super().__init__("", style=style, hyperlinks=False)
        self.parsed = PARSER.parse(markup)


class View(ABC):
    """What shows one reply. thoughts: what the model thought, shown or not."""

    def __init__(self, thinking: str) -> None:
        self.thoughts = ""
        self._thought = THOUGHT if thinking == "show" else HIDDEN
        self._thought_tokens = 0

    def show(self, event: Event) -> None:
        """More of the reply."""
        if event.thinking:
            self.thoughts += event.thinking
            self._thought_tokens += len(event.tokens)
            self._take(self._thought, event.thinking)
        if event.text:
            self._take(TEXT, event.text)

    @abstractmethod
    def close(self) -> None:
        """The reply is over; the cursor is at the start of a line afterwards."""

    @abstractmethod
    def _take(self, kind: str, text: str) -> None: ...


class MarkdownView(View):
    """On a terminal, whose size may change."""

    def __init__(self, console: Console, thinking: str) -> None:
        super().__init__(thinking)
        self._console = console
        self._live = Live(console=console, auto_refresh=False, transient=True, vertical_overflow="visible")
        self._kind, self._text = "", ""  # what comes in, and all of it that may still change
        self._done: list[tuple[str, str]] = []  # finished and not printed yet: kind and text
        self._gap = False  # whether an empty row comes before the next block
        self._next_drawing = 0.0

    def show(self, event: Event) -> None:
        super().show(event)
        began = time.monotonic()
        if began >= self._next_drawing:
            self._draw()
            now = time.monotonic()
            self._next_drawing = now + max(INTERVAL, REST * (now - began))

    def close(self) -> None:
        self._finish()
        self._draw()
        self._live.stop()

    def _take(self, kind: str, text: str) -> None:
        if kind != self._kind:
            self._finish()
            self._kind = kind
        self._text += text.translate(CONTROLS)

    def _finish(self) -> None:
        """Nothing can follow what there is."""
        hidden = self._kind == HIDDEN
        parts = [f"thought for {self._thought_tokens} tokens"] if hidden else split(self._text)
        self._done += [(self._kind, part) for part in parts]
        self._kind, self._text = "", ""

    def _open(self) -> str:
        """Moves what is finished out of the text; the block that is open."""
        if self._kind == HIDDEN:
            return f"thinking: {self._thought_tokens} tokens"
        done = split(self._text.rpartition("\n")[0])[:-1]  # the last line may yet become anything
        self._done += [(self._kind, part) for part in done]
        self._text = self._text[sum(len(part) + 1 for part in done) :]
        return self._text

    def _draw(self) -> None:
        """Prints what is finished; below it shows the open block, the end of it where it is higher than the screen."""
        still_open, rows = self._open(), list[Row]()
        for kind, text in self._done:
            found = self._rows(kind, text)
            rows += found
            self._gap = (self._gap or bool(found)) and kind != HIDDEN
        self._done = []
        shown = self._rows(self._kind, still_open)[1 - self._console.height :]
        self._live.start()
        with self._console:  # what is written leaves in one go
            if rows:
                self._live.update("", refresh=True)
                self._console.print(SegmentLines(rows, new_lines=True))
            self._live.update(SegmentLines(shown, new_lines=True), refresh=True)

    def _rows(self, kind: str, text: str) -> list[Row]:
        """A block as rows of this terminal, with an empty one before it where another block is above."""
        if kind == HIDDEN:
            return self._console.render_lines(Text(text, style="dim"), pad=False)
        quoted = "> " + text.replace("\n", "\n> ")  # its bar makes a thought look like one without colours too
        markdown = ReplyMarkdown(quoted, style="dim") if kind == THOUGHT else ReplyMarkdown(text)
        rows = [_trimmed(row) for row in self._console.render_lines(markdown, pad=False)]
        filled = [i for i, row in enumerate(rows) if row]  # tables come with empty rows of their own
        return [*([[]] if self._gap else []), *rows[filled[0] : filled[-1] + 1]] if filled else []


def _trimmed(row: Row) -> Row:
    """Without spaces at its end, which would wrap once the terminal is made narrower."""
    while row and not row[-1].text.strip():
        row = row[:-1]
    return [*row[:-1], Segment(row[-1].text.rstrip(), row[-1].style)] if row else row


class PlainView(View):
    """The text as it is, but for control characters on a terminal. note: where a hidden thought is mentioned."""

    def __init__(self, stream: TextIO, thinking: str, note: Callable[[str], None]) -> None:
        super().__init__(thinking)
        self._stream, self._note = stream, note
        self._table: dict[int, int | None] = CONTROLS if stream.isatty() else {}
        self._kind, self._last = TEXT, "\n"

    def close(self) -> None:
        self._take(TEXT, "" if self._last == "\n" and self._kind != THOUGHT else "\n")

    def _take(self, kind: str, text: str) -> None:
        if kind != self._kind and kind == THOUGHT:
            text = f"Thinking:\n{text}"
        elif kind != self._kind and self._kind == THOUGHT:
            text = ("" if self._last == "\n" else "\n") + f"\nAnswer:\n{text}"
        elif kind != self._kind and self._kind == HIDDEN:
            self._note(f"thought for {self._thought_tokens} tokens")
        self._kind = kind
        if kind != HIDDEN:
            print(text.translate(self._table), end="", file=self._stream, flush=True)
            self._last = text[-1:] or self._last
