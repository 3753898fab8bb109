"""The assistant against transformers' numbers, both heads, both conventions, step by step."""

import mlx.core as mx
import numpy as np
import pytest
from conftest import HEADS

import mlx_mtp
from mlx_mtp.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.assistant import Convention
from mlx_mtp.sampling import Chooser, Rules
from mlx_mtp.targets import load_target

TOLERANCE = 2e-4


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("convention", list(Convention))
def test_four_steps(golden, head: str, convention: Convention) -> None:
    folder, arrays = golden
    name = {"A": "draft", "B": "draftB"}[convention.value] + f"_{head}"
    target = load_target(Checkpoint.open(folder / "target"))
    drafter = load_drafter(Checkpoint.open(folder / f"assistant_{head}"))
    drafter.convention = convention
    drafter.attach(target)
    cache = target.new_cache(256)
    states = target.forward(mx.array(arrays["input_ids"]), cache)
    cache.advance(arrays["input_ids"].shape[1])
    token, state = mx.array(arrays["bonus_id"])[None], states.hidden[:, -1:]

    drafts, _ = drafter.draft({}, token, state, cache, 4, Chooser(Rules(), {}, {}, mx.random.key(0)))
    assert np.array_equal(np.array(drafts), arrays[f"{name}_ids"])

    position, shared, masks = drafter.view(cache)
    for step in range(4):
        hidden, state = drafter.model.step(target.embed(token), state, position, shared, masks)
        tokens, logits = drafter.model.candidates(hidden)
        expected, found = arrays[f"{name}_logits"][0, step], np.array(logits)[0, 0]
        if tokens is not None:
            # Elsewhere transformers fills in the smallest candidate minus one; here the others do not exist.
            ids = np.array(tokens)[0, 0]
            others = np.delete(expected, ids)
            assert np.abs(others - (found.min() - 1)).max() < TOLERANCE
            expected = expected[ids]
        assert np.abs(found - expected).max() < TOLERANCE
        assert np.abs(np.array(state)[0, 0] - arrays[f"{name}_state"][0, step]).max() < TOLERANCE
        best = int(np.array(logits)[0, 0].argmax())
        token = mx.array([[best if tokens is None else int(np.array(tokens)[0, 0, best])]])


@pytest.mark.parametrize(
    ("target", "drafter", "named"),
    [("ple", "keqv", "K/V heads"), ("keqv", "ple", "K/V heads"), ("unified", "ple", "K/V heads")],
)
def test_a_drafter_of_another_target_is_refused(target: str, drafter: str, named: str, request) -> None:
    from conftest import GOLDEN

    with pytest.raises(mlx_mtp.IncompatibleDrafter, match=named):
        mlx_mtp.load(GOLDEN / target / "target", drafter=GOLDEN / drafter / "assistant_tied")
