"""`mlx-mtp bench` as a user runs it, on the embedded pair with one short prompt and few tokens; no times asserted."""

import importlib.util
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Command, one_sentence, ran

from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.converting.quantise import quantise
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring import bench, configurations
from mlx_mtp.measuring.engines import DecodeJob, TimedRun
from mlx_mtp.measuring.report import DEFINITIONS, bench_markdown

SPREAD = {"median", "low", "high"}
ROW = {
    "arm", "drafter", "depth", "tokens_per_second", "over_stock", "over_plain", "tau", "timed_tokens_per_round",
    "acceptance", "drafted_by_position", "verified_by_position", "accepted_by_position", "depth_counts",
    "milliseconds_per_round", "first_token_milliseconds", "run_bytes", "joules_per_token", "output",
}  # fmt: skip
NAMES = ["stock", "plain", "mtp@2", "lookup@auto"]


@pytest.fixture(scope="module")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "short.jsonl"
    file.write_text(json.dumps({"prompt": "import os\n\ndef main():\n", "category": "code", "raw": True}) + "\n")
    return file


@pytest.fixture(scope="module")
def outputs(prompt_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with report.json, report.md and report.png of one small run, and the JSON."""
    folder, plan = tmp_path_factory.mktemp("bench"), configurations.Plan
    files = [f"--{name}={folder / 'report'}.{end}" for name, end in
             (("json", "json"), ("markdown", "md"), ("plot", "png"))]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_mtp.cli.bench.Plan", lambda **asked: plan(**asked, tokens_for_acceptance=16))
        code = ran("bench", "--prompts", prompt_file, "--arms", "stock,plain,mtp@2,lookup@auto", "--max-tokens", "12",
                   "--repeats", "2", "--cool-down", "0", *files)  # fmt: skip
    assert code == 0
    assert sorted(file.name for file in folder.iterdir()) == ["report.json", "report.md", "report.png"]
    return folder, json.loads((folder / "report.json").read_text())


def test_the_json_holds_everything(outputs: tuple[Path, dict[str, Any]]) -> None:
    report = outputs[1]
    assert set(report) == {
        "format", "verdict", "command", "started", "seconds", "interrupted", "machine", "idle_watts", "pair",
        "settings", "definitions", "notes", "samplings",
    }  # fmt: skip
    assert (report["format"], report["interrupted"], report["pair"]["family"]) == (2, False, "assistant")
    assert report["command"].startswith("mlx-mtp bench --prompts ") and report["settings"]["tokens"] == 12
    assert {"power_source", "low_power_mode", "blas", "load_average", "python"} <= set(report["machine"])
    assert [sampling["name"] for sampling in report["samplings"]] == ["T = 0", "T = 1, top-k 64, top-p 0.95"]
    for sampling in report["samplings"]:
        assert [group["category"] for group in sampling["groups"]] == ["all", "code"]
        for row in (row for group in sampling["groups"] for row in group["arms"]):
            assert set(row) == ROW and set(row["tokens_per_second"]) == set(row["first_token_milliseconds"]) == SPREAD
            assert row["run_bytes"] > 1e5 and row["over_stock"]["low"] <= row["over_stock"]["high"]


def test_the_figures_agree_with_the_raw_runs(outputs: tuple[Path, dict[str, Any]]) -> None:
    for sampling in outputs[1]["samplings"]:
        (prompt,) = sampling["prompts"]
        rows = {row["arm"]: row for row in sampling["groups"][0]["arms"]}
        assert list(rows) == NAMES
        assert rows["stock"]["over_stock"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
        for name, runs in prompt["runs"].items():
            assert [one["tokens"] for one in runs] == [12, 12]  # stop tokens are ignored, the budget is met
            speeds, row = [11 / one["seconds"] for one in runs], rows[name]
            assert row["tokens_per_second"]["median"] == pytest.approx(sum(speeds) / 2)
            # A plain round gives one token: 11 of them between the first token and the last.
            assert (row["milliseconds_per_round"] is None) == (name == "stock")
            if name == "plain":
                assert row["milliseconds_per_round"] == pytest.approx(sum(1e3 / speed for speed in speeds) / 2)
        drafted, reply = rows["mtp@2"], prompt["replies"]["mtp@2"]
        assert drafted["depth_counts"] == {"2": sum(one["depth_counts"]["2"] for one in prompt["runs"]["mtp@2"])}
        assert drafted["tau"] == pytest.approx((reply["tokens"] - 1) / reply["rounds"])
        assert drafted["acceptance"][0] == reply["accepted_by_position"][0] / reply["verified_by_position"][0]


def test_the_markdown_and_the_plot_are_of_that_report_alone(outputs: tuple[Path, dict[str, Any]]) -> None:
    folder, report = outputs
    text = (folder / "report.md").read_text()
    assert bench_markdown(report) == text
    assert text.splitlines()[2] == report["verdict"] and report["verdict"].startswith("At T = 0 ")
    assert "16 tokens at most" in text and "{" not in text
    for words in (*NAMES, *DEFINITIONS, report["machine"]["mlx"], report["command"]):
        assert words in text
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count(" | ") for line in block.splitlines() if "---" not in line}) == 1, block
    picture = (folder / "report.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    report["interrupted"] = True
    assert "### Incomplete" in bench_markdown(report)


def test_how_long_it_will_take() -> None:
    """By a prompt of middle length, asked twice: for all prompts and samplings what is read, written and rested."""
    asked: list[DecodeJob] = []

    def decode(job: DecodeJob) -> TimedRun:
        asked.append(job)
        return TimedRun([0] * job.tokens, seconds=job.tokens - 1.0, first_seconds=2.0)

    run = object.__new__(bench.Bench)
    run.plan = configurations.Plan(max_tokens=11, repeats=2, cool_down=5.0)
    run._ids = [[1] * 3, [1], [1] * 2]
    both = [SimpleNamespace(decode=decode, drafter=name) for name in (None, "mtp")]
    run.lineup = SimpleNamespace(configurations=dict(enumerate(both)), samplings=lambda: [None] * 2)
    # Plain: 1 run to warm up and 2 timed ones; with a drafter 1 reply of 128 tokens and 2 timed runs.
    assert run.expected_seconds() == 2 * (6 * 6 * 2 / 2 + 3 * (128 + 5 * 11 + 2 * 5))
    assert [len(job.prompt) for job in asked] == [2, 2]


SHORT = ("--arms", "plain", "--max-tokens", "8", "--cool-down", "0")


@pytest.mark.parametrize(
    ("error", "code", "words", "turns"),
    [(KeyboardInterrupt(), 130, "Interrupted.", 0), (KeyboardInterrupt(), 130, "Interrupted.", 1),
     (RuntimeError("[metal] out of memory"), 2, "Stopped by an error: [metal] out of memory.", 1)],
)  # fmt: skip
def test_what_was_measured_before_an_end_is_reported(
    error: BaseException, code: int, words: str, turns: int, prompt_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, command: Command,
) -> None:  # fmt: skip
    def cut(self: bench.Bench) -> Iterator[None]:
        yield from itertools.islice(whole(self), turns)
        raise error

    whole = bench.Bench.run
    monkeypatch.setattr(bench.Bench, "run", cut)
    file = tmp_path / "report.json"
    found, out, err = command("bench", "--prompts", prompt_file, *SHORT, "--json", file)
    assert found == code and re.search(r"about \d+ (seconds|minutes) \(configurations: 1, prompts: 1\)\. Ctrl-C", err)
    report = json.loads(file.read_text())
    assert report["interrupted"] and words in report["notes"] and words in err and "### Incomplete" in out
    runs = [prompt["runs"]["plain"] for sampling in report["samplings"] for prompt in sampling["prompts"]]
    assert list(map(len, runs)) == [1] * turns
    assert code == 130 or ("[metal] out of memory" in err.splitlines()[-1] and "Traceback" not in err)


@pytest.mark.peers
def test_mlx_vlm_takes_part_with_a_quantised_pair(prompt_file: Path, tmp_path: Path, command: Command) -> None:
    pytest.importorskip("mlx_vlm")
    quantise(Checkpoint.open(EMBEDDED / "target"), tmp_path / "target", bits=4, group=32)
    file = tmp_path / "target" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"vision_config": None}))  # as the embedded one has it
    options = ("--prompts", prompt_file, "--arms", "plain,mlx-vlm@1", "--max-tokens", "8", "--repeats", "1")
    pair = ("--model", tmp_path / "target", "--drafter", EMBEDDED / "assistant")
    code, out, err = command("bench", *options, *pair, "--temperature", "0", "--cool-down", "0", "--json", "-")
    assert code == 0
    (sampling,) = json.loads(out)["samplings"]
    vlm = {row["arm"]: row for row in sampling["groups"][0]["arms"]}["mlx-vlm@1"]
    assert "left out" not in err
    # Its weights are the same: tokens part, if at all, where two logits nearly tie.
    assert all(abs(place["logit_gap"]) < 0.05 for place in vlm["output"]["differences"])


def test_without_matplotlib_nothing_is_measured(
    monkeypatch: pytest.MonkeyPatch, command: Command, tmp_path: Path
) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else there(name))
    assert "pip install '.[plot]'" in one_sentence(*command("bench", "--plot", tmp_path / "a.png"))
