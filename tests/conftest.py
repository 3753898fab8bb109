"""Shared fixtures. The environment comes first, then mlx_mtp, which loads the fast BLAS before anything imports MLX."""

import workers  # isort: skip  # noqa: F401
import mlx_mtp  # isort: skip  # noqa: F401

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401

from mlx_mtp.checkpoints.packaged import PackagedModel
from mlx_mtp.generation import exactness
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.generation.probe_file import ProbeFile

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("ple", "keqv", "moe", "unified")
HEADS = ("tied", "centroid")
PROBED: dict[tuple[Path | None, int], exactness.Exactness] = {}


@pytest.fixture(params=VARIANTS)
def golden(request: pytest.FixtureRequest) -> tuple[Path, dict[str, np.ndarray]]:
    """A reference model's folder and the arrays transformers computed for it (float32)."""
    folder = GOLDEN / request.param
    return folder, dict(np.load(folder / "reference.npz"))


@pytest.fixture(scope="session", autouse=True)
def commands_without_torch() -> None:
    """The commands that tests start find no torch (children/sitecustomize.py); a worker itself may need it."""
    paths = str(Path(__file__).parent / "children"), os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@pytest.fixture
def probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe for exact mode takes seconds and says the same of one checkpoint every time: it is run once."""
    real = exactness.probe

    def probe(target: Target, capacity: int) -> exactness.Exactness:
        key = target.path, capacity
        if key not in PROBED:
            PROBED[key] = real(target, capacity)
        return PROBED[key]

    monkeypatch.setattr(exactness, "probe", probe)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model of that name, not fetched yet (packages.py)."""
    from packages import packaged_model

    return packaged_model(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def nothing_remembered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exact mode found in one test does not answer for another, which may have changed the weights since."""
    if request.node.get_closest_marker("remembering") is None:
        monkeypatch.setattr(ProbeFile, "load", lambda self: {})


# What the depth control learns in tests is nobody's business.
os.environ["MLX_MTP_CACHE"] = tempfile.mkdtemp(prefix="mlx-mtp-tests-")
atexit.register(shutil.rmtree, os.environ["MLX_MTP_CACHE"], ignore_errors=True)
