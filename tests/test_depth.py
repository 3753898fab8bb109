"""Depth control in simulation: it finds the best depth, never costs more than 2 %, and remembers."""

import json
import random
from pathlib import Path

import pytest

import mlx_mtp
from mlx_mtp.depth import TRY, Curve, DepthController, remembered

# Seconds of a round by depth: rows nearly free, and rows that are not (performance.md, A2).
FLAT = {0: 10.0, 1: 10.5, 2: 11.0, 4: 12.5, 8: 18.0}
STEEP = {0: 10.0, 1: 16.5, 2: 23.0, 4: 36.0, 8: 62.0}


def simulate(
    controller: DepthController, seconds: dict[int, float], acceptance: float, rounds: int, seed: int = 0
) -> tuple[float, float]:
    """Tokens and time of many rounds with independent acceptance; times scatter by 5 %."""
    chance, tokens, time, truth = random.Random(seed), 0, 0.0, Curve(dict(seconds))
    for _ in range(rounds):
        depth = controller.next()
        accepted = 0
        while accepted < depth and chance.random() < acceptance:
            accepted += 1
        took = truth.at(depth) * chance.uniform(0.95, 1.05)
        controller.learn(depth, accepted, took)
        tokens, time = tokens + accepted + 1, time + took
    return tokens, time


def best_rate(seconds: dict[int, float], acceptance: float) -> float:
    truth = Curve(dict(seconds))
    return max(sum(acceptance**i for i in range(depth + 1)) / truth.at(depth) for depth in range(9))


def controller(seconds: dict[int, float]) -> DepthController:
    return DepthController(Curve({d: seconds[d] for d in (0, 1, 2, 4)}), 8, range(9))


@pytest.mark.parametrize("seconds", [FLAT, STEEP])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.8, 0.95])
def test_it_finds_the_best_depth(seconds: dict[int, float], acceptance: float) -> None:
    tokens, time = simulate(controller(seconds), seconds, acceptance, 1500)
    assert tokens / time > 0.95 * best_rate(seconds, acceptance)


@pytest.mark.parametrize("seconds", [FLAT, STEEP])
@pytest.mark.parametrize("acceptance", [0.0, 0.02, 0.05])
def test_never_slower_than_plain(seconds: dict[int, float], acceptance: float) -> None:
    """From an optimistic start, over 250 rounds of a text that the drafter is bad at."""
    for seed in range(5):
        tokens, time = simulate(controller(seconds), seconds, acceptance, 250, seed)
        assert tokens / time > 0.98 / seconds[0]


@pytest.mark.parametrize("seconds", [FLAT, STEEP])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("factor", [0.4, 2.0])
def test_a_wrong_start_is_mended(seconds: dict[int, float], acceptance: float, factor: float) -> None:
    """Measured on a machine that was busy, or idle, and with one depth taken for far cheaper than it is."""
    wrong = {depth: factor * time for depth, time in seconds.items()}
    control = controller(wrong | {4: 0.6 * wrong[4]})
    simulate(control, seconds, acceptance, 300)
    tokens, time = simulate(control, seconds, acceptance, 1000)
    assert tokens / time > 0.95 * best_rate(seconds, acceptance)


@pytest.mark.parametrize("acceptance", [0.7, 0.95])
def test_short_requests_mend_a_curve_too(acceptance: float) -> None:
    """Times taken while something else ran, and replies too short to probe more than once: found on a real machine."""
    control = DepthController(Curve({0: 7.8, 1: 11.2, 2: 29.8, 4: 47.3}), 8, range(9))
    for seed in range(12):
        control.begin()
        simulate(control, FLAT, acceptance, 60, seed)
    tokens, time = 0.0, 0.0
    for seed in range(12):
        control.begin()
        more, took = simulate(control, FLAT, acceptance, 60, seed)
        tokens, time = tokens + more, time + took
    assert tokens / time > 0.9 * best_rate(FLAT, acceptance)


def test_it_follows_a_text_that_changes() -> None:
    control = controller(FLAT)
    simulate(control, FLAT, 0.95, 200)
    assert control.next() >= 5
    simulate(control, FLAT, 0.0, 200)
    assert control.tokens(1) < 1.15
    tokens, time = simulate(control, FLAT, 0.9, 3000)
    assert tokens / time > 0.8 * best_rate(FLAT, 0.9)


def test_a_try_is_some_rounds_in_a_row() -> None:
    """Of which only those that are followed by one like them are timed: the next is built while one runs."""
    control = controller(FLAT)
    depths, chosen = [], []
    for _ in range(400):
        depths.append(control.next())
        chosen.append(control._depth)
        control.learn(depths[-1], 0, None)
    assert set(chosen[-100:]) == {0}
    tried = "".join("t" if depth else "." for depth in depths[-300:]).strip("t")
    assert {len(run) for run in tried.split(".") if run} == {TRY}


def test_a_round_before_one_of_another_depth_is_not_timed() -> None:
    class Recorded:
        deepest = 2

        def __init__(self) -> None:
            self.asked: list[int] = []
            self.learned: list[tuple[int, float | None]] = []

        def begin(self) -> None:
            """Nothing."""

        def next(self) -> int:
            self.asked.append((0, 0, 0, 1, 1, 2, 1)[len(self.asked) % 7])
            return self.asked[-1]

        def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
            self.learned.append((depth, seconds))

    engine, policy = mlx_mtp.load(), Recorded()
    engine._decoder.policy = policy
    for _ in range(2):  # graphs are made in the first, and the rounds in which that happens are not timed either
        policy.asked, policy.learned = [], []
        engine.generate("import os\n", raw=True, max_tokens=120, ignore_end=True)
    assert [depth for depth, _ in policy.learned] == policy.asked[: len(policy.learned)]
    timed = [seconds is not None for _, seconds in policy.learned[3:-2]]
    alike = [one == other for one, other in zip(policy.asked[3:], policy.asked[4:], strict=False)][: len(timed)]
    assert any(timed) and not any(time and not same for time, same in zip(timed, alike, strict=True))


def test_only_allowed_depths() -> None:
    control = DepthController(Curve(dict(FLAT)), 8, [0, 1, 3])
    depths = set()
    for _ in range(300):
        depth = control.next()
        depths.add(depth)
        control.learn(depth, depth, None)
    assert depths <= {0, 1, 3} and 3 in depths


def test_an_interrupted_round_is_hardly_believed() -> None:
    curve = Curve(dict(FLAT))
    curve.learn(1, 10.5 * 20, usual=False)
    assert curve.at(1) == 10.5 and curve.at(0) == 10.0
    # Nothing was known of depth 3 but the line between its neighbours, and that counts as much.
    between = curve.at(3)
    curve.learn(3, 20 * between, usual=False)
    assert curve.at(3) == between == 11.75
    scaled = Curve(dict(FLAT))
    for _ in range(2):  # of the first one its own depth learns, by half at most
        scaled.learn(1, 10.5 * 20, usual=True)
    assert scaled.at(4) / scaled.at(0) == pytest.approx(1.25)
    assert scaled.at(0) <= 1.1 * 10.0


def test_the_median_of_the_latest_rounds_counts_at_the_machines_pace() -> None:
    curve = Curve(dict(FLAT))
    for time in (15.0, 12.0, 13.0, 14.0, 12.0, 13.0, 13.0, 13.0, 13.0):
        curve.learn(4, time, usual=False)
    assert curve.at(4) == pytest.approx(13.0) and curve.at(2) == 11.0
    curve.learn(0, 10.0, usual=True)
    for _ in range(200):  # the machine slows down by a quarter: known from the depth in use alone
        curve.learn(0, 12.5, usual=True)
    assert [curve.at(depth) for depth in (0, 2, 4)] == pytest.approx([12.5, 13.75, 16.25], rel=1e-3)
    curve.learn(4, 14.0, usual=False)
    assert curve.at(4) == pytest.approx(16.25, rel=1e-3)


def test_more_drafts_never_look_cheaper() -> None:
    """Of two times that say so the one that rests on fewer rounds gives way."""
    curve = Curve({0: 10.0, 2: 12.0, 4: 8.0})
    assert [curve.at(d) for d in (0, 1, 2, 3, 4, 8)] == [10.0, 11.0, 12.0, 12.0, 12.0, 12.0]
    for _ in range(9):
        curve.learn(3, 11.0, usual=False)
    assert [curve.at(d) for d in (0, 2, 3, 4)] == pytest.approx([10.0, 11.0, 11.0, 11.0])


def test_a_depth_that_looks_absurdly_dear_keeps_no_other_waiting() -> None:
    """Found on a real machine: plain decoding was never tried again, for it was a deeper depth's turn to be tried."""
    control = DepthController(Curve({0: 10.0, 3: 10.0, 4: 4000.0}), 4, [0, 3, 4])
    tried = []
    for _ in range(600):
        tried.append(control.next())
        control.learn(tried[-1], min(tried[-1], 1), control.curve.at(tried[-1]))
    assert control._depth == 3 and 0 in tried[-300:]


def test_plain_decoding_remembers_why() -> None:
    """Long replies without drafts do not make the next request start from hopes."""
    control = controller(FLAT)
    for _ in range(60):
        control.learn(control.next(), 0, None)
    for _ in range(3000):
        control.learn(0, 0, None)
    control.begin()
    assert control.tokens(8) < 1.2


def test_curves_are_straight_between_and_beyond_measurements() -> None:
    curve = Curve({0: 10.0, 2: 12.0, 4: 16.0})
    assert [curve.at(d) for d in (0, 1, 2, 3, 4, 6)] == [10.0, 11.0, 12.0, 14.0, 16.0, 20.0]


def test_what_was_learned_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "depth.json"
    control = DepthController(Curve(dict(FLAT)), 8, range(9), None, file, "pair one")
    simulate(control, FLAT, 0.9, 100)
    control.save()
    DepthController(Curve({0: 1.0}), 8, range(9), None, file, "pair two").save()
    known = remembered(file, "pair one")
    assert known is not None
    assert known[0].seconds == control.curve.seconds and known[1] == control.long_run
    assert remembered(file, "pair three") is None
    assert [path.name for path in file.parent.iterdir()] == ["depth.json"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"pair": 1}', '{"pair": {"seconds": {"0": -1}, "seen": [], "stood": []}}',
             '{"pair": {"seconds": {"x": 1}, "seen": [1], "stood": [0.5]}}',
             '{"pair": {"seconds": {}, "seen": [], "stood": []}}'],
)  # fmt: skip
def test_a_damaged_profile_is_measured_anew(tmp_path: Path, text: str) -> None:
    (tmp_path / "depth.json").write_text(text)
    assert remembered(tmp_path / "depth.json", "pair") is None


def test_the_engine_learns_and_keeps_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    engine = mlx_mtp.load()
    result = engine.generate("import os\n", raw=True, max_tokens=60, ignore_end=True)
    (profile,) = json.loads((tmp_path / "depth.json").read_text()).values()
    assert set(profile) == {"seconds", "seen", "stood"}
    assert sum(result.stats.depth_counts.values()) == result.stats.rounds


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "file" / "below"))
    assert mlx_mtp.load().generate("import os\n", raw=True, max_tokens=10).tokens
