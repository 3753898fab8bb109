"""`make demo`: the embedded model with and without MTP, side by side and live, then measured, stock mlx-lm beside them.

Nothing is canned: every figure is of this run.
"""

from __future__ import annotations

import time

import mlx.core as mx
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import track
from rich.text import Text

import mlx_mtp
from mlx_mtp.backend import blas
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.bench import Bench
from mlx_mtp.measuring.configurations import MTP, PLAIN, STOCK, Plan, line_up
from mlx_mtp.measuring.prompts import BenchPrompt
from mlx_mtp.measuring.report import build, compared
from mlx_mtp.measuring.tables import Part, Table

SHOWN_PROMPT = "What does `shutil.copytree` do?"
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file without their ends."""\n',
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n",
    "import os\nimport sys\n\ndef main():\n",
)
SHOWN_TOKENS, TOKENS, REPEATS = 192, 128, 5
SHOWN = ("arm", "tokens_per_second", "over_stock", "tau", "acceptance", "output")


def main() -> None:
    """Runs the demo on the terminal."""
    console = Console()
    mtp, plain = mlx_mtp.load(), mlx_mtp.load(drafter=None)
    drafts = "as many drafts a round as pay here" if mtp.depth == "auto" else f"{mtp.depth} drafts a round"
    gpu = mx.default_device() == mx.Device(mx.gpu)
    device = mx.device_info().get("device_name", "GPU") if gpu else f"CPU, {blas.name()}"
    console.print(f"mlx_mtp {mlx_mtp.__version__} · {device} · mode {mtp.mode}, {drafts}\n")
    for engine in (plain, mtp):  # compile before anything is timed
        engine.generate(SHOWN_PROMPT, max_tokens=48, ignore_end=True)
    side_by_side(console, plain, mtp)
    tables.print_parts(console, measured(console, plain, mtp))


def side_by_side(console: Console, plain: mlx_mtp.Engine, mtp: mlx_mtp.Engine) -> None:
    """Both replies grow at once, each by as much as it would in the same time alone: the one behind gets the turn."""
    console.print(f"[bold]{SHOWN_PROMPT}[/bold]")
    streams = [engine.stream(SHOWN_PROMPT, max_tokens=SHOWN_TOKENS) for engine in (plain, mtp)]
    texts, spent, running = ["", ""], [0.0, 0.0], {0, 1}

    def panels() -> Columns:
        width = max(38, console.width // 2 - 2)
        return Columns([Panel(Text(text), title=f"{name} · {seconds:.1f} s", width=width)
                        for name, text, seconds in zip(("plain", "MTP"), texts, spent, strict=True)])  # fmt: skip

    with Live(panels(), console=console, refresh_per_second=12) as live:
        while running:
            turn = min(running, key=lambda i: spent[i])
            began = time.perf_counter()
            event = next(streams[turn], None)
            spent[turn] += time.perf_counter() - began
            if event is None:
                running.discard(turn)
            else:
                texts[turn] += event.text
            live.update(panels())


def measured(console: Console, plain: mlx_mtp.Engine, mtp: mlx_mtp.Engine) -> list[Part]:
    """Speed and output of all three, in fair turns: a bench of a few prompts."""
    plan = Plan(names=(STOCK, PLAIN, f"{MTP}@{mtp.depth}"), samplings=(mlx_mtp.Sampling(temperature=0.0),),
                max_tokens=TOKENS, tokens_for_acceptance=TOKENS, repeats=REPEATS, cool_down=0.0)  # fmt: skip
    bench = Bench(line_up(plan, lambda *_, **__: mtp), [BenchPrompt("code", text, True, "") for text in PROMPTS])
    for _ in track(bench.run(), "measuring", total=bench.steps, console=console, transient=True):
        pass
    found = build(bench)
    title = f"{len(PROMPTS)} code prompts, {TOKENS} tokens, greedy, {REPEATS} runs each"
    rows = [row | {"output": compared(row["output"])} for row in found["samplings"][0]["groups"][0]["arms"]]
    return [Table.of(title, rows, SHOWN), found["verdict"]]


if __name__ == "__main__":
    main()
