"""`make demo`: the embedded model with and without MTP, side by side and live, then what was measured.

What it does: decodes the same prompts plainly and with the drafter, in turns so that both meet the same machine,
then times both, and stock mlx-lm on the same weights, interleaved. What it does not do: anything canned; every
figure is of this run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import track
from rich.text import Text

import mlx_mtp
from mlx_mtp.backend import blas
from mlx_mtp.generation.types import NEUTRAL
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.tables import Part, Table
from mlx_mtp.measuring.turns import Job, Record, differences, engine_arm, interleave, mlx_lm_arm, ratio

SHOWN_PROMPT = "What does `shutil.copytree` do?"
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file without their ends."""\n',
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n",
    "import os\nimport sys\n\ndef main():\n",
)
TOKENS, REPEATS = 128, 5
STOCK, PLAIN, MTP = "stock mlx-lm", "plain", "MTP"


def main() -> None:
    """Runs the demo on the terminal."""
    console = Console()
    mtp, plain = mlx_mtp.load(), mlx_mtp.load(drafter=None)
    drafts = "as many drafts a round as pay here" if mtp.depth == "auto" else f"{mtp.depth} drafts a round"
    console.print(f"mlx_mtp {mlx_mtp.__version__} · {_device()} · mode {mtp.mode}, {drafts}\n")
    for engine in (plain, mtp):  # compile before anything is timed
        engine.generate(SHOWN_PROMPT, max_tokens=48, ignore_end=True)
    _side_by_side(console, plain, mtp)
    tables.show(console, _measure(console, plain, mtp))


def _device() -> str:
    if mx.default_device() == mx.Device(mx.gpu):
        return str(mx.device_info().get("device_name", "GPU"))
    return f"CPU, {blas.name()}"


def _side_by_side(console: Console, plain: mlx_mtp.Engine, mtp: mlx_mtp.Engine) -> None:
    """Both replies grow at once, each by as much as it would in the same time alone: the one behind gets the turn."""
    console.print(f"[bold]{SHOWN_PROMPT}[/bold]")
    names = (PLAIN, MTP)
    streams = [engine.stream(SHOWN_PROMPT, max_tokens=192) for engine in (plain, mtp)]
    texts, spent = ["", ""], [0.0, 0.0]
    open_ends = {0, 1}

    def panels() -> Columns:
        boxes = [
            Panel(Text(texts[i]), title=f"{names[i]} · {spent[i]:.1f} s", width=max(38, console.width // 2 - 2))
            for i in (0, 1)
        ]
        return Columns(boxes)

    with Live(panels(), console=console, refresh_per_second=12) as live:
        while open_ends:
            turn = min(open_ends, key=lambda i: spent[i])
            began = time.perf_counter()
            event = next(streams[turn], None)
            spent[turn] += time.perf_counter() - began
            if event is None:
                open_ends.discard(turn)
            else:
                texts[turn] += event.text
            live.update(panels())


def _measure(console: Console, plain: mlx_mtp.Engine, mtp: mlx_mtp.Engine) -> list[Part]:
    assert plain.tokenizer is not None
    jobs = [Job(plain.tokenizer.encode(prompt), TOKENS, mlx_mtp.Sampling(temperature=0.0).over(NEUTRAL))
            for prompt in PROMPTS]  # fmt: skip
    arms = {STOCK: mlx_lm_arm(EMBEDDED / "target"), PLAIN: engine_arm(plain), MTP: engine_arm(mtp)}
    turns = interleave(arms, jobs, REPEATS)
    *_, records = track(turns, "measuring", total=len(jobs), console=console, transient=True)
    rows = []
    for name, record in records.items():
        faster, _, _ = ratio(record, records[STOCK])
        same = "the reference" if name == PLAIN else _comparison(plain, jobs, records[PLAIN], record)
        per_round = record.tokens_per_round if name == MTP else 1.0
        rows.append([name, f"{record.rate:.1f}", f"{faster:.2f}", f"{per_round:.2f}", same])
    shares = "  ".join(f"{i + 1}: {share:.0%}" for i, share in enumerate(records[MTP].acceptance()))
    title = f"{len(jobs)} code prompts, {TOKENS} tokens, greedy, median of {REPEATS} runs each"
    table = Table(title, ("", "tokens/s", "ratio", "tokens per round", "output"), rows)
    return [table, f"Drafts accepted, by position: {shares}"]


def _comparison(plain: mlx_mtp.Engine, jobs: Sequence[Job], expected: Record, found: Record) -> str:
    """'identical', or where the first difference is and how close the two tokens' logits were there."""
    parted = differences(plain.target, jobs, expected, found)
    return str(parted[0]) if parted else "identical"


if __name__ == "__main__":
    main()
