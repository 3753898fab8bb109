"""Builds wheel and sdist from a copy of the checkout and checks what a user would get.

    .venv/bin/python tools/check_wheel.py [--out DIR]

The wheel is under 50 MB, holds the embedded model with all its drafters and the types' marker and nothing that is not
the package's; the sdist gives the same wheel; and `mlx-mtp generate` runs from the installed wheel, outside the
checkout. Needs setuptools and pip, and no index: the dependencies are those of the environment it runs in. A clean
environment is what .github/workflows/ci.yml makes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "mlx_mtp", "cli")
MOST_BYTES = 50_000_000
NEEDED = ("mlx_mtp/py.typed", "mlx_mtp/checkpoints/pairs.json", "mlx_mtp/cli/app.py",
          "mlx_mtp/freezing/hook-mlx_mtp.py")  # fmt: skip
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2])"


def copied(folder: Path) -> Path:
    """The sources alone: old build folders and a development link inside them would get into the wheel."""

    def left_out(inside: str, names: list[str]) -> list[str]:
        return [name for name in names if name == "__pycache__" or (Path(inside) / name).is_symlink()]

    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=left_out)
        else:
            shutil.copy(source, folder / name)
    return folder


def built(kind: str, source: Path, out: Path) -> Path:
    """The one file that the build backend makes: kind "wheel" or "sdist"."""
    out.mkdir(parents=True, exist_ok=True)
    run = subprocess.run([sys.executable, "-c", BUILD, kind, str(out)], cwd=source, capture_output=True, text=True)
    files = list(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))
    if run.returncode or len(files) != 1:
        sys.exit(f"The {kind} could not be built:\n{run.stdout}{run.stderr}")
    return files[0]


def held(wheel: Path) -> dict[str, int]:
    """Files of a wheel and their sizes, without its own records."""
    with zipfile.ZipFile(wheel) as opened:
        return {entry.filename: entry.file_size for entry in opened.infolist() if ".dist-info/" not in entry.filename}


def check_contents(wheel: Path) -> None:
    """Size, the embedded model as it stands in the checkout, and nothing else at the top."""
    size, found = wheel.stat().st_size, held(wheel)
    if size >= MOST_BYTES:
        sys.exit(f"Expected a wheel under {MOST_BYTES / 1e6:.0f} MB, found {size / 1e6:.1f} MB.")
    assets = ROOT / "mlx_mtp" / "assets"
    expected = {str(file.relative_to(ROOT)): file.stat().st_size for file in assets.rglob("*")
                if file.is_file() and file.name != ".DS_Store" and "__pycache__" not in file.parts}  # fmt: skip
    models = sorted({Path(name).parent.name for name in expected if name.endswith(".safetensors")})
    if not {"target", "assistant"} <= set(models):
        sys.exit(f"Expected the embedded target and its assistant in {assets}, found {models}.")
    lacking = [name for name, size in expected.items() if found.get(name) != size] + [*{*NEEDED} - found.keys()]
    if lacking:
        sys.exit(f"Expected {lacking[0]} in the wheel as it is in the checkout, found another or none.")
    if strange := [name for name in found if not name.startswith("mlx_mtp/") or "__pycache__" in name]:
        sys.exit(f"Expected nothing in the wheel but the package, found {strange[0]}.")
    print(f"{wheel.name}: {size / 1e6:.1f} MB, {len(found)} files, embedded: {', '.join(models)}")


def check_sdist(sdist: Path, wheel: Path, folder: Path) -> None:
    """The wheel built from the sdist holds the same files."""
    with tarfile.open(sdist) as opened:
        opened.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    again = built("wheel", source, folder / "again")
    if held(again) != held(wheel):
        sys.exit(f"{sdist.name} gives another wheel: {sorted(held(again).items() ^ held(wheel).items())[:3]}")
    print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB, gives the same wheel")


def check_installed(wheel: Path, folder: Path) -> None:
    """`mlx-mtp generate` with the embedded model, from the installed wheel, in a folder that is not the checkout."""
    place, elsewhere = folder / "installed", folder / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*pip, str(wheel)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "MLX_MTP_CACHE": str(elsewhere)}

    def said(*command: str) -> str:
        run = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{' '.join(command)} ended with {run.returncode}:\n{run.stdout}{run.stderr}")
        return run.stdout

    imported = said(sys.executable, "-c", "import mlx_mtp; print(mlx_mtp.__file__)").strip()
    if not Path(imported).resolve().is_relative_to(place.resolve()):
        sys.exit(f"Expected the installed package, found {imported}.")
    reply = json.loads(said(str(place / "bin" / "mlx-mtp"), "generate", "import os\n", "--raw", "--depth", "3",
                            "--max-tokens", "24", "--json"))  # fmt: skip
    if not reply["text"] or reply["stats"]["drafted"] == 0:
        sys.exit(f"Expected a reply made with drafts, found {reply}.")
    print(f"installed: mlx-mtp generate wrote {reply['stats']['tokens']} tokens, "
          f"{reply['stats']['tokens_per_round']:.2f} a round")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder that gets wheel and sdist")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mlx-mtp wheel ") as name:
        folder = Path(name)
        (folder / "source").mkdir()
        source = copied(folder / "source")
        sdist, wheel = built("sdist", source, folder / "out"), built("wheel", source, folder / "out")
        check_contents(wheel)
        check_sdist(sdist, wheel, folder / "sdist")
        check_installed(wheel, folder)
        if args.out:
            shutil.copytree(folder / "out", args.out, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
