"""The device is waited for once a round and nowhere else, counted by what waits; `host_syncs` says the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from waits import Waits

import mlx_mtp
from mlx_mtp.generation.interfaces import Memory, States
from mlx_mtp.generation.types import Stats
from mlx_mtp.testing import ScriptedDrafter

TEXT = "import os\nimport sys\n\n\ndef main():\n"


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


def counted(engine: mlx_mtp.Engine, waits: Waits, **options: Any) -> Stats:
    """Statistics of a short reply, after a look at every wait behind its prompt."""
    prompt = engine.tokenizer.encode(TEXT) if engine.tokenizer else [5, 6, 7, 8] * 3
    # Rounds of every size are compiled before: `mx.compile` runs them once to see them, and waits for nothing.
    stats = engine.generate(prompt, max_tokens=40, ignore_end=True, on_prefill=waits.begin, **options).stats
    assert stats.rounds > 5
    assert len(waits.seen) == stats.host_syncs <= stats.rounds + 2, waits.seen
    return stats


@pytest.mark.parametrize("depth", [3, "auto"])
@pytest.mark.parametrize("drafter", [None, "assistant", "parallel", "sequential", "lookup", "lookup+assistant"])
def test_one_wait_a_round_for_every_family(drafter: str | None, depth: int | str, waits: Waits) -> None:
    engine = mlx_mtp.load(drafter=drafter, depth=depth if drafter else "auto")
    stats = counted(engine, waits)
    if drafter and depth != "auto":  # the automatic depth may find that drafts do not pay here
        assert 0 < stats.accepted < stats.drafted


OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "sampled": lambda: {"temperature": 1.0, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 1},
    "penalties": lambda: {"temperature": 0.0, "repetition_penalty": 1.2, "frequency_penalty": 0.2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_one_wait_a_round_for_every_kind_of_sampling(name: str, waits: Waits) -> None:
    options = OPTIONS[name]()
    seed = options.pop("seed", None)
    counted(mlx_mtp.load(depth=3), waits, sampling=mlx_mtp.Sampling(**options), seed=seed)


def test_one_wait_a_round_in_a_session_and_where_buffers_grow(waits: Waits) -> None:
    engine, session = mlx_mtp.load(depth=3), mlx_mtp.Session()
    prompt = engine.tokenizer.encode(TEXT)
    for _ in range(3):
        prompt = prompt * 2
        result = engine.generate(prompt, max_tokens=120, ignore_end=True, session=session, on_prefill=waits.begin)
        assert len(waits.seen) == result.stats.host_syncs <= result.stats.rounds + 2, waits.seen
        prompt = [*prompt, *result.tokens]
    assert len(prompt) > 256


@pytest.mark.parametrize("variant", ["ple", "moe"])
def test_one_wait_a_round_for_other_targets(variant: str, waits: Waits) -> None:
    folder = GOLDEN / variant
    counted(mlx_mtp.load(folder / "target", drafter=folder / "assistant_centroid", depth=3), waits)


class Reading(ScriptedDrafter):
    """Reads a value of every pass, which a family must not; in rounds that are not compiled it can."""

    def __init__(self, read: Callable[[mx.array], object]) -> None:
        super().__init__([])
        self.read = read

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        self.read(accepted[0])
        return memory


READS: dict[str, Callable[[mx.array], object]] = {
    "mx.eval": lambda x: mx.eval(x), "item": lambda x: x.item(), "tolist": lambda x: x.tolist(), "int": int,
    "bool": bool, "float": float, "str": str, "range": range, "f-string": lambda x: f"{x}",
    "if": lambda x: 1 if x == 0 else 2, "np.array": lambda x: np.array(x), "np.stack": lambda x: np.stack([x]),
}  # fmt: skip


@pytest.mark.parametrize("way", READS)
def test_every_way_to_wait_is_seen(way: str, waits: Waits) -> None:
    target = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=None).target
    engine = mlx_mtp.Engine(target, Reading(READS[way]), None, depth=1)
    mx.disable_compile()
    try:
        stats = engine.generate([5, 6, 7], max_tokens=5, ignore_end=True, on_prefill=waits.begin).stats
    finally:
        mx.enable_compile()
    assert len(waits.seen) == stats.host_syncs + stats.rounds
