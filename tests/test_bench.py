"""bench: prompts, turns, statistics, outputs that differ, the verdict, plans, energy."""

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN

import mlx_mtp
from mlx_mtp.errors import DataError, OptionError, PromptError
from mlx_mtp.generation.types import NEUTRAL, Sampling, Stats, acceptance
from mlx_mtp.measuring import machine, prompts
from mlx_mtp.measuring.configurations import GEMMA, Plan, name_and_depth, sampling_name
from mlx_mtp.measuring.engines import DecodeJob, TimedRun
from mlx_mtp.measuring.report import verdict
from mlx_mtp.measuring.turns import Runs, difference, fair_turns

CATEGORIES = ["code", "edit", "prose", "chat", "JSON", "translation", "long context"]


def written(file: Path, *records: object) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


# Prompts


def test_the_built_in_set_has_every_category_and_can_be_asked(embedded: mlx_mtp.Engine) -> None:
    found = prompts.read_prompts()
    assert list(dict.fromkeys(prompt.category for prompt in found)) == CATEGORIES
    assert all(len([one for one in found if one.category == name]) >= 2 for name in CATEGORIES)
    lengths = {name: max(len(p.ids(embedded.tokenizer)) for p in found if p.category == name) for name in CATEGORIES}
    assert lengths["long context"] > 1000 > max(size for name, size in lengths.items() if name != "long context")
    assert [p.raw for p in found if p.category == "code"] == [True, True]


class Strict:
    """A tokenizer whose template refuses everything."""

    has_chat_template = True

    def chat(self, messages: object, thinking: bool = False, tools: object = None) -> list[int]:
        raise PromptError("no chat template takes this")


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
    with pytest.raises(PromptError, match="b.Json, item 2: .*chat template"):
        found[3].ids(Strict())  # type: ignore[arg-type]
    assert not found[3].fits(SimpleNamespace(has_chat_template=False)) and found[2].fits(None)  # type: ignore[arg-type]
    with pytest.raises(PromptError, match="no tokenizer"):
        found[0].ids(None)


def test_published_files_are_read_as_they_are(tmp_path: Path) -> None:
    spec = written(tmp_path / "question.jsonl",
                   {"question_id": 81, "category": "writing", "turns": ["First?", "Second?"]},
                   {"question_id": 161, "category": "math", "turns": ["2 + 2?"]})  # fmt: skip
    human = tmp_path / "HumanEval.jsonl.gz"
    human.write_bytes(gzip.compress(b'{"task_id": "HumanEval/0", "prompt": "def f():\\n", "test": "x"}\n\n'))
    turns = [{"role": role, "content": text} for role, text in
             (("user", "Hello"), ("assistant", "Hi"), ("user", "Bye"), ("assistant", "See you"))]  # fmt: skip
    chat = written(tmp_path / "chats.jsonl", {"messages": turns})
    plain = tmp_path / "essay.txt"
    plain.write_text("\nTwo lines\nof text.\n\n")
    found = prompts.read_prompts([spec, human, chat, plain])
    assert [(p.category, p.text) for p in found] == [
        ("writing", "First?"), ("math", "2 + 2?"), ("HumanEval", "def f():\n"), ("chats", turns[:3]),
        ("essay", "Two lines\nof text."),
    ]  # fmt: skip
    assert not any(p.raw for p in found) and found[1].where == f"{spec}, line 2"
    assert [p.raw for p in prompts.read_prompts([human, chat, plain], raw=True)] == [True, False, True]


def test_prompts_are_chosen_evenly_and_by_category(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", *({"prompt": f"p{i}", "category": "Even" if i % 2 == 0 else "odd"}
                                           for i in range(12)))  # fmt: skip
    assert [p.text for p in prompts.read_prompts([file], per_category=2)] == ["p0", "p6", "p1", "p7"]
    assert [p.text for p in prompts.read_prompts([file], ["even"], 3)] == ["p0", "p4", "p8"]
    with pytest.raises(OptionError, match=r"'none'.*'Even', 'odd'"):
        prompts.read_prompts([file], ["none", "odd"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "JSON object"),
        ('{"question": "a"}', "not 'question'"),
        ('{"turns": []}', "`turns` is no list"),
        ('{"turns": [3]}', "`prompt`"),
        ('{"prompt": " "}', "empty text"),
        ('{"prompt": "a", "category": 1}', "`category`"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "no turn of the user's"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    file = written(tmp_path / "bad.jsonl", {"prompt": "good"}, line)
    with pytest.raises(DataError) as error:
        prompts.read_prompts([file])
    assert words in str(error.value) and f"{file}, line 2" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "No such file"), ("empty.jsonl", b"\n\n", "no prompt"), ("empty.txt", b"\n", "no prompt"),
        ("a.jsonl.gz", b"no gzip", "whole gzip file"), ("latin.txt", b"one\n\xe9", "line 2"), ("c.json", b"{", "JSON"),
        ("cut.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 99, mtime=0)[:30], "whole gzip file"),
    ],
)  # fmt: skip
def test_files_that_are_none(name: str, content: bytes | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        prompts.read_prompts([tmp_path / name])


# Turns and statistics


def test_turns_go_forth_and_back() -> None:
    assert list(fair_turns("AB", 3)) == [(0, "A"), (0, "B"), (1, "B"), (1, "A"), (2, "A"), (2, "B")]
    seeds = [[DecodeJob([1], 2, seed=seed).of_turn(turn).seed for turn in range(3)] for seed in (7, 8)]
    assert seeds[0][0] == 7 and len({*seeds[0], *seeds[1]}) == 6  # every turn and every job draws otherwise


def runs(seconds: np.ndarray) -> Runs:
    return Runs([[TimedRun(list(range(11)), float(time)) for time in row] for row in seconds])


def test_the_ratio_and_its_interval_are_numpys() -> None:
    chance = np.random.default_rng(1)
    base = chance.gamma(50.0, 0.02, (6, 5)) * np.array([[1, 2, 3, 4, 5, 6]]).T
    mine = base * chance.normal(0.5, 0.05, base.shape)
    middle, low, high = runs(mine).ratio(runs(base))
    weights = np.median(base, 1)
    assert middle == pytest.approx(weights.sum() / (weights / np.median(base / mine, 1)).sum())
    # The same bootstrap, written another way and drawn otherwise: 4,000 times at once.
    jobs, turns = chance.integers(6, size=(4000, 6, 1)), chance.integers(5, size=(4000, 6, 5))
    theirs, ours = base[jobs, turns], mine[jobs, turns]
    weights = np.median(theirs, 2)
    drawn = weights.sum(1) / (weights / np.median(theirs / ours, 2)).sum(1)
    assert [low, high] == pytest.approx(list(np.quantile(drawn, (0.025, 0.975))), rel=0.02)
    assert low < middle < high
    assert runs(base).ratio(runs(base)) == (1.0, 1.0, 1.0)


def test_the_first_difference_is_found_with_its_logit_gap() -> None:
    target = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=None).target
    job = DecodeJob([2, 10, 20], 3)
    logits = target.logits(mx.array([[2, 10, 20]]))[0, -1]
    best, second = (int(i) for i in np.argsort(-np.array(logits))[:2])
    same, other = TimedRun([best, 5, 6], 1.0), TimedRun([second, 5, 6], 1.0)
    assert difference(target, job, [same], [same]) is None
    found = difference(target, job, [same], [same, other])
    assert found is not None and found.token == 0
    assert found.gap == pytest.approx(float(logits[best] - logits[second]), rel=1e-4) and found.gap > 0
    # With a penalty the logits are no measure.
    penalised = DecodeJob([2, 10, 20], 3, Sampling(repetition_penalty=1.1).over(NEUTRAL))
    found = difference(target, penalised, [same], [other])
    assert found is not None and np.isnan(found.gap)


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
                  {"names": ()}):
        with pytest.raises(OptionError):
            Plan(**wrong)  # type: ignore[arg-type]
    assert name_and_depth("lookup@auto") == ("lookup", "auto") and name_and_depth("/a@b/c@3") == ("/a@b/c", 3)
    assert name_and_depth("org/name") == ("org/name", None)
    assert sampling_name(GEMMA.over(NEUTRAL)) == "T = 1, top-k 64, top-p 0.95"
    assert sampling_name(Sampling(temperature=0.0, top_k=5, repetition_penalty=1.2).over(NEUTRAL)) == (
        "T = 0, repetition penalty 1.2"
    )


class Monitor:
    """Stands in for AppleEnergyMonitor: every window takes 2 J on the CPU and 3 J on the GPU, DRAM tells nothing."""

    def begin_window(self, key: str) -> None:
        self.open = key

    def end_window(self, key: str) -> Any:
        assert key == self.open
        return SimpleNamespace(cpu_total_mj=2000, gpu_mj=3000, dram_mj=None)


def test_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = mock.Mock(side_effect=RuntimeError("IOReport denied"))
    monkeypatch.setattr(sys, "platform", "linux")
    assert machine.open_meter() == (None, "Energy is not measured: zeus-apple-silicon reads it on Apple silicon only.")
    monkeypatch.setattr(sys, "platform", "darwin")
    for package, words in ((None, "pip install zeus-apple-silicon"),
                           (SimpleNamespace(AppleEnergyMonitor=broken), "does not run here (IOReport denied)")):
        monkeypatch.setitem(sys.modules, "zeus_apple_silicon", package)
        meter, why = machine.open_meter()
        assert meter is None and words in str(why)
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", SimpleNamespace(AppleEnergyMonitor=Monitor))
    meter, why = machine.open_meter()
    assert why is None and meter is not None and meter.of(lambda: 1) == (1, 5.0)


def row(name: str, speed: float, stock: Any = None, plain: Any = None) -> dict[str, Any]:
    over = [found and dict(zip(("ratio", "low", "high"), found, strict=True)) for found in (stock, plain)]
    return {"arm": name, "tokens_per_second": {"median": speed}, "over_stock": over[0], "over_plain": over[1]}


ONE = (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([row("stock", 100, ONE), row("plain", 110, (1.1, 1.0, 1.2)), row("mtp@2", 200, (2.0, 1.8, 2.25))],
         "At T = 0 mtp@2 is fastest, 2.00 times stock mlx-lm [1.80, 2.25]."),
        ([row("stock", 100, ONE), row("plain", 101, (1.01, 0.9, 1.2)), row("mtp@2", 90, (0.9, 0.8, 1.1))],
         "At T = 0 nothing is faster than stock mlx-lm beyond chance (the best is plain, 1.01 times [0.90, 1.20])."),
        ([row("stock", 100, ONE), row("plain", 120, (1.2, None, None))], "At T = 0 plain is fastest, 1.20 times stock "
         "mlx-lm."),
        ([row("plain", 100, plain=ONE), row("lookup@auto", 100, plain=(1.004, 0.99, 1.01))],
         "At T = 0 nothing is faster than plain decoding beyond chance (the best is lookup@auto, 1.00 times "
         "[0.99, 1.01])."),
        ([row("mtp@2", 95), row("mtp@4", 99.5)], "At T = 0 mtp@4 decoded 99.5 tokens/s."),
        ([row("stock", 100, ONE)], "At T = 0 stock decoded 100.0 tokens/s."),
    ],
)  # fmt: skip
def test_the_verdict_is_one_sentence(rows: list[dict[str, Any]], sentence: str) -> None:
    sampling = {"name": "T = 0", "groups": [{"arms": rows}, {"arms": []}]}
    assert verdict([sampling]) == sentence
    warm = {"name": "T = 1", "groups": [{"arms": [row("mtp@2", 95)]}]}
    assert verdict([sampling, warm]) == sentence[:-1] + "; at T = 1 mtp@2 decoded 95.0 tokens/s."
    none = "No turn was finished, so there is nothing to compare."
    assert verdict([{"name": "T = 0", "groups": []}]) == verdict([]) == none
