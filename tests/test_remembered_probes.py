"""What exact mode found is kept for the same machine and weights, shown while it is made, and dropped by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import GOLDEN

import mlx_mtp
from mlx_mtp.checkpoints.kept import forget, probes_path
from mlx_mtp.generation import exactness
from mlx_mtp.generation.exactness import Exactness, ProbeFile
from mlx_mtp.generation.interfaces import Target

pytestmark = pytest.mark.remembering


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The capacities that are probed, which costs nothing here."""
    capacities: list[int] = []

    def probe(target: Target, capacity: int) -> Exactness:
        capacities.append(capacity)
        return Exactness((0, 1, 2), None)

    monkeypatch.setattr(exactness, "probe", probe)
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "cache"))
    return capacities


def generate(target: Path) -> Exactness:
    engine = mlx_mtp.load(target, drafter="lookup", mode="exact")
    engine.generate([5, 6], max_tokens=2)
    assert engine.exactness is not None
    return engine.exactness.at(256)


def test_the_probe_is_made_once_for_the_same_weights(
    asked: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target"
    shutil.copytree(GOLDEN / "keqv" / "target", target)
    first = generate(target)
    assert asked == [256] and "bit for bit (room for 256 tokens)" in caplog.text
    caplog.clear()
    assert generate(target) == first and asked == [256] and "bit for bit" not in caplog.text
    os.utime(next(target.glob("*.safetensors")), (1, 1))  # other weights, as far as anyone can tell
    generate(target)
    assert asked == [256, 256]
    assert len(forget(probes_path())) == 2 and not probes_path().exists()
    generate(target)
    assert asked == [256, 256, 256]


@pytest.mark.parametrize("entry", [None, [], {"256": {}}, {"256": {"depths": [], "width": None}}, {"x": 1},
                                   {"256": {"depths": [1], "width": 5}}, {"256": {"depths": [0, 99], "width": "a"}}],
                         ids=str)  # fmt: skip
def test_damage_is_as_good_as_nothing(tmp_path: Path, entry: object) -> None:
    file = tmp_path / "exactness.json"
    file.write_text(json.dumps({"version": 2, "profiles": {"key": entry}}))
    assert ProbeFile(file, "key").load() == {}
    ProbeFile(file, "key").save({512: Exactness((0, 1), 5)})
    assert ProbeFile(file, "key").load() == {512: Exactness((0, 1), 5)}
