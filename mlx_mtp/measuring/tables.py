"""One way to show what was measured: any JSON object as facts and tables, by rich; on a terminal or as Markdown."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

WIDE = 100_000  # columns of Markdown, whose rows may not wrap
RATES = ("acceptance", "scatter")
# Names of the JSON objects that say too little by themselves.
LABELS = {
    "arm": "configuration", "rows": "tokens of a pass", "tau": "tokens per round", "output": "greedy output",
    "tokens_per_second": "tokens/s [range]", "over_stock": "over stock [95 %]", "over_plain": "over plain [95 %]",
    "acceptance": "drafts accepted", "milliseconds_per_round": "ms a round", "run_bytes": "memory",
    "first_token_milliseconds": "first token ms", "joules_per_token": "J/token", "exact": "same bits as one token",
    "verify": "passes over the target", "choices": "depth it would choose (estimate)", "speed_up": "times plain",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Rows of cells under their heads. No heads: facts, a name and a value a row."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, title: str, rows: Sequence[Mapping[str, Any]], names: Iterable[str] = ()) -> Table:
        """A row an object; names: of the values that are shown, all of them by default."""
        names = list(names or rows[0])
        return cls(title, [label(name) for name in names], [[cell(name, row[name]) for name in names] for row in rows])


# A paragraph is a string; one that begins with "#" is a heading, as in Markdown.
Part = Table | str


def parts_of(title: str, found: Mapping[str, Any]) -> list[Part]:
    """A JSON object: its values as facts, lists of objects as tables, objects within it as parts of their own."""
    facts, parts = [], []
    for name, value in found.items():
        if isinstance(value, dict):
            parts += parts_of(label(name), value)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            parts.append(Table.of(label(name), value))
        elif text := cell(name, value):
            facts.append((label(name), text))
    return [Table(title, (), facts), *parts] if facts else parts


def cell(name: str, value: Any) -> str:
    """A value as its name wants it: bytes as MB or GB, shares in %, a median or ratio with its range."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("bytes"):
            return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
        case float():
            return f"{value:.0%}" if name in RATES else f"{value:.2f}"
        case list() | tuple():
            return " ".join(cell(name, one) for one in value)
        case {"low": low, "high": high, **middle}:
            (value,) = middle.values()
            return f"{value:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")
        case _:
            return str(value)


def label(name: str) -> str:
    """What people read in place of a JSON object's name."""
    return LABELS.get(name, name.replace("_", " "))


def show(parts: Iterable[Part]) -> None:
    """On standard output: as they are on a terminal, as Markdown in a pipe."""
    if sys.stdout.isatty():
        print_parts(Console(), parts)
    else:
        print(markdown(parts), end="")


def markdown(parts: Iterable[Part]) -> str:
    """All parts as text, ready to paste."""
    output = io.StringIO()
    print_parts(Console(file=output, width=WIDE, color_system=None, force_terminal=False), parts, box.MARKDOWN)
    text = "\n".join(line.rstrip() for line in output.getvalue().split("\n"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"


def print_parts(console: Console, parts: Iterable[Part], style: box.Box = box.HEAVY_HEAD) -> None:
    """Prints all parts with an empty line after each; cells are folded where the terminal is narrow."""
    is_markdown = style is box.MARKDOWN
    for part in parts:
        if isinstance(part, str):
            text = part if is_markdown else part.lstrip("# ")
            console.print(Text(text, style="bold" if part.startswith("#") else ""), end="\n\n")
            continue
        if part.title:
            console.print(Text(part.title, style="italic"))
        framed = bool(part.heads) or is_markdown
        table = RichTable(show_header=framed, show_edge=framed, pad_edge=framed, box=style if framed else None)
        for at, head in enumerate(part.heads or ("", "")):
            table.add_column(Text(head), overflow="fold", justify="right" if part.heads and at else "left")
        for row in part.rows:
            table.add_row(*(Text(one.replace("|", "\\|").replace("\n", ", ") if is_markdown else one) for one in row))
        console.print(table)
        if not is_markdown:  # whose tables have empty lines for edges
            console.print()
