"""Rewrites the tables and charts of README.md, docs/ and the drafters' pages from the committed results.

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
PAGES = "docs", "mlx_mtp/assets"
MARKED = re.compile(r"(<!-- table: ([^\n]*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
MARK = re.compile(r"<!-- table:|<!-- end -->")


def shown(root: Path, name: str, block: Block) -> tuple[Any, str]:
    """What a block shows and the command that measured it; ends where the results are not in the form it reads."""
    try:
        results = json.loads((root / "benchmarks" / "results" / block.file).read_text())
        return block.show(results), block.made_by(results)
    except (OSError, LookupError, TypeError, ValueError, AttributeError) as error:
        sys.exit(
            f"'{name}' of benchmarks/blocks.py cannot read {block.file} ({type(error).__name__}: {error}); "
            "measure again, or change the block."
        )


def table(root: Path, name: str) -> str:
    """What stands between the marks of a block: rows as a table, or a text, and the command that measured it."""
    if name not in TABLES:
        sys.exit(f"'{name}' is no table of benchmarks/blocks.py, which has {', '.join(TABLES)}.")
    found, command = shown(root, name, TABLES[name])
    if isinstance(found, str):
        return f"{found} Command: `{command}`.\n"
    heads, rows = found
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join([*lines, "", f"`{command}`", ""])


def rewritten(root: Path, text: str, page: str) -> str:
    """The page with every table as its results say; ends where a mark has no partner."""
    found = MARKED.sub(lambda block: f"{block[1]}{table(root, block[2])}{block[4]}", text)
    if len(MARK.findall(text)) != 2 * len(MARKED.findall(text)):
        sys.exit(f"In {page} a '<!-- table: NAME -->' is not closed by '<!-- end -->'.")
    return found


def stale(root: Path) -> dict[Path, str]:
    """Files whose tables or charts differ from the results, and what they should hold."""
    found = {}
    for page in [root / "README.md", *(file for part in PAGES for file in sorted((root / part).rglob("*.md")))]:
        text = page.read_text(encoding="utf-8")
        fresh = rewritten(root, text, str(page.relative_to(root)))
        if fresh != text:
            found[page] = fresh
    for name, block in CHARTS.items():
        file, fresh = root / name, shown(root, name, block)[0]
        if not file.exists() or file.read_text(encoding="utf-8") != fresh:
            found[file] = fresh
    return found


def main() -> int:
    """Parses options, rewrites or checks; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is stale")
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to work on")
    args = parser.parse_args()
    found = stale(args.root)
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
