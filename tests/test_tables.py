"""The tables and charts of README.md and docs/ say what benchmarks/results/ holds."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import blocks  # noqa: E402
import tables  # noqa: E402


def command(*options: str) -> subprocess.CompletedProcess[str]:
    """The command as a user types it."""
    return subprocess.run([sys.executable, str(ROOT / "benchmarks" / "tables.py"), *options], capture_output=True,
                          text=True)  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout that may be changed."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for name in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_nothing_is_stale() -> None:
    done = command("--check")
    assert (done.returncode, done.stderr) == (0, "")


def test_another_result_is_noticed_and_written(copy: Path) -> None:
    file = copy / "benchmarks" / "results" / "bench.json"
    found = json.loads(file.read_text())
    blocks.arms_of(found["samplings"][0])["mtp@4"]["over_stock"]["ratio"] = 7.125
    file.write_text(json.dumps(found))
    before = (copy / "README.md").read_text()
    done = command("--check", "--root", str(copy))
    assert done.returncode == 1 and {"README.md is stale", "docs/images/speed.svg is stale"} <= {
        line.partition(";")[0] for line in done.stderr.splitlines()
    }
    assert (copy / "README.md").read_text() == before  # checking writes nothing
    assert command("--root", str(copy)).returncode == 0
    assert "7.12" in (copy / "README.md").read_text() and "7.12" in (copy / "docs" / "images" / "speed.svg").read_text()
    assert command("--check", "--root", str(copy)).returncode == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<!-- table: nonsense -->\n<!-- end -->\n", "found 'nonsense'"),
        ("<!-- table: speed -->\n", "closed by '<!-- end -->'"),
        ("<!-- end -->\n", "closed by '<!-- end -->'"),
        ("<!-- table: families -->\n<!-- end -->\n", "families.json"),
        ("<!-- table: training -->\n<!-- end -->\n", "in the form that 'training'"),
    ],
)
def test_blocks_that_cannot_be_made(text: str, words: str, copy: Path) -> None:
    (copy / "benchmarks" / "results" / "families.json").unlink(missing_ok=True)
    (copy / "benchmarks" / "results" / "training.json").write_text('{"something": "else"}')
    (copy / "docs" / "new.md").write_text(text)
    for page in ("README.md", "docs/benchmarking.md"):
        (copy / page).write_text("")
    with pytest.raises(tables.TableError, match="Expected") as error:
        tables.stale(copy)
    assert words in str(error.value)


def test_blocks_whose_results_are_still_to_come() -> None:
    """The forms that benchmarks/families.py and benchmarks/adapt.py write."""
    drafted = {"ratio": 2.0, "interval": [1.5, 2.5], "depth": 4, "tokens_per_round": 3.25, "acceptance": [0.8, 0.625],
               "draft_milliseconds": 1.25, "parameters": 2e6, "training_minutes": 60.2}  # fmt: skip
    plain = {"ratio": 1.0, "interval": [0.9, 1.1]}
    heads, rows = blocks.TABLES["families"].show({"arms": {"plain": plain, "parallel": drafted}})
    assert rows == [["plain", "1.00 [0.90, 1.10]", "", "", "", "", "", ""],
                    ["parallel", "2.00 [1.50, 2.50]", "4", "3.25", "80 62 %", "1.25", "2.00 M", "60 min"]]  # fmt: skip
    assert len(heads) == len(rows[0])
    losses = {"steps": 150, "alone": 5.0, "parallel": 5.125, "sequential": 4.75}
    _, rows = blocks.TABLES["main-head"].show({"main_head_held_out_loss": losses})
    assert [row[1:] for row in rows] == [["5.000", ""], ["5.125", "+0.125"], ["4.750", "-0.250"]]
    _, rows = blocks.TABLES["adapt"].show({"before": 2.0, "after": 2.5, "minutes": 11.4})
    assert rows == [["2.00", "2.50", "+25%", "11 min"]]


def test_a_results_own_command_counts() -> None:
    assert blocks.TABLES["speed"].made_by({"command": "mlx-mtp bench --depth 2"}) == "mlx-mtp bench --depth 2"
    assert blocks.TABLES["memory"].made_by({}).startswith("python benchmarks/soak.py")
