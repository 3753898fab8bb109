"""What greedy decoding must give: one check that holds on every kernel, and references whose every token is clear.

Kernels round differently for one row and for several, and from one processor to the next. So no test here compares
the tokens of two runs without either allowing for a near tie or making sure that there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from conftest import GOLDEN

import mlx_mtp
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.targets.gemma4 import Gemma4Target

# More than rounding explains on any device, and far less than what one wrong row of K/V changes.
NEAR_TIE = 1e-3


def assert_greedy(engine: mlx_mtp.Engine, ids: Sequence[int], tokens: Sequence[int]) -> None:
    """By one pass without a cache every token is the likeliest after those before it, or as likely but for rounding."""
    logits = np.array(engine.target.logits(mx.array([[*ids, *tokens]])))[0, len(ids) - 1 : -1]
    below = logits.max(axis=1) - logits[np.arange(len(tokens)), list(tokens)]
    at = int(below.argmax())
    assert below[at] <= NEAR_TIE, f"token {at} is {below[at]} below the best one"


def same_or_tie(engine: mlx_mtp.Engine, ids: list[int], one: list[int], other: list[int]) -> None:
    """Equal, or parting where the two best logits are closer than rounding could explain, and greedy after that."""
    assert len(one) == len(other)
    if one != other:
        assert_greedy(engine, ids, other)


def lively(variant: str, drafter: Any = None, **options: Any) -> mlx_mtp.Engine:
    """A golden pair whose target has a random matrix as its head and room for a long context.

    With their own head, the embedding, these random models repeat one token for good, whatever came before; so no test
    of what they write would notice an error. With this one every token depends on all that it can see.
    """
    engine = mlx_mtp.load(GOLDEN / variant / "target", drafter=drafter, **options)
    enlivened(engine.target)
    engine.max_context = 4096
    return engine


def random_head(size: int, vocabulary: int) -> np.ndarray:
    """A matrix [D, V] that takes the place of a head."""
    return np.random.default_rng(0).normal(scale=4 * size**-0.5, size=(size, vocabulary)).astype(np.float32)


def enlivened(target: Target, silent: int = 0) -> Target:
    """A golden target with the head of `lively`, which never writes the first `silent` tokens by itself."""
    assert isinstance(target, Gemma4Target)
    table = mx.array(random_head(target.info.hidden_size, target.info.vocab_size))
    bias = mx.where(mx.arange(table.shape[1]) < silent, -50.0, 0.0)
    target.model.head = lambda hidden: hidden.astype(mx.float32) @ table + bias
    target.info = replace(target.info, max_context=4096)
    return target
