"""What commands show on a terminal and nowhere else: bars, the table of models, the line after a reply; no times."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN, ran
from rich.console import Console
from rich.progress import MofNCompleteColumn

import mlx_mtp
from mlx_mtp.checkpoints import memory, pairs
from mlx_mtp.cli import progress
from mlx_mtp.cli.progress import PatientBar
from mlx_mtp.engine import Engine

TARGET, TIED = GOLDEN / "ple" / "target", GOLDEN / "ple" / "assistant_tied"


class Clock:
    """Stands in for the time module: the seconds that a test says."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def console(terminal: bool = True) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, force_interactive=terminal, width=100), file


@pytest.mark.parametrize(("terminal", "began"), [(True, 0.5), (False, 2.0)])
def test_what_is_quick_and_a_pipe_have_no_bar(clock: Clock, terminal: bool, began: float) -> None:
    shown, file = console(terminal)
    with PatientBar(shown) as bar:
        clock.now = began
        for done in (10, 50, 100):
            bar.update("reading", done, 100)
    assert file.getvalue() == ""


def test_bars_for_what_takes_long(clock: Clock) -> None:
    shown, file = console()
    with PatientBar(shown, MofNCompleteColumn()) as bar:
        bar.update("reading", 1, 100)  # at once
        clock.now = 2.0
        bar.update("all there", 100, 100)  # nothing to wait for
        assert file.getvalue() == ""
        for what in ("reading", "fetching"):
            bar.update(what, 25, 100)
        bar.update("reading", 50, 100)
        bar.close()
        written = file.getvalue()
        assert "reading" in written and "fetching" in written and "50/100" in written and "all there" not in written
        assert written.endswith(("\x1b[2K", "\x1b[?25h")) and "\x1b[?25l" in written  # erased, the cursor back
        bar.close()
    assert file.getvalue() == written


class Screen(io.StringIO):
    """Standard output that says it is a terminal."""

    def isatty(self) -> bool:
        return True


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Run:
    """A command whose standard output is a terminal: exit code and what it wrote there."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*args: object) -> tuple[int, str]:
        screen = Screen()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", screen)
            code = ran(*args)
        return code, re.sub(r"\x1b\[[\d;]*m", "", screen.getvalue())

    return run


def test_models_on_a_terminal_are_a_table(on_a_terminal: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(memory, "available_bytes", lambda: 9 * 10**9)
    code, out = on_a_terminal("models")
    best = pairs.best_pair(9 * 10**9)
    assert code == 0 and best is not None and f"The first that fits: {best.target}" in out
    assert f"{memory.readable(9 * 10**9)} of memory" in out
    known = list(pairs.known_pairs())
    assert all(pair.target in out and (pair.assistant or "none") in out for pair in known)
    monkeypatch.setattr(memory, "available_bytes", lambda: 1)
    assert "None fits; the embedded model needs no download." in on_a_terminal("models")[1]


def test_generate_on_a_terminal_ends_with_a_line_of_figures(
    on_a_terminal: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", TARGET, "--tokens", "1,2,3", "--max-tokens", "6")
    for drafter, words in ((TIED, "tokens per round (fast)"), ("none", "tokens/s")):
        code, out = on_a_terminal("generate", *options, "--drafter", drafter, "--depth", 2 if drafter == TIED else 0)
        assert code == 0 and len(out.split()) == 6
        err = capsys.readouterr().err
        assert err.startswith("6 tokens, ") and words in err and ("per round" in err) == (drafter == TIED)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C after the third token of every reply."""
    whole = Engine.stream

    def stream(self: Engine, *args: Any, **options: Any) -> Iterator[mlx_mtp.Event]:
        seen = 0
        for event in whole(self, *args, **options):
            yield event
            seen += len(event.tokens)
            if seen >= 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", stream)


def test_an_interrupted_generate_leaves_what_there_was(interrupted: None, on_a_terminal: Run) -> None:
    options = ("generate", "--model", TARGET, "--drafter", "none", "--tokens", "1,2,3", "--max-tokens", "50")
    code, out = on_a_terminal(*options)
    assert code == 130 and len(out.split()) >= 3 and out.endswith("\n")
    code, printed = on_a_terminal(*options, "--json")
    found = json.loads(printed)
    assert code == 130 and found["tokens"] == [int(word) for word in out.split()] and found["stats"] is None
    assert (found["finish_reason"], found["text"], found["logprobs"]) == ("interrupted", "", None)
