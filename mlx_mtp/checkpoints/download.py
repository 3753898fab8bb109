"""Large files of the hub into its local cache: some at once, and from where an earlier attempt broke off.

What it does: HTTP requests for the rest of a file, retries, checksums, final names. What it does not do: know models
(hub.py) or say in words what went wrong.

huggingface_hub would fetch these files too, but drops what has come when its process ends half-way (its issue 4196,
still so in 2.4). The part files are named as it named them when it could resume, and share its locks.

Invariant: a file has its final name only when its SHA-256 is the one the hub announced.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from mlx_mtp.errors import CheckpointError
from mlx_mtp.version import __version__

AT_ONCE = 4  # files; more do not make a fast line faster
RETRIES, RETRY_SECONDS = 5, 1.0  # attempts in a row that brought nothing, and the pause after each
TICK_SECONDS = 0.1  # between two reports


@dataclass(frozen=True)
class Job:
    """A file to fetch: its address, its size in bytes, its SHA-256, its place in the cache and its lock there."""

    name: str
    url: str
    size: int
    sha256: str
    place: Path
    lock: Path

    @property
    def part(self) -> Path:
        """What has come of it so far."""
        return self.place.with_name(self.place.name + ".incomplete")

    def part_size(self) -> int:
        """Bytes that need not come again; 0 where the part is longer than the file, and so is not one of it."""
        try:
            size = self.part.stat().st_size
        except OSError:
            return 0
        return size if size <= self.size else 0


def fetch(jobs: Sequence[Job], tell: Callable[[int, int], None]) -> None:
    """Fetches all files; `tell` hears (bytes there, bytes in all) in this thread, some times a second.

    The first failure stops all and is raised; what has come stays for the next time, after an interrupt too.
    """
    stop = threading.Event()
    running = [_Running(job, stop) for job in jobs]
    waiting, failures = list(reversed(running)), list[Exception]()
    total = sum(job.size for job in jobs)

    def work() -> None:
        while waiting and not stop.is_set():
            try:
                waiting.pop().run()
            except IndexError:  # another worker took the last one
                return
            except Exception as error:
                failures.append(error)
                stop.set()

    # Daemons, so that Ctrl-C and the end of the program need not wait for the network.
    workers = [threading.Thread(target=work, daemon=True) for _ in jobs[:AT_ONCE]]
    try:
        for worker in workers:
            worker.start()
        while alive := [worker for worker in workers if worker.is_alive()]:
            tell(sum(file.done for file in running), total)
            alive[0].join(TICK_SECONDS)
    finally:
        stop.set()
    if failures:
        raise failures[0]
    if jobs:
        tell(total, total)


class _Running:
    """One file on its way; `done` is how much of it is on the disk."""

    def __init__(self, job: Job, stop: threading.Event) -> None:
        self.job, self._stop = job, stop
        self.done = job.part_size()

    def run(self) -> None:
        """Fetches the rest, compares the whole with the checksum, and gives it its final name."""
        from huggingface_hub.utils import WeakFileLock

        job = self.job
        for folder in (job.place.parent, job.lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(job.lock):
            for _ in range(2):  # what an earlier run left may be spoilt: then once more from the start
                if job.place.exists():  # another process was faster
                    break
                if self._receive() == job.sha256:
                    os.replace(job.part, job.place)
                    break
                job.part.unlink()
            else:
                raise CheckpointError(
                    f"{job.name}: expected the content that the hub announces, found another one twice; try again "
                    "later, or over another network."
                )
        self.done = job.size

    def _receive(self) -> str:
        """Appends what is missing to the part, in as many attempts as it takes; the whole's SHA-256."""
        failures, size = 0, self.job.size
        with self.job.part.open("r+b" if self.job.part.exists() else "w+b") as stream:
            digest = self._known(stream)
            while self.done < size:
                before = self.done
                try:
                    digest = self._request(stream, digest)
                    if self.done <= before:
                        raise ConnectionError("the hub sent nothing new")
                except Exception as error:
                    failures = failures + 1 if self.done <= before else 1
                    if self._stop.is_set() or failures > RETRIES or not _passing(error):
                        raise
                    self._stop.wait(RETRY_SECONDS)
        return digest.hexdigest()

    def _known(self, stream: IO[bytes]) -> hashlib._Hash:
        """The digest of what is there already."""
        digest, self.done = hashlib.sha256(), 0
        if self.job.part_size() == 0:
            stream.truncate(0)
        while piece := stream.read(2**20):
            self._go_on()
            digest.update(piece)
            self.done += len(piece)
        return digest

    def _request(self, stream: IO[bytes], digest: hashlib._Hash) -> hashlib._Hash:
        """One request for the rest; what arrives is kept even if it breaks off."""
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        headers = build_hf_headers(library_name="mlx-mtp", library_version=__version__)
        headers["Accept-Encoding"] = "identity"  # a compressed answer has no ranges
        if self.done:
            headers["Range"] = f"bytes={self.done}-"
        with http_stream_backoff(
            "GET", self.job.url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(), retry_on_status_codes=(429,), max_retries=2,
        ) as answer:  # fmt: skip
            hf_raise_for_status(answer)
            if self.done and answer.status_code != 206:  # a proxy that knows no ranges sends all of it again
                stream.seek(0)
                stream.truncate()
                digest, self.done = hashlib.sha256(), 0
            for piece in answer.iter_bytes():
                self._go_on()
                stream.write(piece)
                stream.flush()  # a process that is killed leaves all that `done` counts
                digest.update(piece)
                self.done += len(piece)
        return digest

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise InterruptedError("the download was stopped")


def _passing(error: Exception) -> bool:
    """Whether another attempt may succeed: faults of the network and of the hub, no refusal and no full disk."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status is not None:
        return bool(status >= 500)
    return not (isinstance(error, OSError) and error.errno)
