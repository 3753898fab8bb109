"""The guard over skips (tests/skips.py), by pytest in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


CASES = {
    "mark": "@pytest.mark.skip(reason='later')\ndef test_it(): pass",
    "condition": "@pytest.mark.skipif(True, reason='not here')\ndef test_it(): pass",
    "call": "def test_it(): pytest.skip('busy')",
    "import": "def test_it(): pytest.importorskip('no_such_module')",
    "no_parameters": "@pytest.mark.parametrize('x', [])\ndef test_it(x): pass",
    "fixture": "@pytest.fixture\ndef here(): pytest.skip('no')\ndef test_it(here): pass",
    "peer": "def test_it(): pytest.skip(\"could not import 'torch'\")",
    "module": "pytest.importorskip('no_such_module')\ndef test_it(): pass",
    "expected": "@pytest.mark.xfail\ndef test_it(): assert False",
    "passed": "def test_it(): pass",
}


@pytest.mark.parametrize("missing", [False, True])
def test_skips_without_an_excuse_fail(missing: bool, tmp_path: Path) -> None:
    """Of a test and of a whole module; a peer is an excuse where it is missing."""
    (tmp_path / "conftest.py").write_text(f"import skips\nskips.missing = lambda module: {missing}\n")
    for name, text in CASES.items():
        (tmp_path / f"test_{name}.py").write_text(f"import pytest\n{text}\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rsfE", "-p", "skips", "-p", "no:cacheprovider", "--rootdir", ".",
               "--continue-on-collection-errors", "."]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    failed = set(re.findall(r"^(?:FAILED|ERROR) test_(\w+)\.py", done.stdout, re.MULTILINE))
    excused = {"expected", "passed", *(["peer"] if missing else [])}
    assert failed == CASES.keys() - excused, done.stdout
    assert done.returncode == 1 and done.stdout.count("skipped without an excuse") >= len(failed)
    assert ("1 skipped" in done.stdout) == missing
