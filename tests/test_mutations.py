"""The list of seeded faults (tools/mutations.py) fits the source: every text is there once, every test exists.

Whether each fault is caught takes minutes: `python tools/mutations.py`.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

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
