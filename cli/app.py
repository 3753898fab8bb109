"""The command line `mlx-mtp`: a thin typer application over the library.

What it does: one file a command, one place where errors become one sentence and exit code 2. What it does not do:
anything a Python program could not do through `mlx_mtp`.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.logging import RichHandler

import mlx_mtp
from mlx_mtp.cli.adapt import adapt
from mlx_mtp.cli.bench import bench
from mlx_mtp.cli.chat import chat
from mlx_mtp.cli.convert import convert
from mlx_mtp.cli.doctor import doctor
from mlx_mtp.cli.generate import generate
from mlx_mtp.cli.models import models
from mlx_mtp.cli.serve import serve
from mlx_mtp.cli.train import train

OUTPUT_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="mlx-mtp",
    help="Language models that decode faster through Multi-Token Prediction, on Apple's MLX.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(chat)
app.command()(generate)
app.command()(serve)
app.command()(bench)
app.command()(train)
app.command()(adapt)
app.command()(convert)
app.command()(doctor)
app.command()(models)


def _version(asked: bool) -> None:
    if asked:
        print(mlx_mtp.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Entry point: exit code 0 done, 2 bad input (one sentence on stderr), 130 interrupted."""
    handler = RichHandler(console=Console(stderr=True), show_time=False, show_path=False, show_level=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    try:
        sys.exit(app(args=sys.argv[1:] or ["--help"], standalone_mode=False) or 0)
    except typer.TyperException as error:  # a command line that typer cannot read
        message = str(getattr(error, "format_message", error.__str__)()).rstrip(".")
        print(f"{message}; 'mlx-mtp --help' shows what there is.", file=sys.stderr)
        sys.exit(2)
    except mlx_mtp.MLXMTPError as error:
        print(" ".join(str(error).split()), file=sys.stderr)  # one line, whatever a path or a name holds
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(130)
    except OSError as error:
        if error.errno not in OUTPUT_FULL:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what Python still writes at its end
        print(f"Expected room for the output, found '{error.strerror}'; free some disk space.", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
