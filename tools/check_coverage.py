"""Lines that the tests run, by file: prints coverage.py's JSON report as a table and fails below the limits.

    python tools/check_coverage.py build/coverage.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

TOTAL, FILE = 90.0, 80.0  # per cent


def main(report: Path) -> int:
    """The exit code: 1 where the whole or one file is below its limit."""
    found = json.loads(report.read_text(encoding="utf-8"))
    files = {name: file["summary"] for name, file in found["files"].items() if file["summary"]["num_statements"]}
    rows = sorted(files.items(), key=lambda row: (row[1]["percent_covered"], row[0]))
    for name, summary in [*rows, ("in all", found["totals"])]:
        lines = f"{summary['covered_lines']}/{summary['num_statements']}"
        print(f"{summary['percent_covered']:6.1f} %  {lines:>11}  {name}")
    low = [f"{name}: expected {FILE:g} %" for name, summary in rows if summary["percent_covered"] < FILE]
    low += [f"in all: expected {TOTAL:g} %"] * (found["totals"]["percent_covered"] < TOTAL)
    print(*low, sep="\n")
    return int(bool(low))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
