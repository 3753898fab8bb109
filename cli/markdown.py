"""Markdown for a terminal while it streams: rich's, with nothing of the text dropped, cut into its blocks."""

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
