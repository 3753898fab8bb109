"""The entry point: Ctrl-C at any moment of the start ends quietly with 130; help and version import no MLX."""

import importlib
import inspect
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDEN

import mlx_mtp
from mlx_mtp.cli.command_line import COMMANDS

HEAVY = ("mlx.core", "mlx_lm", "numpy", "torch", "transformers", "prompt_toolkit", "starlette", "huggingface_hub")
PATIENCE = 300


# Sends Ctrl-C to its own process when the module is asked for: a signal from outside would come at a moment that
# depends on how busy the machine is, perhaps when everything is done.
INTERRUPTED = """
import os, runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            print("imported", file=marks, flush=True)
            os.kill(os.getpid(), signal.SIGINT)

module, marks = sys.argv.pop(1), open(sys.argv.pop(1), "w")
sys.meta_path.insert(0, Finder())
runpy.run_module("mlx_mtp.cli.app", run_name="__main__", alter_sys=True)
"""


def interrupted_at(
    module: str, *arguments: str | Path, marks: Path, interrupts: signal.Handlers = signal.SIG_DFL
) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `mlx-mtp ARGUMENTS`, which gets Ctrl-C when it imports the module."""
    # A shell's background job has interrupts ignored, and its children inherit that: hence the explicit handler.
    found = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, marks, *map(str, arguments)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts),
    )  # fmt: skip
    assert marks.read_text() == "imported\n", f"{module} was never imported: {found.stderr}"
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("command", "module"),
    [("--help", "typer"), ("chat", "mlx_mtp.cli.line_input"), ("generate", "mlx.core"), ("serve", "uvicorn")],
)
def test_an_interrupt_while_modules_are_imported(command: str, module: str, tmp_path: Path) -> None:
    arguments = {"generate": ["def f(x):", "--max-tokens", "4000"], "serve": ["--port", "0"]}.get(command, [])
    code, out, err = interrupted_at(module, command, *arguments, marks=tmp_path / "marks")
    assert (code, out.strip(), err) == (130, "", "")


def test_an_ignored_interrupt_stays_ignored(tmp_path: Path) -> None:
    code, out, _ = interrupted_at("typer", "--version", marks=tmp_path / "marks", interrupts=signal.SIG_IGN)
    assert (code, out) == (0, f"{mlx_mtp.__version__}\n")


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_import_little(option: str) -> None:
    found = subprocess.run([sys.executable, "-X", "importtime", "-m", "mlx_mtp.cli.app", option],
                           stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    out = found.stdout
    assert found.returncode == 0
    assert out == f"{mlx_mtp.__version__}\n" if option == "--version" else all(name in out for name in COMMANDS)
    modules = {line.rpartition("|")[2].strip() for line in found.stderr.splitlines()}
    assert "typer" in modules and not modules.intersection(HEAVY)


@pytest.mark.parametrize("name", COMMANDS)
def test_summaries_are_the_commands_own(name: str) -> None:
    command = getattr(importlib.import_module(f"mlx_mtp.cli.{name}"), name)
    assert COMMANDS[name] == " ".join((inspect.getdoc(command) or "").split("\n\n")[0].split())


def test_public_names() -> None:
    code = """
import sys, mlx_mtp
assert "mlx.core" not in sys.modules and set(mlx_mtp.__all__) <= set(dir(mlx_mtp))
from mlx_mtp import *
assert load is mlx_mtp.load and "mlx.core" in sys.modules
assert all(name in globals() for name in mlx_mtp.__all__)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE, env=dict(os.environ))
    with pytest.raises(AttributeError, match="no attribute 'loud'"):
        _ = mlx_mtp.loud


# Standard streams

TINY = GOLDEN / "ple" / "target"
COMMAND = f"{sys.executable} -m mlx_mtp.cli.app"
IDS = f"generate --model {TINY} --drafter none --tokens 1,2,3 --max-tokens 5"


def shell(line: str, text: bytes = b"", **environment: str) -> tuple[int, bytes, bytes]:
    """Exit code of the command, its output and standard error; MTP in the line is the program."""
    script = f'set -o pipefail; {line.replace("MTP", COMMAND)}; exit "${{PIPESTATUS[0]}}"'
    found = subprocess.run(["bash", "-c", script], input=text, capture_output=True, timeout=PATIENCE,
                           env={**os.environ, **environment})  # fmt: skip
    return found.returncode, found.stdout, found.stderr


@pytest.mark.parametrize(
    ("command", "closed"),
    [("--help", "<&-"), ("--help", ">&-"), ("--help", "2>&-"), (IDS, "<&- >&- 2>&-"), ("chat --max-tokens 2", "<&-")],
)
def test_closed_streams(command: str, closed: str) -> None:
    code, out, err = shell(f"MTP {command} {closed}")
    shown = ">&-" not in closed.replace("2>&-", "") and not command.startswith("chat")
    assert (code, err) == (0, b"") and bool(out) == shown


def test_a_refusal_with_closed_streams() -> None:
    code, out, err = shell("MTP generate - <&- >&-")
    assert (code, out) == (2, b"") and err.count(b"\n") == 1


@pytest.mark.parametrize("command", ["--help", IDS.replace("-tokens 5", "-tokens 200")])
def test_a_reader_that_has_enough(command: str) -> None:
    code, _, err = shell(f"MTP {command} | head -c 2")
    assert code in (0, 1) and err == b""


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"},
                                         {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}])  # fmt: skip
def test_an_output_that_knows_few_characters(environment: dict[str, str]) -> None:
    """What is read is UTF-8 whatever the output is, and what the output lacks is a question mark in it."""
    code = """
import sys
from mlx_mtp.cli import app, command_line
command_line.run = lambda arguments, on_begin: print(sys.stdin.read(), "\\u65e5\\u672c \\xe9") or sys.exit(0)
app.main()
"""
    found = subprocess.run([sys.executable, "-c", code], input="\ufeffé 日本".encode(), capture_output=True,
                           env={**os.environ, **environment}, timeout=PATIENCE)  # fmt: skip
    encoding = environment.get("PYTHONIOENCODING", "ascii")
    assert found.returncode == 0 and found.stderr == b""
    assert found.stdout == "é 日本 日本 é\n".encode(encoding, "replace")
