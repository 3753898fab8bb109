"""Saved chats: they go on where they were, with their own model only; a damaged file is one sentence."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN

import mlx_mtp

QUESTION, NEXT = "What does shutil.copytree do?", "And os.listdir?"


@pytest.fixture(scope="module")
def engine() -> mlx_mtp.Engine:
    return mlx_mtp.load(depth=2)


@pytest.fixture(scope="module")
def saved(engine: mlx_mtp.Engine, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, mlx_mtp.Chat]:
    chat = engine.chat(system="Answer.")
    list(chat.send(QUESTION, max_tokens=24))
    return chat.save(tmp_path_factory.mktemp("chats") / "one"), chat


def test_a_saved_chat_goes_on(engine: mlx_mtp.Engine, saved: tuple[Path, mlx_mtp.Chat]) -> None:
    file, chat = saved
    other = engine.load_chat(file.with_suffix(""))
    assert other.messages == chat.messages and file.name == "one.safetensors"
    list(other.send(NEXT, max_tokens=24))
    fresh = engine.chat()
    fresh.messages = list(chat.messages)
    list(fresh.send(NEXT, max_tokens=24))
    assert other.last.tokens == fresh.last.tokens
    assert other.last.stats.prefilled_tokens < fresh.last.stats.prefilled_tokens == other.last.stats.prompt_tokens


def test_another_model_is_refused(saved: tuple[Path, mlx_mtp.Chat]) -> None:
    stranger = mlx_mtp.load(GOLDEN / "ple" / "target", drafter=None)
    with pytest.raises(mlx_mtp.CheckpointError, match="another"):
        stranger.load_chat(saved[0])


def test_damaged_files_are_one_sentence(
    engine: mlx_mtp.Engine, saved: tuple[Path, mlx_mtp.Chat], tmp_path: Path
) -> None:
    """Flipped bytes anywhere, cuts, sizes that make no sense: nothing of them is ever believed."""
    whole, chance, file = saved[0].read_bytes(), np.random.default_rng(0), tmp_path / "bad.safetensors"
    header = int.from_bytes(whole[:8], "little")
    damaged = [whole[: int(at)] for at in chance.integers(0, len(whole), 40)]
    damaged += [size.to_bytes(8, "little") + whole[8:] for size in (0, 1, 2**31, 2**63, 2**64 - 1, len(whole))]
    for at in [*chance.integers(0, 8 + header, 100), *chance.integers(8 + header, len(whole), 60)]:
        flipped = bytearray(whole)
        flipped[at] ^= int(chance.integers(1, 256))
        damaged.append(bytes(flipped))
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(mlx_mtp.CheckpointError) as found:
            engine.load_chat(file)
        assert str(found.value).count("\n") == 0 and len(str(found.value)) < 600
    assert len(damaged) > 200
    with pytest.raises(mlx_mtp.CheckpointError, match="found none"):
        engine.load_chat(tmp_path / "nothing")
    mx.save_safetensors(str(file), {"ids": mx.zeros((3,), dtype=mx.int32)})
    with pytest.raises(mlx_mtp.CheckpointError):
        engine.load_chat(file)
    assert engine.generate(QUESTION, max_tokens=8).tokens
