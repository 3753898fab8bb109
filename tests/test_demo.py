"""`make demo` in this process, with one short prompt and few tokens: every figure is of this run."""

from __future__ import annotations

import re

import pytest

import mlx_mtp
from mlx_mtp.cli import demo


def test_both_replies_and_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    for name, value in (("PROMPTS", demo.PROMPTS[:1]), ("SHOWN_TOKENS", 32), ("TOKENS", 12), ("REPEATS", 1)):
        monkeypatch.setattr(demo, name, value)
    demo.main()
    shown = capsys.readouterr().out
    assert shown.startswith(f"mlx_mtp {mlx_mtp.__version__} · ") and demo.SHOWN_PROMPT in shown
    assert "plain · " in shown and "MTP · " in shown
    reply = mlx_mtp.load(drafter=None).generate(demo.SHOWN_PROMPT, max_tokens=32).text
    short = [line for line in reply.splitlines() if 10 < len(line) < 50]
    assert short and all(any(row.count(line) == 2 for row in shown.splitlines()) for line in short)  # both boxes
    assert "1 code prompts, 12 tokens, greedy, 1 runs each" in " ".join(shown.split())
    for name in ("stock", "plain", "mtp@auto"):
        row = next(line for line in shown.splitlines() if re.search(rf"^\W {name}\s.*\d\.\d\d\s", line))
        assert len(re.findall(r"\d+\.\d\d\b", row)) >= 2  # rate and ratio
    assert re.search(r"identical to plain|differs in 1 of 1", shown) and "At T = 0 " in shown
