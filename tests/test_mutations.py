"""The list of seeded faults (tools/mutations.py) fits the source: every text is there once, every test exists.

Whether each fault is caught takes minutes: `python tools/mutations.py`.
"""

from __future__ import annotations

import ast
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from _pytest.mark.expression import Expression

TOOL = Path(__file__).parent.parent / "tools" / "mutations.py"
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
