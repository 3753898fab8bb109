"""What the user says: an editable prompt on a terminal, lines of a pipe elsewhere.

What it does: history, several lines, pasted text as one message; and the terminal's behaviour while a reply runs. What
it does not do: understand commands (commands.py).
"""

from __future__ import annotations

import codecs
import contextlib
import os
import signal
import sys
import termios
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO

from mlx_mtp import PromptError

# A history beyond this is put aside at the next start.
HISTORY_BYTES = 2_000_000
PROMPT = "> "
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
HINT = "Ctrl-D leaves, /help shows the commands."


class Lines(Protocol):
    """Where messages come from. interactive: whether somebody sits there and can be asked again."""

    interactive: bool

    def read(self) -> str:
        """The next message; EOFError when there is none, KeyboardInterrupt for a Ctrl-C that it does not answer."""


class Verbatim(str):
    """A message, whatever it begins with."""


class PipeLines:
    """Every line of standard input is a message. echo: shows them, for a reader of the output."""

    interactive = False

    def __init__(self, echo: bool) -> None:
        self._echo, self._begun = echo, False

    def read(self) -> str:
        """The next line that is not empty; PromptError for one that is no UTF-8, EOFError behind the last.

        Text in UTF-16 is refused once and as a whole: cut at line ends, some of its lines would pass for UTF-8.
        """
        while line := sys.stdin.buffer.readline():
            first, self._begun = not self._begun, True
            if first and line.startswith(UTF_16):
                sys.stdin.buffer.read()
                raise PromptError("Expected lines in UTF-8, found UTF-16; convert the input.")
            try:
                text = line.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError:
                raise PromptError("Expected lines in UTF-8, found bytes that are not; convert the input.") from None
            if text.strip():
                if self._echo:
                    print(PROMPT + text, flush=True)
                return Verbatim(text)
        raise EOFError


class DumbLines:
    """A terminal that only knows text (TERM=dumb): the system's own line editing."""

    interactive = True

    def __init__(self, prompts: TextIO) -> None:
        self._prompts = prompts

    def read(self) -> str:
        """The next message; a backslash at the end of a line goes on in another one."""
        message: list[str] = []
        while True:
            print(PROMPT, end="", file=self._prompts, flush=True)
            if not (line := sys.stdin.readline()):
                print(file=self._prompts)
                raise EOFError
            message.append(line.rstrip("\r\n"))
            if message[-1].endswith("\\"):
                message[-1] = message[-1][:-1]
            elif text := "\n".join(message).rstrip():
                return text
            else:
                message = []


class TerminalLines:
    """A prompt with history and several lines. to_stderr: standard output is taken by something else."""

    interactive = True

    def __init__(self, commands: Sequence[str], to_stderr: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import create_output
        from prompt_toolkit.shortcuts import CompleteStyle

        self._session: PromptSession[str] = PromptSession(
            message=[("bold", PROMPT)], multiline=True, history=_history(), key_bindings=self._bindings(),
            completer=WordCompleter(list(commands), sentence=True), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE, reserve_space_for_menu=0, enable_suspend=True,
            # None lets it find out by itself what the terminal can do.
            output=create_output(stdout=sys.stderr) if to_stderr else None,
        )  # fmt: skip

    def read(self) -> str:
        """The next message."""
        while True:
            self._session.placeholder = None
            if (text := self._session.prompt()).strip():
                return text.rstrip()

    def _bindings(self) -> Any:
        """Enter sends; Alt-Enter, or Enter behind a backslash, begins a new line; Ctrl-C clears what was typed.

        Where nothing was typed Ctrl-C says how to leave, inside the prompt: between two prompts the terminal would
        swallow a Ctrl-D that follows at once.
        """
        from prompt_toolkit.filters import is_searching
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

        bindings = KeyBindings()

        @bindings.add("enter", filter=~is_searching)
        def _(event: KeyPressEvent) -> None:
            buffer = event.current_buffer
            if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        @bindings.add("escape", "enter")
        def _(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @bindings.add("c-c", filter=~is_searching)
        @bindings.add("<sigint>")
        def _(event: KeyPressEvent) -> None:
            if event.current_buffer.text:
                event.current_buffer.reset()
            else:
                self._session.placeholder = [("italic", HINT)]

        return bindings


def lines(commands: Sequence[str]) -> Lines:
    """What fits standard input and output as they are."""
    if sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty()):
        if os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
            return DumbLines(sys.stdout if sys.stdout.isatty() else sys.stderr)
        return TerminalLines(commands, to_stderr=not sys.stdout.isatty())
    return PipeLines(echo=sys.stdout.isatty())


def data_folder() -> Path:
    """Where the history is kept: the user's data folder."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "mlx_mtp"


def _history() -> Any:
    """What was typed in earlier chats; for this chat only where the data folder cannot be written."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        """One that a full disk does not disturb."""

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    try:
        file = data_folder() / "chat_history"
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and file.stat().st_size > HISTORY_BYTES:
            file.replace(file.with_name("chat_history.old"))
        os.close(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    except (OSError, RuntimeError):  # RuntimeError: there is no home folder
        return InMemoryHistory()
    return History(str(file))


class Interruption:
    """Ctrl-C while a reply runs: the first one asks it to stop, another one breaks it off wherever it is."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interruption:
        self.asked = False
        self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """What is typed while a reply runs waits for the prompt, and does not appear in the middle of the reply."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
    except (OSError, ValueError, AttributeError, termios.error):
        yield
        return
    quiet = [*before[:6], [*before[6]]]
    quiet[3] &= ~termios.ECHO
    # A Ctrl-D waits for the prompt like everything else; the terminal would swallow it.
    quiet[6][termios.VEOF] = bytes([os.fpathconf(descriptor, "PC_VDISABLE") & 0xFF])
    termios.tcsetattr(descriptor, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
