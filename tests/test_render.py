"""mlx_mtp/measuring/tables.py: one JSON object for a terminal and as Markdown."""

import io

import pytest
from rich.console import Console

from mlx_mtp.measuring.tables import Part, Table, cell, markdown, parts_of, print_parts

PARTS: list[Part] = [
    "### T = 0", "Two prompts.", *parts_of("", {
        "chip": "M9", "power": None, "free_bytes": 3_000_000_000, "works": True,
        "Speed": [{"arm": "x|y", "tokens_per_second": "two\nlines"}, {"arm": "[bold]z", "tokens_per_second": 1.0}],
        "inner": {"acceptance": [0.5, 0.25]},
    }),
    "Notes:\n- one\n- two",
]  # fmt: skip


def test_markdown_keeps_columns_and_lists() -> None:
    assert markdown(PARTS) == """### T = 0

Two prompts.

|            |        |
|------------|--------|
| chip       | M9     |
| free bytes | 3.0 GB |
| works      | yes    |

Speed

| configuration | tokens/s [range] |
|---------------|------------------|
| x\\|y          |       two, lines |
| [bold]z       |             1.00 |

inner

|                 |         |
|-----------------|---------|
| drafts accepted | 50% 25% |

Notes:
- one
- two
"""


@pytest.mark.parametrize("width", [80, 20])
def test_a_terminal_of_any_width_shows_every_cell(width: int) -> None:
    output = io.StringIO()
    print_parts(Console(file=output, width=width, no_color=True), PARTS)
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= width and lines[0] == "T = 0"
    for words in ("chip", "M9", "x|y", "[bold]z", "1.00", "- two"):
        assert words in output.getvalue()
    assert "power" not in output.getvalue()


def test_ranges_and_tables_of_some_values() -> None:
    assert cell("", {"ratio": 2.0, "low": 1.8, "high": 2.25}) == "2.00 [1.80, 2.25]"
    assert cell("", {"ratio": 2.0, "low": None, "high": None}) == "2.00"
    table = Table.of("t", [{"a": 1, "b": 0.5, "rows": 3}], ("rows", "a"))
    assert (table.heads, table.rows) == (["tokens of a pass", "a"], [["3", "1"]])
