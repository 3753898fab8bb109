"""What a hand reaches for first: help, its examples, short options, completion, a prompt from a pipe."""

import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pexpect
import pytest
from conftest import GOLDEN, Command, one_sentence
from documents import ROOT, parsed, piped

import mlx_mtp
from mlx_mtp.cli.command_line import COMMANDS, EXAMPLES

PATIENCE = 300
TINY = ("--model", GOLDEN / "ple" / "target", "--drafter", "none", "--max-tokens", "3")
DOCSTRINGS = {name: inspect.getdoc(getattr(import_module(f"mlx_mtp.cli.{name}"), name)) or "" for name in COMMANDS}


def examples_of(text: str) -> list[tuple[str, ...]]:
    """The program's own commands among a text's examples; what is set before one, or piped into one, is left out."""
    lines = text.partition("Examples:\n")[2].splitlines()
    return [argv[argv.index("mlx-mtp") + 1 :] for line in lines for argv in piped(line) if "mlx-mtp" in argv]


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_of_help_are_commands(name: str) -> None:
    examples = examples_of(DOCSTRINGS[name])
    assert len(examples) in (2, 3) or name == "demo"
    for argv in examples:
        assert argv[0] == name
        parsed(argv)


def test_examples_of_the_whole_program() -> None:
    assert [argv[0] in COMMANDS for argv in examples_of(EXAMPLES)] == [True, True, True]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_names_kinds_of_values_that_people_know(
    name: str, columns: int, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    code, short, err = command(*name.split(), "-h")
    assert (code, err) == (0, "") and short == command(*name.split(), "--help")[1]
    assert max(map(len, short.splitlines())) <= columns
    assert not any(word in short for word in ("<bool>", "<int>", "<float>", "<str>", "<path>", "list[", "Path"))
    assert ("Examples:" in short) == (name != "demo")
    panels = [line for line in short.splitlines() if line.startswith("╭─")]
    assert len(panels) >= (4 if name in ("", "generate", "chat", "bench", "serve", "train", "adapt") else 1)


@pytest.mark.parametrize(
    ("short", "long"),
    [("generate hi -m x -n 5 -t 1", "generate hi --model x --max-tokens 5 --temperature 1"),
     ("chat -m x -n 5 -t 1", "chat --model x --max-tokens 5 --temperature 1"),
     ("bench -m x -n 9 -t 1", "bench --model x --max-tokens 9 --temperature 1"),
     ("serve -m x -n 5 -t 1", "serve --model x --max-tokens 5 --temperature 1"),
     ("doctor -m x", "doctor --model x"),
     ("adapt -m x --drafter d --data t --out o", "adapt --model x --drafter d --data t --out o")],
)  # fmt: skip
def test_short_options(short: str, long: str) -> None:
    assert parsed(short.split()) == parsed(long.split())


@pytest.mark.parametrize(
    ("line", "words"),
    [("mlx-mtp ge", {"generate"}), ("mlx-mtp generate --drafter look", {"lookup", "lookup+auto"}),
     ("mlx-mtp chat --mode ", {"fast", "exact"}), ("mlx-mtp chat -m smol", {"smollm2"}),
     ("mlx-mtp train --family pa", {"parallel"}), ("mlx-mtp train --optimizer a", {"adamw"}),
     ("mlx-mtp convert --what s", {"split"}), ("mlx-mtp serve --top", {"--top-k", "--top-p"})],
)  # fmt: skip
def test_a_shell_completes(line: str, words: set[str], monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    monkeypatch.setenv("_MLX_MTP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(line.count(" ")))
    code, out, err = command()
    assert (code, set(out.split()), err) == (0, words, "")


def test_as_a_module() -> None:
    found = subprocess.run([sys.executable, "-m", "mlx_mtp", "models", "--help"], capture_output=True, text=True,
                           timeout=PATIENCE, check=True)  # fmt: skip
    assert "Usage: mlx-mtp models" in found.stdout and found.stderr == ""


def test_a_prompt_comes_from_a_pipe(command: Command) -> None:
    """With a dash or without; of the newline at its end only raw text keeps anything."""

    def reply(*argv: object, stdin: bytes | None = None) -> str:
        code, out, _ = command("generate", *argv, "-n", 4, "--json", stdin=stdin)
        assert code == 0
        return out.partition('"stats"')[0]

    assert reply(stdin=b"def f(x):\n") == reply("-", stdin=b"def f(x):\n") == reply("def f(x):")
    assert reply("--raw", stdin=b"x\n") == reply("x\n", "--raw")
    assert "prompt is missing" in one_sentence(*command("generate", *TINY, stdin=b""))


def test_a_terminal_without_a_prompt(tmp_path: Path) -> None:
    """One sentence at once; nothing waits for somebody to type."""
    found, code = pexpect.run(f"{sys.executable} -m mlx_mtp generate", withexitstatus=True, timeout=PATIENCE,
                              env=dict(os.environ))  # fmt: skip
    assert code == 2 and found.decode().splitlines() == [
        "A prompt is missing: write it after 'generate', in quotes, or pipe it in."
    ]


def test_linux_without_the_device_library(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    """The wheel mlx is the Python front alone there: one sentence, in Python too; any other error stays what it is."""
    missing = "libmlx.so: cannot open shared object file: No such file or directory"

    def broken(name: str) -> None:
        raise ImportError(missing)

    monkeypatch.setattr("mlx_mtp.cli.command_line.importlib", SimpleNamespace(import_module=broken))
    assert "pip install '.[cpu]'" in one_sentence(*command("generate", "hi"))
    assert command("--version")[0] == 0
    monkeypatch.setattr("mlx_mtp.importlib", SimpleNamespace(import_module=broken))
    with pytest.raises(mlx_mtp.MLXMTPError, match="'mlx-cpu'"):
        mlx_mtp.__getattr__("load")
    missing = "No module named 'typing_extensions'"
    with pytest.raises(ImportError, match="typing_extensions"):
        mlx_mtp.__getattr__("load")


def test_hints_name_extras_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    sources = "\n".join(file.read_text() for folder in ("cli", "mlx_mtp") for file in (ROOT / folder).rglob("*.py"))
    extras = re.findall(r'lacking\([^()]*"(\w+)"\)', sources)
    assert len(extras) == 5 and set(extras) <= set(project["optional-dependencies"])
    assert f"pip install {project['name']}" not in sources and f"'{project['name']}[" not in sources
