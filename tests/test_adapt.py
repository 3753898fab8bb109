"""Fine-tuning a drafter: what is asked, learned, kept and replaced; only the measured gain is given from outside."""

import dataclasses
import json
import shutil
from collections.abc import Generator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import Command
from families import config_of, copy_with_tokenizer, drained, written
from thinking import PLAIN_TEMPLATE

import mlx_mtp
from mlx_mtp.training import adapt as library
from mlx_mtp.training import stages
from mlx_mtp.training.adapt import NotBetter
from mlx_mtp.training.chats import Chats
from mlx_mtp.training.data import Document
from mlx_mtp.training.families import DrafterShape
from mlx_mtp.training.prompts import prompts_of
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.stages import Report
from mlx_mtp.training.trainer import Stage

GREEDY = mlx_mtp.Sampling(temperature=0.0)
OPTIONS: dict[str, Any] = {"tokens": 64, "drafter_steps": 2, "batch_size": 1, "length": 32, "learning_rate": 1e-2}
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target has no tokenizer, parallel heads for it, and nine questions."""
    place = tmp_path_factory.mktemp("adapt")
    copy_with_tokenizer("ple", place / "target")
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

    monkeypatch.setattr(stages, "measured", measure)


def recipe(folder: Path, data: str = "questions.jsonl", **changes: Any) -> Recipe:
    shape = DrafterShape(drafts=2)
    return Recipe(drafters=(shape,), data=(str(folder / data),), **OPTIONS | changes)


def run(folder: Path, out: Path, drafter: str | Path | None = None, **changes: Any) -> tuple[list[str], Report]:
    """Names of the stages as they came, each once, and the report."""
    walk = library.adapt(folder / "target", drafter or folder / "parallel", out, recipe(folder, **changes))
    steps, report = drained(walk)
    return list(dict.fromkeys(step.name for step in steps)), report


def shards(work: Path) -> dict[str, bytes]:
    """All that a target wrote, by where it is kept."""
    return {str(file.relative_to(work)): file.read_bytes() for file in sorted(work.rglob("*.np[yz]"))}


def test_a_better_drafter_is_written_and_chats_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 1.0, 1.5)
    names, report = run(folder, tmp_path / "new")
    assert names == ["chats held out", "chats", "before", "parallel", "parallel measured"]
    assert report == Report(tmp_path / "new", 1.0, 1.5, 2, 2)
    old, new = (mx.load(str(place / "model.safetensors")) for place in (folder / "parallel", tmp_path / "new"))
    assert set(old) == set(new) and max(mx.abs(old[name] - new[name]).max().item() for name in old) > 1e-4
    plain = mlx_mtp.load(folder / "target", drafter=None)
    adapted = mlx_mtp.load(folder / "target", drafter=tmp_path / "new", depth=2)
    assert adapted.generate([30, 31], max_tokens=20).tokens == plain.generate([30, 31], max_tokens=20).tokens
    (asked,) = (tmp_path / "new.work").glob("*/chats")
    engine, chats, held = plain, Chats(asked), Chats(asked.with_name("held_out"))
    questions = [engine.tokenizer.chat([{"role": "user", "content": f"w{i:03},w{i + 1:03},"}]) for i in range(30, 39)]
    held_out = (questions[0], questions[8])
    for found, known in ((chats, questions[1:8]), (held, held_out)):
        assert all(row in known for row in found.prompts(9))


def test_one_that_is_no_better_replaces_nothing_and_asks_nothing_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch, 1.0, 1.5, 2.0, 1.0, 1.8)
    run(folder, tmp_path / "new")
    kept = (tmp_path / "new" / "model.safetensors").read_bytes()
    written = shards(tmp_path / "new.work")
    with pytest.raises(NotBetter, match="makes 1.80 tokens per round on 2 held-out prompts, the one there is 2.00"):
        run(folder, tmp_path / "new", learning_rate=1e-3)  # better than its source, but not than what stands there
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == kept
    assert shards(tmp_path / "new.work") == written
    assert (tmp_path / "new.work" / "candidate" / "model.safetensors").read_bytes() != kept


def moved(source: Path, place: Path) -> Path:
    """The same checkpoint with one weight moved."""
    shutil.copytree(source, place, copy_function=shutil.copyfile)
    weights = mx.load(str(place / "model.safetensors"))
    name = next(name for name in sorted(weights) if name.endswith("norm.weight"))
    mx.save_safetensors(str(place / "model.safetensors"), {**weights, name: weights[name] * 1.5})
    return place


@pytest.mark.parametrize("change", ["path", "target", "seed", "length"])
def test_chats_are_those_that_an_empty_folder_would_have_got(
    change: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a first run with another target or option; the same files in another place are the same."""
    measured(monkeypatch, *[1.0, 1.5] * 3)
    target, drafter, options = folder / "target", folder / "parallel", {}
    list(library.adapt(target, drafter, tmp_path / "used", recipe(folder)))
    first = shards(tmp_path / "used.work")
    shutil.rmtree(tmp_path / "used")
    if change == "path":
        target = shutil.copytree(target, tmp_path / "other")
    elif change == "target":
        target = moved(target, tmp_path / "other")
    else:
        options = {change: 1 if change == "seed" else 31}
    for out in ("used", "empty"):
        list(library.adapt(target, drafter, tmp_path / out, recipe(folder, **options)))
    used, empty = (shards(tmp_path / f"{out}.work") for out in ("used", "empty"))
    assert used == (first if change == "path" else first | empty)
    new = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("used", "empty")]
    assert new[0] == new[1]


def test_tokens_per_round_are_counted_over_all_prompts(folder: Path) -> None:
    engine = mlx_mtp.load(folder / "target", drafter="lookup", depth=2)
    prompts = [[30, 31, 30, 31], [40, 41, 42]]
    seen, found = drained(stages.measured("before", engine, prompts))
    stats = [engine.generate(prompt, max_tokens=stages.MEASURED_TOKENS, sampling=GREEDY).stats for prompt in prompts]
    assert found == sum(s.tokens - 1 for s in stats) / sum(s.rounds for s in stats) >= 1.0
    assert seen == [Stage("before", 1, 2), Stage("before", 2, 2)]


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
    found = prompts_of(iter(documents), Words(), 16)
    # A third of every 16 words; no piece is begun whose half is not there.
    assert found == [[4], [4, 9, 4], [1, 2, 3, 4, 5], [17, 18, 19, 20, 21]]


def test_too_few_prompts(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "few.jsonl").write_text('{"prompt": "w030,"}\n' * 3)
    with pytest.raises(mlx_mtp.DataError, match="hold 3 prompts and at least 4"):
        list(library.adapt(folder / "target", folder / "parallel", tmp_path / "few", recipe(tmp_path, "few.jsonl")))


STRICT = PLAIN_TEMPLATE.replace(
    "{% for", "{% if messages[0].content == 'w031,' %}{{ raise_exception('not this one') }}{% endif %}"
              "{% if messages[0].content == 'w032,' %}{{ messages[0].content + 3 }}{% endif %}{% for", 1
)  # fmt: skip
GOOD = ['{"prompt": "w030,"}'] * 8


@pytest.mark.parametrize(
    ("line", "words"),
    [('{"prompt": "w031,"}', "chat template .*not this one"), ('{"prompt": "w032,"}', "chat template"),
     ('{"prompt": "' + "w030," * 600 + '"}', "a row of --length 32 has room for 24"),
     ('{"prompt": " "}', "prompt of the user"),
     ('{"messages": [{"role": "assistant", "content": "x"}]}', "prompt of the user"), ("{", "one JSON object"),
     ('{"messages": [{"role": "tool", "content": "x"}]}', "role")],
)  # fmt: skip
def test_all_prompts_are_checked_before_any_is_answered(
    line: str, words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy_with_tokenizer("ple", tmp_path / "target", template=STRICT)
    (tmp_path / "questions.jsonl").write_text("\n".join([*GOOD, line]) + "\n")
    monkeypatch.setattr(stages, "chats_of", None)
    with pytest.raises(mlx_mtp.DataError, match=rf"questions\.jsonl, line 9: .*{words}"):
        list(library.adapt(tmp_path / "target", folder / "parallel", tmp_path / "new", recipe(tmp_path)))
    assert not (tmp_path / "new").exists()


def test_what_would_fail_afterwards_is_refused_before(folder: Path, tmp_path: Path) -> None:
    """Too little for one batch, a folder that holds something else: no model is asked."""
    with pytest.raises(mlx_mtp.OptionError, match="at least 2560 for one batch"):
        run(folder, tmp_path / "new", batch_size=80)
    (tmp_path / "bad.jsonl").write_text("{")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    for out in (tmp_path / "mine", tmp_path / "bad.jsonl", folder / "target"):
        with pytest.raises(mlx_mtp.OptionError, match="something else than a drafter, which stays"):
            run(folder, out)
    assert (tmp_path / "mine" / "diary.txt").read_text() == "dear diary"
    (tmp_path / "blocked.work").write_text("")
    with pytest.raises(mlx_mtp.CheckpointError, match="no folder that can be written into"):
        run(folder, tmp_path / "blocked")


def test_what_cannot_be_adapted(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(mlx_mtp.OptionError, match="'lookup' is no drafter with weights"):
        run(folder, tmp_path / "new", drafter="lookup")
    more = dataclasses.replace(recipe(folder), drafters=(DrafterShape(drafts=4),))
    with pytest.raises(mlx_mtp.OptionError, match="has 2 heads; train it for 2 drafts"):
        list(library.adapt(folder / "target", folder / "parallel", tmp_path / "new", more))
    shutil.copytree(folder / "target", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(mlx_mtp.OptionError, match="target has no tokenizer"):
        list(library.adapt(tmp_path / "bare", folder / "parallel", tmp_path / "new", recipe(folder)))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("after", "code"), [(1.5, 0), (1.0, 2)])
def test_the_command(
    after: float, code: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    measured(monkeypatch, 1.25, after)
    given = {"model": folder / "target", "drafter": folder / "parallel", "data": folder / "questions.jsonl",
             "out": tmp_path / "new", "drafts": 2, **OPTIONS}  # fmt: skip
    given["steps"] = given.pop("drafter_steps")
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    found, out, err = command("adapt", *words)
    assert found == code and "Traceback" not in err
    if code:
        assert out == "" and "nothing was replaced" in err and not (tmp_path / "new").exists()
    else:
        assert "1.25 tokens per round before, 1.50 after, on 2 held-out prompts at depth 2" in out and "Next: " in out
        assert (tmp_path / "new" / "config.json").exists()
