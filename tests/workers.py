"""The environment of a test process, whether it is pytest itself or one of several workers of pytest-xdist.

What importing it does, on Linux: one BLAS thread for each worker; and a folder of its own for the fused kernels that
MLX's CPU device builds with g++: processes that run at the same time must not share it, as one may load a library while
another still writes it. A fresh machine builds hundreds of kernels, each of which reads the same large header, so that
header is compiled once: g++ looks for it beside the kernels' sources first, and passes over one it cannot use. What it
does not do: change a kernel, or import MLX, which must come later.
"""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HEADER = Path("mlx", "backend", "cpu", "compiled_preamble.h")


def own_folder(worker: str) -> None:
    """The temporary directory of this process, and of those that it starts, is one for `worker`; it is kept."""
    prefix, place = f"mlx-mtp-tests-{os.getuid()}-", Path(tempfile.gettempdir())
    # pytest-xdist's controller has been here before its workers, which inherit what it set.
    folder = (place.parent if place.name.startswith(prefix) else place) / f"{prefix}{worker}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid == os.getuid():
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)


def compile_header() -> None:
    """The kernels' header, for the MLX that is installed; nothing where there is no g++ or no header."""
    spec = importlib.util.find_spec("mlx")
    includes = [Path(place, "include") for place in (spec and spec.submodule_search_locations) or ()]
    include = next((place for place in includes if (place / HEADER).is_file()), None)
    if include is None or shutil.which("g++") is None:
        return
    kernels = Path(tempfile.gettempdir(), "mlx", importlib.metadata.version("mlx"), "cpu")
    compiled = kernels / HEADER.with_suffix(".h.gch")
    if compiled.exists():
        return
    compiled.parent.mkdir(parents=True, exist_ok=True)
    # MLX's own options: a header compiled with others would not be taken.
    command = ["g++", "-std=c++17", "-O3", "-Wall", "-fPIC", "-I", include, "-x", "c++-header", include / HEADER]
    fresh = compiled.with_name(f"{os.getpid()}.gch")
    if subprocess.run([*command, "-o", fresh], stderr=subprocess.DEVNULL, check=False).returncode == 0:
        fresh.replace(compiled)


def share_the_cores() -> None:
    """One BLAS thread for each worker and for what it starts: two times two of them on two cores are slow."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            os.environ.setdefault(name, "1")


if sys.platform.startswith("linux"):
    own_folder(os.environ.get("PYTEST_XDIST_WORKER", "main"))
    compile_header()
    share_the_cores()
