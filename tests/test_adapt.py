"""Fine-tuning a drafter: what is asked, learned, kept and replaced; only the measured gain is given from outside."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from families import config_of, written
from thinking import PLAIN_TEMPLATE, TOKENS, write_tokenizer

import mlx_mtp
from mlx_mtp.cli import app
from mlx_mtp.training import adapt as library
from mlx_mtp.training.adapt import Adapting, NotBetter, Report
from mlx_mtp.training.corpus import Document
from mlx_mtp.training.pipeline import Stage

OPTIONS: dict[str, Any] = {"prompts": 9, "tokens": 8, "steps": 2, "batch_size": 1, "length": 16, "drafts": 2,
                           "depth": 2, "rehearsal": 0.0, "learning_rate": 1e-2}  # fmt: skip
GREEDY = mlx_mtp.Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target with a tokenizer, parallel heads for it, and nine questions."""
    place = tmp_path_factory.mktemp("adapt")
    shutil.copytree(GOLDEN / "ple" / "target", place / "target", copy_function=shutil.copyfile)
    write_tokenizer(place / "target", [*TOKENS, *(f"w{i:03}," for i in range(len(TOKENS), 128))], PLAIN_TEMPLATE)
    written(place / "parallel", config_of("parallel_heads", 32, 128, 2))
    lines = [json.dumps({"prompt": f"w{i:03},w{i + 1:03},"}) for i in range(30, 39)]
    (place / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return place


def measured(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """Tokens per round are these, one after the other."""
    left = iter(values)

    def measure(name: str, *_: object) -> Generator[Stage, None, float]:
        yield Stage(name, 1, 1)
        return next(left)

    monkeypatch.setattr(library, "_measure", measure)


def run(folder: Path, out: Path, drafter: str | Path | None = None, **changes: Any) -> tuple[list[str], Report]:
    """Names of the stages as they came, each once, and the report."""
    stages = library.adapt(folder / "target", drafter or folder / "parallel", out, [str(folder / "questions.jsonl")],
                           Adapting(**OPTIONS | changes))  # fmt: skip
    names: list[str] = []
    while True:
        try:
            names.append(next(stages).name)
        except StopIteration as end:
            return list(dict.fromkeys(names)), end.value


def test_a_better_drafter_is_written_and_the_targets_words_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 1.0, 1.5)
    names, report = run(folder, tmp_path / "new")
    assert names == ["before", "replies", "adapt", "after"] and report == Report(1.0, 1.5, 2, 2)
    old, new = (mx.load(str(place / "model.safetensors")) for place in (folder / "parallel", tmp_path / "new"))
    assert set(old) == set(new) and max(mx.abs(old[name] - new[name]).max().item() for name in old) > 1e-4
    rows = [json.loads(line) for line in (tmp_path / "new.work" / "replies.jsonl").read_text().splitlines()]
    assert [row["temperature"] for row in rows] == [0, 1] * 3 + [0]  # nine questions, the first and the last held out
    plain = mlx_mtp.load(folder / "target", drafter=None)
    for row in rows[::2]:
        assert row["reply"] == plain.generate(row["prompt"], max_tokens=8, sampling=GREEDY).tokens
    adapted = mlx_mtp.load(folder / "target", drafter=tmp_path / "new", depth=2)
    assert adapted.generate([30, 31], max_tokens=20).tokens == plain.generate([30, 31], max_tokens=20).tokens


def test_one_that_is_no_better_replaces_nothing_and_asks_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 1.0, 1.5, 1.0, 2.0, 1.8)
    run(folder, tmp_path / "new")
    kept = (tmp_path / "new" / "model.safetensors").read_bytes()
    replies = (tmp_path / "new.work" / "replies.jsonl").read_bytes()
    with pytest.raises(NotBetter, match="more than the 2.00 .* found 1.80 on 2 held-out prompts"):
        run(folder, tmp_path / "new", seed=4)  # better than its source, but not than what stands there
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == kept
    assert (tmp_path / "new.work" / "replies.jsonl").read_bytes() == replies
    assert (tmp_path / "new.work" / "candidate" / "model.safetensors").read_bytes() != kept


def test_tokens_per_round_are_counted_over_all_prompts(folder: Path) -> None:
    engine = mlx_mtp.load(folder / "target", drafter="lookup", depth=2)
    prompts = [[30, 31, 30, 31], [40, 41, 42]]
    stages, found = library._measure("before", engine, prompts, Adapting(**OPTIONS)), 0.0
    try:
        seen = []
        while True:
            seen.append(next(stages))
    except StopIteration as end:
        found = end.value
    stats = [engine.generate(prompt, max_tokens=8, sampling=GREEDY).stats for prompt in prompts]
    assert found == sum(s.tokens - 1 for s in stats) / sum(s.rounds for s in stats) >= 1.0
    assert seen == [Stage("before", 1, 2), Stage("before", 2, 2)]


def test_a_reply_cut_off_by_a_kill_is_dropped_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    assert library._known(file) == {}
    whole = json.dumps({"prompt": [1, 2], "temperature": 0, "tokens": 8, "reply": [3]})
    file.write_text(f'{whole}\n{{"prompt": [1, 2], "tem')
    assert library._known(file) == {json.dumps([[1, 2], 0, 8]): [3]}
    assert file.read_text() == whole + "\n"
    file.write_text(f"nonsense\n{whole}\n")
    with pytest.raises(mlx_mtp.DataError, match="line 1: expected a reply, found 'nonsense'"):
        library._known(file)


class Words:
    """A tokenizer whose ids are the lengths of words; a conversation is its roles."""

    def encode(self, text: str) -> list[int]:
        return [len(word) for word in text.split()]

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        return [len(message["role"]) for message in messages]


def test_prompts_are_conversations_up_to_the_reply_and_openings_of_texts() -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = " ".join("x" * (i + 1) for i in range(40))
    documents = [Document("m", messages=said), Document("m", messages=[*said, *said]), Document("m", text=text),
                 Document("m", text="")]  # fmt: skip
    found = library.prompts_of(iter(documents), Words(), Adapting(**OPTIONS))
    # A third of every 16 words; no piece is begun whose half is not there.
    assert found == [[4], [4, 9, 4], [1, 2, 3, 4, 5], [17, 18, 19, 20, 21]]
    fewer = library.prompts_of(iter(documents * 3), Words(), Adapting(**OPTIONS | {"prompts": 4}))
    assert fewer == [[4], [17, 18, 19, 20, 21], [1, 2, 3, 4, 5], [4, 9, 4]]  # every third
    with pytest.raises(mlx_mtp.DataError, match="at least 4 prompts in the data, found 1"):
        library.prompts_of(iter(documents[:1]), Words(), Adapting(**OPTIONS))


def test_rehearsal_is_the_asked_share_of_what_is_learned(folder: Path, tmp_path: Path) -> None:
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    (tmp_path / "other.txt").write_text("w050,w051," * 400)
    options = Adapting(**OPTIONS | {"rehearsal": 0.25, "rehearsal_data": (str(tmp_path),)})
    own = [[60] * 30 for _ in range(10)]
    learned, watched = library._rows(own, load_tokenizer(folder / "target"), options)
    assert learned.dtype == watched.dtype == np.int32
    assert (learned[:270] == 60).all() and len(learned) == 360 and not (learned[270:] == 60).any()
    assert watched.tolist() == learned[:270].tolist()  # the last reply alone is shorter than two rows


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"prompts": 3}, "prompts of at least 4"), ({"depth": 0}, "depth of at least 1"),
     ({"rehearsal": 1.0}, "rehearsal share"), ({"label_share": 1.5}, "label share"), ({"steps": -1}, "steps")],
)  # fmt: skip
def test_impossible_options(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(mlx_mtp.OptionError, match=words):
        Adapting(**OPTIONS | wrong)


def test_what_cannot_be_adapted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mlx_mtp.OptionError, match="with weights, found 'lookup'"):
        run(folder, tmp_path / "new", drafter="lookup")
    shutil.copytree(folder / "target", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(mlx_mtp.OptionError, match="target with a tokenizer"):
        list(library.adapt(tmp_path / "bare", folder / "parallel", tmp_path / "new", [], Adapting(**OPTIONS)))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("after", "code"), [(1.5, 0), (1.0, 2)])
def test_the_command(
    after: float, code: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    measured(monkeypatch, 1.25, after)
    given = {"model": folder / "target", "drafter": folder / "parallel", "data": folder / "questions.jsonl",
             "out": tmp_path / "new", "max-tokens": OPTIONS["tokens"], **OPTIONS}  # fmt: skip
    del given["tokens"]
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    monkeypatch.setattr(sys, "argv", ["mlx-mtp", "adapt", *words])
    with pytest.raises(SystemExit) as end:
        app.main()
    out, err = capsys.readouterr()
    assert int(end.value.code or 0) == code and "Traceback" not in err
    if code:
        assert out == "" and "nothing was replaced" in err and not (tmp_path / "new").exists()
    else:
        assert "on 2 held-out prompts at depth 2: 1.25 before, 1.50 after (+20%)" in out
        assert (tmp_path / "new" / "config.json").exists()
