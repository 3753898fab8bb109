"""Sequential modules against DeepSeek-V3's equations in NumPy, chains beyond the last module included."""


import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from families import config_of, drafted, model_of
from mlx.utils import tree_flatten, tree_map
from references import Equations, float64

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters
from mlx_mtp.drafters.parallel import Parallel
from mlx_mtp.drafters.sequential import Sequential
from mlx_mtp.targets import load_target

TOLERANCE = 2e-3
WIDTH, VOCABULARY = 32, 128
FAMILIES = ("parallel_heads", "sequential_modules")
GEMMA = GOLDEN / "ple" / "target"


@pytest.mark.parametrize(("modules", "depth"), [(1, 1), (1, 4), (2, 2), (3, 3), (2, 5), (3, 8)])
def test_chains_follow_the_equations(modules: int, depth: int) -> None:
    """In decoding, behind any outcomes of the rounds before, and over the whole sequence at once."""
    target, model = load_target(Checkpoint.open(GEMMA)), model_of(config_of("sequential_modules", WIDTH, 128, modules))
    drafter = Sequential(model, mx.float32)
    drafter.attach(target)
    tokens = np.random.default_rng(depth).integers(3, VOCABULARY, 36)
    states = target.forward(mx.array(tokens[None]), target.new_cache(256))
    embedded = target.embed(mx.array(tokens[None]))
    hand = Equations(float64(named_parameters(model)), np.array(states.hidden)[0], np.array(embedded)[0])
    places = len(tokens) - depth
    whole = np.array(target.head(mx.concatenate(model(states.hidden[:, :places], embedded[:, 1:], depth))))
    rounds = 0
    for first in (1, 5, 20):
        for at, logits in drafted(drafter, target, tokens, states, first, depth, first):
            expected = np.array(target.head(mx.array(np.stack(hand.drafts(at, depth))[None].astype(np.float32))))[0]
            assert np.abs(np.stack(logits) - expected).max() < TOLERANCE
            assert np.abs(whole[:, at - 1] - expected).max() < TOLERANCE
            rounds += 1
    assert rounds > 8


# Both families that have layers of their own


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtypes", [(mx.float16, mx.float32), (mx.float32, mx.bfloat16), (mx.bfloat16, mx.float16)])
def test_another_precision_than_the_targets(family: str, dtypes: tuple[mx.Dtype, mx.Dtype]) -> None:
    """Everything that comes from the target or goes to its head is cast, so that a round's arrays keep their types."""
    target, model = load_target(Checkpoint.open(GEMMA)), model_of(config_of(family, WIDTH, VOCABULARY, 2))
    target.dtype, dtype = dtypes
    target.model.update(tree_map(lambda array: array.astype(target.dtype), target.model.parameters()))
    model.update(tree_map(lambda array: array.astype(dtype), model.parameters()))
    drafter = (Parallel if family == "parallel_heads" else Sequential)(model, dtype)
    engine = mlx_mtp.Engine(target, drafter, None, depth=2)
    memory, tokens = drafter.start(1, 256), mx.array([[5, 6]])
    kinds = [array.dtype for _, array in tree_flatten(memory)]
    memory = drafter.observe(memory, tokens, target.forward(tokens, target.new_cache(256)), mx.array([1]))
    assert [array.dtype for _, array in tree_flatten(memory)] == kinds
    assert len(engine.generate([5, 6, 7], max_tokens=3, ignore_end=True).tokens) == 3
