"""Quantised weights on a CPU: the same numbers in float32 where they fit, and a word about it."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf_files import write_gguf
from mlx.utils import tree_flatten

from mlx_mtp.checkpoints import memory
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.converting import convert
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.targets import load_target

pytestmark = pytest.mark.skipif(mx.default_device() != mx.Device(mx.cpu), reason="on a CPU only")


@pytest.fixture(scope="module", params=["generic", "gemma4"])
def quantised(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quantised")
    if request.param == "generic":
        (folder,) = convert(write_gguf(place / "m.gguf"), place / "out")
    else:
        (folder,) = convert(EMBEDDED / "target", place / "out", bits=4, group_size=32)
    return folder


def layers(module: nn.Module) -> set[str]:
    return {type(each).__name__ for _, each in module.named_modules()}


def test_the_values_are_the_same(quantised: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored = Checkpoint.open(quantised).weights()
    (model,) = load_target(Checkpoint.open(quantised)).modules()
    found = dict(tree_flatten(model.parameters()))
    checked = 0
    for name in [name for name in stored if name.endswith(".scales")]:
        stem = name.removesuffix("scales")
        parts = (stored[stem + part].astype(mx.float32) for part in ("scales", "biases"))
        expected = np.array(mx.dequantize(stored[stem + "weight"], *parts, 32, 4))
        same = [array for array in found.values() if array.shape == expected.shape and np.array_equal(array, expected)]
        assert same and same[0].dtype == mx.float32
        checked += 1
    assert checked > 5 and not any("Quantized" in name for name in layers(model))
    assert "the same values in float32" in caplog.text


def test_what_does_not_fit_stays_packed_and_is_called_slow(
    quantised: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    (model,) = load_target(Checkpoint.open(quantised)).modules()
    assert "QuantizedLinear" in layers(model) and "Expect a few tokens a second" in caplog.text
