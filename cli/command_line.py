"""The command line `mlx-mtp`: the commands, and the one place where errors become one sentence and exit code 2.

Of the commands only the one that was asked for is imported: `mlx-mtp --help` needs no MLX and is quick.
"""

from __future__ import annotations

import errno
import importlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler

from mlx_mtp.errors import MLXMTPError
from mlx_mtp.version import __version__

# In the order of `--help`, with the first paragraph of the command's own help (a test keeps both the same).
COMMANDS = {
    "demo": "Show a small real model with and without MTP, side by side.",
    "chat": "Chat on the terminal; in a pipe every line of standard input is a message.",
    "generate": "Generate one completion.",
    "serve": "Serve OpenAI's APIs (Chat Completions, Completions, Responses), Anthropic's Messages, and a chat page.",
    "bench": "Measure this machine: stock mlx-lm, plain, and every drafter, on the same prompts in turns.",
    "train": "Train drafters for a finished target, or a small Gemma-4-shaped target and drafters for it.",
    "adapt": "Fine-tune a drafter to a target; the answers stay the target's own, they only come faster.",
    "convert": "Quantise a checkpoint, bring in a GGUF file or Meta's .pth heads, or split MTP modules off a target.",
    "doctor": "Measure this machine with a pair, and say what to expect.",
    "models": "List known pairs of model and drafter: sizes, what fits here, what is downloaded.",
}
OUTPUT_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def application(arguments: Sequence[str]) -> typer.Typer:
    """All commands by name and summary; whole is the one that `arguments` name, in the module of its name."""
    app = typer.Typer(
        name="mlx-mtp",
        help="Language models that decode faster through Multi-Token Prediction, on Apple's MLX.",
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == asked:
            app.command(name)(getattr(importlib.import_module(f"mlx_mtp.cli.{name}"), name))
        else:
            app.command(name, help=summary)(_not_asked_for)
    return app


def _not_asked_for() -> None:
    """In place of a command of which only name and summary are needed."""


def _version(asked: bool) -> None:
    if asked:
        print(__version__)
        raise typer.Exit


def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


def run(arguments: Sequence[str], on_begin: Callable[[], object]) -> NoReturn:
    """Does what the arguments say and exits; KeyboardInterrupt for an interrupt.

    on_begin: called once everything is imported, when an interrupt may be raised as an exception.
    """
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    try:
        app = application(arguments)
        on_begin()
        sys.exit(app(args=list(arguments) or ["--help"], standalone_mode=False) or 0)
    except typer.TyperException as error:  # a command line that typer cannot read
        message = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
        print(MLXMTPError(f"{message}; 'mlx-mtp --help' shows what there is."), file=sys.stderr)
        sys.exit(2)
    except MLXMTPError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except OSError as error:
        if error.errno not in OUTPUT_FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python still writes at its end
        print(f"The output could not be written ({error.strerror}); free some disk space.", file=sys.stderr)
        sys.exit(2)
