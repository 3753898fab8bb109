"""The entry point of `mlx-mtp`: Ctrl-C is exit code 130 and no traceback, from the first moment on."""

from __future__ import annotations

import contextlib
import os
import signal
import sys


def main() -> None:
    """Entry point: exit code 0 done, 2 bad input (one sentence on stderr), 130 interrupted.

    While modules are imported, and at the end, Ctrl-C ends the process at once: an exception out of a half-made import
    does not always arrive as what it is.
    """
    _prepare_streams()
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # not where the caller has Ctrl-C ignored
        signal.signal(signal.SIGINT, _leave)
    from mlx_mtp.cli.command_line import run

    try:
        run(sys.argv[1:], on_begin=lambda: signal.signal(signal.SIGINT, handler))
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if handler is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> None:
    """Ends the process without Python's tidying up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # closed, full, or in use just now
            stream.flush()
    os._exit(130)


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
        encoding = None if sys.stdin.isatty() else "utf-8-sig"  # None leaves it
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")  # type: ignore[union-attr]
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
