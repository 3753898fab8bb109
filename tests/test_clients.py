"""Other people's clients at their typed defaults, with their own libraries, against a server of the embedded model.

`make clients` makes their environments, with pinned versions, and runs this: some of them pin what others do not, so
none of them is in .venv.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import ROOT
from servers import Running, running
from skips import CLIENTS, JAVASCRIPT_CLIENTS, PYTHON_CLIENTS
from tool_templates import embedded_with_tools

import mlx_mtp

HERE = ROOT / "tests/clients"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Running]:
    """The embedded model with a template that knows tools. At temperature 1: greedily it goes round in circles."""
    target = embedded_with_tools(tmp_path)
    sampling = mlx_mtp.Sampling(temperature=1.0, top_p=0.9)
    with running(mlx_mtp.load(target, drafter="lookup"), tokens=300, seed=3, sampling=sampling) as found:
        yield found


def passed(command: list[str], folder: Path) -> set[str]:
    """The names of what passed; fails where anything did not."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("passed", "FAILED"))]
    bad = [line for line in lines if line.startswith("FAILED")]
    assert done.returncode == 0 and not bad, "\n".join([*bad, done.stderr[-2000:]])
    return {line.removeprefix("passed").split(":")[0].strip() for line in lines}


@pytest.mark.skipif(not all(map(Path.exists, PYTHON_CLIENTS)), reason="no Python clients: make clients")
def test_python_clients(server: Running, tmp_path: Path) -> None:
    found = {name for each in PYTHON_CLIENTS
             for name in passed([str(each), str(HERE / "ask.py"), server.url, "test"], tmp_path)}  # fmt: skip
    assert {name.split()[0] for name in found} == {
        "anthropic", "dspy", "guidance", "instructor", "langchain", "litellm", "llama-index", "llm", "openai",
        "openai-agents", "pydantic-ai",
    }  # fmt: skip
    assert len(found) >= 45


@pytest.mark.skipif(not JAVASCRIPT_CLIENTS.exists(), reason="no JavaScript clients: make clients")
def test_javascript_clients(server: Running, tmp_path: Path) -> None:
    shutil.copyfile(HERE / "ask.mjs", CLIENTS / "ask.mjs")  # node looks for packages beside the file
    found = passed(["node", str(CLIENTS / "ask.mjs"), server.url, "test"], tmp_path)
    assert {name.split()[0] for name in found} == {"openai", "anthropic", "ai"}
    assert len(found) >= 28
