"""mlx_mtp/measuring/tables.py: the same parts for a terminal and as Markdown."""

from __future__ import annotations

import io

from rich.console import Console

from mlx_mtp.measuring.tables import Part, Table, facts, markdown, show

PARTS: list[Part] = [
    "### T = 0", "Two prompts.", facts("", {"chip": "M9", "power": None, "cores": 3}),
    Table("Speed", ("name", "tokens/s"), [["x|y", "two\nlines"], ["[bold]z", "1.0"]]),
    "Notes:", "- one", "- two",
]  # fmt: skip


def test_markdown_keeps_columns_and_lists() -> None:
    assert markdown(PARTS) == """### T = 0

Two prompts.

|  |  |
| --- | --- |
| chip | M9 |
| cores | 3 |

Speed:

| name | tokens/s |
| --- | --- |
| x\\|y | two lines |
| [bold]z | 1.0 |

Notes:

- one
- two
"""


def test_a_terminal_of_any_width_shows_every_cell() -> None:
    for width in (80, 20):
        output = io.StringIO()
        show(Console(file=output, width=width, no_color=True), PARTS)
        lines = output.getvalue().splitlines()
        assert max(map(len, lines)) <= width and lines[0] == "T = 0"
        for words in ("chip", "M9", "x|y", "[bold]z", "1.0", "- two"):
            assert words in output.getvalue()
        assert "power" not in output.getvalue()
