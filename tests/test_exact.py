"""Exact mode: bit-equal output with and without a drafter, through both ways, or a clear refusal to draft."""

import logging

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN, VARIANTS

import mlx_mtp
from mlx_mtp import exactness
from mlx_mtp.exactness import CANONICAL, Exactness


def outputs(variant: str, **options: object) -> list[list[int]]:
    folder = GOLDEN / variant
    engine = mlx_mtp.load(folder / "target", mode="exact", **options)
    prompts = np.random.default_rng(1).integers(3, 128, (2, 20)).tolist()
    return [engine.generate(prompt, max_tokens=100, ignore_end=True, logprobs=1) for prompt in prompts]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("way", ["probed", "canonical"])
def test_equal_with_and_without_a_drafter(
    variant: str, way: str, probed_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens and the logprobs' very bits; the canonical width also where the probe would not need it."""
    if way == "canonical":
        monkeypatch.setattr(exactness, "probe", lambda target: Exactness(tuple(range(CANONICAL)), CANONICAL))
    plain = outputs(variant, drafter=None)
    for depth in (1, 4, "auto"):
        found = outputs(variant, drafter=GOLDEN / variant / "assistant_tied", depth=depth)
        assert [r.tokens for r in found] == [r.tokens for r in plain]
        assert [r.logprobs for r in found] == [r.logprobs for r in plain]
        assert {r.stats.mode for r in found} == {"exact"}


def test_a_device_that_cannot_says_so_and_decodes_plainly(monkeypatch, caplog) -> None:
    monkeypatch.setattr(exactness, "_same", lambda *sizes: False)
    folder = GOLDEN / "ple"
    with caplog.at_level(logging.WARNING):
        engine = mlx_mtp.load(folder / "target", drafter=folder / "assistant_tied", depth=3, mode="exact")
    assert "decoding plainly" in caplog.text
    stats = engine.generate([5, 6, 7], max_tokens=20, ignore_end=True).stats
    assert stats.drafted == 0 and stats.mode == "exact"


def test_the_probe_sees_one_differing_bit(monkeypatch) -> None:
    """A target whose rows depend on how many there are, by the least possible amount, is not called exact."""
    engine = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=None)
    target, head = engine.target, engine.target.head
    assert exactness.probe(target).possible

    def uneven(hidden: mx.array) -> mx.array:
        logits = head(hidden)
        return logits * (1.0 + 2.0**-22 * mx.arange(hidden.shape[1])[:, None])

    monkeypatch.setattr(target, "head", uneven)
    assert exactness.probe(target) == Exactness((0,), None)


def test_unknown_modes_are_refused() -> None:
    with pytest.raises(mlx_mtp.OptionError, match="fast"):
        mlx_mtp.load(mode="quick")
