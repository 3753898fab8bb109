"""The output distribution: exact enumeration through the device code, and long runs of the real loop."""

import itertools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from greedy import NEAR_TIE, lively
from references import log_softmax

import mlx_mtp
from mlx_mtp import Sampling
from mlx_mtp.generation import acceptance
from mlx_mtp.generation.round import Rounds, SequenceState
from mlx_mtp.generation.sampling import SamplingSpec, TokenDistribution
from mlx_mtp.generation.types import NEUTRAL
from mlx_mtp.testing import MIXED, MarkovDrafter, MarkovTarget, ScriptedDrafter

FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7, top_k=2),
    Sampling(temperature=1.3, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=1.0, top_k=3, top_p=0.9, min_p=0.05),
]
ODDS = {"token": acceptance.token_odds, "block": acceptance.block_odds}


def filtered(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution in float64, row by row, straight from the definitions."""
    flat = logits.reshape(-1, logits.shape[-1]).astype(np.float64)
    out = np.zeros_like(flat)
    for row, distribution in zip(flat, out, strict=True):
        kept = np.argsort(-row, kind="stable")
        weights = np.exp(row[kept] / sampling.temperature - row.max() / sampling.temperature)
        if sampling.top_k:
            kept, weights = kept[: sampling.top_k], weights[: sampling.top_k]
        weights = weights / weights.sum()
        if sampling.top_p is not None and sampling.top_p < 1:
            count = int((np.cumsum(weights) - weights < sampling.top_p).sum())
            kept, weights = kept[:count], weights[:count]
        if sampling.min_p:
            enough = weights >= sampling.min_p * weights[0]
            kept, weights = kept[enough], weights[enough]
        distribution[kept] = weights / weights.sum()
    return out.reshape(logits.shape)


def distribution_of(logits: np.ndarray, sampling: Sampling) -> TokenDistribution:
    full = sampling.over(NEUTRAL)
    spec = SamplingSpec.of(full, logits.shape[-1])
    return spec.distribution(mx.array(logits.astype(np.float32)), None, spec.arrays(full, logits.shape[-1]))


def dense(distribution: TokenDistribution, vocabulary: int) -> np.ndarray:
    probabilities = np.array(distribution.probabilities).astype(np.float64)
    if distribution.tokens is None:
        return probabilities
    out = np.zeros((*probabilities.shape[:-1], vocabulary))
    np.put_along_axis(out, np.array(distribution.tokens), probabilities, axis=-1)
    return out


def joint_of(odds, vocabulary: int, depth: int, sampling: Sampling, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Joint distribution of the depth + 1 tokens that a round and plain decoding after it emit; the target's own.

    After some tokens the drafter's distribution is the target's own.
    """
    random = np.random.default_rng(seed)
    p_logits = [random.normal(size=(vocabulary**i, vocabulary)) * 1.5 for i in range(depth + 1)]
    q_logits = [p + random.normal(size=p.shape) * (random.random((len(p), 1)) < 0.7) for p in p_logits[:depth]]
    blocks = np.array(list(itertools.product(range(vocabulary), repeat=depth)))
    before = [np.zeros(len(blocks), dtype=int)]  # index of the block's first i tokens
    for i in range(depth):
        before.append(before[-1] * vocabulary + blocks[:, i])
    p = distribution_of(np.stack([p_logits[i][before[i]] for i in range(depth + 1)], axis=1), sampling)
    q = distribution_of(np.stack([q_logits[i][before[i]] for i in range(depth)], axis=1), sampling)
    p_tables, q_tables = [filtered(x, sampling) for x in p_logits], [filtered(x, sampling) for x in q_logits]
    drawn = np.prod([q_tables[i][before[i], blocks[:, i]] for i in range(depth)], axis=0)
    found = odds(mx.array(blocks.astype(np.int32)), q, p)
    passes, residual = np.array(found.pass_, dtype=np.float64), dense(found.residual, vocabulary)
    target = np.ones((1, 1))
    for distributions in p_tables:
        target = (target.reshape(-1, 1) * distributions).reshape(1, -1)
    emitted = np.zeros_like(target)
    for accepted in range(depth + 1):
        if found.prefix:
            stops = 1.0 - passes[:, accepted] if accepted < depth else 1.0
            chance = passes[:, :accepted].prod(axis=1) * stops
        else:
            reaches = passes[:, accepted - 1] if accepted else 1.0
            chance = reaches * (1.0 - passes[:, accepted:]).prod(axis=1)
        weight = np.where(drawn > 0, drawn * chance, 0.0)
        begun = np.zeros((vocabulary**accepted, vocabulary))
        np.add.at(begun, before[accepted], weight[:, None] * residual[:, accepted])
        for distributions in p_tables[accepted + 1 :]:
            begun = (begun.reshape(-1, 1) * distributions).reshape(-1, vocabulary)
        emitted += begun.reshape(1, -1)
    return emitted[0], target[0]


@pytest.mark.parametrize("odds", ODDS)
@pytest.mark.parametrize("sampling", FILTERS)
@pytest.mark.parametrize(("vocabulary", "depth"), [(3, 4), (4, 3), (5, 1), (6, 2), (6, 4)])
def test_enumeration_of_every_block(odds: str, sampling: Sampling, vocabulary: int, depth: int) -> None:
    emitted, target = joint_of(ODDS[odds], vocabulary, depth, sampling, seed=vocabulary * 10 + depth)
    assert abs(target.sum() - 1) < 1e-9
    assert np.abs(emitted - target).max() < 1e-6


def markov_pair(seed: int = 0, vocabulary: int = 6) -> tuple[np.ndarray, MarkovTarget, MarkovDrafter]:
    random = np.random.default_rng(seed)
    table = random.normal(size=(vocabulary, vocabulary)).astype(np.float32) * 1.5
    other = table + random.normal(size=table.shape).astype(np.float32)
    return table, MarkovTarget(mx.array(table)), MarkovDrafter(mx.array(other))


def worst_deviation(sequences: Sequence[Sequence[int]] | np.ndarray, distribution: np.ndarray) -> float:
    """The larger chi-square of lag-1 and lag-2 pairs against what is known, in standard deviations from its mean."""
    worst, ids = 0.0, np.array(sequences)
    for lag, expected_rows in ((1, distribution), (2, distribution @ distribution)):
        seen = np.zeros(distribution.shape)
        np.add.at(seen, (ids[:, :-lag], ids[:, lag:]), 1)
        expected = seen.sum(axis=1, keepdims=True) * expected_rows
        assert seen[expected == 0].sum() == 0  # nothing that the filters forbid
        cells = expected > 5
        freedom = cells.sum() - (expected.sum(axis=1) > 0).sum()
        chi_square = ((seen - expected)[cells] ** 2 / expected[cells]).sum()
        # Pairs at lag 2 overlap, which only makes the statistic a little wider than chi-square's own.
        worst = max(worst, (chi_square - freedom) / np.sqrt(2 * max(freedom, 1)))
    return worst


def batch_of_rounds(sampling: Sampling, depth: int, batch: int, length: int) -> np.ndarray:
    """The first `length` tokens of many sequences [batch, length] that one compiled round carries on side by side."""
    _, target, drafter = markov_pair()
    resolved, start = sampling.over(NEUTRAL), mx.zeros((batch, 1), dtype=mx.int32)
    spec = SamplingSpec.of(resolved, 6)
    state = SequenceState(start, target.embed(start), target.new_cache(256, batch), {}, spec, spec.arrays(resolved, 6),
                          key=mx.random.key(3))  # fmt: skip
    rounds, written, found = Rounds(target, drafter), np.zeros(batch, dtype=int), np.zeros((batch, 64), dtype=int)
    while written.min() < length:
        *tokens, accepted = np.array(rounds.submit(state, depth).tokens).T
        for i, column in enumerate(tokens):
            fits = (i <= accepted) & (written < length)
            found[fits, written[fits]] = column[fits]
            written += fits
    return found[:, :length]


@pytest.mark.parametrize("sampling", FILTERS)
@pytest.mark.parametrize("depth", [0, 1, 6])
def test_rounds_follow_the_distribution(sampling: Sampling, depth: int) -> None:
    """20,000 tokens of compiled rounds against the exact distribution of a Markov target.

    At depth 6 acceptance wants as many random numbers as the token after it: of one key they would be the same.
    """
    tokens = batch_of_rounds(sampling, depth, 2000, 10)
    assert worst_deviation(tokens, filtered(markov_pair()[0], sampling)) < 5


def test_a_long_run_follows_the_distribution_and_its_seed() -> None:
    """One sequence through the whole pipelined loop; without a seed every run is another."""
    table, target, drafter = markov_pair()
    engine = mlx_mtp.Engine(target, drafter, None, depth=4)
    runs = [engine.generate([0], max_tokens=count, sampling=FILTERS[0], seed=seed).tokens
            for count, seed in ((2500, 3), (100, 3), (100, None))]  # fmt: skip
    assert worst_deviation(runs[:1], filtered(table, FILTERS[0])) < 5
    assert runs[0][:100] == runs[1] != runs[2]


PENALISED = Sampling(
    temperature=0.0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.4,
    logit_bias={7: 1.5, 9: float("-inf")},
)  # fmt: skip


def test_penalties_and_logprobs_by_hand() -> None:
    """Every token and its logprob, recomputed in NumPy from the target's plain logits; with drafts that are right and
    wrong at known places."""
    prompt = np.random.default_rng(2).integers(3, 128, 20).tolist()
    plain, options = lively("ple"), {"max_tokens": 80, "sampling": PENALISED, "logprobs": 3, "ignore_end": True}
    drafter = ScriptedDrafter(prompt + plain.generate(prompt, **options).tokens, MIXED)
    result = mlx_mtp.Engine(plain.target, drafter, None, depth=4).generate(prompt, **options)
    all_logits = np.array(plain.target.logits(mx.array([prompt + result.tokens])))[0].astype(np.float64)
    for i, token in enumerate(result.tokens):
        logits = all_logits[len(prompt) - 1 + i]
        counts = np.bincount(result.tokens[:i], minlength=len(logits))
        seen = (counts > 0) | (np.bincount(prompt, minlength=len(logits)) > 0)
        logits = np.where(seen, np.where(logits > 0, logits / 1.3, logits * 1.3), logits)
        logits = logits - 0.5 * (counts > 0) - 0.4 * counts
        logits[7] += 1.5
        logits[9] = -np.inf
        logprobs = log_softmax(logits)
        best = np.argsort(-logprobs)[:3]
        assert logprobs[token] > logprobs[best[0]] - NEAR_TIE
        assert abs(result.logprobs[i] - logprobs[token]) < NEAR_TIE
        assert np.abs(np.array(list(result.top_logprobs[i].values())) - logprobs[best]).max() < NEAR_TIE
    assert 9 not in result.tokens and len(set(result.tokens)) > 20
    assert 0 < result.stats.accepted < result.stats.drafted


def test_python_logits_processors_see_every_token() -> None:
    """A processor that forbids what the last token was, in mlx-lm's convention; read one round at a time."""
    engine, prompt = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=None), [5, 6, 7, 8, 9]
    lengths = []

    def no_repeats(tokens: mx.array, logits: mx.array) -> mx.array:
        lengths.append(tokens.size)
        logits[:, tokens[-1:]] = -1e9
        return logits

    def run(drafter: ScriptedDrafter | None, depth: int, count: int) -> mlx_mtp.Result:
        return mlx_mtp.Engine(engine.target, drafter, None, depth=depth).generate(
            prompt, max_tokens=count, logits_processors=[no_repeats], ignore_end=True, logprobs=2
        )

    expected = run(None, 0, 60)
    assert min(max(top.values()) - min(top.values()) for top in expected.top_logprobs) > NEAR_TIE
    drafter = ScriptedDrafter(prompt + expected.tokens, MIXED)
    found = run(drafter, 3, 60)
    assert found.tokens == expected.tokens
    assert 0 < found.stats.accepted == sum(drafter.accepted(len(prompt), 60, 3)) < found.stats.drafted
    assert all(a != b for a, b in itertools.pairwise(found.tokens))
    assert min(lengths) == len(prompt)


def sparse(random: np.random.Generator, rows: int, size: int, vocabulary: int) -> TokenDistribution:
    """A distribution on `size` different tokens a row, in no order."""
    tokens = np.stack([random.permutation(vocabulary)[:size] for _ in range(rows)])[None].astype(np.int32)
    weights = random.random((1, rows, size)).astype(np.float32)
    return TokenDistribution(mx.array(tokens), mx.array(weights / weights.sum(axis=-1, keepdims=True)))


@pytest.mark.parametrize(("mine", "others", "vocabulary"), [(1, 7, 9), (5, 2, 6), (40, 60, 64), (300, 200, 900)])
def test_one_distribution_on_the_support_of_another(mine: int, others: int, vocabulary: int) -> None:
    """Token by token against dense rows in NumPy; a draft put in by force may stand in the support twice."""
    random = np.random.default_rng(mine)
    q, p = sparse(random, 4, mine, vocabulary), sparse(random, 4, others, vocabulary)
    forced = mx.array([[int(np.array(q.tokens)[0, 0, -1]), 0, int(np.array(p.tokens)[0, 2, 0]), 1]])
    for distribution in (q, q.overridden(mx.array([[True, False, True, False]]), forced)):
        rows = np.zeros((1, 4, vocabulary), np.float32)
        for row, token, weight in zip(np.repeat(np.arange(4), mine), np.array(distribution.tokens).ravel(),
                                      np.array(distribution.probabilities).ravel(), strict=True):  # fmt: skip
            rows[0, row, token] += weight
        assert np.array_equal(np.array(distribution.on(p)), np.take_along_axis(rows, np.array(p.tokens), axis=-1))


@pytest.mark.parametrize("odds", ODDS)
def test_memory_of_acceptance_grows_with_top_k_and_not_with_its_square(odds: str) -> None:
    """At most what 40 rows of the support take, however far the device works ahead; all pairs take 4,000."""
    random, size, rows = np.random.default_rng(0), 4000, 4
    q, p = sparse(random, rows, size, 4096), sparse(random, rows + 1, size, 4096)
    drafts = q.tokens[..., 0]
    mx.eval(q.tokens, q.probabilities, p.tokens, p.probabilities, drafts)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = ODDS[odds](drafts, q, p)
    mx.eval(found.pass_, found.residual.probabilities)
    assert mx.get_peak_memory() - before < 40 * rows * size * 4
