"""Fine-tuning a drafter: what is asked, learned, kept and replaced; only the measured gain is given from outside."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Generator, Sequence
from dataclasses import replace
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
from mlx_mtp.training.data import Document, read_documents
from mlx_mtp.training.self_generated import Question, Replies
from mlx_mtp.training.stages import Stage

OPTIONS: dict[str, Any] = {"prompts": 9, "tokens": 8, "steps": 2, "batch_size": 1, "length": 16, "drafts": 2,
                           "depth": 2, "rehearsal": 0.0, "learning_rate": 1e-2}  # fmt: skip
GREEDY = mlx_mtp.Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target has no tokenizer, parallel heads for it, and nine questions."""
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
    with pytest.raises(NotBetter, match="makes 1.80 tokens per round on 2 held-out prompts, the one there is 2.00"):
        run(folder, tmp_path / "new", learning_rate=1e-3)  # better than its source, but not than what stands there
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == kept
    assert (tmp_path / "new.work" / "replies.jsonl").read_bytes() == replies
    assert (tmp_path / "new.work" / "candidate" / "model.safetensors").read_bytes() != kept


def moved(source: Path, place: Path) -> Path:
    """The same checkpoint with one weight moved."""
    shutil.copytree(source, place, copy_function=shutil.copyfile)
    weights = mx.load(str(place / "model.safetensors"))
    name = next(name for name in sorted(weights) if name.endswith("norm.weight"))
    mx.save_safetensors(str(place / "model.safetensors"), {**weights, name: weights[name] * 1.5})
    return place


@pytest.mark.parametrize("change", ["path", "drafter", "depth"])
def test_replies_are_those_that_an_empty_folder_would_have_got(
    change: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a first run with another drafter or option; the same files in another place are the same."""
    measured(monkeypatch, *[1.0, 1.5] * 3)
    target, drafter, options = folder / "target", folder / "parallel", dict(OPTIONS)
    data = [str(folder / "questions.jsonl")]
    list(library.adapt(target, drafter, tmp_path / "used", data, Adapting(**options)))
    first = (tmp_path / "used.work" / "replies.jsonl").read_text()
    shutil.rmtree(tmp_path / "used")
    if change == "path":
        target = shutil.copytree(target, tmp_path / "other")
    elif change == "drafter":
        drafter = moved(drafter, tmp_path / "other")
    else:
        options |= {"depth": 1}
    for out in ("used", "empty"):
        list(library.adapt(target, drafter, tmp_path / out, data, Adapting(**options)))
    used, empty = ((tmp_path / f"{out}.work" / "replies.jsonl").read_text() for out in ("used", "empty"))
    assert used == (first if change == "path" else first + empty)
    new = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("used", "empty")]
    assert new[0] == new[1]


def test_a_reply_is_followed_by_the_token_that_ended_it(folder: Path) -> None:
    """Of several stop tokens the one the target wrote: where it stops among its own 40 tokens, whichever that is."""
    engine = mlx_mtp.load(folder / "target", drafter=folder / "parallel", depth=2)
    options = Adapting(**OPTIONS | {"tokens": 40})
    written_on = engine.generate([30, 31], max_tokens=40, sampling=GREEDY, ignore_end=True).tokens
    for stop in dict.fromkeys(written_on):
        engine.stop_tokens = frozenset({stop, *(token for token in range(128) if token not in written_on)})
        result = engine.generate([30, 31], max_tokens=40, sampling=GREEDY)
        assert (result.stop_token, result.finish_reason) == (stop, "stop") and stop not in result.tokens
        replies = library._replies(Memory(), "a", engine, [[30, 31]], options)
        (row,) = finished(replies)
        assert row == [30, 31, *written_on[: written_on.index(stop) + 1]]
    engine.stop_tokens = frozenset()
    assert engine.generate([30, 31], max_tokens=40, sampling=GREEDY).stop_token is None


class Memory(Replies):
    """Replies without a file."""

    def __init__(self) -> None:
        self._known = {}

    def add(self, question: Question, reply: Sequence[int]) -> None:
        """Forgotten at once."""


def finished(stages: Generator[Stage, None, Any]) -> Any:
    """What a generator of stages returns."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return end.value


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


QUESTION = Question(source="a", prompt=(1, 2), temperature=0, tokens=8, seed=3)
OTHERS = [replace(QUESTION, **change) for change in (
    {"source": "b"}, {"prompt": (1,)}, {"temperature": 1}, {"tokens": 9}, {"seed": 4})]  # fmt: skip


def test_a_reply_answers_exactly_the_question_that_it_was_given_to(tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    Replies(file).add(QUESTION, [3, 4])
    kept = Replies(file)
    assert kept.get(QUESTION) == [3, 4] and not any(kept.get(other) for other in OTHERS)
    for other in OTHERS:
        kept.add(other, [5])
    assert Replies(file).get(QUESTION) == [3, 4] and all(Replies(file).get(other) == [5] for other in OTHERS)
    row = {name: value for name, value in json.loads(file.read_text().splitlines()[0]).items() if name != "source"}
    file.write_text(json.dumps(row) + "\n")  # from before replies said whose they are
    assert Replies(file).get(QUESTION) is None and file.read_text() == json.dumps(row) + "\n"


def test_replies_survive_a_kill_at_any_byte(tmp_path: Path) -> None:
    """Whatever of the second line is on the disk: the first reply is kept, and what is added afterwards too."""
    file = tmp_path / "replies.jsonl"
    Replies(file).add(QUESTION, [3])
    first = file.read_bytes()
    Replies(file).add(OTHERS[0], [4])
    whole = file.read_bytes()
    for size in range(len(first), len(whole) + 1):
        file.write_bytes(whole[:size])
        found = Replies(file)
        assert found.get(QUESTION) == [3] and found.get(OTHERS[0]) == ([4] if size >= len(whole) - 1 else None)
        found.add(OTHERS[1], [5])
        again = Replies(file)
        assert again.get(QUESTION) == [3] and again.get(OTHERS[1]) == [5]


@pytest.mark.parametrize("damage", [b"nonsense", b'{"prompt": [1]', b"\xff", b"[]", b'{"reply": [1]}', b"\0\0"])
def test_a_damaged_reply_is_named(damage: bytes, tmp_path: Path) -> None:
    file = tmp_path / "replies.jsonl"
    Replies(file).add(QUESTION, [3])
    whole = file.read_bytes()
    for content in (whole + damage + b"\n", whole + damage + b"\n" + whole):
        file.write_bytes(content)
        with pytest.raises(mlx_mtp.DataError, match="replies.jsonl, line 2: this is no reply"):
            Replies(file)
        assert file.read_bytes() == content


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
    with pytest.raises(mlx_mtp.DataError, match="hold 1 prompts and at least 4"):
        library.prompts_of(iter(documents[:1]), Words(), Adapting(**OPTIONS))


def test_rehearsal_is_the_asked_share_of_what_is_learned(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("w050,w051," * 400)
    options = Adapting(**OPTIONS | {"rehearsal": 0.25})
    own = [[60] * 30 for _ in range(10)]
    engine = mlx_mtp.load(folder / "target", drafter=None)
    other = library._replay(list(read_documents([str(tmp_path)])), engine, own, options)
    learned, watched = library._rows(own, other, options)
    assert learned.dtype == watched.dtype == np.int32
    assert (learned[:270] == 60).all() and len(learned) == 360 and not (learned[270:] == 60).any()
    assert watched.tolist() == learned[:270].tolist()  # the last reply alone is shorter than two rows


STRICT = PLAIN_TEMPLATE.replace(
    "{% for", "{% if messages[0].content == 'w031,' %}{{ raise_exception('not this one') }}{% endif %}"
              "{% if messages[0].content == 'w032,' %}{{ messages[0].content + 3 }}{% endif %}{% for", 1
)  # fmt: skip
GOOD = ['{"prompt": "w030,"}'] * 8


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"prompt": "w031,"}', "chat template .*not this one"), ('{"prompt": "w032,"}', "chat template"),
     ('{"prompt": "' + "w030," * 600 + '"}', "room for [0-9]+ beside"),
     ('{"prompt": " "}', "prompt of the user"),
     ('{"messages": [{"role": "assistant", "content": "x"}]}', "prompt of the user"), ("{", "one JSON object"),
     ('{"messages": [{"role": "tool", "content": "x"}]}', "role")],
)  # fmt: skip
def test_all_prompts_are_checked_before_any_is_answered(
    line: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder / "target", tmp_path / "target", copy_function=shutil.copyfile)
    write_tokenizer(tmp_path / "target", [*TOKENS, *(f"w{i:03}," for i in range(len(TOKENS), 128))], STRICT)
    (tmp_path / "questions.jsonl").write_text("\n".join([*GOOD, line]) + "\n")
    monkeypatch.setattr(mlx_mtp.Engine, "stream", None)
    with pytest.raises(mlx_mtp.DataError, match=rf"questions\.jsonl, line 9: .*{words}"):
        list(library.adapt(tmp_path / "target", folder / "parallel", tmp_path / "new",
                           [str(tmp_path / "questions.jsonl")], Adapting(**OPTIONS)))  # fmt: skip
    assert not (tmp_path / "new").exists()


def test_what_would_fail_afterwards_is_refused_before(folder: Path, tmp_path: Path) -> None:
    """Too little for one batch, a bad text to rehearse, a folder that holds something else: no model is asked."""
    with pytest.raises(mlx_mtp.DataError, match="at least 1281 tokens"):
        run(folder, tmp_path / "new", batch_size=80)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(mlx_mtp.DataError, match=r"bad\.jsonl, line 1"):
        run(folder, tmp_path / "new", rehearsal=0.5, rehearsal_data=(str(tmp_path / "bad.jsonl"),))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    for out in (tmp_path / "mine", tmp_path / "bad.jsonl", folder / "target"):
        with pytest.raises(mlx_mtp.OptionError, match="something else than a drafter, which stays"):
            run(folder, out)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"
    (tmp_path / "blocked.work").write_text("")
    with pytest.raises(mlx_mtp.CheckpointError, match="no folder that can be written into"):
        run(folder, tmp_path / "blocked")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"prompts": 3}, "prompts must be at least 4"), ({"depth": 0}, "depth must be at least 1"),
     ({"rehearsal": 1.0}, "rehearsal must be"), ({"label_share": 1.5}, "label_share"), ({"steps": -1}, "steps")],
)  # fmt: skip
def test_impossible_options(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(mlx_mtp.OptionError, match=words):
        Adapting(**OPTIONS | wrong)


def test_what_cannot_be_adapted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mlx_mtp.OptionError, match="'lookup' is no drafter with weights"):
        run(folder, tmp_path / "new", drafter="lookup")
    shutil.copytree(folder / "target", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(mlx_mtp.OptionError, match="target has no tokenizer"):
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
