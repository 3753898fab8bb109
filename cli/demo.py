"""`make demo`: the embedded model with and without MTP, side by side and live, then what was measured.

What it does: decodes the same prompts plainly and with the drafter, in turns so that both meet the same machine,
then times both, and stock mlx-lm on the same weights, interleaved. What it does not do: anything canned; every
figure is of this run.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress import track
from rich.table import Table
from rich.text import Text

import mlx_mtp
from mlx_mtp import blas
from mlx_mtp.loading import EMBEDDED

SHOWN_PROMPT = "What does `shutil.copytree` do?"
PROMPTS = (
    'def read_lines(path, encoding="utf-8"):\n    """Return the lines of a file without their ends."""\n',
    "class Queue:\n    def __init__(self, maxsize=0):\n        self.maxsize = maxsize\n",
    "import os\nimport sys\n\ndef main():\n",
)
TOKENS, ROUNDS = 128, 5
Arm = Callable[[Sequence[int]], tuple[list[int], float, mlx_mtp.Stats | None]]


def main() -> None:
    """Runs the demo on the terminal."""
    console = Console()
    mtp, plain = mlx_mtp.load(), mlx_mtp.load(drafter=None)
    drafts = "as many drafts a round as pay here" if mtp.depth == "auto" else f"{mtp.depth} drafts a round"
    console.print(f"mlx_mtp {mlx_mtp.__version__} · {_device()} · mode {mtp.mode}, {drafts}\n")
    for engine in (plain, mtp):  # compile before anything is timed
        engine.generate(SHOWN_PROMPT, max_tokens=48, ignore_end=True)
    _side_by_side(console, plain, mtp)
    console.print(_measure(console, plain, mtp))


def _device() -> str:
    if mx.default_device() == mx.Device(mx.gpu):
        return str(mx.device_info().get("device_name", "GPU"))
    return f"CPU, {blas.name()}"


def _side_by_side(console: Console, plain: mlx_mtp.Engine, mtp: mlx_mtp.Engine) -> None:
    """Both replies grow at once, each by as much as it would in the same time alone: the one behind gets the turn."""
    console.print(f"[bold]{SHOWN_PROMPT}[/bold]")
    names = ("plain", "MTP")
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


def _measure(console: Console, plain: mlx_mtp.Engine, mtp: mlx_mtp.Engine) -> Table:
    assert plain.tokenizer is not None
    prompts = [plain.tokenizer.encode(prompt) for prompt in PROMPTS]
    arms: dict[str, Arm] = {"stock mlx-lm": _mlx_lm_arm(), "plain": _engine_arm(plain), "MTP": _engine_arm(mtp)}
    rates: dict[str, list[float]] = {name: [] for name in arms}
    outputs: dict[str, list[list[int]]] = {name: [] for name in arms}
    stats: list[mlx_mtp.Stats] = []
    for name, prompt in _interleaved(arms, prompts, console):
        tokens, rate, found = arms[name](prompt)
        rates[name].append(rate)
        outputs[name].append(tokens)
        if name == "MTP" and found:
            stats.append(found)
    return _table(plain, prompts, rates, outputs, stats)


def _interleaved(
    arms: dict[str, Arm], prompts: list[list[int]], console: Console
) -> Iterator[tuple[str, list[int]]]:
    """Warms every arm up, then yields runs in the order A B C C B A, prompt by prompt."""
    for arm in arms.values():
        arm(prompts[0])
    runs = [
        (name, prompt)
        for round_ in range(ROUNDS)
        for prompt in prompts
        for name in (list(arms) if round_ % 2 == 0 else list(arms)[::-1])
    ]
    yield from track(runs, description="measuring", console=console, transient=True)


def _engine_arm(engine: mlx_mtp.Engine) -> Arm:
    def run(prompt: Sequence[int]) -> tuple[list[int], float, mlx_mtp.Stats | None]:
        result = engine.generate(prompt, max_tokens=TOKENS, ignore_end=True)
        return result.tokens, result.stats.decode_tokens_per_second, result.stats

    return run


def _mlx_lm_arm() -> Arm:
    """mlx-lm's own plain loop on the same weights, in float32 as ours on a CPU."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(EMBEDDED / "target")
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)

    def run(prompt: Sequence[int]) -> tuple[list[int], float, mlx_mtp.Stats | None]:
        tokens, times = [], []
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=TOKENS):
            tokens.append(int(token))
            times.append(time.perf_counter())
        return tokens, (len(tokens) - 1) / (times[-1] - times[0]), None

    return run


def _table(
    plain: mlx_mtp.Engine,
    prompts: list[list[int]],
    rates: dict[str, list[float]],
    outputs: dict[str, list[list[int]]],
    stats: list[mlx_mtp.Stats],
) -> Table:
    base = statistics.median(rates["stock mlx-lm"])
    runs = len(rates["MTP"])
    table = Table(title=f"{len(prompts)} code prompts, {TOKENS} tokens, greedy, median of {runs} runs an arm")
    for column in ("", "tokens/s", "ratio", "tokens per round", "output"):
        table.add_column(column, justify="left" if column in ("", "output") else "right")
    for name, found in rates.items():
        middle = statistics.median(found)
        per_round = statistics.mean(s.tokens_per_round for s in stats) if name == "MTP" else 1.0
        same = "the reference" if name == "plain" else _comparison(plain, prompts, outputs["plain"], outputs[name])
        table.add_row(name, f"{middle:.1f}", f"{middle / base:.2f}", f"{per_round:.2f}", same)
    drafted = _by_position([found.drafted_by_position for found in stats])
    accepted = _by_position([found.accepted_by_position for found in stats])
    shares = "  ".join(f"{i + 1}: {a / d:.0%}" for i, (a, d) in enumerate(zip(accepted, drafted, strict=True)))
    table.caption = f"drafts accepted by position, of those drafted  {shares}"
    return table


def _by_position(counts: Sequence[Sequence[int]]) -> list[int]:
    """Sums over runs that may have drafted to different depths."""
    return [sum(column) for column in itertools.zip_longest(*counts, fillvalue=0)]


def _comparison(
    plain: mlx_mtp.Engine, prompts: list[list[int]], expected: list[list[int]], found: list[list[int]]
) -> str:
    """'identical', or where the first difference is and how close the two best logits were there."""
    for i, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one != other:
            at = next(j for j, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
            prompt = prompts[i % len(prompts)]
            logits = plain.target.logits(mx.array([prompt + one[:at]]))[0, -1]
            second, best = mx.sort(logits)[-2:].tolist()  # type: ignore[misc]
            return f"parts at token {at + 1}, two best logits {best - second:.1e} apart"
    return f"identical ({len(expected)} runs)"


if __name__ == "__main__":
    main()
