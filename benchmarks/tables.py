"""Rewrites the tables and charts of README.md and docs/ from the committed results.

    .venv/bin/python benchmarks/tables.py [--check] [--root DIR]

A table stands between the marks `<!-- table: NAME -->` and `<!-- end -->`; blocks.py says what each shows and which
command measured it. --check writes nothing and exits with 1 where something is stale. Measures nothing itself.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from blocks import CHARTS, TABLES, Block

ROOT = Path(__file__).parent.parent
MARKED = re.compile(r"(<!-- table: ([^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARK = re.compile(r"<!-- table:|<!-- end -->")


class TableError(Exception):
    """A block that cannot be made; the message says why."""


def pages(root: Path) -> list[Path]:
    """The files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def results_of(root: Path, name: str, block: Block) -> dict[str, Any]:
    """What a benchmark wrote; TableError where it is missing or no JSON."""
    file = root / "benchmarks" / "results" / block.file
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise TableError(f"Expected results for '{name}' in {file}, found none ({error}); {block.command}.") from error
    assert isinstance(found, dict)
    return found


def shown(name: str, block: Block, results: dict[str, Any]) -> Any:
    """What the block shows; TableError where the file has another form than the block reads."""
    try:
        return block.show(results)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise TableError(
            f"Expected {block.file} in the form that '{name}' of benchmarks/blocks.py reads, found another "
            f"({type(error).__name__}: {error}); measure again, or change the block."
        ) from error


def table(root: Path, name: str) -> str:
    """What stands between the marks of a block: rows as a table, or a text, and the command that measured it."""
    block = TABLES.get(name)
    if block is None:
        raise TableError(f"Expected a table of benchmarks/blocks.py ({', '.join(TABLES)}), found '{name}'.")
    results = results_of(root, name, block)
    found = shown(name, block, results)
    if isinstance(found, str):
        return f"{found} Command: `{block.made_by(results)}`.\n"
    heads, rows = found
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", f"`{block.made_by(results)}`", ""])


def rewritten(root: Path, text: str, page: str) -> str:
    """The page with every table as its results say; TableError for a mark without its partner."""
    found = MARKED.sub(lambda block: f"{block[1]}{table(root, block[2])}{block[4]}", text)
    if len(MARK.findall(text)) != 2 * len(MARKED.findall(text)):
        raise TableError(
            f"Expected every '<!-- table: NAME -->' of {page} closed by '<!-- end -->', found one that is not."
        )
    return found


def stale(root: Path) -> dict[Path, str]:
    """Files whose tables or charts differ from the results, and what they should hold."""
    found = {}
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        fresh = rewritten(root, text, str(page.relative_to(root)))
        if fresh != text:
            found[page] = fresh
    for name, block in CHARTS.items():
        file, fresh = root / name, shown(name, block, results_of(root, name, block))
        if not file.exists() or file.read_text(encoding="utf-8") != fresh:
            found[file] = fresh
    return found


def main() -> int:
    """Parses options, rewrites or checks; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to work on")
    args = parser.parse_args()
    try:
        found = stale(args.root)
    except TableError as error:
        print(error, file=sys.stderr)
        return 1
    for file, text in found.items():
        name = file.relative_to(args.root)
        if args.check:
            print(f"{name} is stale; python benchmarks/tables.py rewrites it.", file=sys.stderr)
        else:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            print(f"rewrote {name}")
    return int(args.check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
