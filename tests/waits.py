"""Counts what waits for the device, whoever does it: every way in which Python can ask MLX for a value.

`mx.async_eval` does not wait and does not count. NumPy reads an array's buffer without a call of one of its methods; so
there it is NumPy's functions that are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

READS = (
    "item", "tolist", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__dlpack__",
    "__repr__", "__format__",
)  # fmt: skip
WAITS = ("eval", "synchronize", "save", "savez", "save_safetensors", "save_gguf")
CONVERSIONS = ("array", "asarray", "asanyarray", "ascontiguousarray", "copy", "stack", "concatenate")


class Waits:
    """Patches all of them for as long as `monkeypatch` lives; `seen` names each wait in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for owner, names in ((mx.array, READS), (mx, WAITS), (np, CONVERSIONS)):
            for name in names:
                monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name), owner is np))

    def _counted(self, name: str, real: Callable[..., Any], reads_buffers: bool) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if not reads_buffers or _holds(args):
                self.seen.append(name)
            return real(*args, **options)

        return counted

    def begin(self, done: int, total: int) -> None:
        """For `on_prefill`: what the prompt's passes waited for does not count."""
        self.seen.clear()


def _holds(value: Any) -> bool:
    """Whether an array of MLX is among the arguments."""
    return isinstance(value, mx.array) or (isinstance(value, tuple | list) and any(map(_holds, value)))
