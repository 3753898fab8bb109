"""Every family of targets with every family of drafters: the promises of mlx_mtp.testing, and that no family is left out.

Small golden models for Gemma 4, random ones for mlx-lm's. A plug-in's families are checked the same way, on its side.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import GOLDEN
from families import config_of, written
from greedy import enlivened
from test_generic import BASE, CONFIGS
from test_generic import written as written_target

from mlx_mtp import drafters, targets
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.lookup import Lookup, LookupFirst
from mlx_mtp.generation.interfaces import Drafter, Target
from mlx_mtp.targets import load_target
from mlx_mtp.testing import PROMISES, Conformance

# Shared K/V and layer inputs, K = V, experts, unified; rings that wrap, ours and mlx-lm's, and latents.
PAIRS = (
    ("ple", "assistant"), ("ple", "trunk"), ("ple", "modules"), ("ple", "lookup"), ("ple", "lookup+modules"),
    ("keqv", "assistant"), ("moe", "assistant"), ("unified", "assistant"),
    ("llama-sliding", "hidden"), ("llama-sliding", "lookup"), ("deepseek_v3", "modules"), ("gemma3_text", "trunk"),
)  # fmt: skip
FAMILIES = {"trunk": ("parallel_heads", 3, {"reads": "trunk"}), "hidden": ("parallel_heads", 3, {}),
            "modules": ("sequential_modules", 2, {})}  # fmt: skip


@pytest.fixture(scope="module")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Conformance]:
    """A pair by the names of its target and its drafter, loaded once."""
    root = tmp_path_factory.mktemp("conformance")

    @functools.cache
    def target_of(name: str) -> Target:
        if name in CONFIGS:
            return load_target(Checkpoint.open(written_target(root / name, BASE | CONFIGS[name])))
        return enlivened(load_target(Checkpoint.open(GOLDEN / name / "target")))

    def drafter_of(target: str, name: str) -> Drafter:
        if name.startswith("lookup"):
            return Lookup() if name == "lookup" else LookupFirst(drafter_of(target, name.removeprefix("lookup+")))
        if name == "assistant":
            return load_drafter(Checkpoint.open(GOLDEN / target / "assistant_tied"))
        family, count, fields = FAMILIES[name]
        config = config_of(family, 32, target_of(target).info.vocab_size, count, **fields)
        return load_drafter(Checkpoint.open(written(root / f"{target}-{name}", config)))

    return functools.cache(lambda target, drafter: Conformance(target_of(target), drafter_of(target, drafter)))


@pytest.mark.parametrize("promise", PROMISES)
@pytest.mark.parametrize(("target", "drafter"), PAIRS)
def test_promise(
    target: str, drafter: str, promise: str, pair_of: Callable[[str, str], Conformance]
) -> None:
    pair_of(target, drafter).check(promise)
