"""Markdown while it streams: cut into blocks that no later text can change, and each of them rendered for a terminal.

What it does: finds the ends of paragraphs, list items, tables and code as lines come in, long code in parts, and turns
a block into rows of at most the terminal's width. What it does not do: write to the terminal (reply_view.py), or
follow what spans blocks (reference links).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from markdown_it import MarkdownIt
from pygments.lexer import Lexer
from pygments.lexers import get_lexer_by_name
from pygments.token import Comment, String
from pygments.util import ClassNotFound
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text

FENCE = re.compile(r"( *)(`{3,}(?=[^`]*$)|~{3,})\s*([\w+#.-]*)")
ITEM = re.compile(r"( *)([-*+]|\d{1,9}[.)])( +)(?=\S)")
HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
RULE = re.compile(r" {0,3}([-*_])( *\1){2,}\s*$")
# A last line of these alone may yet become anything; it is not shown before it is known what.
UNDECIDED = re.compile(r"\s*(?:[`~#>|=*+_-]*|\d{1,9}[.)]?)\s*")
PADDING = re.compile(r"(?<! )(?: |\x1b\[[0-9;]*m +\x1b\[0m)+$")
# Long code is finished in parts of at least so many lines, and the place for a cut is looked for this often.
PART_LINES, STRIDE = 40, 20
TEXT, LIST_ITEM, CODE, THOUGHT = "text", "list item", "code", "thought"


@dataclass(frozen=True)
class Block:
    """A piece of a reply. Of code that is shown in parts, the first one opens the fence and the last one closes it."""

    kind: str
    text: str
    language: str = ""
    opens: bool = True
    closes: bool = True

    def follows(self, before: Block | None) -> bool:
        """Whether it comes right below the block before, without an empty row."""
        if before is None or not self.opens:
            return True
        return self.kind == before.kind and self.kind in (LIST_ITEM, THOUGHT)


class Lines:
    """Whole lines out of text as it comes; the work for a piece does not depend on how long the open line is."""

    def __init__(self) -> None:
        self._open: list[str] = []

    def feed(self, text: str) -> list[str]:
        """Lines that the new text finished, without their ends."""
        first, *more = text.split("\n")
        self._open.append(first)
        if not more:
            return []
        found, self._open = ["".join(self._open), *more[:-1]], more[-1:]
        return found

    @property
    def last(self) -> str:
        """The line that has no end yet."""
        return "".join(self._open)

    def take(self) -> str:
        """The same, which is over then."""
        last, self._open = self.last, []
        return last


class Blocks:
    """Splits one reply."""

    def __init__(self) -> None:
        self._line = Lines()
        self._lines: list[str] = []
        self._fence: str | None = None  # that of the open code
        self._language, self._parts = "", 0
        self._indent: int | None = None  # of what belongs to the open list item
        self._inner: str | None = None  # the fence of code inside that

    def feed(self, text: str) -> list[Block]:
        """Blocks that the new text finished."""
        return [block for line in self._line.feed(text) for block in self._take(line)]

    def open(self, final: bool = False) -> Block | None:
        """What is not finished yet, for showing it; `final` shows a last line that says nothing yet, too."""
        last = self._line.last
        hidden = last == "" or (not final and UNDECIDED.fullmatch(last))
        lines = self._lines if hidden else [*self._lines, last]
        return self._block(lines, closes=False) if lines or self._fence else None

    def finish(self) -> list[Block]:
        """The rest, once nothing can follow."""
        last = self._line.take()
        return (self._take(last) if last else []) + self._close()

    def _block(self, lines: list[str], closes: bool) -> Block:
        if self._fence is not None:
            return Block(CODE, "\n".join(lines), self._language, self._parts == 0, closes)
        return Block(TEXT if self._indent is None else LIST_ITEM, "\n".join(lines))

    def _close(self) -> list[Block]:
        """Ends the open block."""
        found = [self._block(self._lines, closes=True)] if self._fence or any(map(str.strip, self._lines)) else []
        self._lines, self._fence, self._indent, self._inner, self._parts = [], None, None, None, 0
        return found

    def _take(self, line: str) -> list[Block]:
        """A whole line; the blocks it ended."""
        if self._fence is not None:
            if _closes(line, self._fence):
                return self._close()
            self._lines.append(line)
            return self._part()
        if self._indent is not None and (self._inner is not None or _indent(line) >= self._indent or not line.strip()):
            self._inner = _fence_after(line, self._inner)
            self._lines.append(line)
            return []
        fence = FENCE.match(line)
        if fence and len(fence[1]) < 4:
            done = self._close()
            self._fence, self._language = fence[2], fence[3]
            return done
        return self._take_text(line)

    def _take_text(self, line: str) -> list[Block]:
        if not line.strip():
            return self._close()
        item, rule = ITEM.match(line), RULE.match(line)
        in_text = bool(self._lines) and self._indent is None
        if HEADING.match(line) or (rule and not (in_text and rule[1] == "-")):
            return [*self._close(), Block(TEXT, line)]
        if rule:  # under a line of text it makes that a heading
            self._lines.append(line)
            return self._close()
        if item and not (in_text and (len(item[1]) > 3 or item[2] not in ("-", "*", "+", "1.", "1)"))):
            done = self._close()
            self._lines = [line]
            self._indent = len(item[1]) + len(item[2]) + (len(item[3]) if len(item[3]) < 5 else 1)
            return done
        done = self._close() if self._indent is not None and self._lines and not self._lines[-1].strip() else []
        self._lines.append(line)
        return done

    def _part(self) -> list[Block]:
        """The front of long code, up to a line at whose end no string or comment is open."""
        if len(self._lines) < PART_LINES or len(self._lines) % STRIDE:
            return []
        at = _last_clean_line(self._lines, self._language)
        if at == 0:
            return []
        part = self._block(self._lines[:at], closes=False)
        self._lines, self._parts = self._lines[at:], self._parts + 1
        return [part]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _closes(line: str, fence: str) -> bool:
    mark = line.strip()
    return len(mark) >= len(fence) and not mark.strip(fence[0]) and _indent(line) < 4


def _fence_after(line: str, fence: str | None) -> str | None:
    """The fence that is open inside a list item behind this line."""
    if fence is not None:
        mark = line.strip()
        return None if len(mark) >= len(fence) and not mark.strip(fence[0]) else fence
    opened = FENCE.match(line)
    return opened[2] if opened else None


def _lexer(language: str) -> Lexer | None:
    try:
        return get_lexer_by_name(language, stripnl=False, ensurenl=False) if language else None
    except ClassNotFound:
        return None


def _last_clean_line(lines: list[str], language: str) -> int:
    """Number of lines in front of the last line end that belongs to no string and no comment; 0 where all do."""
    lexer, found, seen = _lexer(language), 0, 0
    if lexer is None:
        return len(lines)
    for kind, value in lexer.get_tokens("\n".join(lines) + "\n"):
        ends = value.count("\n")
        seen += ends
        if ends and kind not in String and (kind not in Comment or value == "\n"):
            found = seen
    return min(found, len(lines))


class _Code(CodeBlock):
    """Indented code and code in list items: coloured, without a background that only suits one kind of terminal."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield _coloured(str(self.text).rstrip("\n"), self.lexer_name)


class _Heading(Heading):
    """All at the left."""

    LEVEL_ALIGN: ClassVar = {}


class _Prose(Markdown):
    """Markdown in which nothing is dropped: HTML stays as it was written, and links show their addresses."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements, "fence": _Code, "code_block": _Code, "heading_open": _Heading,
    }  # fmt: skip
    parser = MarkdownIt("commonmark", {"html": False}).enable("strikethrough").enable("table")

    def __init__(self, markup: str) -> None:
        super().__init__("", hyperlinks=False)
        self.parsed = self.parser.parse(markup)


def _coloured(code: str, language: str) -> Text:
    lexer = _lexer(language)
    if lexer is None:
        return Text(code)
    text = Syntax("", lexer, theme="ansi_dark", background_color="default", word_wrap=True).highlight(code)
    return text[: len(code)]  # some lexers end their text with a line end


def _renderable(block: Block) -> RenderableType:
    if block.kind != CODE:
        return _Prose(block.text)
    # The fences stay: where code begins and ends must show without colours, and in what is copied.
    parts: list[Text] = [Text("```" + block.language, style="dim")] if block.opens else []
    if block.text:
        parts.append(_coloured(block.text, block.language))
    return Group(*parts, *([Text("```", style="dim")] if block.closes else []))


def rows(console: Console, block: Block) -> list[str]:
    """A block as rows for this console, with its escape sequences and without line ends."""
    if block.kind == THOUGHT:
        wrapped = Text(block.text).wrap(console, max(1, console.width - 2)) or [Text("")]
        # A bar, so that thoughts look like thoughts without colours too.
        found: RenderableType = Group(*(Text(f"│ {row.plain.rstrip()}", style=Style(dim=True)) for row in wrapped))
    else:
        found = _renderable(block)
    with console.capture() as capture:
        console.print(found, end="")
    lines = [PADDING.sub("", line) for line in capture.get().removesuffix("\n").split("\n")]
    if block.kind in (TEXT, LIST_ITEM):  # tables and headings come with empty rows of their own
        while len(lines) > 1 and not lines[-1]:
            lines.pop()
        while len(lines) > 1 and not lines[0]:
            lines.pop(0)
    return lines
