"""The guard over skips (tests/skips.py), and the list of seeded faults (tools/mutations.py), which fits the source."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

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


# Seeded faults. Whether each is caught takes minutes: `python tools/mutations.py`

TOOL = HERE.parent / "tools" / "mutations.py"
spec = importlib.util.spec_from_file_location("mutations", TOOL)
assert spec and spec.loader
mutations = sys.modules["mutations"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mutations)


def test_every_fault_fits_the_source() -> None:
    assert len(mutations.FAULTS) >= 15
    for fault in mutations.FAULTS:
        assert mutations.places(fault) == 1, fault.name
        changed = (mutations.ROOT / fault.file).read_text().replace(fault.old, fault.new)
        ast.parse(changed)  # a fault that no Python can read would be caught by anything
        assert fault.old != fault.new and (mutations.ROOT / fault.tests[0]).exists()
    assert len({fault.name for fault in mutations.FAULTS}) == len(mutations.FAULTS)


def test_every_selection_finds_what_it_names() -> None:
    """pytest collects the files once; then each `-k` is tried on the names, and every word of it must find a test."""
    selections = {fault.tests for fault in mutations.FAULTS}
    files = sorted({tests[0] for tests in selections})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=mutations.ROOT, capture_output=True, text=True, check=True)
    names = [line for line in done.stdout.splitlines() if "::" in line]
    for file, *rest in selections:
        there = [name.removeprefix(file) for name in names if name.startswith(f"{file}::")]
        assert there, file
        if rest:
            option, words = rest
            assert option == "-k"
            expression = Expression.compile(words)
            found = [name for name in there if expression.evaluate(lambda word, name=name, **_: word in name.lower())]
            for word in set(words.split()) - {"and", "or", "not"}:
                assert any(word.strip("()") in name.lower() for name in found), (file, words, word)


def test_a_skip_that_the_guard_makes_a_failure_is_no_catch(tmp_path: Path) -> None:
    shutil.copy(TOOL.parent.parent / "tests" / "skips.py", tmp_path / "conftest.py")
    (tmp_path / "test_it.py").write_text("import pytest\ndef test_it(): pytest.skip('not now')")
    with pytest.raises(mutations.NotRun, match="1 of 1 tests"):
        mutations.run(tmp_path, ("test_it.py",))
