"""What the tests of README.md, docs/ and help share: code blocks, commands and links of pages, commands parsed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from mlx_mtp.cli.command_line import application

ROOT = Path(__file__).parent.parent
TOP = ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")
PAGES = (*(ROOT / f"{name}.md" for name in TOP), *sorted((ROOT / "docs").glob("**/*.md")))
FENCE = re.compile(r"^```(.*?)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
PROGRAMS = ("mlx-mtp", "make", "pip", "python", "python3", "curl", "printf", "source", "rm", "apt-get", "pyinstaller")


@dataclass(frozen=True)
class Command:
    """One command of a page; stdin: the command whose output is piped into it."""

    page: str
    argv: tuple[str, ...]
    stdin: Command | None = None

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.argv)}"


def blocks(language: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Page, language and text of every fenced block, or of those of one language."""
    for page in PAGES:
        for found in FENCE.finditer(page.read_text(encoding="utf-8")):
            if language in (None, found[1]):
                yield page.name, found[1], found[2]


def commands() -> list[Command]:
    """Every command of every bash block, each once."""
    found: dict[tuple[tuple[str, ...], Command | None], Command] = {}
    for page, _, text in blocks("bash"):
        for line in text.splitlines():
            before = None
            for argv in piped(line):
                before = Command(page, argv, before)
                found.setdefault((argv, before.stdin), before)
    return list(found.values())


def inline_commands() -> list[Command]:
    """Commands in running text, between backticks, that have arguments."""
    found: dict[tuple[str, ...], Command] = {}
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for match in INLINE.finditer(text):
            if match[1].startswith(PROGRAMS):
                (argv,) = piped(match[1])
                found.setdefault(argv, Command(page.name, argv))
    return list(found.values())


def piped(line: str) -> list[tuple[str, ...]]:
    """The commands of one line, joined by pipes; none of a comment or an empty line."""
    words = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    words.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in words:
        if word == "|":
            found.append([])
        elif set(word) <= set("|&;<>"):
            raise AssertionError(f"Expected one command or a pipe in a line of a page, found '{word}' in: {line}")
        else:
            found[-1].append(word)
    return [tuple(argv) for argv in found if argv]


def links() -> list[tuple[Path, str]]:
    """Page and address of every link and picture."""
    return [(page, found[1]) for page in PAGES for found in LINK.finditer(FENCE.sub("", page.read_text("utf-8")))]


def parsed(argv: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """The parameters of a command line, by the real program's own parser; typer's error where it does not take it."""
    group: Any = typer.main.get_command(application(argv))
    context = group.make_context("mlx-mtp", list(argv))
    name, command, rest = group.resolve_command(context, list(argv))
    parameters: dict[str, Any] = command.make_context(name, rest, parent=context).params
    return parameters
