"""The command line `mlx-mtp`: the commands, and the one place where errors become one sentence and exit code 2.

Of the commands only the one that was asked for is imported: `mlx-mtp --help` needs no MLX and is quick.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer
from rich.console import Console
from rich.logging import RichHandler
from typer.core import TyperCommand, TyperGroup

from mlx_mtp.errors import MLXMTPError, without_device
from mlx_mtp.version import __version__

# In the order of `--help`, with the first paragraph of the command's own help (a test keeps both the same).
PANELS = {
    "Run a model": {
        "demo": "Show a small real model with and without MTP, side by side.",
        "chat": "Chat on the terminal; in a pipe every line of standard input is a message.",
        "generate": "Generate one completion.",
        "serve": "Serve OpenAI's Chat Completions, Completions and Responses, Anthropic's Messages, and a chat page.",
    },
    "Measure and choose": {
        "models": "List known pairs of model and drafter: sizes, what fits here, what is downloaded.",
        "doctor": "Measure this machine with a pair, and say what to expect.",
        "bench": "Measure this machine: stock mlx-lm, plain, and every drafter, on the same prompts in turns.",
    },
    "Make drafters and checkpoints": {
        "train": "Train drafters for a finished target, or a small Gemma-4-shaped target and drafters for it.",
        "adapt": "Fine-tune a drafter to a target; the answers stay the target's own, they only come faster.",
        "convert": "Quantise a checkpoint, bring in a GGUF file or Meta's .pth, or split MTP modules off a target.",
    },
}
COMMANDS = {name: summary for panel in PANELS.values() for name, summary in panel.items()}
EXAMPLES = """Examples:
  mlx-mtp demo
  mlx-mtp chat --model smollm2
  mlx-mtp generate --help"""
KINDS: dict[Any, str] = {bool: "", int: "NUMBER", float: "NUMBER", str: "TEXT", Path: "PATH"}
OUTPUT_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def application(arguments: Sequence[str]) -> typer.Typer:
    """All commands by name and summary; whole is the one that `arguments` name, in the module of its name.

    Where a shell asks how to complete a line there are no arguments, and the line is in the environment.
    """
    app = typer.Typer(
        name="mlx-mtp",
        cls=_Group,
        help="Language models that decode faster through Multi-Token Prediction, on Apple's MLX.",
        epilog=EXAMPLES,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
    )
    app.callback()(options)
    line = os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS") or ""
    asked = next((word for word in arguments or line.split()[1:] if not word.startswith("-")), None)
    for panel, names in PANELS.items():
        for name, summary in names.items():
            function, text = _not_asked_for, summary
            if name == asked:
                function = getattr(importlib.import_module(f"mlx_mtp.cli.{name}"), name)
                text = inspect.getdoc(function) or ""
            text, heading, examples = text.partition("Examples:\n")
            made = app.command(name, cls=_Command, help=text, epilog=heading + examples, rich_help_panel=panel)
            made(function)
    return app


def _plain(parameters: list[Any]) -> list[Any]:
    """The same with kinds of values that people know: NUMBER, TEXT or PATH, none for a flag or an argument's name."""
    for one in parameters:
        if one.param_type_name == "argument":
            one.display_type_rich = lambda ctx: None
        elif one.metavar is None:
            kind = one.type_descriptor.annotation
            one.metavar = next((KINDS[each] for each in (kind, *get_args(kind)) if each in KINDS), None)
    return parameters


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _plain(super().get_params(ctx))


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
        sys.exit(app(args=list(arguments) or ["--help"], prog_name="mlx-mtp", standalone_mode=False) or 0)
    except typer.Abort as error:
        raise KeyboardInterrupt from error
    except typer.TyperException as error:  # a command line that typer cannot read
        message = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
        refusal = MLXMTPError(f"{message}; 'mlx-mtp --help' shows what there is.")
    except MLXMTPError as error:
        refusal = error
    except ImportError as error:
        refusal = without_device(error)
    except OSError as error:
        if error.errno not in OUTPUT_FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python still writes at its end
        refusal = MLXMTPError(f"The output could not be written ({error.strerror}); free some disk space.")
    print(refusal, file=sys.stderr)
    sys.exit(2)
