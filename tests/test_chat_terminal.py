"""`mlx-mtp chat` in a pseudo-terminal and in pipes: typing, Ctrl-C in mid-reply, commands, resize, exit codes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pexpect = pytest.importorskip("pexpect")

CHAT = ["-m", "mlx_mtp.cli.app", "chat"]


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder),
            "TERM": "xterm"}  # fmt: skip


@pytest.mark.parametrize("columns", [40, 100])
def test_a_conversation_on_a_terminal(columns: int, tmp_path: Path) -> None:
    chat = pexpect.spawn(sys.executable, [*CHAT, "--max-tokens", "400"], encoding="utf-8", timeout=120,
                         dimensions=(24, columns), env=environment(tmp_path))  # fmt: skip
    chat.expect("leaves")
    chat.send("What does os.listdir do?\r")
    chat.expect("python|Return|def")
    chat.sendintr()  # in mid-reply: it stops, the conversation stays
    chat.expect("tokens/s|stopped")
    chat.setwinsize(30, columns + 7)
    chat.send("/nonsense\r")
    chat.expect("/help")
    chat.send(f"/save {tmp_path / 'kept'}\r")
    chat.expect("kept")
    chat.send("/quit\r")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0 and (tmp_path / "kept.safetensors").exists()


def test_in_a_pipe_every_line_is_a_message(tmp_path: Path) -> None:
    """Replies alone on standard output, no colours, nothing on standard error."""
    command = [sys.executable, *CHAT, "--max-tokens", "12", "--temperature", "0"]
    text = "What is os.path?\nAnd shutil?\n"
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment(tmp_path), timeout=120)
    assert done.returncode == 0 and done.stderr == "" and "\x1b" not in done.stdout and done.stdout.strip()
    wrong = subprocess.run(command, input="/nonsense\n", capture_output=True, text=True, env=environment(tmp_path),
                           timeout=120)  # fmt: skip
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "/help" in wrong.stderr
