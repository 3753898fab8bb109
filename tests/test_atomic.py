"""Files and folders that take their place whole, or not at all."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mlx_mtp.checkpoints.atomic import replacing


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_whole(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    for before, after in ((None, "old"), ("old", "new")):
        with replacing(file) as fresh:
            assert fresh.suffix == ".json" and fresh.parent == tmp_path
            fresh.write_text(after)
            assert (file.read_text() if file.exists() else None) == before
        assert file.read_text() == after and names(tmp_path) == ["report.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_breaks_off_leaves_the_old_one(kind: str, error: type[BaseException], tmp_path: Path) -> None:
    inside = "." if kind == "file" else "one"
    if kind == "folder":
        (tmp_path / kind).mkdir()
    (tmp_path / kind / inside).write_text("old")
    with pytest.raises(error), replacing(tmp_path / kind) as fresh:
        if kind == "folder":
            fresh.mkdir()
        (fresh / inside).write_text("half")
        raise error
    assert names(tmp_path) == [kind] and (tmp_path / kind / inside).read_text() == "old"


def test_a_folder_replaces_another_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model-4.5"
    out.mkdir()
    (out / "old").touch()
    with replacing(out) as fresh:
        fresh.mkdir()
        (fresh / "new").touch()
    assert names(out) == ["new"] and names(tmp_path) == ["model-4.5"]

    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self.name.startswith(".model-4.partial"):
            raise OSError("another program is in it")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="another program"), replacing(out) as fresh:
        fresh.mkdir()
    assert names(out) == ["new"] and names(tmp_path) == ["model-4.5"]


def test_a_link_keeps_pointing_to_what_is_replaced_and_threads_do_not_meet(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    seen: list[Path] = []

    def other() -> None:
        with replacing(tmp_path / "link") as fresh:
            seen.append(fresh)
            fresh.write_text("second")

    with replacing(tmp_path / "link") as fresh:
        fresh.write_text("first")
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert seen != [fresh] and (tmp_path / "link").read_text() == "second"
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "first"
    assert names(tmp_path) == ["link", "real"]


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    pipe, heard = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: heard.append(pipe.read_text()))
    reader.start()
    with replacing(pipe) as given:
        given.write_text("text")
    reader.join()
    assert heard == ["text"] and pipe.is_fifo()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-S", "-c", ""])
    gone.wait()
    others = f".other.partial-{gone.pid}-1.json", f".state.partial-{os.getpid()}-1.json"
    for name in (f".state.partial-{gone.pid}-1.json", *others):
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "state.json") as fresh:
        fresh.write_text("whole")
    assert names(tmp_path) == [*others, "state.json"]
