"""What `doctor` and `bench` found, as tables for a terminal and as Markdown: the same parts, rendered either way."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Table:
    """Rows of cells under their heads. No heads: facts, a name and a value a row."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


# A paragraph is a string; one that begins with "#" is a heading, as in Markdown, one that begins with "- " of a list.
Part = Table | str


def facts(title: str, values: Mapping[str, object]) -> Table:
    """Names and values; those that are None are left out."""
    return Table(title, (), [(name, str(value)) for name, value in values.items() if value is not None])


def markdown(parts: Iterable[Part]) -> str:
    """All parts as text, ready to paste."""
    blocks = [_markdown_table(part) if isinstance(part, Table) else part for part in parts]
    joints = ["\n" if one.startswith("- ") and other.startswith("- ") else "\n\n" for one, other in pairwise(blocks)]
    return "".join(block + joint for block, joint in zip(blocks, [*joints, "\n"], strict=True))


def _markdown_table(table: Table) -> str:
    heads = list(table.heads) or [""] * len(table.rows[0])
    safe = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in [heads, *table.rows]]
    first, *lines = [f"| {' | '.join(row)} |" for row in safe]
    title = [f"{table.title}:", ""] if table.title else []
    return "\n".join([*title, first, "|" + " --- |" * len(heads), *lines])


def show(console: Console, parts: Iterable[Part]) -> None:
    """Prints all parts; cells are folded where the terminal is narrow."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    for part in parts:
        if isinstance(part, str):
            console.print(Text(part.lstrip("# "), style="bold" if part.startswith("#") else ""))
            continue
        heads = part.heads or ("", "")
        shown = RichTable(
            title=part.title or None, title_justify="left", show_header=bool(part.heads),
            box=box.HEAVY_HEAD if part.heads else None, pad_edge=bool(part.heads),
        )  # fmt: skip
        for at, head in enumerate(heads):
            shown.add_column(head, overflow="fold", justify="right" if part.heads and at else "left")
        for row in part.rows:
            shown.add_row(*map(Text, row))
        console.print(shown)
        console.print()
