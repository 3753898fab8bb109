"""mlx_mtp.backend.blas: what it finds, in what order, and that MLX really uses it.

The library is global to a process and must be loaded before MLX, so the tests that load one use a fresh process.
"""

import ctypes
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlx_mtp.backend import blas

LINUX = sys.platform.startswith("linux")
FILE = Path(blas.__file__)
# Loads blas.py by its path: importing the package would load the BLAS, and MLX, before the test can look.
IMPORT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("mlx_mtp.backend.blas", {str(FILE)!r})
blas = importlib.util.module_from_spec(spec)
spec.loader.exec_module(blas)
"""


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", IMPORT + code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def has_fast_blas() -> bool:
    return LINUX and any(blas._open(path) for path in blas._candidates())


linux = pytest.mark.skipif(not LINUX, reason="Linux only")
needs_fast_blas = pytest.mark.skipif(not has_fast_blas(), reason="no OpenBLAS or MKL on this machine")


@needs_fast_blas
def test_mlx_calls_land_in_the_library_that_was_loaded_before_it() -> None:
    """dlsym over the global scope answers as the linker does when it binds MLX."""
    loaded, again, imported, same, product = run(
        "import ctypes\n"
        "print(blas.load_fast_blas())\n"
        "blas._candidates = None\n"  # would raise if it were called
        "print(blas.load_fast_blas())\n"
        "print('mlx' in sys.modules or 'mlx.core' in sys.modules)\n"
        "import mlx.core as mx\n"
        "path = blas.name().rsplit('(', 1)[1].rstrip(')')\n"
        "address = lambda library: ctypes.cast(library.cblas_sgemm, ctypes.c_void_p).value\n"
        "print(address(ctypes.CDLL(None)) == address(ctypes.CDLL(path)))\n"
        "ones = mx.ones((64, 64))\n"
        "print(bool(mx.all(mx.matmul(ones, ones, stream=mx.cpu) == 64)))"
    )
    assert loaded == again and loaded.startswith(("OpenBLAS ", "MKL ")) and loaded.endswith(")")
    assert (imported, same, product) == ("False", "True", "True")


INTEL, AMD = "vendor_id : GenuineIntel\n", "vendor_id : AuthenticAMD\n"
ALL = "fpu sse sse2 sse3 ssse3 sse4_1 sse4_2 avx fma avx2 avx512f avx512bw avx512cd avx512dq avx512vl"


@pytest.mark.parametrize(
    ("cpuinfo", "kernels"),
    [
        (f"{INTEL}flags : {ALL} avx512_bf16", "SkylakeX"), (f"{AMD}flags : {ALL}", "SkylakeX"),
        (f"{INTEL}flags : fpu sse avx fma avx2 avx512f", "Haswell"), (f"{AMD}flags : fpu sse avx fma avx2", "Zen"),
        (f"{INTEL}flags : fpu sse sse2 avx", None), ("Features : fp asimd evtstrm", None), ("", None),
    ],
)  # fmt: skip
def test_kernels_for_a_processor(cpuinfo: str, kernels: str | None) -> None:
    assert blas.core_type(cpuinfo) == kernels


@needs_fast_blas
def test_openblas_uses_kernels_that_fit_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself it takes its oldest ones for a processor that is newer than it. A choice of the user's stands."""
    monkeypatch.delenv(blas.CORE_TYPE, raising=False)
    (name, left) = run("import os\nprint(blas.load_fast_blas())\nprint(os.environ.get(blas.CORE_TYPE))")
    assert left == "None"
    if name.startswith("OpenBLAS") and blas.core_type(Path("/proc/cpuinfo").read_text()):
        assert "prescott" not in name.lower()
        monkeypatch.setenv(blas.CORE_TYPE, "Prescott")
        assert "prescott" in run("print(blas.load_fast_blas())")[0].lower()


@linux
def test_says_so_when_mlx_came_first() -> None:
    lines = run("import mlx.core\nprint(blas.load_fast_blas())\nprint(blas.name())")
    assert lines == ["None", blas.TOO_LATE if has_fast_blas() else blas.REFERENCE]


@linux
def test_nothing_to_find(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_loaded", None)
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(blas, "_candidates", lambda: iter(["/nowhere/libopenblas.so.0"]))
    assert blas.load_fast_blas() is None and blas.name() == blas.REFERENCE


@linux
def test_a_library_without_cblas_is_refused() -> None:
    assert isinstance(ctypes.CDLL("libm.so.6"), ctypes.CDLL)
    assert blas._open("libm.so.6") is None


def test_nothing_is_loaded_outside_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_loaded", None)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(blas, "_candidates", lambda: pytest.fail("looked for a library"))
    assert blas.load_fast_blas() is None
    assert "Accelerate" in blas.name()


@linux
def test_where_it_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The threaded builds of distributions first, then the environment's OpenBLAS, then MKL, the newest first."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(sys, "base_prefix", "/base")
    found = list(blas._candidates())
    assert found[0].endswith("-linux-gnu/openblas-pthread/libopenblas.so.0")
    assert found[1:5] == ["libopenblasp.so.0", "libopenblas.so.0", f"{tmp_path}/lib/libopenblas.so.0",
                          "/base/lib/libopenblas.so.0"]  # fmt: skip
    assert found[5:] == [name.format(version) for version in (3, 2) for name in (
        f"{tmp_path}/lib/libmkl_rt.so.{{}}", "/base/lib/libmkl_rt.so.{}", "libmkl_rt.so.{}")]  # fmt: skip
    assert blas._open(str(tmp_path / "libopenblas.so.0")) is None and blas._load(str(tmp_path / "none.so")) is None


def test_names_of_libraries() -> None:
    def version(buffer: ctypes.Array[ctypes.c_char], size: int) -> None:
        assert size == len(buffer)
        buffer.value = b"Intel(R) oneAPI Math Kernel Library Version 2024.2-Product Build 20240605"

    assert blas._version(SimpleNamespace(mkl_get_version_string=version)) == "MKL 2024.2"  # type: ignore[arg-type]
    assert blas._version(object()) == "BLAS"  # type: ignore[arg-type]


@linux
def test_run_by_its_path_it_prints_what_it_found() -> None:
    """tools/setup.sh asks this way."""
    done = subprocess.run([sys.executable, "-P", str(FILE)], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0 if has_fast_blas() else 1, "")
    assert done.stdout.startswith(("OpenBLAS ", "MKL ")) if has_fast_blas() else done.stdout.strip() == blas.REFERENCE
