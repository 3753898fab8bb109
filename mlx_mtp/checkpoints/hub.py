"""The Hugging Face hub: what a name stands for, its files on this disk, and every failure as one sentence.

Everything goes through huggingface_hub, so HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE mean what they mean
elsewhere, and other programs share the cache.

Invariant: `find` and `cached` never return a folder that lacks a file.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import huggingface_hub  # brings its parts only when they are used, but for these constants
from huggingface_hub import constants

from mlx_mtp.checkpoints import memory
from mlx_mtp.checkpoints.checkpoint import Checkpoint, lacking, read_config
from mlx_mtp.checkpoints.download import LargeFile, fetch_all, in_background
from mlx_mtp.errors import DoesNotFit, MLXMTPError, ModelNotFound
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


@dataclass(frozen=True)
class LoadProgress:
    """How far a load is: `what` is "download" or "load" (from disk into memory), `done` of `total` bytes."""

    what: str
    name: str
    done: int
    total: int


OnProgress = Callable[[LoadProgress], None]


def telling(what: str, name: str, on_progress: OnProgress | None) -> Callable[[int, int], None]:
    """What hears (bytes done, bytes in all) of a load and hands it on to whoever listens."""

    def tell(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(LoadProgress(what, name, done, total))

    return tell


@dataclass(frozen=True)
class Listing:
    """A source on the hub: the files that a model needs, at one commit. `name` is the hub's own spelling.

    large: those of `files` that the hub keeps by their content; the others are small, and in git.
    """

    name: str
    commit: str
    files: tuple[str, ...]
    large: tuple[LargeFile, ...]

    @property
    def bytes_to_come(self) -> int:
        """Bytes a download would fetch: without whole files and without what an interrupted one left."""
        return sum(file.size - file.bytes_here() for file in self.large)

    @cached_property
    def config(self) -> dict[str, Any]:
        with _refusals(self.name):
            file = huggingface_hub.hf_hub_download(self.name, "config.json", revision=self.commit, tqdm_class=_no_bar())
            return read_config(Path(file))

    def tensors(self) -> Iterator[tuple[str, str, int]]:
        """Name, type and bytes of every stored tensor, by the headers of the files; at least as much without them."""
        header_of = huggingface_hub.HfApi().parse_safetensors_file_metadata
        for file in self.large:
            if file.name.endswith(".safetensors"):
                try:
                    with _quiet():
                        header = header_of(self.name, file.name, revision=self.commit)
                except Exception as error:  # an estimate is enough
                    log.debug("the header of '%s' was not to be had: %s", file.name, error)
                    yield file.name, "BF16", file.size
                else:
                    for name, tensor in header.tensors.items():
                        yield name, tensor.dtype, tensor.data_offsets[1] - tensor.data_offsets[0]

    def fetch(self, on_progress: OnProgress | None = None) -> Checkpoint:
        """Fetches what is missing; Ctrl-C leaves what has come for later. ModelNotFound where the hub refuses or the
        network breaks for good, CheckpointError where what came is not what the hub announced."""
        with _refusals(self.name):
            by_http = [file for file in self.large if file.size <= LARGEST_BY_HTTP]
            fetch_all(by_http, telling("download", self.name, on_progress))
            # The small files, and the snapshot's layout around the large ones.
            folder = huggingface_hub.snapshot_download(
                self.name, allow_patterns=FILES, ignore_patterns=NO_FILES, tqdm_class=_no_bar(),
                library_name="mlx-mtp", library_version=__version__,
            )  # fmt: skip
        return Checkpoint.open(folder)


Source = Checkpoint | Listing  # a model whose files are here, or are to come


def find(name: str) -> Source:
    """A model's files here, or what the hub lists where its newest are not all here. Where the hub cannot be asked, a
    whole copy in the cache; ModelNotFound without one."""
    local = cached(name)
    try:
        # TimeoutError wherever it hangs, since a dead name server heeds no limit.
        listing = in_background(lambda: _listing(name)).result(PATIENCE if local else LONG_PATIENCE)
    except ModelNotFound:
        raise
    except Exception as error:  # huggingface_hub raises its own, its HTTP library's and OS errors
        if local is None:
            raise _explained(name, error) from error
        log.info("'%s': the hub could not be asked (%s); using the copy in %s.", name, type(error).__name__, local)
        return Checkpoint.open(local)
    snapshot = _storage(listing.name) / "snapshots" / listing.commit
    here = all((snapshot / file).is_file() for file in listing.files) and not lacking(snapshot)
    return Checkpoint.open(snapshot) if here else listing


def cached(name: str) -> Path | None:
    """The newest whole copy of a model in the hub's cache, without asking the hub."""
    snapshots = (_storage(name) / "snapshots").glob("*")
    newest_first = sorted(snapshots, key=lambda folder: folder.stat().st_mtime, reverse=True)
    revisions = ("main", *(folder.name for folder in newest_first))
    return next((folder for revision in revisions if (folder := _whole(name, revision))), None)


def started(name: str) -> bool:
    """Whether some of a model is in the cache, whole or not."""
    return any((_storage(name) / "blobs").glob("*"))


def hub_answers(seconds: float = GLANCE) -> bool:
    """Whether the hub can be reached now: one small request; no answer within `seconds` is a no."""
    with contextlib.suppress(Exception), _quiet():  # whatever it is, the hub did not answer
        session = huggingface_hub.get_session()
        answer = in_background(lambda: session.head(constants.ENDPOINT, timeout=seconds)).result(seconds)
        return bool(answer.status_code < 500)
    return False


def check_disk(names: str, needed: int) -> None:
    """Raises DoesNotFit where the disk of the hub's cache has less room than so many bytes of these models take."""
    cache = Path(constants.HF_HUB_CACHE)
    folder = next(place for place in (cache, *cache.parents) if place.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DoesNotFit(
            f"{names} needs {memory.readable(needed)} of free disk, more than the {memory.readable(free)} at {folder}; "
            "free some, set HF_HOME to a folder on another disk, or choose a smaller model ('mlx-mtp models')."
        )


# What the hub says


def _listing(name: str) -> Listing:
    from huggingface_hub.utils import filter_repo_objects

    with _quiet():
        api = huggingface_hub.HfApi(library_name="mlx-mtp", library_version=__version__)
        info = api.model_info(name, files_metadata=True, timeout=REQUEST_SECONDS)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    wanted = list(filter_repo_objects(siblings, allow_patterns=FILES, ignore_patterns=NO_FILES))
    if "config.json" not in wanted or not any(file.endswith(".safetensors") for file in wanted):
        raise ModelNotFound(
            f"'{name}' on the hub has no config.json with model*.safetensors; choose a repository in safetensors or "
            "MLX format (no GGUF, no adapter alone)."
        )
    name, commit = info.id if NAME.fullmatch(info.id) else name, str(info.sha)
    place, large = _storage(name), []
    for file in wanted:
        content = siblings[file].lfs
        if content and SHA256.fullmatch(sha256 := content.sha256):  # it names a path
            url = huggingface_hub.hf_hub_url(name, file, revision=commit)
            lock = place.parent / ".locks" / place.name / f"{sha256}.lock"
            large.append(LargeFile(file, url, int(siblings[file].size or 0), sha256, place / "blobs" / sha256, lock))
    return Listing(name, commit, tuple(wanted), tuple(large))


@contextlib.contextmanager
def _refusals(name: str) -> Iterator[None]:
    """Whatever huggingface_hub raises comes out as a sentence, and it says nothing by itself."""
    try:
        with _quiet():
            yield
    except MLXMTPError:
        raise
    except Exception as error:  # as in `find`
        raise _explained(name, error) from error


def _explained(name: str, error: BaseException) -> ModelNotFound:
    """Why a model could not be had, in a sentence that says what to do."""
    from huggingface_hub import errors

    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else None
    login = "log in with 'hf auth login' or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        why = f"has an owner who asks you to accept a licence first; accept it at {page} and {login}"
    elif isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError) or status == 404:
        why = f"is neither a folder nor a model on the hub; check the spelling, and if the model is private {login}"
    elif status in (401, 403):
        why = f"is not given out for your token ({status}); {login} with a valid one"
    elif status == 429:
        why = f"cannot be had, since the hub takes no more requests for now; wait some minutes, or {login}"
    elif status is not None:
        why = f"cannot be had, since the hub has a problem of its own ({status}); try again later"
    elif isinstance(error, errors.OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE:
        why = "has no whole copy on this disk; unset HF_HUB_OFFLINE to download it"
    elif isinstance(error, OSError) and error.errno:
        place = error.filename or constants.HF_HUB_CACHE
        why = f"cannot be had, since {place} cannot be written ({error.strerror}); check its rights and the free disk"
    else:
        why = (
            f"is no folder, and there is no way to {constants.ENDPOINT} ({type(error).__name__}); check the network: "
            "what has been downloaded is kept, and the same command goes on from there"
        )
    return ModelNotFound(f"'{name}' {why}.")


# The cache


def _storage(name: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _whole(name: str, revision: str) -> Path | None:
    """The snapshot of a revision, where it has all its files as far as anything here tells."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    # Of a name that the hub does not allow, and bytes in refs that are no UTF-8, comes a ValueError, and of a user
    # without a home a RuntimeError.
    with contextlib.suppress(LocalEntryNotFoundError, ValueError, RuntimeError), _quiet():
        # Compares with the hub's listing, where the download that made the snapshot kept it.
        found = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=FILES, ignore_patterns=NO_FILES
        )
        return None if lacking(Path(found)) else Path(found)
    return None


def _no_bar() -> Any:
    """A progress bar of huggingface_hub that is never shown: what matters comes by on_progress."""
    from huggingface_hub.utils import tqdm

    class Hidden(tqdm):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **{**named, "disable": True})

    return Hidden


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
