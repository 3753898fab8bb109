"""What the user says: an editable prompt on a terminal, lines of a pipe elsewhere; and the terminal during a reply."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import tty
from collections.abc import Iterator, Sequence
from threading import Event
from typing import Any

from mlx_mtp.checkpoints.kept import user_folder

PROMPT = "> "
HINT = "Ctrl-D leaves, /help shows the commands."


class PlainLines:
    """Lines, in a pipe and on a terminal that only knows text (TERM=dumb). prompt: "" where nobody is asked."""

    def __init__(self, prompt: str) -> None:
        self.interactive, self._prompt = bool(prompt), prompt

    def read(self) -> str:
        """The next line that is not empty, EOFError after the last."""
        line = ""
        while not line.strip():
            line = input(self._prompt)
        return line


class TerminalLines:
    """A prompt with history and several lines; to_stderr: standard output is taken by something else.

    Enter sends; Alt-Enter, or Enter after a backslash, begins a new line; Ctrl-C clears what was typed. Where nothing
    was typed Ctrl-C says how to leave, inside the prompt: between two prompts the terminal would swallow a Ctrl-D that
    follows at once.
    """

    interactive = True

    def __init__(self, commands: Sequence[str], to_stderr: bool) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.filters import is_searching
        from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
        from prompt_toolkit.output import create_output
        from prompt_toolkit.shortcuts import CompleteStyle

        bindings = KeyBindings()
        self._session: PromptSession[str] = PromptSession(
            message=[("bold", PROMPT)], multiline=True, history=_history(), key_bindings=bindings,
            completer=WordCompleter(list(commands), sentence=True), complete_while_typing=False,
            complete_style=CompleteStyle.READLINE_LIKE, reserve_space_for_menu=0, enable_suspend=True,
            # None lets it find out by itself what the terminal can do.
            output=create_output(stdout=sys.stderr) if to_stderr else None,
        )  # fmt: skip

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

    def read(self) -> str:
        """The next message."""
        while True:
            self._session.placeholder = None
            if (text := self._session.prompt()).strip():
                return text.rstrip()


Lines = PlainLines | TerminalLines


def lines(commands: Sequence[str]) -> Lines:
    """What fits standard input and output as they are."""
    out = sys.stdout.isatty()
    if not sys.stdin.isatty() or not (out or sys.stderr.isatty()):
        return PlainLines("")
    if os.environ.get("TERM", "dumb") in ("dumb", "unknown"):
        return PlainLines(PROMPT if out else "")
    return TerminalLines(commands, to_stderr=not out)


def _history() -> Any:
    """What was typed in earlier chats, in the user's data folder; of this chat only where that cannot be written."""
    from prompt_toolkit.history import FileHistory

    file = user_folder("XDG_DATA_HOME", ".local/share") / "mlx_mtp" / "chat_history"

    class History(FileHistory):
        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch(mode=0o600)
                super().store_string(string)

    return History(str(file))


@contextlib.contextmanager
def interruption() -> Iterator[Event]:
    """Ctrl-C while a reply runs: the first one sets the event, another one breaks off whatever runs."""
    asked = Event()

    def handle(*_: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def no_echo() -> Iterator[None]:
    """What is typed while a reply runs waits for the prompt, and does not appear in the middle of the reply."""
    try:
        descriptor = sys.stdin.fileno()
        before = termios.tcgetattr(descriptor)
        tty.setcbreak(descriptor, termios.TCSANOW)  # a Ctrl-D waits too
    except (OSError, ValueError, AttributeError, termios.error):
        yield
        return
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSANOW, before)
