"""Saved chats of every drafter family: they go on as if never saved; nothing damaged or foreign gets in."""

import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import refusal
from families import WORDS, chat_folder, copy_with_tokenizer, talking
from thinking import ANSWER, thinking_engine

import mlx_mtp
import mlx_mtp.chat.saved as saved_chats
from mlx_mtp.checkpoints.atomic import write_state

FAMILIES = ("assistant", "lookup", "sequential", "lookup+parallel")
Edit = Callable[[dict[str, Any], dict[str, mx.array]], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chat_folder(tmp_path_factory.mktemp("chats"))


def talk(chat: mlx_mtp.Chat, *questions: str, tokens: int = 30) -> mlx_mtp.Result:
    for question in questions:
        list(chat.send(question, max_tokens=tokens))
    assert chat.last is not None
    return chat.last


@pytest.fixture(scope="module")
def saved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[mlx_mtp.Engine, Path]:
    """A conversation of two turns, in which rings have wrapped, with parallel heads (which have K/V of their own)."""
    engine = talking(folder, "parallel")
    chat = engine.chat(system="Be brief.")
    talk(chat, "Why?", "And?")
    return engine, chat.save(tmp_path_factory.mktemp("saved") / "chat")


def refused(engine: mlx_mtp.Engine, file: Path | str) -> str:
    return refusal(lambda: engine.load_chat(file), mlx_mtp.CheckpointError)


# Round trips


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_chat_goes_on_as_if_it_had_not_been(folder: Path, tmp_path: Path, family: str) -> None:
    family = family.replace("+", f"+{folder}/")
    engine, again = talking(folder, family), talking(folder, family)
    chat = engine.chat(system="Be brief.", thinking=True)
    talk(chat, "Why?", "And?", tokens=40)  # rings of 40 slots have wrapped twice
    file = chat.save(str(tmp_path / "deep" / "er" / "name"))
    assert file == tmp_path / "deep" / "er" / "name.safetensors" and list(file.parent.iterdir()) == [file]
    for name in (file, tmp_path / "deep" / "er" / "name"):
        other = again.load_chat(name)
        assert (other.messages, other.thinking) == (chat.messages, True)
        assert other.session.ids == chat.session.ids and len(other.session.ids) > 80
    mine, theirs = talk(chat, "x"), talk(other, "x")
    assert theirs.tokens == mine.tokens and theirs.stats.accepted == mine.stats.accepted
    assert theirs.stats.prefilled_tokens == mine.stats.prefilled_tokens < 12
    assert other.save(file) == file  # over the old one
    assert engine.load_chat(file).messages == chat.messages
    assert other.undo() == "x" and talk(other, "x").tokens == mine.tokens


def test_chats_without_kv(folder: Path, tmp_path: Path) -> None:
    engine = talking(folder, "none")
    empty = engine.load_chat(engine.chat().save(tmp_path / "empty"))
    assert empty.messages == [] and empty.session.lease is None and empty.system is None
    chat = thinking_engine(tmp_path / "markov").chat()  # a target without K/V and without a folder
    list(chat.send("Why?"))
    other = chat.engine.load_chat(chat.save(tmp_path / "markov-chat"))
    assert other.messages == chat.messages and other.session.ids
    assert "".join(event.text for event in other.send("And?")) == ANSWER


def test_text_of_any_kind_comes_back(folder: Path, tmp_path: Path) -> None:
    chat = talking(folder, "none").chat(system='quotes " and \\ and \n lines, ö, 日本, 🎈, \x00')
    assert chat.engine.load_chat(chat.save(tmp_path / "ünï ćode.v2")).messages == chat.messages


# Another model, another drafter


def test_another_model_is_refused(folder: Path, saved: tuple[mlx_mtp.Engine, Path], tmp_path: Path) -> None:
    copy_with_tokenizer("keqv", tmp_path / "target")
    assert "with another model" in refused(mlx_mtp.load(tmp_path / "target", drafter=None), saved[1])
    other_words = [*WORDS[:-2], WORDS[-1], WORDS[-2]]
    copy_with_tokenizer("ple", tmp_path / "words" / "target", other_words)
    assert "tokenizer" in refused(mlx_mtp.load(tmp_path / "words" / "target", drafter=None), saved[1])
    shutil.copytree(folder / "target", tmp_path / "tuned")
    weights = tmp_path / "tuned" / "model.safetensors"
    weights.write_bytes(flipped(weights.read_bytes(), -3, 1))
    assert "other weights" in refused(mlx_mtp.load(tmp_path / "tuned", drafter=None), saved[1])
    moved = shutil.copytree(folder / "target", tmp_path / "the same elsewhere")
    assert mlx_mtp.load(moved, drafter=None).load_chat(saved[1]).messages


def test_another_version_or_mode_computes_anew(
    folder: Path, saved: tuple[mlx_mtp.Engine, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = talking(folder, "parallel", mode="exact").load_chat(saved[1])
    assert exact.messages and exact.session.lease is None
    monkeypatch.setattr(saved_chats, "__version__", "99.0")
    assert saved[0].load_chat(saved[1]).session.lease is None


# Damage


def test_hundreds_of_damaged_files(saved: tuple[mlx_mtp.Engine, Path], tmp_path: Path) -> None:
    engine, file = saved
    whole, chance = file.read_bytes(), np.random.default_rng(1)
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = [*chance.integers(0, header, 90), *chance.integers(header, len(whole), 60)]
    damaged = [flipped(whole, int(place), int(chance.integers(1, 256))) for place in places]
    damaged += [whole[: int(cut)] for cut in [*range(0, 10), header - 1, header, *chance.integers(10, len(whole), 30)]]
    sizes = [0, 1, 2, header - 9, header - 7, 10**6, 2**31, 2**32 + header, 2**63, 2**64 - 1]
    damaged += [struct.pack("<Q", size) + whole[8:] for size in sizes]
    damaged += [whole + b"\0", b"", b"\0" * 1000, whole[8:], whole[:header] + bytes(len(whole) - header)]
    count, copy = 0, tmp_path / "damaged.safetensors"
    for content in damaged:
        copy.write_bytes(content)
        try:
            found = engine.load_chat(copy)
        except mlx_mtp.CheckpointError as error:
            assert str(error).endswith(".") and str(copy) in str(error)
            count += 1
        else:  # one kind of white space in the header in place of another
            assert content[8:header].split() == whole[8:header].split() and found.messages
    assert count >= 200
    assert talk(engine.load_chat(file), "x").stats.prefilled_tokens < 12


def flipped(content: bytes, place: int, bits: int) -> bytes:
    changed = bytearray(content)
    changed[place] ^= bits
    return bytes(changed)


def rewritten(file: Path, copy: Path, edit: Edit) -> Path:
    """The same file with something changed and a digest that says it is sound."""
    tensors, metadata = mx.load(str(file), return_metadata=True)
    about = json.loads(metadata["mlx_mtp"])
    del about["digest"]
    edit(about, tensors)
    about["digest"] = saved_chats._digest(about, tensors)
    mx.save_safetensors(str(copy), tensors, {"mlx_mtp": json.dumps(about)})
    return copy


ABOUT = {
    "format": [0, 1, None, "2"], "thinking": [None, 1, "yes"], "target": [None, "other", 3],
    "capacity": [0, -1, 3, 1.5, True, "256", 300, 512, 2**31, 2**40, 10**30],
    "newest": [-1, 0, 255.0, True, "9", 256, 2**40, None],
    "messages": [None, {}, "text", [None], ["text"], [{}], [{"role": "user"}], [{"role": "tool", "content": ""}],
                 [{"role": "user", "content": None}], [{"role": "user", "content": [{"type": "text"}]}],
                 [{"role": ["user"], "content": "x"}]],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in ABOUT.items() for value in values])
def test_fields_that_cannot_be(saved: tuple[mlx_mtp.Engine, Path], tmp_path: Path, field: str, value: Any) -> None:
    refused(saved[0], rewritten(saved[1], tmp_path / "a.safetensors", lambda about, _: about.update({field: value})))


IDS = (mx.array([1.0, 2.0]), mx.array([[1, 2]]), mx.array(3), mx.zeros((0,), mx.int32), mx.array([1] * 3000))
SHAPES: tuple[Callable[[mx.array], mx.array], ...] = (
    lambda rows: rows[:, :, :-1], lambda rows: mx.concatenate([rows, rows], axis=1), lambda rows: rows.reshape(-1),
    lambda rows: mx.concatenate([rows, rows]), lambda rows: rows.astype(mx.float16), lambda rows: rows.astype(mx.int32),
    lambda rows: mx.zeros((0,)), lambda rows: mx.array(1.0),
)  # fmt: skip


def test_tensors_that_cannot_be(saved: tuple[mlx_mtp.Engine, Path], tmp_path: Path) -> None:
    """Too few, too many, of other shapes and types."""
    tensors = mx.load(str(saved[1]))
    names = [name for name, tensor in tensors.items() if tensor.ndim == 4]
    others: list[dict[str, Any]] = [{"more": mx.zeros(3)}, *({name: None} for name in ("ids", "keys.0", "values.1"))]
    others += [{"ids": ids} for ids in IDS]
    others += [{name: change(tensors[name])} for change in SHAPES
               for name in (names[0], names[-1], next(name for name in names if name.startswith("memory.")))]
    for i, other in enumerate(others):

        def edit(_: object, held: dict[str, mx.array], other: dict[str, Any] = other) -> None:
            held.update(other)
            for name in [name for name, tensor in held.items() if tensor is None]:
                del held[name]

        refused(saved[0], rewritten(saved[1], tmp_path / f"{i}.safetensors", edit))


def test_what_is_no_chat(saved: tuple[mlx_mtp.Engine, Path], folder: Path, tmp_path: Path) -> None:
    engine = saved[0]
    assert "no saved conversation" in refused(engine, tmp_path / "nowhere")
    for name in ("", ".", "/", "a\0b", "x" * 300, tmp_path, "/dev/null"):
        refused(engine, name)
    with pytest.raises(mlx_mtp.CheckpointError, match="no saved conversation"):  # whose name breaks the sentence
        engine.load_chat("no/such/\n/folder")
    (tmp_path / "text.safetensors").write_text("Hello")
    refused(engine, tmp_path / "text")
    refused(engine, folder / "target" / "model.safetensors")
    for metadata in ({"mlx_mtp": "[" * 100_000}, {"mlx_mtp": "[]"}, {"mlx_mtp": "{}"}, {"other": "{}"}):
        mx.save_safetensors(str(tmp_path / "other.safetensors"), {"ids": mx.zeros(3)}, metadata)
        refused(engine, tmp_path / "other")


# Saving that fails


def unsaved(chat: mlx_mtp.Chat, file: Path | str) -> str:
    return refusal(lambda: chat.save(file), mlx_mtp.CheckpointError)


def test_a_full_disk_leaves_the_old_file_and_the_chat(folder: Path, tmp_path: Path) -> None:
    chat = talking(folder, "none").chat()
    talk(chat, "Why?")
    file = chat.save(tmp_path / "chat")
    before = file.read_bytes()
    talk(chat, "And?")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, limits[1]))
    try:
        assert "could not be written" in unsaved(chat, file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == [file.name]
    assert len(chat.engine.load_chat(chat.save(file)).messages) == 4
    assert talk(chat, "x").stats.prefilled_tokens < 12


def test_other_files_are_not_replaced(folder: Path, saved: tuple[mlx_mtp.Engine, Path], tmp_path: Path) -> None:
    chat = saved[0].load_chat(saved[1])
    shutil.copy(folder / "target" / "model.safetensors", tmp_path / "model.safetensors")
    write_state(tmp_path / "state.safetensors", {"a": mx.zeros(3)}, {"step": 1}, "free some")
    (tmp_path / "text.safetensors").write_text("mine")
    (tmp_path / "folder.safetensors").mkdir()
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()}
    for path in before:
        assert "is not replaced" in unsaved(chat, path)
        assert "is not replaced" in unsaved(chat, path.with_suffix(""))
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.iterdir()} == before
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(saved[1].read_bytes()[:-5])
    assert saved[0].load_chat(chat.save(damaged)).messages == chat.messages


def test_names_that_are_none(saved: tuple[mlx_mtp.Engine, Path], tmp_path: Path) -> None:
    chat = saved[0].load_chat(saved[1])
    (tmp_path / "file").write_text("x")
    for name in ("", ".", "/", "a\0b", "x" * 300, tmp_path / "file" / "chat", "/dev/null/chat"):
        unsaved(chat, name)


# The drafter's memory, and whose it is


def test_kv_belong_to_the_drafter_and_to_what_a_lookup_stands_in_front_of(folder: Path, tmp_path: Path) -> None:
    """With every other drafter the K/V are computed anew, but for those that remember nothing."""
    names = ["none", "assistant", "lookup", "sequential",
             *(f"lookup+{folder / name}" for name in ("parallel", "sequential"))]  # fmt: skip
    engines = {name: talking(folder, name) for name in names}
    for saver, engine in engines.items():
        chat = engine.chat()
        talk(chat, "Why?", tokens=4)
        file = chat.save(tmp_path / "chat")
        for loader, other in engines.items():
            same = loader == saver or {loader, saver} == {"none", "assistant"}
            loaded = other.load_chat(file)
            assert loaded.messages == chat.messages and loaded.session.ids == (chat.session.ids if same else [])


def test_other_weights_under_the_same_name_count(folder: Path, tmp_path: Path) -> None:
    place = shutil.copytree(folder, tmp_path / "same")
    for family in ("parallel", f"lookup+{place / 'parallel'}"):
        chat = talking(place, family).chat()
        talk(chat, "Why?")
        file = chat.save(tmp_path / "chat")
        weights = place / "parallel" / "model.safetensors"
        before = weights.read_bytes()
        weights.write_bytes(flipped(before, -3, 1))
        other = talking(place, family).load_chat(file)
        assert other.messages and other.session.lease is None
        weights.write_bytes(before)
        assert talking(place, family).load_chat(file).session.lease is not None
