"""Depth control: in simulation it finds the best depth from any start and is never much slower than plain decoding;
what it remembers is a prior; in the engine it measures nothing before the first request."""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from conftest import GOLDEN
from greedy import lively
from simulation import CPU, GPU, MACHINES, Machine, Text, always, best_fixed, simulate, switching

import mlx_mtp
from mlx_mtp.generation.depth import DepthController, DepthPolicy, FixedDepth, Profile, ProfileFile, RoundCosts
from mlx_mtp.generation.loop import Decoder

NEVER, SELDOM, OFTEN, NEARLY = always(0.0), always(0.3), always(0.8), always(0.95)
PROSE_AND_CODE = switching(0.15, 0.9, 400)
TOKENS, SEEDS = 2000, 3
# (depths that are remembered wrongly, by which factor)
EVERY, DRAFTED = tuple(range(9)), tuple(range(1, 9))
WRONG = [
    (EVERY, 10.0), (EVERY, 0.01), (DRAFTED, 10.0), (DRAFTED, 100.0), (DRAFTED, 0.1), (DRAFTED, 0.01), ((0,), 10.0),
    ((0,), 0.01), ((4,), 10.0), ((4,), 0.1), ((1,), 100.0), ((8,), 0.01),
]  # fmt: skip


def remembered(machine: Machine, depths: Sequence[int], factor: float, folder: Path) -> ProfileFile:
    """A profile of this machine that is wrong: what the depths cost in plain rounds is multiplied."""
    wrong = [time * (factor if depth in depths else 1.0) for depth, time in enumerate(machine.seconds)]
    profile = Profile([time / wrong[0] for time in wrong], 0.02, [0.0] * 8, [0.0] * 8)
    (folder / "depth.json").write_text(json.dumps({"version": 2, "profiles": {"pair": asdict(profile)}}))
    return ProfileFile(folder / "depth.json", "pair")


def believed(machine: Machine, depths: Sequence[int], factor: float) -> DepthController:
    """A control that took such costs for true, however absurd they are."""
    control = DepthController(range(9))
    wrong = [time * (factor if depth in depths else 1.0) for depth, time in enumerate(machine.seconds)]
    control.costs = RoundCosts(8, [time / wrong[0] for time in wrong])
    control.begin()
    return control


def share_of_best(controls: Sequence[DepthController], machine: Machine, text: Text) -> float:
    """Tokens per second after 50 rounds over those of the best fixed depth, of one run per control."""
    rates = [simulate(control, machine, text, TOKENS, seed).rate(50) for seed, control in enumerate(controls)]
    return statistics.fmean(rates) / best_fixed(machine, text, TOKENS)


def fresh() -> list[DepthController]:
    return [DepthController(range(9)) for _ in range(SEEDS)]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("text", [NEVER, SELDOM, OFTEN, NEARLY, PROSE_AND_CODE])
def test_a_fresh_start_finds_the_best_depth(machine: Machine, text: Text) -> None:
    assert share_of_best(fresh(), machine, text) > 0.95


def test_chance_in_short_replies_moves_little() -> None:
    """Replies of 100 tokens, all of one kind: what the last ones taught outweighs the first rounds of the next."""
    shares = []
    for machine in (GPU, CPU):
        for text in map(always, (0.5, 0.6, 0.7)):
            rates = [simulate(one, machine, text, 3000, seed, reply=100).rate(200) for seed, one in enumerate(fresh())]
            shares.append(statistics.fmean(rates) / best_fixed(machine, text, 3000))
    assert statistics.fmean(shares) > 0.983


@pytest.mark.parametrize(("depths", "factor"), WRONG)
@pytest.mark.parametrize(("machine", "text"), [(GPU, OFTEN), (CPU, NEVER)])
def test_wrong_memories_are_found_out(
    machine: Machine, text: Text, depths: Sequence[int], factor: float, tmp_path: Path
) -> None:
    file = remembered(machine, depths, factor, tmp_path)
    for begun in (lambda: DepthController(range(9), file), lambda: believed(machine, depths, factor)):
        assert share_of_best([begun(), begun()], machine, text) > 0.95


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("text", [NEVER, OFTEN, NEARLY])
@pytest.mark.parametrize(
    "disturbed",
    [{"sleeps": (7, 60, 200)}, {"busy": ((400, 1200, 3.0),)}, {"busy": ((400, 700, 10.0),)}, {"smeared": 0.3}],
    ids=("sleeps", "another program", "a greedy program", "times counted for the next round"),
)  # fmt: skip
def test_what_else_the_machine_does(machine: Machine, text: Text, disturbed: dict) -> None:
    assert share_of_best(fresh(), replace(machine, **disturbed), text) > 0.95


@pytest.mark.parametrize("machine", [GPU, CPU], ids=lambda machine: machine.name)
@pytest.mark.parametrize(("noise", "share"), [("uniform", 0.95), ("heavy", 0.95), ("lognormal", 0.91)])
def test_noisy_times(machine: Machine, noise: str, share: float) -> None:
    """Times off by up to half, often late, or with a deviation of half: what 500 such rounds can tell is less sharp."""
    noisy = replace(machine, noise=noise)
    assert statistics.fmean(share_of_best(fresh(), noisy, text) for text in (NEVER, SELDOM, OFTEN, NEARLY)) > share


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("acceptance", [0.0, 0.02])
def test_never_slower_than_plain(machine: Machine, acceptance: float) -> None:
    """From the first round on, over 400 tokens of a text that the drafter is bad at."""
    rates = [simulate(control, machine, always(acceptance), 400, seed).rate() for seed, control in enumerate(fresh())]
    plain = [simulate(FixedDepth(0), machine, NEVER, 400, seed).rate() for seed in range(SEEDS)]
    assert statistics.fmean(rates) > 0.98 * statistics.fmean(plain)


def test_the_pace_gets_the_blame_where_a_cost_is_known() -> None:
    """The worked example of the module: 26 ms in place of 13 are a slower machine, or after a start a dearer depth."""
    costs = RoundCosts(2)
    for _ in range(4):
        for depth, seconds in [(0, None)] + [(0, 0.010)] * 9 + [(2, None)] + [(2, 0.013)] * 50:
            costs.learn(depth, seconds)
    assert costs.cost(2) == pytest.approx(1.3, rel=0.03)
    for _ in range(9):
        costs.learn(2, 0.026)
    assert costs.cost(2) == pytest.approx(1.3, rel=0.05) and costs.plain_seconds == pytest.approx(0.020, rel=0.05)
    new = RoundCosts(2)
    for depth, seconds in [(0, 0.010)] * 9 + [(2, None)] + [(2, 0.026)] * 4 + [(0, None)] + [(0, 0.010)] * 4:
        new.learn(depth, seconds)
    assert new.cost(2) == pytest.approx(2.6, rel=0.05) and new.plain_seconds == pytest.approx(0.010, rel=0.05)


def test_only_allowed_depths() -> None:
    control, depths = DepthController([0, 3, 5]), set()
    for _ in range(300):
        depths.add(depth := control.next())
        control.learn(depth, depth, 0.01 + 0.0001 * depth)
    assert depths <= {0, 3, 5} and 5 in depths


def test_reasons() -> None:
    assert FixedDepth(0).reason == "Not drafting: the depth is fixed at 0."
    assert FixedDepth(1).reason == "Drafting 1 token a round: the depth is fixed."
    control = DepthController(range(9))
    assert control.reason == "Not enough rounds yet to say whether drafting pays."
    simulate(control, CPU, NEVER, 300, 0)
    plainly = r"Not drafting: a round of 1 draft takes 1\.[67] times a plain one and yields only 1\.[01] tokens\."
    assert re.fullmatch(plainly, control.reason)
    control = DepthController([0, 4])
    simulate(control, GPU, always(1.0), 600, 0)
    drafting = r"Drafting 4 tokens a round: a round takes 1\.[34] times a plain one and yields 5\.0 tokens\."
    assert re.fullmatch(drafting, control.reason)


def test_the_engine_says_why() -> None:
    assert mlx_mtp.load(drafter=None).depth_reason == "Not drafting: no drafter is loaded."
    assert mlx_mtp.load(depth=3).depth_reason == "Drafting 3 tokens a round: the depth is fixed."


# What is kept

GOOD = Profile([1.0, 1.2, 1.5], 0.05, [9.0, 7.0], [8.0, 6.0])


def test_what_was_learned_is_kept(tmp_path: Path) -> None:
    file = ProfileFile(tmp_path / "deep" / "depth.json", "pair one")
    control = DepthController(range(9), file)
    simulate(control, GPU, OFTEN, 800, 0)
    control.save()
    ProfileFile(file.path, "pair two").save(GOOD)
    again = DepthController(range(9), file)
    assert [again.costs.cost(d) for d in range(9)] == pytest.approx([control.costs.cost(d) for d in range(9)])
    assert again.long_run == control.long_run and again.reason.startswith("Drafting ")
    assert ProfileFile(file.path, "pair three").load(8) is None
    assert [path.name for path in file.path.parent.iterdir()] == ["depth.json"]


@pytest.mark.parametrize(
    "worse", [replace(GOOD, noise=0.3), replace(GOOD, noise=0.11), replace(GOOD, costs=[1.0, 0.9, 1.5]),
              replace(GOOD, costs=[1.0, 1.2, 32.0]), replace(GOOD, costs=None)],
)  # fmt: skip
def test_costs_of_a_bad_hour_are_not_kept(tmp_path: Path, worse: Profile) -> None:
    """Too noisy, noisier than what is kept, falling, absurd, or too few rounds: acceptance is kept all the same."""
    file, worse = ProfileFile(tmp_path / "depth.json", "pair"), replace(worse, accepted=[5.0, 4.0])
    file.save(GOOD)
    file.save(worse)
    assert file.load(2) == replace(GOOD, accepted=[5.0, 4.0])
    alone = ProfileFile(tmp_path / "depth.json", "another pair")
    alone.save(worse)
    found = alone.load(2)
    assert found is not None and found.accepted == [5.0, 4.0] and (found.costs is None or worse.noise == 0.11)


@pytest.mark.parametrize(
    "profile", [1, {}, {"costs": None}, {"costs": [1, "x"], "noise": 0, "verified": [1, 1], "accepted": [0, 0]},
                {"costs": None, "noise": 0, "verified": [1, 1], "accepted": [2, 0]},
                {"costs": None, "noise": 0, "verified": [1], "accepted": [1]},
                {"seconds": {"0": 0.011, "4": 0.357}, "seen": [1, 1], "stood": [1, 1]}],
)  # fmt: skip
def test_a_damaged_profile_is_not_used(tmp_path: Path, profile: object) -> None:
    file = ProfileFile(tmp_path / "depth.json", "pair")
    good = {"pair": asdict(GOOD)}
    damaged = [
        {"pair": profile}, {"version": 2, "profiles": {"pair": profile}}, {"version": 2, "profiles": [profile]},
        {"version": 1, "profiles": good}, good,
    ]  # fmt: skip
    for text in ("", "[]", "{", *map(json.dumps, damaged)):
        file.path.write_text(text)
        assert file.load(2) is None
        file.save(GOOD)
        assert file.load(2) == GOOD


# In the engine


@dataclass
class Recorded(DepthPolicy):
    """Depths by turns; what was asked of it and what it heard."""

    deepest: int = 2

    def __post_init__(self) -> None:
        self.asked: list[int] = []
        self.learned: list[tuple[int, float | None]] = []

    @property
    def reason(self) -> str:
        return "By turns."

    def next(self) -> int:
        self.asked.append((0, 0, 0, 1, 1, 2, 1)[len(self.asked) % 7])
        return self.asked[-1]

    def learn(self, depth: int, accepted: int, seconds: float | None) -> None:
        self.learned.append((depth, seconds))


def test_a_round_before_one_of_another_depth_is_not_timed() -> None:
    engine, policy = lively("ple", GOLDEN / "ple" / "assistant_tied"), Recorded()
    engine._decoder.policy = policy
    for _ in range(2):  # graphs are made in the first, and the rounds in which that happens are not timed either
        policy.asked, policy.learned = [], []
        engine.generate([5, 6, 7], max_tokens=60, ignore_end=True)
    assert [depth for depth, _ in policy.learned] == policy.asked[: len(policy.learned)]
    timed = [seconds is not None for _, seconds in policy.learned[3:-2]]
    alike = [one == other for one, other in zip(policy.asked[3:], policy.asked[4:], strict=False)][: len(timed)]
    assert any(timed) and not any(time and not same for time, same in zip(timed, alike, strict=True))


def test_loading_runs_no_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(Decoder, "prefill", lambda *_: pytest.fail("a round was run"))
    engine = mlx_mtp.load()
    assert engine.plain_seconds_per_token is None
    assert engine.depth_reason == "Not enough rounds yet to say whether drafting pays."


def test_the_engine_learns_and_keeps_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    engine = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=GOLDEN / "ple" / "assistant_tied")
    result = engine.generate([5, 6, 7], max_tokens=60, ignore_end=True)
    kept = json.loads((tmp_path / "depth.json").read_text())
    (profile,) = kept["profiles"].values()
    assert kept["version"] == 2 and set(profile) == {"costs", "noise", "verified", "accepted"}
    assert profile["verified"][0] > 0
    assert sum(result.stats.depth_counts.values()) == result.stats.rounds


def test_a_folder_that_cannot_be_written_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "file" / "below"))
    engine = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=GOLDEN / "ple" / "assistant_tied")
    assert engine.generate([5, 6, 7], max_tokens=10, ignore_end=True).tokens
