"""A fast BLAS for MLX's CPU device on Linux.

MLX's Linux CPU wheel brings the reference BLAS, whose float32 products take 15 to 50 times as long as they need to. A
fast one that is loaded with global symbols before MLX is imported gets MLX's calls, because the dynamic linker takes
the first library that offers a name. On macOS nothing is done: MLX uses Accelerate and Metal.

OpenBLAS gives a processor that is newer than itself its oldest kernels, a fifth as fast as those that fit (0.3.21 on an
Emerald Rapids: 30 in place of 145 GFLOP/s). So it is told which fit, unless OPENBLAS_CORETYPE is set.

`python -P mlx_mtp/backend/blas.py` prints what was found and exits 1 if that is nothing (tools/setup.sh asks this way).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

REFERENCE = "reference BLAS bundled with MLX (slow: install libopenblas0-pthread)"
TOO_LATE = "reference BLAS bundled with MLX (slow: import mlx_mtp before mlx)"

CORE_TYPE = "OPENBLAS_CORETYPE"  # OpenBLAS reads it while it is loaded
AVX512 = {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# The loaded library stays in the process for good, so what was loaded is remembered for good.
_loaded: str | None = None
_library: ctypes.CDLL | None = None


def load_fast_blas() -> str | None:
    """Loads OpenBLAS or MKL for MLX to use and returns its name, or None where there is none (or no need of one).

    Call it before `import mlx.core`: that import binds MLX to its own BLAS, and nothing loaded later changes it.
    """
    global _loaded
    if _loaded is None and sys.platform.startswith("linux") and "mlx.core" not in sys.modules:
        with _fitting_kernels():
            _loaded = next(filter(None, map(_load, _candidates())), None)
    return _loaded


def name() -> str:
    """The BLAS in use, for reports."""
    if sys.platform == "darwin":
        return "Accelerate on the CPU, Metal on the GPU"
    if _loaded is None and "mlx.core" in sys.modules and any(map(_open, _candidates())):
        return TOO_LATE
    return _loaded or REFERENCE


def use_threads(count: int) -> int | None:
    """A product that begins now takes at most so many threads; returns how many it took before, None where that is not
    ours to set (no OpenBLAS)."""
    if _library is None or not hasattr(_library, "openblas_set_num_threads"):
        return None
    before = int(_library.openblas_get_num_threads())
    _library.openblas_set_num_threads(count)
    return before


def core_type(cpuinfo: str) -> str | None:
    """OpenBLAS's name of the kernels for the processor that /proc/cpuinfo describes; None to let it choose."""
    flags = set(next((line for line in cpuinfo.splitlines() if line.startswith("flags")), "").split())
    if flags >= AVX512:
        return "SkylakeX"
    if flags >= {"avx2", "fma"}:
        return "Zen" if "AuthenticAMD" in cpuinfo else "Haswell"
    return None


@contextlib.contextmanager
def _fitting_kernels() -> Iterator[None]:
    """Names the kernels to OpenBLAS while the block runs; NumPy's copy and later programs choose for themselves."""
    wanted = None
    if CORE_TYPE not in os.environ:
        with contextlib.suppress(OSError):
            wanted = core_type(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace"))
    if wanted is not None:
        os.environ[CORE_TYPE] = wanted
    try:
        yield
    finally:
        if wanted is not None:
            del os.environ[CORE_TYPE]


def _candidates() -> Iterator[str]:
    """Where a fast BLAS may be: full paths, or sonames for the dynamic linker to find. Threaded builds come first."""
    # Debian and Ubuntu: x86_64-linux-gnu, aarch64-linux-gnu.
    yield f"/usr/lib/{platform.machine()}-linux-gnu/openblas-pthread/libopenblas.so.0"
    yield "libopenblasp.so.0"  # Fedora: plain libopenblas.so.0 is the one-threaded build there
    yield "libopenblas.so.0"
    # A conda environment, then the PyPI wheel `mkl`; base_prefix is the conda environment a venv was made from.
    folders = [f"{prefix}/lib/" for prefix in dict.fromkeys([sys.prefix, sys.base_prefix])]
    yield from (folder + "libopenblas.so.0" for folder in folders)
    yield from (f"{folder}libmkl_rt.so.{version}" for version in (3, 2) for folder in [*folders, ""])


def _open(path: str) -> ctypes.CDLL | None:
    """Opens a library if it is there and has what MLX calls, without offering its symbols to anyone yet."""
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    # NumPy's and SciPy's own copies of OpenBLAS prefix every name: useless here.
    return library if hasattr(library, "cblas_sgemm") else None


def _load(path: str) -> str | None:
    """Loads a library with global symbols; returns its name, or None if it is not there or not suitable."""
    global _library
    if (library := _open(path)) is None:
        return None
    # Opening a loaded library again only adds its symbols to the global scope.
    _library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    return f"{_version(library)} ({path})"


def _version(library: ctypes.CDLL) -> str:
    if hasattr(library, "openblas_get_config"):
        for ask in (library.openblas_get_config, library.openblas_get_corename):
            ask.restype = ctypes.c_char_p
        # "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ...": the rest is build options. The kernels decide speed and bits.
        return " ".join([*library.openblas_get_config().decode().split()[:2], library.openblas_get_corename().decode()])
    if hasattr(library, "mkl_get_version_string"):
        buffer = ctypes.create_string_buffer(200)
        library.mkl_get_version_string(buffer, len(buffer))
        # "Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build ...": the number is what matters.
        return "MKL " + buffer.value.decode().partition("Version ")[2].split("-")[0].strip()
    return "BLAS"


if __name__ == "__main__":
    found = load_fast_blas()
    print(name())
    sys.exit(0 if found or sys.platform == "darwin" else 1)
