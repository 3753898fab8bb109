"""Tables and charts of the pages say what benchmarks/results/ holds; what benchmarks/cost_model.py foretells."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import blocks
import cost_model
import pytest
import tables
from documents import ROOT

from mlx_mtp.generation.depth import expected_tokens
from mlx_mtp.measuring.diagnosis import Costs


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


COSTS = Costs(
    context=200, verify=(0.010, 0.011, 0.012, 0.013, 0.015, 0.018, 0.020, 0.022), plain=0.0105, drafted_depth=4,
    drafted=0.015 + 4 * 0.001 + 0.0008, draft_step=0.001, build=0.001, submit=0.002, scatter=0.02,
)  # fmt: skip


def test_rounds_needed_by_hand() -> None:
    chances = cost_model.tokens_distribution(10, [8, 4])
    assert chances == pytest.approx([0.2, 0.4, 0.4]) and sum(chances) == pytest.approx(1.0)
    assert cost_model.tokens_distribution(7, []) == [1.0]  # plain decoding
    # One token: one round. Two: one more round where the first gave one. Three: 1 + 0.2 N(2) + 0.4 N(1).
    assert [cost_model.rounds_needed(chances, n) for n in range(4)] == pytest.approx([0.0, 1.0, 1.2, 1.64])
    assert cost_model.rounds_needed([1.0], 63) == 63.0
    long = cost_model.rounds_needed(chances, 5000)
    assert 5000 / long == pytest.approx(expected_tokens([0.8, 0.5], 2), rel=1e-3)


def test_the_prediction_by_hand() -> None:
    plain = cost_model.seconds_per_token(COSTS, {0: 9}, [1.0], 64)
    assert plain == pytest.approx(0.0105)
    # Depth 2: a pass of three rows, two drafts, and the gap that depth 4 showed.
    parts = cost_model.round_parts(COSTS, {2: 5})
    assert (parts.verify, parts.draft, parts.gap) == pytest.approx((0.012, 0.002, 0.0008))
    chances = [0.2, 0.4, 0.4]
    needed = cost_model.rounds_needed(chances, 63)
    assert cost_model.seconds_per_token(COSTS, {2: 5}, chances, 64) == pytest.approx(needed * 0.0148 / 63)
    # The formula itself, E / (verify(M) / verify(1) + depth x draft / verify(1) + gap / verify(1)), for long replies.
    formula = 2.2 / (1.2 + 0.2 + 0.08)
    model = COSTS.verify[0] / cost_model.seconds_per_token(COSTS, {2: 5}, chances, 4000)
    assert model == pytest.approx(formula, rel=1e-3)
