"""bench: prompts, turns, statistics, outputs that differ, the verdict, plans, energy."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp.drafters.lookup import Lookup
from mlx_mtp.errors import DataError, OptionError, PromptError
from mlx_mtp.generation.types import NEUTRAL, Sampling, Stats, acceptance
from mlx_mtp.loading import EMBEDDED, another_drafter, drafter_folder
from mlx_mtp.measuring import energy, machine, prompts, report
from mlx_mtp.measuring.arms import DEFAULT_DEPTHS, GEMMA, Plan, _depths, parted, sampling_name
from mlx_mtp.measuring.report import verdict
from mlx_mtp.measuring.turns import Difference, Job, Record, Timing, differences, ratio, take_turns

CATEGORIES = ["code", "edit", "prose", "chat", "JSON", "translation", "long context"]


def written(file: Path, *records: object) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


# Prompts


def test_the_built_in_set_has_every_category_and_can_be_asked() -> None:
    found = prompts.read_prompts()
    assert prompts.categories_of(found) == CATEGORIES
    assert all(len([one for one in found if one.category == name]) >= 2 for name in CATEGORIES)
    tokenizer = mlx_mtp.load(drafter=None).tokenizer
    lengths = {name: max(len(p.ids(tokenizer)) for p in found if p.category == name) for name in CATEGORIES}
    assert lengths["long context"] > 1000 > max(size for name, size in lengths.items() if name != "long context")
    assert [p.raw for p in found if p.category == "code"] == [True, True]


def test_json_in_any_case_is_never_a_prompt_itself(tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": "x"}, {"role": "user", "content": "two"}]
    rows = [{"prompt": "one"}, {"messages": said}]
    lines = written(tmp_path / "a.JSONL", *rows)
    listed, single = tmp_path / "b.Json", tmp_path / "c.json"
    listed.write_text(json.dumps(rows))
    single.write_text(json.dumps(rows[0]))
    packed = tmp_path / "d.jsonl.GZ"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    found = prompts.read_prompts([lines, listed, single, packed])
    texts = ["one", said]
    assert [(p.category, p.text) for p in found] == [*zip("aabbcdd", [*texts * 2, "one", *texts], strict=True)]
    assert found[3].where == f"{listed}, item 2"
    with pytest.raises(mlx_mtp.PromptError, match="b.Json, item 2: .*chat template"):
        found[3].ids(Strict())  # type: ignore[arg-type]
    single.write_text("{")
    with pytest.raises(mlx_mtp.DataError, match="c.json: expected JSON"):
        prompts.read_prompts([single])


class Strict:
    """A tokenizer whose template refuses everything."""

    has_chat_template = True

    def chat(self, messages: object, thinking: bool = False) -> list[int]:
        raise mlx_mtp.PromptError("no chat template takes this")


def test_published_files_are_read_as_they_are(tmp_path: Path) -> None:
    spec = written(tmp_path / "question.jsonl",
                   {"question_id": 81, "category": "writing", "turns": ["First?", "Second?"]},
                   {"question_id": 161, "category": "math", "turns": ["2 + 2?"]})  # fmt: skip
    human = tmp_path / "HumanEval.jsonl.gz"
    human.write_bytes(gzip.compress(b'{"task_id": "HumanEval/0", "prompt": "def f():\\n", "test": "x"}\n\n'))
    chat = written(tmp_path / "chats.jsonl", {"messages": [
        {"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you"},
    ]})  # fmt: skip
    plain = tmp_path / "essay.txt"
    plain.write_text("\nTwo lines\nof text.\n\n")
    found = prompts.read_prompts([spec, human, chat, plain])
    assert [(p.category, p.text) for p in found] == [
        ("writing", "First?"), ("math", "2 + 2?"), ("HumanEval", "def f():\n"),
        ("chats", [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"},
                   {"role": "user", "content": "Bye"}]),
        ("essay", "Two lines\nof text."),
    ]  # fmt: skip
    assert not any(p.raw for p in found) and all(p.raw for p in prompts.read_prompts([human, plain], raw=True))
    assert found[1].where == f"{spec}, line 2"


def test_prompts_are_chosen_evenly_and_by_category(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "category": "Even" if i % 2 == 0 else "odd"}
                                           for i in range(12)))  # fmt: skip
    assert [p.text for p in prompts.read_prompts([file], per_category=2)] == ["p0", "p6", "p1", "p7"]
    assert [p.text for p in prompts.read_prompts([file], ["even"], 3)] == ["p0", "p4", "p8"]
    with pytest.raises(OptionError, match=r"'Even', 'odd'.*'none'"):
        prompts.read_prompts([file], ["none", "odd"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "expected one JSON object"),
        ("[1]", "expected a JSON object, found list"),
        ('{"question": "a"}', "expected `turns`, `prompt` or `messages`, found 'question'"),
        ('{"turns": "a"}', "expected `turns` as a list"),
        ('{"turns": []}', "expected `turns` as a list"),
        ('{"turns": [3]}', "expected `turns` to be a string"),
        ('{"prompt": 3}', "expected `prompt` to be a string"),
        ('{"prompt": " "}', "found an empty text"),
        ('{"prompt": "a", "category": 1}', "expected `category` to be a string"),
        ('{"messages": []}', "expected `messages` to be a list of turns"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "with a turn of the user's"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "expected turns with the role"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    file = written(tmp_path / "bad.jsonl", {"prompt": "good"}, line)
    with pytest.raises(DataError) as error:
        prompts.read_prompts([file])
    assert words in str(error.value) and f"{file}, line 2" in str(error.value)


def test_a_checkpoint_is_asked_only_what_it_takes() -> None:
    class Bare:
        has_chat_template = False

    (chat, text) = prompts.read_prompts(categories=["chat"])
    assert not chat.fits(Bare()) and text.fits(Bare())  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="with a tokenizer"):
        text.ids(None)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        prompts.read_prompts([tmp_path / "none.txt"])
    for name, content in (("empty.jsonl", b"\n\n"), ("empty.txt", b"\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="at least one prompt"):
            prompts.read_prompts([tmp_path / name])
    cut = tmp_path / "cut.jsonl.gz"
    for content in (b"no gzip", gzip.compress(b'{"prompt": "a"}' * 99)[:30]):
        cut.write_bytes(content)
        with pytest.raises(DataError, match="whole gzip file"):
            prompts.read_prompts([cut])
    latin = tmp_path / "latin.txt"
    latin.write_bytes(b"one\n\xe9")
    with pytest.raises(DataError, match="line 2: expected UTF-8"):
        prompts.read_prompts([latin])


# Turns and statistics


def test_arms_take_turns_a_b_b_a_after_a_warm_up() -> None:
    ran: list[tuple[str, int]] = []
    rests: list[int] = []

    def arm(name: str) -> Any:
        def run(job: Job) -> Timing:
            ran.append((name, job.seed))
            return Timing([1, 2], 1.0, 0)

        return run

    arms = {"A": arm("A"), "B": arm("B")}
    booked = list(take_turns(arms, Job([1], 2, seed=7), 3, pause=lambda: rests.append(len(ran))))
    assert [name for name, _ in ran] == ["A", "B", *"ABBAAB"]
    assert [name for name, _ in booked] == list("ABBAAB")
    assert rests == [2, 4, 6]
    # Both arms of a turn draw with one seed, every turn with another.
    seeds = [seed for _, seed in ran[2:]]
    assert seeds[0] == seeds[1] == 7 and len(set(seeds)) == 3 and seeds[2] == seeds[3]


def record(seconds: np.ndarray, tokens: int = 11) -> Record:
    return Record([[Timing(list(range(tokens)), float(time), 0) for time in row] for row in seconds])


def test_the_ratio_and_its_interval_are_numpys() -> None:
    chance = np.random.default_rng(1)
    base = chance.gamma(50.0, 0.02, (6, 5)) * np.array([[1, 2, 3, 4, 5, 6]]).T
    mine = base * chance.normal(0.5, 0.05, base.shape)
    middle, low, high = ratio(record(mine), record(base))
    weights = np.median(base, 1)
    assert middle == pytest.approx(weights.sum() / (weights / np.median(base / mine, 1)).sum())
    # The same bootstrap, written another way and drawn otherwise.
    drawn = []
    for _ in range(4000):
        jobs = chance.integers(6, size=6)
        turns = chance.integers(5, size=(6, 5))
        pick = [np.take_along_axis(data[jobs], turns, 1) for data in (base, mine)]
        weights = np.median(pick[0], 1)
        drawn.append(weights.sum() / (weights / np.median(pick[0] / pick[1], 1)).sum())
    assert low == pytest.approx(np.quantile(drawn, 0.025), rel=0.02)
    assert high == pytest.approx(np.quantile(drawn, 0.975), rel=0.02)
    assert low < middle < high


def test_an_arm_is_as_fast_as_itself() -> None:
    seconds = np.random.default_rng(2).gamma(5.0, 1.0, (3, 4))
    assert ratio(record(seconds), record(seconds)) == (1.0, 1.0, 1.0)


def test_the_first_difference_is_found_with_its_logit_gap() -> None:
    target = mlx_mtp.load(drafter=None).target
    job = Job([2, 10, 20], 3)
    logits = target.logits(mx.array([[2, 10, 20]]))[0, -1]
    best, second = (int(i) for i in np.argsort(-np.array(logits))[:2])
    expected = Record([[Timing([best, 5, 6], 1.0, 0)]])
    assert differences(target, [job], expected, Record([[Timing([best, 5, 6], 1.0, 0)]])) == []
    other = Record([[Timing([best, 5, 6], 1.0, 0), Timing([second, 5, 6], 1.0, 0)]])
    (found,) = differences(target, [job], expected, other)
    assert (found.job, found.token) == (0, 0)
    assert found.gap == pytest.approx(float(logits[best] - logits[second]), rel=1e-4) and found.gap > 0
    assert str(Difference(0, 4, 0.00123)) == "parts at token 5, the two tokens' logits 1.2e-03 apart"


def test_acceptance_is_conditional_and_ends_where_nothing_tells() -> None:
    stats = [Stats(), Stats()]
    # Depths change, so that a position's drafts come from other rounds than the position before.
    stats[1].count([(1, 1), (1, 1)], tokens=5)
    stats[0].count([(3, 3), (3, 1), (3, 0)], tokens=8)
    assert stats[0].verified_by_position == [3, 2, 1] and stats[0].drafted_by_position == [3, 3, 3]
    assert acceptance(stats) == pytest.approx([4 / 5, 1 / 2, 1.0])
    assert acceptance([]) == []


# Plans, energy, machine


def test_plans() -> None:
    for wrong in ({"max_tokens": 1}, {"repeats": 0}, {"cool_down": -1.0}, {"cool_down": float("nan")}, {"seed": 2**64},
                  {"arms": ()}):
        with pytest.raises(OptionError, match="Expected"):
            Plan(**wrong)  # type: ignore[arg-type]
    assert parted("lookup@auto") == ("lookup", "auto") and parted("/a@b/c@3") == ("/a@b/c", 3)
    assert parted("org/name") == ("org/name", None)
    assert sampling_name(GEMMA.over(NEUTRAL)) == "T = 1, top-k 64, top-p 0.95"
    assert sampling_name(Sampling(temperature=0.0, top_k=5, repetition_penalty=1.2).over(NEUTRAL)) == (
        "T = 0, repetition penalty 1.2"
    )


def test_the_usual_depths_stop_where_the_drafter_does() -> None:
    class Short(Lookup):
        max_depth = 3

    assert list(_depths(Plan(), None, Lookup())) == list(DEFAULT_DEPTHS)
    assert list(_depths(Plan(), None, Short())) == [2, 3, "auto"]
    assert list(_depths(Plan(depths=(1, 8)), None, Short())) == [1, 8]
    assert list(_depths(Plan(), "auto", Short())) == ["auto"]


def test_second_drafters_are_loaded_by_name() -> None:
    assert isinstance(another_drafter(None, "lookup"), Lookup) and another_drafter(None, "none") is None
    assert drafter_folder(None, "auto") == EMBEDDED / "assistant" and drafter_folder(None, "lookup") is None
    assert not isinstance(another_drafter(None, "assistant"), Lookup)


class Monitor:
    """Stands in for AppleEnergyMonitor: every window takes 2 J on the CPU and 3 J on the GPU, DRAM tells nothing."""

    def begin_window(self, key: str) -> None:
        self.open = key

    def end_window(self, key: str) -> Any:
        assert key == self.open

        class Used:
            cpu_total_mj, gpu_mj, dram_mj = 2000, 3000, None

        return Used()


def test_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy.EnergyMeter(Monitor()).of(lambda: "done") == ("done", 5.0)
    monkeypatch.setattr(sys, "platform", "linux")
    assert energy.open_meter() == (None, "Energy is not measured: zeus-apple-silicon reads it on Apple silicon only.")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", None)
    meter, why = energy.open_meter()
    assert meter is None and "pip install zeus-apple-silicon" in str(why)
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", SimpleNamespace(AppleEnergyMonitor=Monitor))
    meter, why = energy.open_meter()
    assert why is None and meter is not None and meter.of(lambda: 1) == (1, 5.0)

    def broken() -> Monitor:
        raise RuntimeError("IOReport denied")

    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", SimpleNamespace(AppleEnergyMonitor=broken))
    meter, why = energy.open_meter()
    assert meter is None and "does not run here (IOReport denied)" in str(why)


def test_power_source() -> None:
    assert machine.drawn_from("Now drawing from 'Battery Power'\n -InternalBattery-0 93%") == "Battery Power"
    assert machine.drawn_from("") is None


def row(arm: str, speed: float, stock: tuple[float, float | None, float | None] | None, **more: Any) -> dict[str, Any]:
    def over(found: tuple[float, float | None, float | None] | None) -> dict[str, float | None] | None:
        return None if found is None else dict(zip(("ratio", "low", "high"), found, strict=True))

    speeds = {"median": speed, "low": speed, "high": speed}
    return {"arm": arm, "tokens_per_second": speeds, "over_stock": over(stock), "over_plain": over(more.get("plain"))}


ONE = (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("arms", "sentence"),
    [
        ([row("stock", 100, ONE), row("plain", 110, (1.1, 1.0, 1.2)), row("mtp@2", 200, (2.0, 1.8, 2.25))],
         "At T = 0 mtp@2 is fastest, 2.00 times stock mlx-lm [1.80, 2.25]."),
        ([row("stock", 100, ONE), row("plain", 101, (1.01, 0.9, 1.2)), row("mtp@2", 90, (0.9, 0.8, 1.1))],
         "At T = 0 nothing is faster than stock mlx-lm beyond chance (the best is plain, 1.01 times [0.90, 1.20])."),
        ([row("stock", 100, ONE), row("plain", 120, (1.2, None, None))], "At T = 0 plain is fastest, 1.20 times stock "
         "mlx-lm."),
        ([row("plain", 100, None, plain=ONE), row("mtp@2", 95, None, plain=(0.95, 0.9, 0.99)),
          row("lookup@auto", 100, None, plain=(1.004, 0.99, 1.01))],
         "At T = 0 nothing is faster than plain decoding beyond chance (the best is lookup@auto, 1.00 times "
         "[0.99, 1.01])."),
        ([row("mtp@2", 95, None), row("mtp@4", 99.5, None)], "At T = 0 mtp@4 decoded 99.5 tokens/s."),
        ([row("stock", 100, ONE)], "At T = 0 stock decoded 100.0 tokens/s."),
    ],
)  # fmt: skip
def test_the_verdict_is_one_sentence(arms: list[dict[str, Any]], sentence: str) -> None:
    sampling = {"name": "T = 0", "groups": [{"arms": arms}, {"arms": []}]}
    assert verdict([sampling]) == sentence
    warm = {"name": "T = 1", "groups": [{"arms": [row("mtp@2", 95, None)]}]}
    assert verdict([sampling, warm]) == sentence[:-1] + "; at T = 1 mtp@2 decoded 95.0 tokens/s."
    none = "No turn was finished, so there is nothing to compare."
    assert verdict([{"name": "T = 0", "groups": []}]) == verdict([]) == none


def test_scattered_times_are_noted() -> None:
    """Of greedy runs at one depth only: elsewhere the work differs from run to run."""
    def scatter(seconds: list[float], arm: str = "plain", temperature: float = 0.0) -> float:
        runs = [Timing([1, 2], time, 0) for time in seconds]
        job = Job([1], 2, Sampling(temperature=temperature).over(NEUTRAL))
        arms = {"plain": SimpleNamespace(depth=0), "mtp@auto": SimpleNamespace(depth="auto")}
        measured = SimpleNamespace(job=job, timings={arm: runs})
        bench: Any = SimpleNamespace(results={"T": [measured]}, lineup=SimpleNamespace(arms=arms))
        return report._scatter(bench)

    times = [1.0, 1.1, 1.2, 1.4, 1.5]
    low, middle, high = np.quantile(times, (0.25, 0.5, 0.75), method="weibull")
    assert scatter(times) == pytest.approx((high - low) / middle)
    assert scatter(times[:3]) == scatter(times, "mtp@auto") == scatter(times, temperature=1.0) == 0.0
