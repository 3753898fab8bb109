"""`mlx-mtp chat` in a pseudo-terminal and in pipes: typing, Ctrl-C, resize, a paste, exit codes."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pyte
import pytest
from conftest import Command

import mlx_mtp

CHAT = ["-m", "mlx_mtp.cli.app", "chat", "--depth", "3"]
PATIENCE = 300
READY = "Ctrl-D leaves.\n>"
Piped = Callable[..., tuple[int, str, str]]
ENDLESS = ["--max-tokens", "4000"]  # of which nobody sees the end


def environment(folder: Path, **changes: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
    return {**inherited, "HF_HUB_OFFLINE": "1", "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder),
            "TERM": "xterm-256color", **changes}  # fmt: skip


class Terminal:
    """A chat on a terminal that answers what terminals are asked, and remembers what left the screen."""

    def __init__(self, folder: Path, *options: str, columns: int = 100, into: str = "", **variables: str) -> None:
        command = shlex.join([sys.executable, *CHAT, *options]) + into
        self.child = pexpect.spawn(
            "bash", ["-c", f"exec {command}"], dimensions=(30, columns), env=environment(folder, **variables),
            encoding="utf-8", timeout=PATIENCE,
        )  # fmt: skip
        self.screen = pyte.HistoryScreen(columns, 30, history=20_000, ratio=0.001)
        self.screen.write_process_input = self.child.send
        self._stream, self.raw = pyte.Stream(self.screen), ""

    @property
    def text(self) -> str:
        columns = range(self.screen.columns)
        gone = ["".join(line[x].data for x in columns) for line in self.screen.history.top]
        return "\n".join(row.rstrip() for row in [*gone, *self.screen.display]).rstrip()

    def read(self) -> bool:
        """Takes what the chat has written within a moment; whether it still runs."""
        try:
            found = self.child.read_nonblocking(65536, timeout=0.1)
        except pexpect.TIMEOUT:
            return True
        except pexpect.EOF:
            return False
        self.raw += found
        self._stream.feed(found)
        return True

    def wait(self, wanted: str) -> None:
        """Until this is to be seen."""
        end = time.monotonic() + PATIENCE
        while wanted not in self.text:
            assert time.monotonic() < end and self.read(), self.text

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self.child.setwinsize(rows, columns)

    def ended(self) -> int:
        """The exit code."""
        while self.read():
            pass
        self.child.close()
        assert "Traceback" not in self.text
        return int(self.child.exitstatus)

    @property
    def colours(self) -> bool:
        """30 to 49 and 90 to 107 are colours, alone or before or after others."""
        return bool(re.search(r"\x1b\[(?:[\d;]*;)?(?:[34]\d|9\d|10[0-7])(?:;[\d;]*)?m", self.raw))


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """A chat that is ready, and ends with the test."""
    chats: list[Terminal] = []

    def start(*options: str, folder: Path = tmp_path, **settings: Any) -> Terminal:
        chats.append(Terminal(folder, *options, **settings))
        chats[-1].wait("Which one")
        chats[-1].child.send("\r")  # nothing is here and no hub is asked: the embedded model
        chats[-1].wait(READY)
        return chats[-1]

    yield start
    for chat in chats:
        chat.child.close(force=True)


def test_typing_stopping_and_leaving(tmp_path: Path, opened: Callable[..., Terminal]) -> None:
    chat = opened(*ENDLESS)
    chat.child.send("one line\\\rtwo\x1b\rthree")  # a backslash, then Alt-Enter
    chat.wait("> one line\n  two\n  three")
    chat.child.send("\x03")  # clears it
    chat.child.send("What does `shutil.copytree` do?\r")
    chat.wait("Return the file")
    for columns, rows in ((40, 30), (120, 8), (100, 30)):
        seen = len(chat.raw)
        chat.resize(columns, rows)
        while len(chat.raw) < seen + 300:  # goes on
            assert chat.read()
    chat.child.sendintr()
    chat.wait("stopped\n>")
    chat.child.send("/stats\r")
    chat.wait("1 turn,")  # the answer so far is part of the conversation
    chat.child.send("\x1b[A\x1b[A")  # up to the last but one of the history
    chat.wait("no finished reply yet\n> What does `shutil.copytree` do?")
    chat.child.send("\x03\x03")  # clears it; then there is nothing to clear
    chat.wait("> Ctrl-D leaves, /help shows the commands.")
    chat.child.send("\x03\x04")  # in one breath
    assert chat.ended() == 0 and chat.colours
    assert "shutil.copytree" in (tmp_path / "mlx_mtp" / "chat_history").read_text()
    assert (tmp_path / "mlx_mtp" / "chat_history").stat().st_mode & 0o077 == 0


def test_what_is_typed_while_a_reply_runs_waits(opened: Callable[..., Terminal]) -> None:
    """And a paste is one message."""
    chat = opened("--max-tokens", "150")
    chat.child.send("\x1b[200~" + "\r".join([*map(str, range(60)), "the last line"]) + "\x1b[201~")
    chat.wait("the last line")
    assert "tokens/s" not in chat.text  # nothing was sent yet
    seen = len(chat.raw)
    chat.child.send("\r")
    while len(chat.raw) < seen + 300:
        assert chat.read()
    chat.child.send("/stats\rtyped ahead\r\x04")
    assert chat.ended() == 0
    assert re.search(r"tokens per round.*\n> /stats\nconversation +1 turn,", chat.text)
    assert int(re.findall(r"(\d+) tokens, \d+ prefilled", chat.text)[0]) > 120  # a number and a line end each
    assert "typed ahead" not in chat.text.partition("> /stats")[0] and chat.text.count("cut at max_tokens") == 2


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_and_40_columns(tmp_path: Path, opened: Callable[..., Terminal], variables: dict[str, str]) -> None:
    history = tmp_path / "no folder"
    history.write_text("")  # so that no history can be kept
    chat = opened("--max-tokens", "30", folder=history, columns=40, **variables)
    chat.child.send("What does os.walk do?\r")
    chat.wait("tokens/s")
    chat.child.send("/nonsense\r")
    chat.wait("There is no command")
    chat.child.send("\x04")
    assert chat.ended() == 0 and not chat.colours
    assert "```python" in chat.text and "Return the current" in chat.text
    assert "\x1b" not in chat.raw or "TERM" not in variables


@pytest.fixture
def piped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> Piped:
    """The command in this process, its standard input and output being pipes: exit code, stdout, stderr."""
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)

    def call(text: bytes, *options: str) -> tuple[int, str, str]:
        return command("chat", "--depth", "3", *options, stdin=text)

    return call


def test_in_a_pipe_every_line_is_a_message(piped: Piped) -> None:
    """Replies alone on standard output, no colours, nothing on standard error."""
    text = b"\xef\xbb\xbfWhat does os.walk do?\n\n/undo\r\nWhat does os.walk do?\nMore"
    code, out, err = piped(text, "--max-tokens", "12")
    assert (code, err) == (0, "") and "\x1b" not in out
    one, two, three, *_ = out.split("```python")[1:]
    assert one == two and three


def test_bad_lines_in_a_pipe(piped: Piped) -> None:
    """One sentence each, the other lines are followed, exit code 2."""
    code, out, err = piped(b"bytes \xff\nWhat does os.walk do?\n\xfe more\n/load nowhere\n", "--max-tokens", "8")
    sentences = err.splitlines()
    assert code == 2 and len(sentences) == 2 and all(line.endswith(".") for line in sentences)
    assert out.startswith("```python")


def test_options_of_a_conversation(piped: Piped, tmp_path: Path) -> None:
    """--system and --load, alone and together."""
    question = b"What does os.walk do?\n"
    chat = mlx_mtp.load().chat(system="Be brief.")
    answers = []
    for system in ("Be brief.", "Answer with a class for a queue."):
        chat.set_system(system)
        file = str(chat.save(tmp_path / "kept"))
        alone = piped(question, "--max-tokens", "8", "--system", system)
        assert alone[0] == 0 and alone[2] == "" and piped(question, "--max-tokens", "8", "--load", file) == alone
        answers.append(alone[1])
    options = ("--max-tokens", "8", "--load", file, "--system", "Be brief.")
    assert piped(question, *options)[1] == answers[0] != answers[1]


def test_standard_output_that_ends(tmp_path: Path) -> None:
    """Nothing but the exit code where its reader has read enough; one sentence where the disk is full."""
    command = f"{sys.executable} {' '.join(CHAT)} --max-tokens 40"
    for sink, out, complaint in (("| head -c 5", b"```py", b""), ("> /dev/full", b"", b"No space")):
        if sink == "> /dev/full" and not Path("/dev/full").exists():
            continue
        shell = ["bash", "-o", "pipefail", "-c", f"{command} {sink}"]
        done = subprocess.run(shell, input=b"What does os.walk do?\nMore\nAnd more\n", capture_output=True,
                              env=environment(tmp_path), timeout=PATIENCE, check=False)  # fmt: skip
        assert done.returncode in (1, 2) and done.stdout == out
        assert complaint in done.stderr and done.stderr.count(b"\n") == bool(complaint)


def test_an_interrupt_in_a_pipe_ends_with_130(tmp_path: Path) -> None:
    command = [sys.executable, *CHAT, *ENDLESS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          env=environment(tmp_path), bufsize=0) as chat:  # fmt: skip
        assert chat.stdin and chat.stdout
        chat.stdin.write(b"What does `shutil.copytree` do?\nMore\n")
        first = chat.stdout.read(20)
        chat.send_signal(signal.SIGINT)
        rest, errors = chat.communicate(timeout=PATIENCE)
    assert chat.returncode == 130 and first.startswith(b"```") and rest.endswith(b"\n") and errors == b""
