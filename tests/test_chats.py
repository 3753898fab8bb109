"""Self-generated data: what a target writes to itself is its own, no pass is padding, and it is kept whole."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from families import copy_with_tokenizer, drained
from thinking import TOKENS

import mlx_mtp
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.training import chats as library
from mlx_mtp.training import stages
from mlx_mtp.training.chats import GIVEN, QUESTION, REPLY, TEMPERATURES, Chats, Script, loops, write_chats
from mlx_mtp.training.families import FAMILIES, DrafterShape, prepared
from mlx_mtp.training.recipe import Recipe

LENGTH = 40


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> mlx_mtp.Engine:
    words = [*(f"w{i:03}," for i in range(len(TOKENS), 125)), "Apples", "zebra", "Yes"]
    folder = copy_with_tokenizer("ple", tmp_path_factory.mktemp("chats") / "target", [*TOKENS, *words])
    return mlx_mtp.load(folder, drafter=None)


def written(target: Target, script: Script, folder: Path, tokens: int = 8 * LENGTH, **options: object) -> Chats:
    given = {"tokens": tokens, "length": LENGTH, "seed": 1, **options}
    list(write_chats(target, script, folder, **given))
    return Chats(folder)


def test_replies_are_the_targets_and_so_are_states(
    engine: mlx_mtp.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against one pass over every chat alone, without a cache; the prompts are given as they are."""
    monkeypatch.setattr(library, "LONGEST", 9)
    prompts = [[30, 31, 32], [40, 41]]
    found = written(engine.target, Script(prompts, [], [], [], frozenset({50})), tmp_path, aux_layers=[1])
    tokens, mask, start, best, norm, states, replies = found.rows(range(8))
    agree: list[bool] = []
    for row, begin in sorted({(i, int(place)) for i in range(8) for place in start[i]}):
        places = np.flatnonzero(start[row] == begin)
        assert (places == begin + np.arange(len(places))).all()
        chat = mx.array(tokens[row, places][None])
        logits = np.array(engine.target.logits(chat))[0].astype(np.float64)
        agree += (best[row, places] == logits.argmax(-1)).tolist()
        assert np.abs(norm[row, places] - np.log(np.exp(logits).sum(-1))).max() < 1e-3
        left = engine.target.forward(chat, engine.target.new_cache(256))
        hidden, first = np.array(left.hidden)[0], np.array(left.aux[1])[0]
        own, beside = np.split(states[row, places], 2, axis=-1)
        assert np.abs(own - hidden).max() < 0.02 * np.abs(hidden).max()
        assert np.abs(beside - first / np.sqrt(np.square(first).mean(-1, keepdims=True))).max() < 0.02
    assert np.mean(agree) > 0.99 and len(np.unique(start)) > 8 and states.dtype == np.float16
    assert replies[replies > 0].tolist() == np.flatnonzero(mask == REPLY).tolist()
    for row, temperature in enumerate(TEMPERATURES * 2):
        told = np.flatnonzero(mask[row] == REPLY)
        assert tokens[row, :2].tolist() in ([30, 31], [40, 41]) and len(told) > LENGTH // 2
        if temperature == 0:
            assert (tokens[row, told] == best[row, told - 1]).mean() > 0.99
        runs = np.split(told, np.flatnonzero(np.diff(told) > 1) + 1)
        assert max(map(len, runs)) <= 9
        assert all(50 not in tokens[row, run[:-1]] for run in runs)  # a stop token ends a reply, and is learned
    assert (mask != QUESTION).all()


def test_the_target_asks_itself(engine: mlx_mtp.Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the chat template: a question of its own, what comes after one, a reply; then another, or it asks on."""
    monkeypatch.setattr(library, "LONGEST", 5)
    monkeypatch.setattr(library, "LONGEST_QUESTION", 5)
    script = Script.of(engine.tokenizer, [], set(engine.stop_tokens))
    chat = engine.tokenizer.chat
    one, two = [{"role": "user", "content": "w060,"}], [{"role": "assistant", "content": "Yes"}]
    assert chat(one) == [*script.first, *engine.tokenizer.encode("w060,", special=False), *script.reply]
    spoken = engine.tokenizer.encode("Yes", special=False)
    assert chat([*one, *two, *one]) == [*chat(one), *spoken, *script.later, *chat(one)[len(script.first) :]]
    tokens, mask, *_ = written(engine.target, script, tmp_path).rows(range(8))
    for row in range(8):
        size = len(script.first)
        assert tokens[row, :size].tolist() == script.first and mask[row, size] == QUESTION
        assert {GIVEN, REPLY, QUESTION} == set(mask[row].tolist())
    held = Chats(tmp_path).questions()
    again = written(engine.target, script, tmp_path / "again", avoided=held)
    assert (again.tokens == tokens).all() and (again.mask[again.mask == REPLY]).size < (mask == REPLY).sum()


def test_written_again_it_is_the_same_and_what_is_there_is_kept(engine: mlx_mtp.Engine, tmp_path: Path) -> None:
    script = Script([[30, 31]], [], [], [], frozenset())
    whole = written(engine.target, script, tmp_path / "whole", tokens=3 * 64 * LENGTH)
    steps = write_chats(engine.target, script, tmp_path / "cut", tokens=3 * 64 * LENGTH, length=LENGTH, seed=1)
    for _ in range(LENGTH + 7):
        next(steps)
    steps.close()
    first = (tmp_path / "cut" / "0000.npz").stat().st_mtime_ns
    cut = written(engine.target, script, tmp_path / "cut", tokens=3 * 64 * LENGTH)
    assert cut.name == whole.name and (tmp_path / "cut" / "0000.npz").stat().st_mtime_ns == first
    batch = cut.batches(10, 0)
    seen = np.concatenate([batch(step)[0] for step in range(19)])
    assert len(seen) == 190 and all((one == other).all() for one, other in zip(batch(20), batch(20), strict=True))
    (tmp_path / "cut" / "0001.npz").write_bytes(b"PK")
    with pytest.raises(mlx_mtp.CheckpointError, match=r"0001\.npz: not chats"):
        Chats(tmp_path / "cut")


def test_no_more_is_written_than_was_asked_for(engine: mlx_mtp.Engine, tmp_path: Path) -> None:
    """But for what fills up the rows: 64 at a time at most, as many in every shard."""
    script = Script([[30, 31]], [], [], [], frozenset())
    for tokens, total in ((1, 2), (5, 5), (64, 64), (65, 66), (200, 200)):
        steps = write_chats(engine.target, script, tmp_path / str(tokens), tokens=tokens, length=1, seed=1)
        assert {found for _, found in steps} == {total}


def test_loops_and_the_most_frequent() -> None:
    assert loops([1, 2, 3] * 16) and not loops(list(range(48))) and not loops([1] * 47)
    chats = Chats.__new__(Chats)
    chats.tokens, chats.mask = np.array([[5, 3, 3, 9, 9, 9]]), np.array([[GIVEN, 1, 1, 1, 1, 1]])
    assert chats.frequent(2, 12).tolist() == [3, 9] and chats.frequent(3, 12).tolist() == [0, 3, 9]


@pytest.mark.parametrize("family", ["sequential", "parallel"])
def test_a_drafter_learns_from_chats(family: str, engine: mlx_mtp.Engine, tmp_path: Path) -> None:
    """What it foresees of the data rises; its shortlist is what is written, and a picture shows it where one can."""
    recipe = Recipe(batch_size=4, length=LENGTH, tokens=16 * LENGTH, drafter_steps=60, evaluate_every=20)
    given = [[30, 31, 32], [40, 41]], [[50, 51]]
    _, (chats, held) = drained(stages.chats_of(tmp_path, engine, *given, recipe))
    shape = DrafterShape(family=family, drafts=2, inner=32, shortlist=40)
    config = FAMILIES[family].describe(shape, engine.target, LENGTH)
    mx.random.seed(0)
    module = FAMILIES[family].build(config)
    found = list(stages.drafter_stage(tmp_path, module, engine, shape, recipe, chats, held, new=True))
    mx.random.seed(0)
    fresh = prepared(FAMILIES[family].build(config), chats)
    rows = chats.rows(range(16))
    loss = FAMILIES[family].objective(engine.target, 2, 0.6, mx.array(chats.frequent(40, 128)))
    before, after = (loss(one, tuple(map(mx.array, rows)), mx.array(0.0))[0].item() for one in (fresh, module))
    assert after < 0.8 * before
    assert module.shortlist.tolist() == chats.frequent(40, 128).tolist()
    assert found[-1].held_out is not None and len(found[-1].held_out) == 3
    drawn = tmp_path / f"train-{family}" / "acceptance.png"
    assert drawn.exists() == (importlib.util.find_spec("matplotlib") is not None)


def test_every_part_of_a_batch_finds_its_own_replies() -> None:
    mask = np.random.default_rng(0).integers(0, 3, (6, 300))
    parts = np.split(library.replies_of(mask, 3), 3)
    for part, rows in zip(parts, np.split(mask, 3), strict=True):
        assert part.shape[0] == 2 and part.size % 256 == 0
        assert part[part > 0].tolist() == [i for i in np.flatnonzero(rows == REPLY) if i]
    assert library.replies_of(np.zeros((2, 8), np.int32)).tolist() == [[0] * 128] * 2
