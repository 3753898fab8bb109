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
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.engines import Job, with_engine, with_mlx_lm
from mlx_mtp.measuring.tables import Part, Table
from mlx_mtp.measuring.turns import differences, interleave

SHOWN_PROMPT = "What does `shutil.copytree` do?"
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file without their ends."""\n',
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n",
    "import os\nimport sys\n\ndef main():\n",
)
SHOWN_TOKENS, TOKENS, REPEATS = 192, 128, 5
STOCK, PLAIN, MTP = "stock mlx-lm", "plain", "MTP"


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
    tables.show(console, measured(console, plain, mtp))


def side_by_side(console: Console, plain: mlx_mtp.Engine, mtp: mlx_mtp.Engine) -> None:
    """Both replies grow at once, each by as much as it would in the same time alone: the one behind gets the turn."""
    console.print(f"[bold]{SHOWN_PROMPT}[/bold]")
    streams = [engine.stream(SHOWN_PROMPT, max_tokens=SHOWN_TOKENS) for engine in (plain, mtp)]
    texts, spent, running = ["", ""], [0.0, 0.0], {0, 1}

    def panels() -> Columns:
        width = max(38, console.width // 2 - 2)
        return Columns([Panel(Text(text), title=f"{name} · {seconds:.1f} s", width=width)
                        for name, text, seconds in zip((PLAIN, MTP), texts, spent, strict=True)])  # fmt: skip

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
    """Speed and output of all three, in fair turns."""
    assert plain.tokenizer is not None
    jobs = [Job(plain.tokenizer.encode(prompt), TOKENS) for prompt in PROMPTS]
    decoders = {STOCK: with_mlx_lm(EMBEDDED / "target"), PLAIN: with_engine(plain), MTP: with_engine(mtp)}
    turns = interleave(decoders, jobs, REPEATS)
    *_, runs = track(turns, "measuring", total=len(jobs), console=console, transient=True)
    rows = []
    for name, its in runs.items():
        where = differences(plain.target, jobs, runs[PLAIN], its)
        rows.append({
            "": name, "tokens/s": its.rate, "ratio": its.speed_up(runs[STOCK]),
            "tokens per round": its.tokens_per_round if name == MTP else 1.0,
            "output": "the reference" if name == PLAIN else str(where[0]) if where else "identical",
        })  # fmt: skip
    title = f"{len(jobs)} code prompts, {TOKENS} tokens, greedy, median of {REPEATS} runs each"
    rates = "  ".join(f"{i}: {rate:.0%}" for i, rate in enumerate(runs[MTP].acceptance(), start=1))
    return [Table.of(title, rows), f"Drafts accepted, by position: {rates}"]


if __name__ == "__main__":
    main()
