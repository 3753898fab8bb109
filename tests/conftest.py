"""Shared fixtures. mlx_mtp comes first: it loads the fast BLAS before anything imports MLX."""

import mlx_mtp  # isort: skip  # noqa: F401

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("ple", "keqv", "moe", "unified")
HEADS = ("tied", "centroid")


@pytest.fixture(params=VARIANTS)
def golden(request: pytest.FixtureRequest) -> tuple[Path, dict[str, np.ndarray]]:
    """A reference model's folder and the arrays transformers computed for it (float32)."""
    folder = GOLDEN / request.param
    return folder, dict(np.load(folder / "reference.npz"))

# What the depth control learns in tests is nobody's business.
os.environ["MLX_MTP_CACHE"] = tempfile.mkdtemp(prefix="mlx-mtp-tests-")
