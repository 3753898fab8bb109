"""The device is waited for once a round and nowhere else, counted by what waits; `host_syncs` says the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from families import config_of, written
from greedy import lively

import mlx_mtp

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


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    folder, assistant = tmp_path_factory.mktemp("drafters"), GOLDEN / "ple" / "assistant_tied"
    parallel = written(folder / "parallel", config_of("parallel_heads", 32, 128, 2))
    sequential = written(folder / "sequential", config_of("sequential_modules", 32, 128, 2))
    return {"none": None, "assistant": assistant, "parallel": parallel, "sequential": sequential, "lookup": "lookup",
            "lookup+assistant": f"lookup+{assistant}"}  # fmt: skip


def counted(engine: mlx_mtp.Engine, waits: Waits, ids: list[int], **options: Any) -> mlx_mtp.Result:
    """A short reply, after a look at every wait behind its prompt."""
    # Rounds of every size are compiled before: `mx.compile` runs them once to see them, and waits for nothing.
    result = engine.generate(ids, max_tokens=24, ignore_end=True, on_prefill=waits.begin, **options)
    assert result.stats.rounds > 5
    assert len(waits.seen) == result.stats.host_syncs <= result.stats.rounds + 2, waits.seen
    return result


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": mlx_mtp.Sampling(temperature=1.0, top_k=40, top_p=0.9, min_p=0.01), "seed": 1},
    "penalties": {"sampling": mlx_mtp.Sampling(repetition_penalty=1.2, frequency_penalty=0.2)},
}


@pytest.mark.parametrize("depth", [2, "auto"])
@pytest.mark.parametrize("drafter", ["none", "assistant", "parallel", "sequential", "lookup", "lookup+assistant"])
def test_one_wait_a_round_for_every_family(
    drafter: str, depth: int | str, drafters: dict[str, Path | None], waits: Waits
) -> None:
    """Greedy and sampled, in a session and where buffers grow."""
    named = drafters[drafter]
    engine, session = lively("ple", named, depth=depth if named else "auto"), mlx_mtp.Session()
    ids = [5, 6, 7, 8] * 58
    for options in OPTIONS.values() if depth == 2 and drafter == "assistant" else [OPTIONS["greedy"]]:
        ids = [*ids, *counted(engine, waits, ids, session=session, **options).tokens]
    assert len(ids) >= 256


@pytest.mark.parametrize("variant", ["keqv", "moe"])
def test_one_wait_a_round_for_other_targets(variant: str, waits: Waits) -> None:
    folder = GOLDEN / variant
    engine = mlx_mtp.load(folder / "target", drafter=folder / "assistant_centroid", depth=3)
    counted(engine, waits, [5, 6, 7, 8] * 3)
