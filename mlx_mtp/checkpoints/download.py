"""Large files of the hub, or of a package index, to their place: some at once, and from where an attempt broke off.

huggingface_hub requests the bytes. It would also find them a place, but drops what has come when its process ends
half-way (its issue 4196, still so in 2.4). So the part files are ours, under its locks and, of the hub, in its cache.

Invariant: a file has its final name only when its SHA-256 is the one that was announced.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from mlx_mtp.errors import CheckpointError
from mlx_mtp.version import __version__

AT_ONCE = 4  # files; more do not make a fast line faster
TICK_SECONDS = 0.1  # between two reports
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds, one after each answer that says the hub itself has a problem

Returned = TypeVar("Returned")


@dataclass(frozen=True)
class LargeFile:
    """A file to fetch. size: bytes. token: False sends none; None sends the user's for the hub, where there is one."""

    name: str
    url: str
    size: int
    sha256: str
    place: Path
    lock: Path
    token: bool | None = None

    @property
    def part(self) -> Path:
        return self.place.with_name(self.place.name + ".incomplete")

    def bytes_here(self) -> int:
        """Bytes that need not come again; 0 where the part is longer than the file, and so is not one of it."""
        for path in (self.part, self.place):
            with suppress(OSError):
                size = path.stat().st_size
                return size if size <= self.size else 0
        return 0

    def fetch(self, stop: threading.Event) -> None:
        """Fetches the rest, compares the whole with the checksum, and gives it its final name."""
        from huggingface_hub.utils import WeakFileLock

        for folder in (self.place.parent, self.lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(self.lock):
            for _ in range(2):  # what an earlier run left may be spoilt: then once more from the start
                if self.place.exists():  # another process was faster
                    return
                if self._received(stop) == self.sha256:
                    os.replace(self.part, self.place)
                    return
                self.part.unlink()
        raise CheckpointError(
            f"{self.name} came twice with another content than was announced; try again later, or over another network."
        )

    def _received(self, stop: threading.Event) -> str:
        """Appends what is missing to the part, and waits out faults of the hub's own; the whole's SHA-256."""
        from huggingface_hub.errors import HfHubHTTPError

        self.part.touch()
        with _Part(self.part, "r+b") as stream:
            stream.stop = stop
            stream.truncate(self.bytes_here())
            for pause in (*PAUSES, None):
                try:
                    self._request_rest(stream)
                    break
                except HfHubHTTPError as error:
                    if pause is None or error.response.status_code < 500 or stop.wait(pause):
                        raise
            stream.seek(0)
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def _request_rest(self, stream: io.FileIO) -> None:
        from huggingface_hub.file_download import http_get
        from huggingface_hub.utils import build_hf_headers, silent_tqdm

        http_get(
            self.url, cast(BinaryIO, stream), resume_size=stream.seek(0, os.SEEK_END), expected_size=self.size,
            headers=build_hf_headers(token=self.token, library_name="mlx-mtp", library_version=__version__)
            | {"Accept-Encoding": "identity"},  # a compressed answer has no ranges
            tqdm_class=silent_tqdm,
        )  # fmt: skip


class _Part(io.FileIO):
    """A file without a buffer, so that a process that is killed leaves what has come; writing ends at `stop`."""

    stop: threading.Event

    def write(self, data: Any) -> int:
        if self.stop.is_set():
            raise InterruptedError("the download was stopped")
        return super().write(data)


def in_background(call: Callable[[], Returned]) -> Future[Returned]:
    """What a daemon thread makes of a call: neither Ctrl-C nor the end of the program waits for the network."""
    answer: Future[Returned] = Future()

    def run() -> None:
        try:
            answer.set_result(call())
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return answer


def fetch_all(files: Sequence[LargeFile], tell: Callable[[int, int], None]) -> None:
    """Fetches all; `tell` hears (bytes there, bytes in all) in this thread. The first failure stops all and is raised;
    what has come stays for the next time, after an interrupt too."""
    stop, total = threading.Event(), sum(file.size for file in files)
    waiting = iter(files)  # shared: each file goes to one thread

    def work() -> None:
        try:
            for file in waiting:
                if not stop.is_set():
                    file.fetch(stop)
        except Exception:
            stop.set()
            raise

    try:
        ends = [in_background(work) for _ in files[:AT_ONCE]]
        while wait(ends, TICK_SECONDS).not_done:
            tell(sum(file.bytes_here() for file in files), total)
    finally:
        stop.set()
    if failures := [error for end in ends if (error := end.exception())]:
        raise min(failures, key=lambda error: isinstance(error, InterruptedError))  # not one that was only stopped
    if files:
        tell(total, total)
