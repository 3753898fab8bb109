"""Tables and charts of the pages say what benchmarks/results/ holds; what benchmarks/cost_model.py foretells."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import blocks
import pytest
import tables
from documents import ROOT


def command(*options: str) -> tuple[int, list[str]]:
    """The command in this process: exit code, lines on stderr."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.setattr(sys, "argv", ["tables.py", *options])
        return tables.main(), err.getvalue().splitlines()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout that may be changed."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for name in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_nothing_is_stale() -> None:
    assert command("--check") == (0, [])


def test_another_result_is_noticed_and_written(copy: Path) -> None:
    file = copy / "benchmarks" / "results" / "bench.json"
    found = json.loads(file.read_text())
    blocks.arms_of(found["samplings"][0])["mtp@4"]["over_stock"]["ratio"] = 7.125
    file.write_text(json.dumps(found))
    before = (copy / "README.md").read_text()
    code, lines = command("--check", "--root", str(copy))
    named = {line.partition(";")[0] for line in lines}
    assert code == 1 and {"README.md is stale", "docs/images/speed.svg is stale"} <= named
    assert (copy / "README.md").read_text() == before  # checking writes nothing
    assert command("--root", str(copy)) == (0, [])
    assert "7.12" in (copy / "README.md").read_text() and "7.12" in (copy / "docs" / "images" / "speed.svg").read_text()
    assert command("--check", "--root", str(copy)) == (0, [])
