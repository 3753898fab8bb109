"""README.md and docs/: every command parses and, where that takes seconds, runs; every snippet runs; no link is dead.

Commands run with the embedded model in place of other names, with few tokens and steps, in a folder of their own. What
is only parsed is listed in PARSED_ONLY with the reason; anything else that a page shows must run.
"""

import argparse
import contextlib
import importlib
import io
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import tomllib
import types
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tables
from blocks import HEADLINE, arms_of
from conftest import Command as Run
from conftest import ran
from documents import PROGRAMS, ROOT, Command, blocks, commands, inline_commands, links, parsed
from layouts import DEEPSEEK, deepseek_arrays, meta_arrays, meta_folder, write_folder

import mlx_mtp
from mlx_mtp import drafters
from mlx_mtp.cli import doctor
from mlx_mtp.cli.command_line import COMMANDS
from mlx_mtp.generation import exactness
from mlx_mtp.loading import EMBEDDED, FAMILIES
from mlx_mtp.training import stages

PATIENCE = 300  # seconds; a backstop
LANGUAGES = ("bash", "python", "text", "toml")
TARGET, ASSISTANT = str(EMBEDDED / "target"), str(EMBEDDED / "assistant")
# Options whose value is a name of the reader's own, and what stands for it here.
NAMES = {
    "--model": TARGET, "-m": TARGET, "--target": TARGET, "--start": ASSISTANT, "--drafter": ASSISTANT,
    "--data": "texts",
}  # fmt: skip
BY_WORD = ("auto", "none", "lookup", "lookup+auto", *FAMILIES)
TINY_TRAINING = ["--batch-size", "1", "--length", "32"]
TINY_TARGET, TINY_DRAFTER = ["--target-steps", "1", "--vocabulary", "400"], ["--drafter-steps", "1", "--tokens", "32"]
SMALL = {
    "generate": ["--max-tokens", "8"],
    "chat": ["--max-tokens", "8"],
    "adapt": ["--tokens", "32", "--steps", "1", "--batch-size", "1", "--length", "32"],
}
PARSED_ONLY = {
    ("mlx-mtp", "bench"): "takes minutes; its own tests run it",
    ("mlx-mtp", "serve"): "one of them is the server that the requests of the pages go to",
    ("make",): "this is one of its runs",
    ("pip",): "needs an index; tools/check_wheel.py installs the package",
    ("python",): "measures for minutes; but for tables.py, which is run below",
    ("printf",): "its text goes into the command after it",
    ("python3",): "makes an environment",
    ("source",): "changes the reader's shell",
    ("rm",): "removes files in the reader's home",
    ("apt-get",): "changes the system",
    ("pyinstaller",): "takes minutes",
}


def named(command: Command) -> str:
    return f"{command.page.removesuffix('.md')}-{' '.join(command.argv)[:60]}"


def check_pip(argv: tuple[str, ...]) -> None:
    """The extras behind `.` and behind the package's name are there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert argv[1] in ("install", "uninstall", "wheel")
    found = [re.fullmatch(r"(?:\.|mlx-mtp)(?:\[([\w,]+)\])?|pyinstaller", word) for word in argv[2:]]
    assert any(found)
    assert {extra for one in found if one and one[1] for extra in one[1].split(",")} <= set(extras)


@pytest.mark.parametrize("command", [*commands(), *inline_commands()], ids=named)
def test_every_command_parses(command: Command) -> None:
    program, *arguments = command.argv
    assert program in PROGRAMS, f"no test knows what to do with '{program}'"
    if program == "mlx-mtp" and len(arguments) == 1:
        assert arguments[0] in (*COMMANDS, "--version")
    elif program == "mlx-mtp" and arguments:
        parsed(arguments)
    elif program == "make":
        assert all(re.search(rf"^{name}:", (ROOT / "Makefile").read_text(), re.MULTILINE) for name in arguments)
    elif program == "pip" and arguments:
        check_pip(command.argv)
    elif program == "python":
        assert arguments[:2] == ["-m", "mlx_mtp"] or (ROOT / arguments[0]).exists()


def stand_ins(folder: Path) -> None:
    (folder / "texts").mkdir()
    for i in range(12):
        lines = [f"The tree number {j} of row {i} stands beside stone {7 * j % 13}. It grows." for j in range(40)]
        (folder / "texts" / f"{i}.txt").write_text("\n".join(lines))
    prompts = [{"prompt": f"What does the tree number {i} do?"} for i in range(10)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))


def shortened(argv: list[str], folder: Path) -> list[str]:
    """The same command with names that are here and sizes that take seconds."""
    name, found = argv[0], list(argv)
    for i, option in enumerate(argv[:-1]):
        if option in NAMES and argv[i + 1] not in (*BY_WORD, "prompts.jsonl"):
            found[i + 1] = NAMES[option]
    if name == "convert":
        found[1] = str(converted_from(argv, folder))
    if name == "train" and "--resume" not in argv:
        found += TINY_TRAINING
        found += [] if "--target" in argv else TINY_TARGET
        found += [] if "--joint" in argv else TINY_DRAFTER
        found += [] if "--data" in argv else ["--data", "texts"]
    return found + SMALL.get(name, [])


def converted_from(argv: list[str], folder: Path) -> Path:
    """A checkpoint of the layout that a convert command speaks of."""
    if "--bits" in argv:
        return Path(TARGET)
    if "split" in argv:
        return write_folder(folder / "in", DEEPSEEK, deepseek_arrays())
    return meta_folder(folder / "in", meta_arrays())


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command of mlx-mtp in a folder with what the commands read."""
    monkeypatch.chdir(tmp_path)
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    stand_ins(tmp_path)

    def call(*arguments: str, stdin: bytes = b"") -> tuple[int, str, str]:
        capsys.readouterr()
        return ran(*arguments, stdin=stdin), *capsys.readouterr()

    return call


def to_run() -> list[Command]:
    """Commands that run here; those that differ only in the reader's own names run once."""
    found: dict[Any, Command] = {}
    for command in commands():
        if {command.argv[:1], command.argv[:2]} & {*PARSED_ONLY, ("curl",)}:
            continue
        words = list(command.argv)
        for i, option in enumerate(command.argv[:-1]):
            if option in (*NAMES, "--out") and words[i + 1] not in BY_WORD:
                words[i + 1] = "NAME"
        found.setdefault((*words, command.stdin), command)
    return list(found.values())


@pytest.fixture(scope="module")
def measured_once() -> Iterator[None]:
    """The diagnosis and the probe for exact mode take seconds and say the same of one target every time; replies by
    which drafters are measured are short."""
    with pytest.MonkeyPatch.context() as patched:
        for module, name in ((doctor, "diagnose"), (exactness, "probe")):
            patched.setattr(module, name, once(getattr(module, name)))
        patched.setattr(stages, "MEASURED_TOKENS", 8)
        yield


def once(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, whose first result stands for all; every command here is about the embedded target."""
    kept: list[Any] = []

    def call(*args: Any, **options: Any) -> Any:
        kept.extend([] if kept else [function(*args, **options)])
        return kept[0]

    return call


@pytest.mark.parametrize("command", to_run(), ids=named)
def test_every_command_runs(command: Command, run: Run, tmp_path: Path, measured_once: None) -> None:
    arguments = list(command.argv[1:])
    if "--resume" in arguments:
        first = [*arguments[: arguments.index("--resume")], "--family", "parallel"]
        assert run(*shortened(first, tmp_path))[0] == 0
    text = b"What is os.path?\n/quit\n" if arguments[0] == "chat" else b""
    if command.stdin is not None:
        text = subprocess.run(command.stdin.argv, capture_output=True, check=True).stdout
    code, out, err = run(*shortened(arguments, tmp_path), stdin=text)
    if arguments[0] == "adapt" and "nothing was replaced" in err:
        return  # one step need not make a drafter better, and then it must say so
    assert code == 0, err
    outs = [i + 1 for i, option in enumerate(arguments) if option == "--out"]
    assert all(Path(arguments[i]).is_dir() for i in outs) and (outs or out.strip())
    if "--json" in arguments:
        assert isinstance(json.loads(out), dict)


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A free port on which the real `mlx-mtp serve` of the pages listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        number = free.getsockname()[1]
    served = next(c for c in commands() if c.argv[:2] == ("mlx-mtp", "serve") and "8080" in c.argv)
    arguments = [str(number) if word == "8080" else word for word in served.argv[1:]]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen([sys.executable, "-m", "mlx_mtp.cli.app", *arguments], env=environment,
                             cwd=tmp_path_factory.mktemp("server"), stderr=subprocess.PIPE, text=True)  # fmt: skip
    assert child.stderr is not None
    try:
        lines = iter(child.stderr.readline, "")
        assert any(f"127.0.0.1:{number}/v1" in line for line in lines), "the server did not start"
        yield number
    finally:
        child.terminate()
        child.communicate(timeout=300)


@pytest.mark.parametrize("command", [c for c in commands() if c.argv[0] == "curl"], ids=named)
def test_every_request_is_answered(command: Command, port: int) -> None:
    """As curl would send it; not every machine has curl."""
    curl = argparse.ArgumentParser(exit_on_error=False)
    curl.add_argument("url")
    curl.add_argument("-H", action="append", default=[])
    curl.add_argument("-d", type=str.encode)
    asked = curl.parse_args(command.argv[1:])
    headers = dict(re.split(": *", header, maxsplit=1) for header in asked.H)
    request = urllib.request.Request(asked.url.replace(":8080", f":{port}"), asked.d, headers)
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with direct.open(request, timeout=PATIENCE) as answer:
        assert json.load(answer)["choices"][0]["message"]["content"]


SNIPPETS = [(page, text) for page, _, text in blocks("python")]


@pytest.mark.parametrize(("page", "text"), SNIPPETS, ids=[page for page, _ in SNIPPETS])
def test_every_snippet_runs(
    page: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(drafters.registry, "_loaders", dict(drafters.registry._loaders))
    stand_ins(tmp_path)
    if ":8080" in text:
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "127.0.0.1")
        text = text.replace(":8080", f":{request.getfixturevalue('port')}")
    exec(compile(text, page, "exec"), {"__name__": page})
    out = capsys.readouterr().out
    assert out.strip()
    if page == "drafters.md":
        assert out.rstrip().endswith("True")  # the family's output is that of plain decoding


def test_every_block_has_a_language_that_is_checked() -> None:
    assert {language for _, language, _ in blocks()} <= set(LANGUAGES)
    assert not [text for _, language, text in blocks() if language == "text" and re.search(r"^\s*mlx-mtp ", text, re.M)]


def test_the_map_of_files_shows_what_there_is() -> None:
    (text,) = [text for page, language, text in blocks("text") if page == "architecture.md"]
    folder, shown = ROOT, set()
    for line in text.splitlines():
        name = line.split()[0]
        folder = folder if line.startswith(" ") else ROOT
        assert (folder / name).exists(), line
        shown.add(str((folder / name).relative_to(ROOT)))
        folder = ROOT / name if line == "mlx_mtp/" else folder
        for other in re.findall(r"\b(\w+\.(?:py|sh))\b", line):
            assert list(ROOT.glob(f"mlx_mtp/**/{other}")) or list(ROOT.glob(f"*/{other}")), line
    packages = {str(init.parent.relative_to(ROOT)) for init in ROOT.glob("mlx_mtp/*/__init__.py")}
    assert packages - {"mlx_mtp/cli", "mlx_mtp/serving"} <= shown  # serving/ stands in the line of server.py


def test_every_link_leads_somewhere() -> None:
    """Inside the repository strictly; other addresses are only listed (there is no network)."""
    for page, address in links():
        if re.match(r"[a-z]+:", address):
            print(f"{page.name} links to {address}")
            assert address.startswith("https://")
            continue
        name, _, anchor = address.partition("#")
        place = page.parent / name if name else page
        assert place.exists(), f"{page.name}: {address}"
        if anchor:
            heads = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w\- ]", "", head).lower().replace(" ", "-") for head in heads], address


# The site


def test_the_site_is_built_and_asks_nobody_else(tmp_path: Path) -> None:
    """As `make docs` does it: strictly, so that a dead link or a docstring that names no parameter fails."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    pages = {page: page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")}
    for page, text in pages.items():
        asked = re.findall(r"<(?:script|link|img|iframe|source)[^>]*(?:src|href)=\"?((?:https?:)?//[^\s\">]+)", text)
        assert not asked, page
    reference = pages[tmp_path / "api" / "index.html"]
    assert all(f'id="mlx_mtp.{name}"' in reference for name in mlx_mtp.__all__ if name != "__version__")


# What PyInstaller is told, as docs/embedding.md says


def test_the_hook_collects_all_of_three_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point's own function, with a stand-in for PyInstaller."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["pyinstaller40"]
    module, name = points["hook-dirs"].split(":")
    (folder,) = getattr(importlib.import_module(module), name)()
    stand_in: Any = types.ModuleType("PyInstaller.utils.hooks")
    stand_in.collect_all = lambda package: ([(package, "files")], [(package, "libraries")], [f"{package}.hidden"])
    monkeypatch.setitem(sys.modules, "PyInstaller.utils.hooks", stand_in)
    # A name within the package, or coverage does not count its lines.
    found = runpy.run_path(str(Path(folder) / "hook-mlx_mtp.py"), run_name="mlx_mtp.freezing.hook")
    packages = ["mlx", "mlx_lm", "mlx_mtp"]
    assert found["datas"] == [(package, "files") for package in packages]
    assert found["binaries"] == [(package, "libraries") for package in packages]
    assert found["hiddenimports"] == [f"{package}.hidden" for package in packages]


# Tables and charts say what benchmarks/results/ holds


def tables_command(*options: str) -> tuple[int, list[str]]:
    """The command in this process: exit code, lines on stderr."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as err:
        patch.setattr(sys, "argv", ["tables.py", *options])
        return tables.main(), err.getvalue().splitlines()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A checkout that may be changed."""
    shutil.copy(ROOT / "README.md", tmp_path)
    for name in ("docs", "benchmarks/results"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_nothing_is_stale() -> None:
    assert tables_command("--check") == (0, [])


def test_another_result_is_noticed_and_written(copy: Path) -> None:
    for name, arm in (("bench.json", "mtp@auto"), ("bench-smollm2.json", HEADLINE)):
        file = copy / "benchmarks" / "results" / name
        found = json.loads(file.read_text())
        arms_of(found["samplings"][0])[arm]["over_stock"]["ratio"] = 7.125
        file.write_text(json.dumps(found))
    before = (copy / "README.md").read_text()
    code, lines = tables_command("--check", "--root", str(copy))
    named = {line.partition(";")[0] for line in lines}
    assert code == 1 and {"README.md is stale", "docs/images/speed.svg is stale"} <= named
    assert (copy / "README.md").read_text() == before  # checking writes nothing
    assert tables_command("--root", str(copy)) == (0, [])
    assert "7.12" in (copy / "README.md").read_text() and "7.12" in (copy / "docs" / "images" / "speed.svg").read_text()
    assert tables_command("--check", "--root", str(copy)) == (0, [])
