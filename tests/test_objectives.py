"""Losses and their gradients against NumPy: the papers' sums row by row, and finite differences in float64."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import GOLDEN
from families import config_of, lively, model_of
from mlx.utils import tree_flatten, tree_map
from references import Equations, Gemma, Weights, below, float64, log_softmax, parallel_heads
from test_generic import BASE, CONFIGS
from test_generic import written as written_target
from training_memory import peak

from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.layers import LayersConfig
from mlx_mtp.drafters.parallel import ParallelModel
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.targets import load_target
from mlx_mtp.targets.gemma4 import Gemma4Model, Gemma4Target
from mlx_mtp.targets.gemma4_config import DEFAULT_ROPE, Gemma4Config
from mlx_mtp.training import objective
from mlx_mtp.training.chats import replies_of
from mlx_mtp.training.objective import Joint

WIDTH, VOCABULARY, CAP, WINDOW = 16, 24, 2.0, 3
KINDS = ["sliding_attention", "full_attention"]
TEXT = {
    "model_type": "gemma4_text", "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 20,
    "num_hidden_layers": 2, "layer_types": KINDS, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "global_head_dim": 16, "sliding_window": WINDOW, "final_logit_softcapping": CAP, "rms_norm_eps": 1e-6,
    "rope_parameters": DEFAULT_ROPE,
}  # fmt: skip
STEP = 1e-5  # of the finite differences
HEADS = "trunk", "hidden"  # what parallel heads may read
AUX = [1, 0]  # layers that modules may read, in an order of their own


def gemma() -> Gemma4Model:
    """A target whose logits come close to the cap, so that it counts."""
    return lively(Gemma4Model(Gemma4Config.from_dict(TEXT)), seed=1)


def batch_of(rows: int, batch: int = 2, vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (batch, rows))


def reference(weights: Weights) -> Gemma:
    return Gemma(weights, KINDS, [8, 16], WINDOW, CAP)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean over the rows of logits [T, V]."""
    return -np.take_along_axis(log_softmax(logits), labels[:, None], axis=-1).mean()


def kept(
    target: Target, tokens: np.ndarray, learned: np.ndarray | None = None, start: mx.array | None = None,
    reads: str = "",
) -> tuple[mx.array, ...]:  # fmt: skip
    """Tokens [B, L] as chats.py keeps them, all of a reply where `learned` does not say which, of one chat a row."""
    ids = mx.array(tokens)
    start = mx.zeros_like(ids) if start is None else start
    states = target.forward(ids, objective._remembering(target, start))
    sizes = [mx.sqrt(mx.square(state).mean(axis=-1, keepdims=True)) for state in states.aux]
    beside = [states.aux[layer] / sizes[layer] for layer in (AUX if reads == "aux" else [])]
    hidden, logits = mx.concatenate([states.hidden, *beside], axis=-1), target.head(states.hidden)
    mask = np.ones(tokens.shape, np.int32) if learned is None else learned.astype(np.int32)
    best, norm = mx.argmax(logits, axis=-1), mx.logsumexp(logits, axis=-1)
    return ids, mx.array(mask), start, best, norm, hidden, mx.array(replies_of(mask))


def check(
    module: nn.Module, loss: Callable[..., Any], batch: np.ndarray, by_hand: Callable[[Weights], float],
    progress: float = 0.0,
) -> list[float]:  # fmt: skip
    """Loss, and the slope along a random direction of every parameter, against NumPy's; returns the figures."""
    gradient = nn.value_and_grad(module, loss)
    compiled = mx.compile(lambda *arrays: gradient(module, *arrays), inputs=module.state, outputs=module.state)
    (found, figures), gradients = compiled(tree_map(mx.array, batch), mx.array(progress))
    weights = float64(named_parameters(module))
    assert abs(found.item() - by_hand(weights)) < 1e-5 * max(1.0, abs(found.item()))
    random, slopes = np.random.default_rng(1), float64(dict(tree_flatten(gradients)))
    assert slopes.keys() == weights.keys() - {"shortlist"}
    for name, weight in ((n, w) for n, w in weights.items() if n in slopes):
        direction = random.normal(size=weight.shape)
        direction /= np.linalg.norm(direction)
        ahead, behind = (by_hand({**weights, name: weight + sign * STEP * direction}) for sign in (1, -1))
        expected = (ahead - behind) / (2 * STEP)
        assert abs((slopes[name] * direction).sum() - expected) < 1e-5 + 2e-4 * abs(expected), name
    assert any(np.abs(slope).max() > 1e-3 for slope in slopes.values())
    return figures.tolist()


# Target and drafter together


def drafts_by_hand(
    weights: Weights, hidden: np.ndarray, aux: list[np.ndarray], embedded: np.ndarray, reads: str, steps: int
) -> np.ndarray:
    """What goes into the head, of heads that read a state, or of modules, which may read layers: [K, T, D]."""
    if reads in HEADS:
        return parallel_heads(weights, aux[-1] if reads == "trunk" else hidden)
    equations = Equations(weights, hidden, embedded, [aux[layer] for layer in (AUX if reads == "aux" else [])])
    return np.stack([equations.drafts(place + 1, steps) for place in range(len(hidden))], axis=1)


def drafter_of(vocabulary: int, width: int, count: int, reads: str) -> nn.Module:
    """Heads that read one of the states, or modules, which may read layers."""
    if reads in HEADS:
        return model_of(config_of("parallel_heads", width, vocabulary, count, reads=reads))
    return model_of(config_of("sequential_modules", width, vocabulary, count, aux_layers=AUX if reads else []))


@pytest.mark.parametrize(
    ("reads", "count", "steps", "weight", "progress"),
    [("trunk", 2, 2, 1.0, 0.0), ("hidden", 2, 2, 0.3, 0.0), ("", 2, 2, 0.3 / 2, 0.2), ("", 2, 2, 0.1 / 2, 0.8),
     ("", 1, 3, 0.3 / 3, 0.0)],
)  # fmt: skip
def test_joint(reads: str, count: int, steps: int, weight: float, progress: float) -> None:
    """Lambda of modules is 0.3 in the first two thirds, then 0.1; a single one trained for three steps on its own
    states."""
    batch, rows = batch_of(5 + steps), 4
    joint = Joint(gemma(), drafter_of(VOCABULARY, WIDTH, count, reads))

    def by_hand(weights: Weights) -> float:
        target, total = reference(below(weights, "target.")), 0.0
        for tokens in batch:
            hidden, trunk = target.states(tokens[:rows])
            total += cross_entropy(target.head(hidden), tokens[1 : 1 + rows])
            embedded = np.stack([target.embed(token) for token in tokens])
            found = drafts_by_hand(below(weights, "drafter."), hidden, [trunk], embedded, reads, steps)
            for k, result in enumerate(found):
                total += weight * cross_entropy(target.head(result), tokens[k + 2 : k + 2 + rows])
        return total / len(batch)

    loss = objective.joint_parallel_loss(weight) if reads else objective.joint_sequential_loss(steps)
    check(joint, loss, batch, by_hand, progress)


def test_one_head_is_plain_training() -> None:
    batch, model = mx.array(batch_of(12)), gemma()
    none = ParallelModel(LayersConfig(count=0, reads="trunk", hidden_size=WIDTH, vocab_size=VOCABULARY,
                                      norm_eps=1e-5, block={}))  # fmt: skip
    joint = Joint(model, none)
    (one, figures), gradients = nn.value_and_grad(joint, objective.joint_parallel_loss())(joint, batch)
    (other, right), plain = nn.value_and_grad(model, objective.next_token_loss)(model, batch)
    assert one.item() == other.item() and figures.tolist() == right.tolist()
    for (name, a), (_, b) in zip(tree_flatten(gradients["target"]), tree_flatten(plain), strict=True):
        assert mx.abs(a - b).max() <= 1e-6 * mx.abs(b).max() + 1e-9, name


# One head after the other


def test_the_logits_of_one_head_at_a_time() -> None:
    """Peak memory of a step with 32,768 tokens in the vocabulary: four heads need hardly more than one."""
    before = mx.set_memory_limit(1)  # the CPU backend waits instead of running ahead
    try:
        one, four, at_once = (peak(heads, 32_768, 1, 48, way) for heads, way in ((1, True), (4, True), (4, False)))
    finally:
        mx.set_memory_limit(before)
    assert four < 1.15 * one and at_once > 1.6 * one, (one, four, at_once)


# On a frozen target


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    """Ours, one of mlx-lm, and a quantised one; all of 32 numbers a state."""
    root, llama = tmp_path_factory.mktemp("targets"), BASE | CONFIGS["llama"]
    return {
        "gemma": load_target(Checkpoint.open(GOLDEN / "ple" / "target")),
        "llama": load_target(Checkpoint.open(written_target(root / "llama", llama))),
        "quantised": load_target(Checkpoint.open(written_target(root / "quantised", llama, 4))),
    }


def frozen_by_hand(
    target: Target, batch: np.ndarray, learned: np.ndarray, count: int, decay: float, ids: list[int], late: bool,
    reads: str,
) -> Callable[[Weights], float]:  # fmt: skip
    rows = batch.shape[1] - 1 - count
    sequences = []
    for tokens, told in zip(batch, learned, strict=True):
        row = mx.array(tokens[None])
        states = target.forward(row, target.new_cache(256))
        parts = (states.hidden[:, :rows], target.embed(row), target.logits(row), *(a[:, :rows] for a in states.aux))
        sequences.append([told, *(np.array(part)[0].astype(np.float64) for part in parts)])
    head = mx.eye(sequences[0][1].shape[1])  # the head is linear but for Gemma's cap
    products = np.array(target.head(head[None]))[0].astype(np.float64)
    cap = 30.0 if isinstance(target, Gemma4Target) else None
    if cap:
        products = np.arctanh(products / cap) * cap

    def loss(weights: Weights) -> float:
        totals, counts = np.zeros(count), np.zeros(count)
        for told, hidden, embedded, wanted, *aux in sequences:
            for j, result in enumerate(drafts_by_hand(weights, hidden, aux, embedded, reads, count)):
                logits = (result @ products)[:, ids]
                logits = np.tanh(logits / cap) * cap if cap else logits
                p, q = np.exp(log_softmax(wanted))[j + 1 : j + 1 + rows, ids], log_softmax(logits)
                value = -(p * q).sum(axis=-1)
                if late:
                    overlap = np.minimum(p, np.exp(q)).sum(axis=-1)
                    value = 0.5 * value - 0.5 * np.log(np.maximum(overlap, 1e-4))
                there = told[j + 2 : j + 2 + rows]
                totals[j], counts[j] = totals[j] + (value * there).sum(), counts[j] + there.sum()
        weight = decay ** np.arange(count)
        return float((weight * totals / counts).sum() / weight.sum())

    return loss


LISTED = [1, 4, 5, 40, 41, 42, 90]


def some(batch: np.ndarray) -> np.ndarray:
    """Which tokens are learned: not all, and in the later half more."""
    return np.random.default_rng(4).random(batch.shape) < np.linspace(0.5, 1.0, batch.shape[1])


@pytest.mark.parametrize(
    ("name", "reads", "count", "steps", "ids", "late"),
    [("gemma", "trunk", 2, 2, [], False), ("llama", "hidden", 2, 2, LISTED, True),
     ("quantised", "trunk", 2, 2, LISTED, False), ("gemma", "", 2, 2, LISTED, True), ("llama", "", 1, 3, [], True),
     ("quantised", "", 2, 3, [], False), ("gemma", "aux", 1, 3, LISTED, True), ("llama", "aux", 2, 2, [], False)],
)  # fmt: skip
def test_on_a_frozen_target(
    name: str, reads: str, count: int, steps: int, ids: list[int], late: bool, targets: dict[str, Target]
) -> None:
    target, batch = targets[name], batch_of(5 + steps, 2 if reads in HEADS else 1, 96)
    drafter = drafter_of(target.info.vocab_size, 32, count, reads)
    every = list(range(target.info.vocab_size))
    by_hand = frozen_by_hand(target, batch, some(batch), steps, 0.7, ids or every, late, reads)
    listed = mx.array(ids, dtype=mx.int32) if ids else None
    loss = (objective.parallel_loss if reads in HEADS else objective.sequential_loss)(target, steps, 0.7, listed)
    check(drafter, loss, kept(target, batch, some(batch), reads=reads), by_hand, 0.7 if late else 0.3)


def test_a_frozen_target_stays_as_it_is(targets: dict[str, Target]) -> None:
    """Only the drafter has gradients, and the figures are agreement with the target, of all drafts so far."""
    target = targets["gemma"]
    before = {name: np.array(weight) for name, weight in named_parameters(target.model).items()}
    drafter, batch = model_of(config_of("sequential_modules", 32, 128, 1)), batch_of(40, 3, 128)
    told = some(batch)
    loss = objective.sequential_loss(target, 2)
    (_, figures), gradients = nn.value_and_grad(drafter, loss)(drafter, kept(target, batch, told))
    assert dict(tree_flatten(gradients)).keys() == named_parameters(drafter).keys()
    assert all(np.array_equal(weight, before[name]) for name, weight in named_parameters(target.model).items())
    ids = mx.array(batch)
    states = target.forward(ids, target.new_cache(256, 3))
    best, alive = np.array(target.logits(ids)).argmax(axis=-1), np.ones((3, 37), bool)
    for j, hidden in enumerate(drafter(states.hidden[:, :37], target.embed(ids[:, 1:39]), 2)):
        alive &= np.array(target.head(hidden)).argmax(axis=-1) == best[:, j + 1 : j + 38]
        alive &= told[:, j + 2 : j + 39]
        assert abs(figures[j].item() - alive.sum() / told[:, 2:39].sum()) < 1e-6


@pytest.mark.parametrize("reads", ["trunk", "hidden", "", "aux", "assistant"])
@pytest.mark.parametrize("progress", [0.3, 0.7])
def test_chats_of_one_row_do_not_see_each_other(reads: str, progress: float, targets: dict[str, Target]) -> None:
    """Loss, figures and slopes of two chats one after the other are the means of those of each alone."""
    target, tokens = targets["gemma"], batch_of(24, 2, 128)
    if reads == "assistant":
        drafter = load_drafter(Checkpoint.open(GOLDEN / "ple" / "assistant_tied")).model
        loss = objective.assistant_loss(target, 2)
    else:
        drafter = drafter_of(128, 32, 2, reads)
        loss = (objective.parallel_loss if reads in HEADS else objective.sequential_loss)(target, 2)
    told = np.ones((2, 24), bool)
    told[:, [11, 23]] = False  # the last places of a row have no second draft
    start = mx.array(np.repeat([[0, 12]], 2, axis=0).repeat(12, axis=1).astype(np.int32))
    both = kept(target, tokens, told, start, reads)
    slope, parts = nn.value_and_grad(drafter, loss), np.split(tokens, 2, axis=1)
    (found, figures), gradients = slope(drafter, both, mx.array(progress))
    alone = [slope(drafter, kept(target, part, told[:, :12], reads=reads), mx.array(progress)) for part in parts]
    assert abs(found.item() - np.mean([value.item() for (value, _), _ in alone])) < 1e-4
    assert np.allclose(figures, np.mean([np.array(right) for (_, right), _ in alone], axis=0), atol=1e-6)
    for (name, one), *others in zip(tree_flatten(gradients), *(tree_flatten(each) for _, each in alone), strict=True):
        mean = np.mean([np.array(other) for _, other in others], axis=0)
        assert np.allclose(one, mean, atol=2e-3 * np.abs(mean).max() + 1e-6), name


def test_a_long_sequence_keeps_the_whole_window(targets: dict[str, Target]) -> None:
    """The assistant reads sliding K/V of every row, also where the ring of decoding would have lost them."""
    target, drafter = targets["gemma"], load_drafter(Checkpoint.open(GOLDEN / "ple" / "assistant_tied")).model
    batch, found = mx.array(batch_of(120, 2, 128)), {}
    for start in (0, 70):  # sliding rows only: the same rows as the end of a long sequence and of all of it
        cache = objective._remembering(target, mx.zeros_like(batch[:, start:]))
        target.forward(batch[:, start:], cache)
        i = target.info.storing_layers["sliding_attention"]
        assert cache.keys[i].shape[2] == 120 - start
        assert (np.abs(np.array(cache.keys[i])).max(axis=(0, 1, 3)) > 0).all()
        found[start] = cache
    loss, _ = objective.assistant_loss(target, 2)(drafter, kept(target, np.array(batch)))
    assert np.isfinite(loss.item())


def test_a_centroid_drafter_learns_like_a_dense_one(targets: dict[str, Target]) -> None:
    """Its table is in slot order; reordered to that of the tokens it is a dense drafter's, and so is the loss."""
    target = targets["gemma"]
    folders = [GOLDEN / "ple" / f"assistant_{head}" for head in ("tied", "centroid")]
    dense, centroid = (load_drafter(Checkpoint.open(folder)).model for folder in folders)
    ordering = centroid.masked_embedding.token_ordering
    shared = {k: w for k, w in named_parameters(centroid).items() if not k.startswith("masked")}
    shared["model.embed_tokens.weight"] = shared["model.embed_tokens.weight"][mx.argsort(ordering)]
    dense.load_weights(list(shared.items()))
    batch = kept(target, batch_of(20, 2, 128))
    for progress in (0.0, 0.8):
        loss = objective.assistant_loss(target, 3)
        (one, right), (other, also) = (loss(drafter, batch, mx.array(progress)) for drafter in (dense, centroid))
        assert abs(one.item() - other.item()) < 1e-5 and mx.allclose(right, also)
