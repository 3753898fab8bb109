"""Records `mlx-mtp chat` in a pseudo-terminal and draws what stood on its screen: docs/images/chat.svg.

    .venv/bin/python tools/picture.py [--model smollm2] [--columns 80] [--out FILE.svg]

The run is real: the installed program, typed into as a user would; the figures are those of the machine it runs on.
The model must be here already. Needs pexpect and pyte (extra `dev`).
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from itertools import groupby
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pexpect
import pyte

ROOT = Path(__file__).parent.parent
ROWS = 60
PATIENCE = 120
# Each is answered by something with a line of tokens/s.
TYPED = ("Give me a Python one-liner that reverses a string.", "Make it a function with type hints.", "/stats")
NO_BREAK = "\N{NO-BREAK SPACE}"  # browsers drop ordinary spaces at a text's ends and then stretch what is left
READY = "\n>"
PLAIN = ("NO_COLOR", "COLUMNS", "LINES")  # would change what is drawn
COLOURS = {"default": "#222", "black": "#222", "red": "#a22", "green": "#277327", "brown": "#866000",
           "yellow": "#866000", "blue": "#1e50aa", "magenta": "#823282", "cyan": "#007373",
           "white": "#666"}  # fmt: skip
PAPER = "#fbfbf9"  # a ground of its own: readable on pages of any colour
WIDTH, HEIGHT, SIZE = 7.83, 18, 13  # of a character's cell, and of its font


class Recording:
    """A chat on a terminal of its own."""

    def __init__(self, folder: str, model: str, columns: int) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in PLAIN}
        environment |= {"HF_HUB_OFFLINE": "1", "XDG_DATA_HOME": folder, "XDG_CONFIG_HOME": folder,
                        "TERM": "xterm-256color"}  # fmt: skip
        self.child = pexpect.spawn(
            sys.executable, ["-m", "mlx_mtp.cli.app", "chat", "--model", model, "--temperature", "0"],
            dimensions=(ROWS, columns), env=environment, encoding="utf-8", timeout=PATIENCE,
        )  # fmt: skip
        self.screen = pyte.Screen(columns, ROWS)
        self.screen.write_process_input = self.child.send
        self._stream = pyte.Stream(self.screen)

    @property
    def text(self) -> str:
        """What stands on the screen."""
        return "\n".join(row.rstrip() for row in self.screen.display).rstrip()

    def wait_for_prompt(self, times: int) -> None:
        """Until the chat waits for input after so many replies."""
        end = time.monotonic() + PATIENCE
        while not (self.text.endswith(READY) and self.text.count("tokens/s") >= times):
            if time.monotonic() > end:
                raise SystemExit(f"the chat did not come to its prompt; it shows:\n{self.text}")
            try:
                self._stream.feed(self.child.read_nonblocking(65536, timeout=0.2))
            except pexpect.TIMEOUT:
                continue
            except pexpect.EOF:
                raise SystemExit(f"the chat ended; it showed:\n{self.text}") from None


def style_of(cell: Any) -> str:
    """A cell's colour and weight as SVG attributes."""
    name = cell.fg.removeprefix("bright")
    colour = COLOURS.get(name) or (f"#{name}" if len(name) == 6 else COLOURS["default"])
    return f'fill="{colour}"' + ' font-weight="bold"' * cell.bold + ' font-style="italic"' * cell.italics


def drawn(screen: Any, title: str) -> str:
    """The screen as SVG: a line of text for every row, a piece of it for every run of one style.

    From the program's greeting on: what it says of this machine while it loads is not drawn.
    """
    rows = [[screen.buffer[y][x] for x in range(screen.columns)] for y in range(screen.lines)]
    first = next(y for y, row in enumerate(screen.display) if row.startswith("mlx-mtp "))
    last = max(y for y, row in enumerate(screen.display) if row.strip())
    rows = rows[first : last + 1]
    width, height = screen.columns * WIDTH + 32, len(rows) * HEIGHT + 56
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" font-size="{SIZE}">',
        f'<rect width="100%" height="100%" rx="8" fill="{PAPER}"/>',
        f'<text x="16" y="24" font-family="Helvetica, Arial, sans-serif" fill="#555">{escape(title)}</text>',
        '<g font-family="Menlo, Consolas, DejaVu Sans Mono, monospace">',
    ]
    for y, row in enumerate(rows):
        at = 0
        for style, cells in groupby(row, style_of):
            text = "".join(cell.data for cell in cells)
            if text.strip():
                place = f'x="{16 + at * WIDTH:.1f}" y="{54 + y * HEIGHT}" textLength="{len(text) * WIDTH:.1f}"'
                out.append(f"<text {place} {style}>{escape(text.replace(' ', NO_BREAK))}</text>")
            at += len(text)
    return "\n".join([*out, "</g></svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as `mlx-mtp chat` takes it")
    parser.add_argument("--columns", type=int, default=80, help="of the terminal")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images" / "chat.svg")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        chat = Recording(folder, args.model, args.columns)
        chat.wait_for_prompt(0)
        for i, typed in enumerate(TYPED, 1):
            chat.child.send(f"{typed}\r")
            chat.wait_for_prompt(i)
        title = f"mlx-mtp chat --model {args.model}, on {os.cpu_count()} CPU cores of a {platform.system()} machine"
        svg = drawn(chat.screen, title)
        chat.child.sendeof()
        chat.child.close(force=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(svg, encoding="utf-8")
    print(chat.text)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
