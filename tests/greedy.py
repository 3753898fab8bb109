"""What greedy decoding must give, one check that holds on every kernel; and logits of a sequence in pieces.

Kernels round differently for one row and for several, and from one processor to the next. So no test here compares
the tokens of two runs without either allowing for a near tie or making sure that there is none.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from conftest import GOLDEN

import mlx_mtp
from mlx_mtp.generation.cache import KVCache
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.targets.gemma4 import Gemma4Target
from mlx_mtp.testing import NEAR_TIE


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


def ids(count: int, seed: int = 0) -> list[int]:
    """A random prompt for a golden model."""
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


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


def in_passes(target: Target, tokens: mx.array, sizes: Sequence[int], junk: int = 0) -> tuple[mx.array, KVCache]:
    """Logits of every token, `sizes` committed a pass, each pass with `junk` rows after it that are rejected."""
    cache, found, start = target.new_cache(512, tokens.shape[0]), [], 0
    for size in sizes:
        rejected = (tokens[:, start : start + 1] + 1 + mx.arange(junk)) % target.info.vocab_size
        if junk:
            target.forward(rejected, cache)  # wholly rejected
        rows = mx.concatenate([tokens[:, start : start + size], rejected], axis=1)
        found.append(target.head(target.forward(rows, cache).hidden)[:, :size])
        cache.advance(size)
        start += size
    return mx.concatenate(found, axis=1), cache


def random_sizes(total: int, seed: int, most: int) -> list[int]:
    """Sizes of passes that are `total` tokens in all."""
    chance, sizes = random.Random(seed), list[int]()
    while total > sum(sizes):
        sizes.append(chance.randint(1, min(total - sum(sizes), most)))
    return sizes
