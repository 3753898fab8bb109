"""A plugin of pytest: no test is skipped without an excuse that is on this list, and holds.

A skip for any other reason is a failure, in a module as in a test; and pytest's summary names every skip (`-rs`, in
pyproject.toml).
"""

import importlib.util
import shutil
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from mlx_mtp.backend import blas

# What `make clients` makes, for tests/test_clients.py: Python environments, and where JavaScript's packages lie.
CLIENTS = Path(__file__).parent.parent / "build/clients"
PYTHON_CLIENTS = [CLIENTS / name / "bin/python" for name in ("clients", "clients-instructor", "clients-llama-index")]
JAVASCRIPT_CLIENTS = CLIENTS / "node_modules"
PEERS = ("torch", "transformers", "mlx_vlm")


def missing(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def chromium() -> str | None:
    """Where the system's own is."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# What a skip's reason begins with, and whether it is true here.
EXCUSES: dict[str, Callable[[], bool]] = {
    **{f"could not import '{peer}'": lambda peer=peer: missing(peer) for peer in PEERS},
    # tests/test_page.py: the package playwright, and a browser of the system's.
    "no Chromium that can be driven": lambda: missing("playwright") or chromium() is None,
    "no Python clients": lambda: not all(map(Path.exists, PYTHON_CLIENTS)),
    "no JavaScript clients": lambda: not JAVASCRIPT_CLIENTS.exists(),
    "Linux only": lambda: not sys.platform.startswith("linux"),
    # What tools/setup.sh could not install: without root, or without a network.
    "no OpenBLAS or MKL on this machine": lambda: not any(map(blas._open, blas._candidates())),
}


def checked(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Makes a skip without an excuse a failure."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
    reason = reason.removeprefix("Skipped: ")
    if not any(reason.startswith(words) and holds() for words, holds in EXCUSES.items()):
        report.outcome = "failed"
        report.longrepr = f"skipped without an excuse of tests/skips.py: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    checked(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    checked(report)
    return report
