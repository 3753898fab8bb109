"""The entry point of `mlx-mtp`: Ctrl-C is exit code 130 and no traceback, from the first moment on."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import termios
from types import FrameType
from typing import Any

IMPORTING = "<frozen importlib._bootstrap>"


def main() -> None:
    """Entry point: exit code 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
    _prepare_streams()
    interrupts = Interrupts()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where the caller has Ctrl-C ignored
        interrupts.take()
    from mlx_mtp.cli.command_line import run

    with contextlib.suppress(KeyboardInterrupt):  # another one, just when the first had been answered
        run(sys.argv[1:], on_begin=interrupts.begin)
    interrupts.running = False
    sys.exit(130)


def _prepare_streams() -> None:
    """Standard streams that always work: closed ones lead nowhere, and no character is one too many for them.

    Input is UTF-8 with or without a byte order mark; what is not UTF-8 in it is found where it is read.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # nothing else must get the number of a closed one
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name, number, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8"))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # read from already, or no stream of the system's
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        if not sys.stdin.isatty():
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")  # type: ignore[union-attr]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


class Interrupts:
    """What Ctrl-C does: KeyboardInterrupt while the command runs, else the end of the process at once.

    Imports end at once, those in the middle of a command too: an exception out of a half-made import does not always
    arrive as what it is, since libraries catch it, or are in a finaliser, where Python prints it and goes on.
    """

    def __init__(self) -> None:
        self.running = False
        self._terminal: list[Any] | None = None

    def take(self) -> None:
        """From now on Ctrl-C is answered here."""
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):
            self._terminal = termios.tcgetattr(sys.stdin.fileno())
        if sys.unraisablehook is sys.__unraisablehook__:
            sys.unraisablehook = self._unraisable
        atexit.register(self._end)
        signal.signal(signal.SIGINT, self._handle)

    def begin(self) -> None:
        """The command runs: it answers KeyboardInterrupt."""
        self.running = True

    def _end(self) -> None:
        self.running = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        while self.running and frame is not None and frame.f_code.co_filename != IMPORTING:
            frame = frame.f_back
        if not self.running or frame is not None:
            self._leave()
        raise KeyboardInterrupt

    def _unraisable(self, unraisable: sys.UnraisableHookArgs) -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            self._leave()
        sys.__unraisablehook__(unraisable)

    def _leave(self) -> None:
        """Ends the process without Python's tidying up; the terminal is as it was found."""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, full, or in use just now
                stream.flush()
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):
            if self._terminal is not None:
                termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, self._terminal)
            if sys.stderr.isatty():
                os.write(sys.stderr.fileno(), b"\x1b[?25h")  # a progress bar hides the cursor
        os._exit(130)


if __name__ == "__main__":
    main()
