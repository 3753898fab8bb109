"""benchmarks/cost_model.py: what it foretells, by hand; and that predictions go through the statistics of the runs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cost_model
import pytest

from mlx_mtp.generation.depth import expected_tokens
from mlx_mtp.generation.types import Stats
from mlx_mtp.measuring.configurations import Configuration
from mlx_mtp.measuring.diagnosis import Costs
from mlx_mtp.measuring.engines import TimedRun
from mlx_mtp.measuring.turns import Runs

COSTS = Costs(
    context=200, verify=(0.010, 0.011, 0.012, 0.013, 0.015, 0.018, 0.020, 0.022, 0.024), plain=0.0105, drafted_depth=4,
    drafted=0.015 + 4 * 0.001 + 0.0008, draft_step=0.001, build=0.001, submit=0.002, scatter=0.02,
)  # fmt: skip


def test_rounds_needed_by_hand() -> None:
    chances = cost_model.tokens_distribution(10, [8, 4])
    assert chances == pytest.approx([0.2, 0.4, 0.4]) and sum(chances) == pytest.approx(1.0)
    assert cost_model.tokens_distribution(7, []) == [1.0]  # plain decoding
    # One token: one round. Two: one more round where the first gave one. Three: 1 + 0.2 N(2) + 0.4 N(1).
    assert [cost_model.rounds_needed(chances, n) for n in range(4)] == pytest.approx([0.0, 1.0, 1.2, 1.64])
    assert cost_model.rounds_needed([1.0], 63) == 63.0
    long = cost_model.rounds_needed(chances, 5000)
    assert 5000 / long == pytest.approx(expected_tokens([0.8, 0.5], 2), rel=1e-3)


def test_the_prediction_by_hand() -> None:
    plain = cost_model.seconds_per_token(COSTS, {0: 9}, [1.0], 64)
    assert plain == pytest.approx(0.0105)
    # Depth 2: a pass of three rows, two drafts, and the gap that depth 4 showed.
    parts = cost_model.round_parts(COSTS, {2: 5})
    assert (parts.verify, parts.draft, parts.gap) == pytest.approx((0.012, 0.002, 0.0008))
    chances = [0.2, 0.4, 0.4]
    needed = cost_model.rounds_needed(chances, 63)
    assert cost_model.seconds_per_token(COSTS, {2: 5}, chances, 64) == pytest.approx(needed * 0.0148 / 63)
    # The formula itself, E / (verify(M) / verify(1) + depth x draft / verify(1) + gap / verify(1)), for long replies.
    formula = 2.2 / (1.2 + 0.2 + 0.08)
    model = COSTS.verify[0] / cost_model.seconds_per_token(COSTS, {2: 5}, chances, 4000)
    assert model == pytest.approx(formula, rel=1e-3)


def test_a_mix_of_depths_is_predicted_by_its_shares() -> None:
    mix = {0: 30, 2: 10}
    parts = cost_model.round_parts(COSTS, mix)
    assert parts.seconds == pytest.approx(0.75 * 0.0105 + 0.25 * 0.0148)
    # The ten of depth 2 were accepted in 8 and 4 rounds; the thirty others had no drafts.
    chances = cost_model.tokens_distribution(40, [8, 4])
    assert chances == pytest.approx([0.75 + 0.25 * 0.2, 0.25 * 0.4, 0.25 * 0.4])
    wanted = cost_model.rounds_needed(chances, 63) * parts.seconds / 63
    assert cost_model.seconds_per_token(COSTS, mix, chances, 64) == pytest.approx(wanted)


def test_exact_mode_pays_for_padded_passes() -> None:
    parts = cost_model.round_parts(COSTS, {2: 1}, padded=5)
    assert (parts.verify, parts.draft) == pytest.approx((0.015, 0.002))


def test_every_turn_is_foretold_by_its_own_pieces() -> None:
    """Plain decoding whose rounds take what its pieces say is foretold exactly, also when a turn is twice as slow."""
    engine: Any = object()
    every = {name: Configuration(name=name, decode=lambda job: pytest.fail("not run"), engine=engine, drafter=drafter)
             for name, drafter in (("plain", None), ("mtp@2", "mtp"))}  # fmt: skip
    tokens, slow = 64, replace(COSTS, **{name: 2 * getattr(COSTS, name) for name in ("plain", "drafted", "draft_step")},
                               verify=tuple(2 * time for time in COSTS.verify))  # fmt: skip
    pieces = [{"": costs, "mtp": costs} for costs in (COSTS, slow)]
    stats = {"plain": Stats(rounds=63, depth_counts={0: 63}),
             "mtp@2": Stats(rounds=30, depth_counts={2: 30}, accepted_by_position=[24, 12])}  # fmt: skip
    seconds = {"plain": (63 * 0.0105, 63 * 0.021), "mtp@2": (0.5, 1.0)}
    runs = {name: [TimedRun([1] * tokens, time, 0, stats[name]) for time in seconds[name]] for name in every}
    bench: Any = cost_model.Foretold.__new__(cost_model.Foretold)
    bench.padded = None
    found = cost_model.Found({name: Runs([runs[name]]) for name in every}, {name: Runs() for name in every})
    for one in every.values():
        bench._foretell(found, one, pieces, runs[one.name])
    for mine, real in zip(found.predicted["plain"].by_job[0], runs["plain"], strict=True):
        assert mine.seconds == pytest.approx(real.seconds)
    (name, row), = cost_model.rows_of(found).items()
    needed = cost_model.rounds_needed([0.2, 0.4, 0.4], 63)
    assert (name, row["over"], row["measured"]) == ("mtp@2", "plain", pytest.approx(63 * 0.0105 / 0.5))
    assert row["predicted"] == pytest.approx(63 * 0.0105 / (needed * 0.0148))
    assert row["deviation"] == pytest.approx(row["predicted"] / row["measured"] - 1)
    assert row["verify_milliseconds"] == pytest.approx(1.5 * 12.0)
