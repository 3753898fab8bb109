"""Training: the losses against NumPy, resuming as if never stopped, a kill at any moment, the command end to end."""

import dataclasses
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN, Command, ran
from references import log_softmax
from test_objectives import kept

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters.assistant import AssistantConfig, AssistantModel
from mlx_mtp.targets import load_target
from mlx_mtp.targets.gemma4 import Gemma4Model, Gemma4Target
from mlx_mtp.targets.gemma4_config import Gemma4Config
from mlx_mtp.training import families, pipeline, stages
from mlx_mtp.training.data import Batches
from mlx_mtp.training.families import FAMILIES, DrafterShape, describe_assistant, describe_sequential, write_drafter
from mlx_mtp.training.objective import assistant_loss
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.small_target import target_config

OPTIONS = ("--target-steps", "6", "--drafter-steps", "4", "--tokens", "128", "--batch-size", "2",
           "--length", "32", "--vocabulary", "300")  # fmt: skip


def small(vocabulary: int) -> dict:
    """The target that is trained here, with a tenth of the width."""
    config = target_config(vocabulary)
    config["text_config"] |= {"hidden_size": 32, "intermediate_size": 32, "head_dim": 8, "global_head_dim": 16,
                              "hidden_size_per_layer_input": 4, "num_hidden_layers": 3, "num_kv_shared_layers": 1,
                              "layer_types": config["text_config"]["layer_types"][1:4]}  # fmt: skip
    return config


@pytest.fixture(autouse=True)
def small_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "target_config", small)
    monkeypatch.setattr(stages, "MEASURED_TOKENS", 12)


def pair() -> tuple[Gemma4Model, AssistantModel]:
    mx.random.seed(3)
    target = Gemma4Model(Gemma4Config.from_dict(small(64)))
    config = describe_assistant(DrafterShape(), Gemma4Target(target, mx.float32), 32)
    return target, AssistantModel(AssistantConfig.from_dict(config))


@pytest.mark.parametrize("progress", [0.1, 0.7])
def test_assistant_loss_is_what_decoding_would_draft(progress: float) -> None:
    """Row by row through the drafter's own decoding path: the K/V below the row, teacher-forced tokens, own states."""
    from mlx_mtp.drafters.assistant import Assistant

    model, drafter = pair()
    target, steps, decay = Gemma4Target(model, mx.float32), 3, 0.8
    assistant = Assistant(drafter)
    assistant.attach(target)
    batch = np.random.default_rng(1).integers(0, 64, (1, 14))
    rows = batch.shape[1] - 1 - steps
    loss, agreement = assistant_loss(target, steps, decay)(drafter, kept(target, batch), mx.array(progress))
    distributions = log_softmax(np.array(target.logits(mx.array(batch))))[0]
    terms, agreed = np.zeros((steps, rows)), np.zeros((steps, rows))
    for row in range(rows):
        cache = target.new_cache(64)
        state = target.forward(mx.array(batch[:, : row + 1]), cache).hidden[:, -1:]
        cache.advance(row + 1)
        position, shared, masks = assistant.view(cache)
        for j in range(steps):
            token = mx.array(batch[:, row + 1 + j : row + 2 + j])
            hidden, state = drafter.step(target.embed(token), state, position, shared, masks)
            proposed = log_softmax(np.array(drafter.candidates(hidden)[1]))[0, 0]
            wanted = np.exp(distributions[row + 1 + j])
            surprise, overlap = -(wanted * proposed).sum(), np.minimum(wanted, np.exp(proposed)).sum()
            terms[j, row] = surprise if progress < 0.6 else 0.5 * (surprise - np.log(overlap))
            agreed[j, row] = proposed.argmax() == wanted.argmax()
    weights = decay ** np.arange(steps)
    assert abs(loss.item() - (weights * terms.mean(axis=1)).sum() / weights.sum()) < 1e-4
    assert np.allclose(np.array(agreement), agreed.cumprod(axis=0).mean(axis=1), atol=1e-6)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    words = np.random.default_rng(0).choice(["tree", "stone", "river", "cloud", "green", "walks", "sings"], (40, 60))
    for i, row in enumerate(words):
        (folder / f"{i:02}.txt").write_text(" ".join(row) + ".\n")
    return folder


def test_the_command_goes_on_after_an_interrupt_and_makes_a_pair(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    out, batch = tmp_path / "run", Batches.batch
    log = out / "train-target" / "log.jsonl"

    def interrupted(self: Batches, step: int) -> np.ndarray:
        if step == 3 and log.exists():
            raise KeyboardInterrupt
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", interrupted)
        assert ran("train", "--out", out, "--data", corpus, *OPTIONS) == 130
    assert (out / "train-target" / "training.safetensors").exists()
    code, shown, _ = command("train", "--out", out, "--data", corpus, *OPTIONS)  # the same command goes on
    assert code == 0 and f"{out / 'assistant'}: 1.00 tokens per round before" in shown
    assert "Next: mlx-mtp chat --model" in shown
    assert ran("train", "--out", out, "--resume") == 0
    steps = [json.loads(line)["step"] for line in log.read_text().splitlines()]
    assert steps == list(range(1, 7))  # no step twice, none missing
    engine = mlx_mtp.load(out / "target", depth=2)  # the assistant beside it is found
    ids = engine.tokenizer.encode("tree stone")
    plain = mlx_mtp.load(out / "target", drafter=None).generate(ids, max_tokens=30, ignore_end=True)
    assert engine.generate(ids, max_tokens=30, ignore_end=True).tokens == plain.tokens
    assert engine.drafter is not None


ROWS = {"batch_size": 2, "length": 32}
TARGET, DRAFTER = {"target_steps": 3, "vocabulary": 300}, {"drafter_steps": 2, "tokens": 128}
TINY = ROWS | TARGET | DRAFTER


def test_every_family_on_one_target(corpus: Path, tmp_path: Path) -> None:
    """All three beside a target trained for them, then two on that finished target: each drafts in the engine."""
    shapes = [DrafterShape(family=name, drafts=2, inner=32) for name in FAMILIES]
    stages = list(pipeline.train(tmp_path, Recipe(drafters=shapes, data=[str(corpus)], **TINY)))
    measured = (f"{name} measured" for name in FAMILIES)
    assert {stage.name for stage in stages} >= {"target", "chats held out", "chats", *FAMILIES, *measured}
    frozen = Recipe(drafters=shapes[1:], target=str(tmp_path / "target"), data=[str(corpus)], **ROWS, **DRAFTER)
    list(pipeline.train(tmp_path / "frozen", frozen))
    ids = list(range(20, 40))
    plain = mlx_mtp.load(tmp_path / "target", drafter=None).generate(ids, max_tokens=20, ignore_end=True).tokens
    frozen_too = [tmp_path / "frozen" / shape.family for shape in shapes[1:]]
    for folder in (*(tmp_path / family for family in FAMILIES), *frozen_too):
        engine = mlx_mtp.load(tmp_path / "target", drafter=folder, depth=2)
        assert engine.generate(ids, max_tokens=20, ignore_end=True).tokens == plain


@pytest.mark.parametrize("family", ["parallel", "sequential"])
def test_joint_training_makes_a_pair(family: str, corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe(drafters=[DrafterShape(family=family, drafts=2)], joint=True, data=[str(corpus)], **ROWS, **TARGET)
    stages = list(pipeline.train(tmp_path, recipe))
    assert {stage.name for stage in stages} == {"joint"} and len(stages) == 3
    assert len({stage.figures["loss"] for stage in stages}) == 3
    engine = mlx_mtp.load(tmp_path / "target", drafter=tmp_path / family, depth=2)
    plain = mlx_mtp.load(tmp_path / "target", drafter=None)
    found = [one.generate("tree stone", raw=True, max_tokens=20, ignore_end=True).tokens for one in (engine, plain)]
    assert found[0] == found[1]
    with pytest.raises(mlx_mtp.OptionError, match="data"):
        list(pipeline.train(tmp_path, dataclasses.replace(recipe, data=["elsewhere"])))


def test_training_goes_on_from_a_target_and_from_a_drafter(corpus: Path, tmp_path: Path) -> None:
    """The first loss of the second run is that of the weights it starts from, not of fresh ones."""
    shapes = [DrafterShape(family="sequential", drafts=1, inner=32, aux_layers=[1])]
    options = {**TINY, "target_steps": 12, "learning_rate": 1e-2}
    fresh = list(pipeline.train(tmp_path / "one", Recipe(drafters=shapes, data=[str(corpus)], **options)))
    on = Recipe(drafters=[], start=str(tmp_path / "one" / "target"), data=[str(corpus)], seed=0,
                target_steps=1, learning_rate=1e-6, **ROWS)  # fmt: skip
    (stage,) = pipeline.train(tmp_path / "two", on)
    losses = [s.figures["loss"] for s in fresh if s.name == "target"]
    assert stage.figures["loss"] < losses[0] - 0.5  # the same batch: the seed's first
    one, two = (mlx_mtp.load(tmp_path / name / "target", drafter=None) for name in ("one", "two"))
    assert one.tokenizer.encode("tree stone") == two.tokenizer.encode("tree stone")
    assert apart(one.target, two.target) < 1e-3
    start = str(tmp_path / "one" / "sequential")
    kept_sizes = [DrafterShape(family="sequential", drafts=1)]
    frozen = Recipe(drafters=kept_sizes, target=str(tmp_path / "one" / "target"), start=start, data=[str(corpus)],
                    learning_rate=1e-6, **ROWS | DRAFTER | {"drafter_steps": 1})  # fmt: skip
    for sizes in ({"vocabulary": 300}, {"target": frozen.target, "drafters": shapes}, {"target": "x", "drafters": []}):
        with pytest.raises(mlx_mtp.OptionError, match="one drafter|brings|leave"):
            dataclasses.replace(on, **sizes)
    list(pipeline.train(tmp_path / "three", frozen))
    files = (tmp_path / name / "sequential" / "model.safetensors" for name in ("one", "three"))
    kept = [mx.load(str(file)) for file in files]
    assert max(mx.abs(kept[0][name] - kept[1][name]).max().item() for name in kept[0]) < 1e-3
    with pytest.raises(mlx_mtp.OptionError, match="family"):
        other = dataclasses.replace(frozen, drafters=[DrafterShape(family="parallel", drafts=1)])
        list(pipeline.train(tmp_path / "four", other))
    with pytest.raises(mlx_mtp.OptionError, match="families one by one"):
        dataclasses.replace(frozen, drafters=[])


def apart(one: Gemma4Target, other: Gemma4Target) -> float:
    tokens = mx.array([[5, 6, 7, 8]])
    return mx.abs(one.logits(tokens) - other.logits(tokens)).max().item()


def test_layers_of_a_deep_target_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third and two thirds of the way through it, where nobody says which."""
    target = load_target(Checkpoint.open(GOLDEN / "ple" / "target"))
    there = len(target.model.layers)

    def read(aux_layers: list[int] | None = None) -> list[int]:
        shape = DrafterShape(family="sequential", aux_layers=aux_layers)
        return describe_sequential(shape, target, 8).get("aux_layers", [])

    assert read() == read([]) == [] and read([2, 0]) == [2, 0]
    monkeypatch.setattr(families, "DEEP", there)
    assert read() == [there // 3, 2 * there // 3] and read([]) == []
    with pytest.raises(mlx_mtp.OptionError, match=f"there is no {there}"):
        read([there])
    for wrong in ([-1], [1.5]):
        with pytest.raises(mlx_mtp.OptionError, match="aux_layers"):
            read(wrong)


def test_chats_for_another_drafter_are_refused(corpus: Path, tmp_path: Path) -> None:
    """A run of an earlier version kept no layers."""
    recipe = Recipe(drafters=[DrafterShape(family="sequential", drafts=1, aux_layers=[1])], data=[str(corpus)], **TINY)
    run = pipeline.train(tmp_path, recipe)
    while not any(tmp_path.glob("held_out/*.npz")):
        next(run)
    run.close()
    for file in tmp_path.glob("held_out/*.npy"):
        np.save(file, np.load(file)[..., :1])
    with pytest.raises(mlx_mtp.CheckpointError, match="take another folder"):
        list(pipeline.train(tmp_path, recipe))


def test_impossible_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(mlx_mtp.OptionError, match="family"):
        DrafterShape(family="medusa")
    for family, size in (("assistant", {"modules": 2}), ("parallel", {"width": 64}), ("sequential", {"width": 64}),
                         ("assistant", {"shortlist": 0}), ("parallel", {"aux_layers": []})):  # fmt: skip
        with pytest.raises(mlx_mtp.OptionError, match=f"{family} has no {next(iter(size))}"):
            DrafterShape(family=family, **size)
    with pytest.raises(mlx_mtp.CheckpointError, match="recipe"):
        Recipe.read(tmp_path)
    (tmp_path / "recipe.json").write_text('{"drafters": [], "colour": 3}')
    with pytest.raises(mlx_mtp.CheckpointError, match="not a recipe"):
        Recipe.read(tmp_path)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_a_drafter_that_is_not_finite_replaces_nothing(value: float, tmp_path: Path) -> None:
    """As float16, in which it is written: 1e5 is beyond it."""
    _, drafter = pair()
    config = {"model_type": "gemma4_assistant"}
    write_drafter(tmp_path / "new", config, drafter)
    kept = (tmp_path / "new" / "model.safetensors").read_bytes()
    drafter.model.norm.weight = mx.full(drafter.model.norm.weight.shape, value)
    with pytest.raises(mlx_mtp.CheckpointError, match="finite numbers as weights, found others in 'model.norm.weight'"):
        write_drafter(tmp_path / "new", config, drafter)
    assert (tmp_path / "new" / "model.safetensors").read_bytes() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


FRESH = TINY | {"target_steps": 1, "drafter_steps": 1}


def test_data_are_checked_before_anything_is_trained_and_leave_nothing(corpus: Path, tmp_path: Path) -> None:
    """A chat that the template refuses, too little held out for a later stage: then the same call with better data."""
    out, late = tmp_path / "run", tmp_path / "late.jsonl"
    turns = [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]
    late.write_text(json.dumps({"text": "fine"}) + "\n" + json.dumps({"messages": turns}))
    short = tmp_path / "short"
    short.mkdir()
    for i in range(10):
        (short / f"{i}.txt").write_text("tree stone river " * (8 if i % 8 == 0 else 200))
    for recipe, words in (
        (Recipe(data=[str(late), str(corpus)], **FRESH), r"late\.jsonl, line 2: .*system message first"),
        (Recipe(data=[str(short)], **{**FRESH, "length": 64}), "at least [0-9]+ tokens"),
    ):
        with pytest.raises(mlx_mtp.DataError, match=words):
            next(pipeline.train(out, recipe))
        assert not out.exists()
    late.write_text(json.dumps({"messages": turns[:1]}))
    assert next(pipeline.train(out, Recipe(data=[str(late), str(corpus)], **FRESH))).name == "target"


def test_a_run_goes_on_only_with_what_it_began_with(corpus: Path, tmp_path: Path) -> None:
    """Changed data or another target under the same name are refused."""
    out = tmp_path / "run"
    recipe = Recipe(data=[str(corpus)], **FRESH)
    list(pipeline.train(out, recipe))
    target = tmp_path / "target"
    shutil.copytree(out / "target", target)
    frozen = Recipe(data=[str(corpus)], target=str(target), drafters=[DrafterShape(inner=32)], **ROWS, **DRAFTER)
    stages = pipeline.train(tmp_path / "frozen", frozen)
    assert next(stages).name == "chats held out"
    stages.close()
    shutil.rmtree(tmp_path / "frozen" / "assistant", ignore_errors=True)
    config = json.loads((target / "generation_config.json").read_text())
    (target / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))
    with pytest.raises(mlx_mtp.OptionError, match="whose target has changed"):
        list(pipeline.train(tmp_path / "frozen", frozen))
    text = corpus / "00.txt"
    kept = text.read_text()
    text.write_text(kept + "more")
    with pytest.raises(mlx_mtp.OptionError, match="whose data has changed"):
        list(pipeline.train(out, recipe))
    text.write_text(kept)
    list(pipeline.train(out, recipe))
    shutil.rmtree(out / "assistant")
    list(pipeline.train(out, recipe))
    assert (out / "assistant" / "config.json").exists()


def test_a_run_begins_in_a_folder_of_its_own(corpus: Path, tmp_path: Path) -> None:
    recipe = Recipe(data=[str(corpus)], **FRESH)
    for name in ("target", "assistant", "tokenizer"):
        (tmp_path / name).mkdir()
        with pytest.raises(mlx_mtp.OptionError, match=f"named {name} already"):
            next(pipeline.train(tmp_path, recipe))
        (tmp_path / name).rmdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(mlx_mtp.CheckpointError, match="no folder that can be written into"):
        next(pipeline.train(tmp_path / "file", recipe))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"batch_size": 0}, "batch_size"), ({"length": 1}, "length"), ({"length": 3}, "above the 3 drafts"),
     ({"seed": -1}, "seed"), ({"target_steps": 0}, "target_steps"), ({"drafter_steps": 0}, "drafter_steps"),
     ({"tokens": 100}, "one batch"), ({"tokens": 0}, "tokens"), ({"vocabulary": 0}, "vocabulary"),
     ({"accumulate": 3}, "another accumulate"), ({"joint": True}, "joint"),
     ({"target": "x", "target_steps": 9}, "target_steps has no effect"),
     ({"target": "x", "vocabulary": 9}, "vocabulary has no effect"), ({"drafters": [], "tokens": 9}, "tokens has no"),
     ({"drafters": [DrafterShape(family="parallel")], "joint": True, "drafter_steps": 9}, "drafter_steps has no")],
)  # fmt: skip
def test_numbers_are_checked_before_data_are_read(wrong: dict, words: str) -> None:
    with pytest.raises(mlx_mtp.OptionError, match=words):
        Recipe(**wrong)


@pytest.mark.parametrize(
    ("options", "words"),
    [(("--length", "64"), "another value of length"), (("--drafts", "2"), "another value of drafters"),
     (("--optimizer", "adamw", "--seed", "0"), "value of optimizer"), (("--length", "32"), "/nowhere: expected"),
     (("--inner", "64"), "another value of drafters"), (("--aux-layers", "1,2"), "assistant has no aux_layers"),
     (("--aux-layers", "x"), "takes numbers of layers")],
)  # fmt: skip
def test_resume_takes_no_other_values(options: tuple[str, ...], words: str, tmp_path: Path, command: Command) -> None:
    """What the run began with may be said again; anything else is refused and not ignored."""
    recipe = Recipe(data=["/nowhere"], **FRESH)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.saved()))
    code, _, err = command("train", "--out", tmp_path, "--resume", *options)
    assert code == 2 and words in " ".join(err.split()) and "Traceback" not in err
