"""The Hugging Face hub: what a name stands for, its files on this disk, and every failure as one sentence.

What it does: finds a whole copy in the hub's local cache, asks the hub what is newest, downloads what is missing and
goes on where an earlier attempt broke off. What it does not do: know pairs (pairs.py) or read tensors.

Everything goes through huggingface_hub, so HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean
elsewhere, and other programs share the cache. Only large files are fetched by fetch.py, which can go on where it
broke off, into the places where huggingface_hub looks for them; it does the rest.

Invariant: `find` and `cached` never return a folder that lacks a file.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mlx_mtp.checkpoints import memory
from mlx_mtp.checkpoints.checkpoint import INDEX, missing_shards, read_json, section, visible
from mlx_mtp.checkpoints.download import Job, fetch
from mlx_mtp.errors import CheckpointError, DoesNotFit, ModelNotFound
from mlx_mtp.version import __version__

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SHA256 = re.compile(r"[0-9a-f]{64}")
FILES = ["*.json", "model*.safetensors", "tokenizer.model", "*.jinja"]
NO_FILES = ["*/*", ".*"]  # folders inside a repository hold other formats of the same model
# Seconds to wait for the hub's answer: when a whole copy is here anyway, when there is none, and to see if it is there.
PATIENCE, LONG_PATIENCE, GLANCE = 4.0, 30.0, 2.0
REQUEST_SECONDS = 10.0  # of one request without a byte
LARGEST_BY_HTTP = 50 * 10**9  # the hub serves larger files by its own protocol only, which huggingface_hub speaks

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Progress:
    """How far a load is: `what` is "download" or "load" (from disk into memory), `done` of `total` bytes."""

    what: str
    name: str
    done: int
    total: int


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class RemoteFile:
    """A file on the hub; sha256 for large ones, which the hub keeps by their content."""

    name: str
    size: int
    sha256: str | None


@dataclass(frozen=True)
class Listing:
    """The files that a model on the hub needs, at one commit. `name` is the hub's own spelling."""

    name: str
    commit: str
    files: tuple[RemoteFile, ...]

    @property
    def snapshot(self) -> Path:
        """The folder in the local cache where these files are or will be."""
        return _storage(self.name) / "snapshots" / self.commit

    def missing(self) -> list[RemoteFile]:
        """Files that are not in the cache yet."""
        blobs = _storage(self.name) / "blobs"
        return [
            file for file in self.files
            if not (self.snapshot / file.name).is_file() and not (file.sha256 and (blobs / file.sha256).is_file())
        ]  # fmt: skip

    def jobs(self) -> list[Job]:
        """The missing files that fetch.py takes: all but small ones, which are in git, and those no plain GET gets."""
        from huggingface_hub import hf_hub_url

        storage = _storage(self.name)
        locks = storage.parent / ".locks" / storage.name
        return [
            Job(
                file.name, hf_hub_url(self.name, file.name, revision=self.commit), file.size, file.sha256,
                storage / "blobs" / file.sha256, locks / f"{file.sha256}.lock",
            )
            for file in self.missing() if file.sha256 and file.size <= LARGEST_BY_HTTP
        ]  # fmt: skip

    def bytes_to_come(self) -> int:
        """Bytes a download would fetch: without whole files and without what an interrupted one left."""
        return sum(file.size for file in self.missing()) - sum(job.part_size() for job in self.jobs())

    def weight_bytes(self, exact: bool) -> int:
        """Memory of the weights: an upper bound by the files' sizes, or by their headers, which takes some requests."""
        weights = [file for file in self.files if file.name.endswith(".safetensors")]
        bound = sum(file.size for file in weights)
        if exact:
            try:
                return memory.held_bytes(_remote_tensors(self, weights))
            except Exception as error:  # an estimate is enough
                log.debug("headers of '%s' were not to be had: %s", self.name, error)
                return bound
        return bound * memory.CPU_HALF_FACTOR if memory.on_cpu() else bound


def find(name: str) -> Path | Listing:
    """A model's folder, or what the hub lists where its newest files are not all here.

    A whole copy in the cache is used when the hub cannot be asked (no network, HF_HUB_OFFLINE, an error of the hub).
    Raises ModelNotFound where there is neither.
    """
    local = cached(name)
    try:
        listing = _within(PATIENCE if local else LONG_PATIENCE, lambda: _listing(name))
    except ModelNotFound:
        raise
    except Exception as error:  # huggingface_hub raises its own, its HTTP library's and OS errors
        if local is None:
            raise _explained(name, error) from error
        log.info("'%s': the hub could not be asked (%s); using the copy in %s.", name, type(error).__name__, local)
        return local
    return listing if listing.missing() or not _whole(listing.name, listing.commit) else listing.snapshot


def download(listing: Listing, on_progress: OnProgress | None = None) -> Path:
    """Fetches what is missing of a listing and returns its folder; `check_disk` first.

    on_progress is called in the caller's thread, some times a second. Ctrl-C leaves what has come for the next time.
    Raises ModelNotFound where the hub refuses or the network breaks for good, CheckpointError where what came is not
    what the hub announced.
    """

    def tell(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(Progress("download", listing.name, done, total))

    try:
        with _quiet():
            fetch(listing.jobs(), tell)
            return _complete(listing)
    except CheckpointError:
        raise
    except Exception as error:  # as in `find`
        raise _explained(listing.name, error) from error


def cached(name: str) -> Path | None:
    """The newest whole copy of a model in the hub's cache, without asking the hub; None where there is none."""
    snapshots = _storage(name) / "snapshots"
    try:
        newest = (_storage(name) / "refs" / "main").read_text().strip()
    except (OSError, ValueError):  # ValueError: bytes that are no UTF-8
        newest = ""
    there = sorted(snapshots.glob("*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    commits = [folder.name for folder in there if folder.name != newest]
    return next((snapshots / commit for commit in (newest, *commits) if commit and _whole(name, commit)), None)


def started(name: str) -> bool:
    """Whether some of a model is in the cache, whole or not."""
    return any((_storage(name) / "blobs").glob("*"))


def hub_answers(seconds: float = GLANCE) -> bool:
    """Whether the hub can be reached now: one small request; no answer within `seconds` is a no.

    False at once under HF_HUB_OFFLINE. Meant for `chat`, which offers a download only where one is possible.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    def ask() -> bool:
        answer = get_session().head(constants.ENDPOINT, timeout=seconds)
        return bool(answer.status_code < 500)

    try:
        with _quiet():
            return _within(seconds, ask)
    except Exception as error:  # whatever it is, the hub did not answer
        log.debug("the hub does not answer: %s", error)
        return False


def check_disk(listings: Sequence[Listing]) -> None:
    """Raises DoesNotFit where the disk of the hub's cache has less room than the downloads take."""
    from huggingface_hub import constants

    needed = sum(listing.bytes_to_come() for listing in listings)
    folder = Path(constants.HF_HUB_CACHE)
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        names = " and ".join(f"'{listing.name}'" for listing in listings)
        raise DoesNotFit(
            f"Expected {memory.readable(needed)} of free disk for {names}, found {memory.readable(free)} at {folder}; "
            "free some, set HF_HOME to a folder on another disk, or choose a smaller model ('mlx-mtp models')."
        )


# What the hub says


def _listing(name: str) -> Listing:
    from huggingface_hub import HfApi
    from huggingface_hub.utils import filter_repo_objects

    with _quiet():
        info = HfApi(library_name="mlx-mtp", library_version=__version__).model_info(
            name, files_metadata=True, timeout=REQUEST_SECONDS
        )
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    wanted = list(filter_repo_objects(siblings, allow_patterns=FILES, ignore_patterns=NO_FILES))
    if "config.json" not in wanted or not any(file.endswith(".safetensors") for file in wanted):
        raise ModelNotFound(
            f"Expected config.json and model*.safetensors in '{name}' on the hub, found none; choose a repository in "
            "safetensors or MLX format (no GGUF, no adapter alone)."
        )
    files = []
    for file in wanted:
        content = getattr(siblings[file].lfs, "sha256", None)  # None for a small file; names a path, so no other form
        digest = content if isinstance(content, str) and SHA256.fullmatch(content) else None
        files.append(RemoteFile(file, int(siblings[file].size or 0), digest))
    return Listing(info.id if NAME.fullmatch(info.id) else name, str(info.sha), tuple(files))


def _remote_tensors(listing: Listing, files: Sequence[RemoteFile]) -> Iterator[tuple[str, str, int]]:
    from huggingface_hub import HfApi

    for file in files:
        header = HfApi().parse_safetensors_file_metadata(listing.name, file.name, revision=listing.commit)
        for name, tensor in header.tensors.items():
            yield name, tensor.dtype, tensor.data_offsets[1] - tensor.data_offsets[0]


def _explained(name: str, error: BaseException) -> ModelNotFound:
    """Why a model could not be had, in a sentence that says what to do."""
    from huggingface_hub import constants, errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    expected = f"Expected a folder or a model on the Hugging Face hub at '{name}', found"
    page = f"{constants.ENDPOINT}/{name}"
    login = "log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return ModelNotFound(
            f"{expected} one whose owner asks you to accept a licence first; accept it at {page} and {login}."
        )
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return ModelNotFound(f"{expected} neither; check the spelling, and if the model is private {login}.")
    if status in (401, 403):
        return ModelNotFound(f"{expected} that the hub refuses your token ({status}); {login} with a valid one.")
    if status == 429:
        return ModelNotFound(f"{expected} that the hub takes no more requests for now; wait some minutes, or {login}.")
    if status is not None:
        return ModelNotFound(f"{expected} that the hub has a problem of its own ({status}); try again later.")
    if isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        return ModelNotFound(f"{expected} no whole copy on this disk; unset HF_HUB_OFFLINE to download it.")
    if isinstance(error, errors.HFValidationError):
        return ModelNotFound(f"{expected} neither; the hub allows no such name.")
    if isinstance(error, OSError) and error.errno:
        return ModelNotFound(
            f"{expected} that {error.filename or constants.HF_HUB_CACHE} cannot be written ({error.strerror}); "
            "check its rights and the free disk."
        )
    return ModelNotFound(
        f"{expected} no such folder and no way to {constants.ENDPOINT} ({type(error).__name__}); check the network: "
        "what has been downloaded is kept, and the same command goes on from there."
    )


# The cache


def _storage(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _whole(name: str, commit: str) -> bool:
    """Whether a snapshot has all its files, as far as anything here tells."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:  # compares with the hub's listing, where the download that made the snapshot kept it
        with _quiet():
            found = snapshot_download(
                name, revision=commit, local_files_only=True, allow_patterns=FILES, ignore_patterns=NO_FILES
            )
    except (LocalEntryNotFoundError, ValueError):
        return False
    return not lacking(Path(found))


def lacking(folder: Path) -> list[str]:
    """Files that a checkpoint's other files say there must be, and are not: weights, shards, config.json."""
    weights = [file.name for file in visible(folder.glob("*.safetensors")) if file.is_file()]
    wanted = ["config.json", *missing_shards(weights)]
    try:
        if (folder / INDEX).is_file():
            wanted += [str(shard) for shard in section(read_json(folder / INDEX), "weight_map", INDEX).values()]
    except CheckpointError:
        wanted.append(INDEX)
        return wanted
    if not weights:
        wanted.append("model.safetensors")
    return sorted({name for name in wanted if not (folder / name).is_file()})


def _complete(listing: Listing) -> Path:
    """Lets huggingface_hub fetch the small files and lay out the snapshot; the large ones are in its cache already."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **{**named, "disable": True})

    folder = Path(
        snapshot_download(
            listing.name, allow_patterns=FILES, ignore_patterns=NO_FILES, tqdm_class=Silent,
            library_name="mlx-mtp", library_version=__version__,
        )
    )  # fmt: skip
    if missing := lacking(folder):
        raise CheckpointError(
            f"{folder}: expected the whole of '{listing.name}', found no {', '.join(missing[:3])}; download it again."
        )
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """huggingface_hub's own log stays silent: what matters comes as an error or by on_progress."""
    from huggingface_hub.utils import logging as hub_logging

    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


def _within(seconds: float, call: Callable[[], Returned]) -> Returned:
    """The call's result; TimeoutError after so many seconds, wherever it hangs (a dead name server heeds no limit)."""
    result: list[Returned] = []
    failure: list[Exception] = []
    ended = threading.Event()

    def run() -> None:
        try:
            result.append(call())
        except Exception as error:
            failure.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, daemon=True).start()
    if not ended.wait(seconds):
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    if failure:
        raise failure[0]
    return result[0]
