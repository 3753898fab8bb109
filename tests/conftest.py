"""Shared fixtures. The environment comes first, then mlx_mtp, which loads the fast BLAS before anything imports MLX."""

import workers  # isort: skip  # noqa: F401
import mlx_mtp  # isort: skip  # noqa: F401

import atexit
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401

from mlx_mtp.checkpoints.packaged import PackagedModel
from mlx_mtp.engine import Engine
from mlx_mtp.generation import exactness

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ("ple", "keqv", "moe", "unified")
Command = Callable[..., tuple[int, str, str]]
HEADS = ("tied", "centroid")
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


@contextmanager
def uncompiled() -> Iterator[None]:
    """Rounds built anew each time: compiling kernels for sizes that are used once would take most of the time."""
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()


def ran(*args: object, stdin: bytes | None = None) -> int:
    """`mlx-mtp ARGS` in this process, without a network; the exit code. stdin: what is piped into it."""
    from mlx_mtp.cli import app

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(sys, "argv", ["mlx-mtp", *map(str, args)])
        if stdin is not None:
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        app.main()
    return int(end.value.code or 0)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """`ran` with what it wrote: exit code, stdout, stderr."""

    def call(*args: object, stdin: bytes | None = None) -> tuple[int, str, str]:
        capsys.readouterr()
        return ran(*args, stdin=stdin), *capsys.readouterr()

    return call


@pytest.fixture(scope="session")
def embedded() -> Engine:
    """The embedded pair, drafting 2 tokens a round."""
    return mlx_mtp.load(depth=2)


def one_sentence(code: int, out: str, err: str) -> str:
    """A refusal of the command line, checked."""
    assert code == 2, (code, out, err)
    assert out == ""
    assert err.endswith(".\n") and err.count("\n") == 1 and 20 < len(err) < 700, err
    assert "Traceback" not in err
    return err


def refusal(call: Callable[[], object], kind: type[mlx_mtp.MLXMTPError] = mlx_mtp.MLXMTPError) -> str:
    """The sentence in which a call is refused, checked."""
    with pytest.raises(kind) as caught:
        call()
    sentence = str(caught.value)
    assert sentence.endswith((".", ")")) and "\n" not in sentence and 30 < len(sentence) < 900, sentence
    assert "Traceback" not in sentence
    return sentence


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model of that name, not fetched yet."""
    from gguf_files import packaged_model

    return packaged_model(tmp_path, monkeypatch)


@pytest.fixture(autouse=True)
def nothing_remembered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What exact mode found in one test does not answer for another, which may have changed the weights since."""
    if request.node.get_closest_marker("remembering") is None:
        monkeypatch.setattr(exactness.ProbeFile, "load", lambda self: {})


# What the depth control learns in tests is nobody's business.
os.environ["MLX_MTP_CACHE"] = tempfile.mkdtemp(prefix="mlx-mtp-tests-")
atexit.register(shutil.rmtree, os.environ["MLX_MTP_CACHE"], ignore_errors=True)
