"""The loop: speculation never changes the output, whatever is drafted; budgets, stops, statistics."""

import itertools
import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN, HEADS, VARIANTS
from greedy import lively, reference, same_or_tie

import mlx_mtp
from mlx_mtp.generation import loop
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder, GenerationRequest
from mlx_mtp.generation.types import Stats
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.testing import ScriptedDrafter

# The golden models' ring: a window of 8 and 32 slots of slack. Their first buffers hold 256 rows.
RING, FIRST_BUFFERS = 40, 256
# Where a script is right: everywhere, nowhere, and so that rounds are cut at every draft.
MIXED = [bool(int(digit)) for digit in "101111110101100"]
SCRIPTS = ([True], [False], MIXED)
DEPTHS = (1, 2, 4, 8)
# Tokens of a prompt and of its reply: over the ring's first wrap, over a later one and into larger buffers.
RUNS = ((4, 56), (228, 48))


def prompt(variant: str) -> list[int]:
    return np.load(GOLDEN / variant / "reference.npz")["input_ids"][0].tolist()


@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_transformers(variant: str) -> None:
    meta = json.loads((GOLDEN / variant / "meta.json").read_text())
    engine = mlx_mtp.load(GOLDEN / variant / "target", drafter=None)
    assert engine.generate(prompt(variant), max_tokens=20, ignore_end=True).tokens == meta["greedy"]


def random_prompt(length: int) -> list[int]:
    """One after which no token of any variant is a near tie (`reference` checks it)."""
    return np.random.default_rng(2).integers(3, 128, length).tolist()


def kinds_of_rounds(rounds: list[int], depth: int, prompt: int, row: int) -> set[tuple[str, str]]:
    """Which rounds (accepting all drafts, none, or some) end before `row`, write it or begin after it.

    rounds: drafts accepted in each.
    """
    found, first = set(), prompt
    for accepted in rounds:
        when = "before" if first + depth < row else "at" if first <= row else "after"
        found.add((when, {0: "none", depth: "all"}.get(accepted, "some")))
        first += accepted + 1
    return found


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("run", "row"), [(RUNS[0], RING), (RUNS[1], 6 * RING), (RUNS[1], FIRST_BUFFERS)])
def test_rounds_of_every_kind_are_met(depth: int, run: tuple[int, int], row: int) -> None:
    """What the next test relies on: before, at and after the wrap, and where the buffers grow."""
    met: set[tuple[str, str]] = set()
    for right in SCRIPTS:
        rounds = ScriptedDrafter([1] * 400, right).accepted(*run, depth)
        met |= kinds_of_rounds(rounds, depth, run[0], row)
    kinds = ("all", "none", "some") if depth > 1 else ("all", "none")
    assert met == set(itertools.product(("before", "at", "after"), kinds))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_depth_equals_plain(variant: str) -> None:
    """Drafts that are right and wrong at known places, over wraps of the ring and into larger buffers."""
    plain = lively(variant)
    for begin, count in RUNS:
        ids = random_prompt(begin)
        expected = reference(plain, ids, count)
        for depth, right in itertools.product(DEPTHS, SCRIPTS):
            drafter = ScriptedDrafter(ids + expected, right)
            engine = mlx_mtp.Engine(plain.target, drafter, None, depth=depth)
            result = engine.generate(ids, max_tokens=count, ignore_end=True)
            assert result.tokens == expected
            rounds, stats = drafter.accepted(begin, count, depth), result.stats
            assert (stats.rounds, stats.drafted, stats.accepted) == (len(rounds), depth * len(rounds), sum(rounds))
            assert stats.accepted_by_position == [sum(n > i for n in rounds) for i in range(depth)]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_assistant_that_is_wrong_changes_nothing(variant: str, head: str) -> None:
    """The golden assistants are random: whatever they propose, the target's own words come out."""
    plain = lively(variant)
    ids, count = random_prompt(RUNS[0][0]), RUNS[0][1]
    engine = lively(variant, GOLDEN / variant / f"assistant_{head}", depth=3)
    result = engine.generate(ids, max_tokens=count, ignore_end=True)
    assert result.tokens == reference(plain, ids, count)
    assert result.stats.drafted == 3 * result.stats.rounds > 3 * count // 2


@pytest.fixture(scope="module")
def embedded() -> tuple[mlx_mtp.Engine, list[int], list[int]]:
    """The embedded model decoding plainly, a prompt, and 300 varied tokens of its own."""
    engine = mlx_mtp.load(drafter=None)
    ids = engine.tokenizer.encode("import os\n\n\nclass Reader:\n")
    tokens = engine.generate(ids, max_tokens=300, ignore_end=True).tokens
    assert len(set(tokens)) > 20
    return engine, ids, tokens


def scripted(plain: mlx_mtp.Engine, script: list[int], depth: int, **options) -> mlx_mtp.Engine:
    return mlx_mtp.Engine(plain.target, ScriptedDrafter(script), plain.tokenizer, depth=depth, **options)


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_full_acceptance(embedded, depth: int) -> None:
    plain, ids, expected = embedded
    result = scripted(plain, ids + expected, depth).generate(ids, max_tokens=300)
    same_or_tie(plain, ids, expected, result.tokens)
    stats = result.stats
    assert stats.accepted_by_position[0] >= stats.drafted_by_position[0] - 2  # but for rounds past the end
    assert stats.tokens_per_round > 0.95 * (depth + 1) - 0.2
    assert stats.host_syncs <= stats.rounds + 2
    assert stats.head_passes == stats.rounds + 1
    assert stats.depth_counts == {depth: stats.rounds}


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_full_rejection(embedded, depth: int) -> None:
    plain, ids, expected = embedded
    wrong = [(token + 1) % 4096 for token in ids + expected]
    result = scripted(plain, wrong, depth).generate(ids, max_tokens=200)
    same_or_tie(plain, ids, expected[:200], result.tokens)
    assert result.stats.accepted == 0
    assert result.stats.rounds in (199, 200)


def test_budget_is_exact(embedded) -> None:
    plain, ids, expected = embedded
    engine = scripted(plain, ids + expected, 4)
    for budget in (1, 2, 3, 5, 6, 7):
        result = engine.generate(ids, max_tokens=budget)
        assert (result.tokens, result.finish_reason) == (expected[:budget], "length")


def test_no_round_for_nothing(embedded) -> None:
    """The first token waits for no round, and behind a round that may be the last there is none in flight."""
    plain, ids, expected = embedded
    engine, stats = scripted(plain, ids + expected, 4), Stats()
    runs = Decoder(engine.target, engine.drafter, FixedDepth(4)).decode(GenerationRequest(ids=ids, budget=20), stats)
    assert next(runs).tokens == expected[:1]
    assert stats.rounds == 0
    assert [token for run in runs for token in run.tokens] == expected[1:20]
    assert stats.rounds == 4  # of 5 tokens each, all of whose drafts stand


def test_end_token_inside_a_draft(embedded) -> None:
    plain, ids, expected = embedded
    end = expected[9]
    first = expected.index(end)
    engine = scripted(plain, ids + expected, 8, stop_tokens=[end])
    result = engine.generate(ids, max_tokens=100)
    assert (result.tokens, result.finish_reason) == (expected[:first], "stop")
    assert engine.generate(ids, max_tokens=20, ignore_end=True).tokens == expected[:20]


def test_stop_string_is_cut_and_engine_stays_usable(embedded) -> None:
    plain, ids, expected = embedded
    text = plain.generate(ids, max_tokens=60).text
    stop = text[20:26]
    cut = plain.generate(ids, max_tokens=60, stop=[stop])
    assert cut.text == text[: text.index(stop)]
    assert cut.finish_reason == "stop"
    for _ in plain.stream(ids, max_tokens=60):
        break  # the consumer walks away
    assert plain.generate(ids, max_tokens=60).text == text


def test_chunked_prefill_equals_one_chunk(embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ids, expected = embedded
    long = (ids + expected) * 2
    whole = plain.generate(long, max_tokens=40, ignore_end=True).tokens
    for rows in (16, 50, 97):
        monkeypatch.setattr(loop, "MAX_CHUNK", rows)
        seen: list[tuple[int, int]] = []
        chunked = plain.generate(
            long, max_tokens=40, ignore_end=True, on_prefill=lambda done, total, seen=seen: seen.append((done, total))
        )
        same_or_tie(plain, long, whole, chunked.tokens)
        assert seen[-1] == (len(long), len(long)) and len(seen) == -(-len(long) // rows)


def test_compiled_rounds_are_bounded(embedded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server meets every top_k there is: old graphs go, and coming back to one changes nothing."""
    plain, ids, expected = embedded
    monkeypatch.setattr("mlx_mtp.generation.round.MOST_COMPILED", 2)
    engine = scripted(plain, ids + expected, 1)
    runs = [engine.generate(ids, max_tokens=4, seed=1, sampling=mlx_mtp.Sampling(temperature=1.0, top_k=k)).tokens
            for k in (2, 3, 4, 5, 2)]  # fmt: skip
    assert runs[0] == runs[-1]
    assert [key[2].top_k for key in engine._decoder.rounds._compiled] == [5, 2]


def test_context_is_respected(embedded) -> None:
    plain, ids, expected = embedded
    engine = scripted(plain, ids + expected, 4, max_context=len(ids) + 10)
    result = engine.generate(ids, max_tokens=100, ignore_end=True)
    assert (result.tokens, result.finish_reason) == (expected[:10], "length")
    with pytest.raises(mlx_mtp.PromptError, match="shorter than the context"):
        engine.generate(ids + expected[:10])


def test_embedded_pair_drafts_well_and_exactly() -> None:
    plain, mtp = mlx_mtp.load(drafter=None), mlx_mtp.load(depth=4)
    ids = mtp.tokenizer.encode("def main():\n    parser = ")
    expected, found = (e.generate(ids, max_tokens=200, ignore_end=True) for e in (plain, mtp))
    same_or_tie(plain, ids, expected.tokens, found.tokens)
    assert found.stats.tokens_per_round > 1.5


def test_embedded_target_is_stock_mlx_lm() -> None:
    """Other engines load the embedded target too, and see the same logits."""
    from mlx_lm.utils import load_model

    engine = mlx_mtp.load(drafter=None)
    model, _ = load_model(EMBEDDED / "target")
    model.set_dtype(mx.float32)
    tokens = mx.array([engine.tokenizer.encode("import os\nclass A:\n    def f(self):\n")])
    assert mx.abs(model(tokens).astype(mx.float32) - engine.target.logits(tokens)).max().item() < 1e-3


def test_a_round_traced_again_does_not_follow_a_cache_that_grew() -> None:
    """Without mx.compile every round is built anew; the first request grows from one rung of the ladder to the next."""
    engine = mlx_mtp.load(depth=3)
    asked = {"raw": True, "max_tokens": 280, "ignore_end": True}
    expected = engine.generate("import os\n", **asked).tokens
    engine = mlx_mtp.load(depth=3)
    mx.disable_compile()
    try:
        assert [engine.generate("import os\n", **asked).tokens for _ in range(2)] == [expected] * 2
    finally:
        mx.enable_compile()
