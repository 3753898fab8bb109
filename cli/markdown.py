"""Markdown for a terminal while it streams: rich's, with nothing of the text dropped, cut into finished parts."""

from __future__ import annotations

import re
from typing import ClassVar

from markdown_it import MarkdownIt
from markdown_it.token import Token
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.syntax import Syntax
from rich.text import Text

# HTML and the addresses of reference links stay in the text as they were written.
PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"]).disable("reference")
# A last line of these alone may yet become anything; it is not shown before it is known what.
UNDECIDED = re.compile(r"\s*(?:[`~#>|=*+_-]*|\d{1,9}[.)]?)\s*")


def split(text: str) -> list[tuple[str, bool]]:
    """The text cut where a block or an item of a list begins, and whether each part is such an item.

    Later lines change nothing but the last part, and a part looks alone as it does among the others.
    """
    starts: list[tuple[int, bool]] = []
    for token in PARSER.parse(text):
        item = token.type == "list_item_open" and token.level == 1
        is_list = token.type in ("bullet_list_open", "ordered_list_open")
        if token.map and (item or (token.level == 0 and not is_list)):
            starts.append((token.map[0], item))
    lines = text.split("\n")
    cuts = [0, *(start for start, _ in starts[1:]), len(lines)]
    return [("\n".join(lines[cuts[i] : cuts[i + 1]]), item) for i, (_, item) in enumerate(starts)]


class _Code(CodeBlock):
    """Code between its fences: where it begins and ends must show without colours, and in what is copied.

    It has no background, which would only suit one kind of terminal.
    """

    @classmethod
    def create(cls, markdown: Markdown, token: Token) -> _Code:
        return cls(token.info.partition(" ")[0], token.markup)

    def __init__(self, language: str, fence: str) -> None:
        super().__init__(language or "text", "ansi_dark")
        self._opening, self._closing = Text(fence + language, style="dim"), Text(fence, style="dim")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).removesuffix("\n")
        if self._opening:
            yield self._opening
        if code:
            yield Syntax(code, self.lexer_name, theme=self.theme, background_color="default", word_wrap=True)
        if self._closing:
            yield self._closing


class _Heading(Heading):
    """All at the left."""

    LEVEL_ALIGN: ClassVar = {}


class ReplyMarkdown(Markdown):
    """Markdown as replies have it; links show their addresses."""

    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements, "fence": _Code, "code_block": _Code, "heading_open": _Heading,
    }  # fmt: skip

    def __init__(self, markup: str, style: str = "none") -> None:
        super().__init__("", style=style, hyperlinks=False)
        self.parsed = PARSER.parse(markup)
