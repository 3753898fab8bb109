"""`make demo` in this process, with one short prompt and few tokens: every figure is of this run."""

from __future__ import annotations

import re

import mlx.core as mx
import pytest
from conftest import GOLDEN

import mlx_mtp
from mlx_mtp.cli import demo
from mlx_mtp.measuring.turns import Job, Record, Timing


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the demo writes."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:1])
    monkeypatch.setattr(demo, "TOKENS", 12)
    monkeypatch.setattr(demo, "REPEATS", 1)
    demo.main()
    return capsys.readouterr().out


def test_both_replies_and_what_was_measured(shown: str) -> None:
    assert shown.startswith(f"mlx_mtp {mlx_mtp.__version__} · ") and demo.SHOWN_PROMPT in shown
    assert "plain · " in shown and "MTP · " in shown
    reply = mlx_mtp.load(drafter=None).generate(demo.SHOWN_PROMPT, max_tokens=192).text
    short = [line for line in reply.splitlines() if 10 < len(line) < 50]
    assert short and all(any(row.count(line) == 2 for row in shown.splitlines()) for line in short)  # both boxes
    assert "1 code prompts, 12 tokens, greedy, median of 1 runs each" in " ".join(shown.split())
    for arm, end in (("stock mlx-lm", ""), ("plain", "the reference"), ("MTP", "")):
        row = next(line for line in shown.splitlines() if re.search(rf"^\W {arm}\s.*\d\.\d\s", line))
        assert len(re.findall(r"\d+\.\d\d\b", row)) >= 2 and end in row  # ratio, tokens per round
    assert re.search(r"Drafts accepted, by position: 1: \d+%", shown)


def test_a_difference_is_named_with_its_place_and_gap() -> None:
    engine, tokens = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=None), [5, 6, 7, 8]
    job, (plain, same, other) = Job([1, 2, 3], 4), (
        Record([[Timing(found, 1.0, 0, None)]]) for found in (tokens, tokens, [5, 6, 9, 8])
    )  # fmt: skip
    assert demo._comparison(engine, [job], plain, same) == "identical"
    logits = engine.target.logits(mx.array([[1, 2, 3, 5, 6]]))[0, -1]
    gap = (logits[7] - logits[9]).item()
    assert demo._comparison(engine, [job], plain, other) == f"parts at token 3, the two tokens' logits {gap:.1e} apart"
