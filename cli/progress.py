"""Progress bars that stay out of the way: on stderr, only on a terminal, only for what takes longer than a second."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from mlx_mtp.checkpoints import hub

# Below this a bar would only flicker.
PATIENCE_SECONDS = 1.0


class PrefillBar:
    """A bar for the prompt, shown once it has taken a second; `update` is the engine's on_prefill."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began = time.perf_counter()
        self._progress: Progress | None = None

    def __enter__(self) -> PrefillBar:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, done: int, total: int) -> None:
        """Prompt tokens done, of total."""
        if self._progress is None:
            early = time.perf_counter() - self._began < PATIENCE_SECONDS
            if early or done >= total or not self._console.is_interactive:
                return
            columns = TextColumn("reading the prompt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
            self._progress = Progress(*columns, console=self._console, transient=True)
            self._progress.add_task("", total=total)
            self._progress.start()
        self._progress.update(self._progress.task_ids[0], completed=done)

    def close(self) -> None:
        """Removes the bar; harmless when there is none."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class LoadBar:
    """Bars for what `mlx_mtp.load` downloads and reads, one a model; `update` is its on_progress.

    Shown once the load has taken a second; gone at the end of the block.
    """

    VERBS = {"download": "downloading", "load": "reading"}

    def __init__(self, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._began = time.perf_counter()

    def __enter__(self) -> LoadBar:
        self._began = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tasks:  # a Progress that was never started prints an empty line when stopped
            self._progress.stop()

    def update(self, at: hub.Progress) -> None:
        """How far a download or the reading of a file is."""
        key = (at.what, at.name)
        if key not in self._tasks:
            early = time.perf_counter() - self._began < PATIENCE_SECONDS
            if early or at.done >= at.total or not self._progress.console.is_interactive:
                return
            self._progress.start()
            # What is there already was not fetched in this run, and must not count for the speed.
            description = f"{self.VERBS[at.what]} {at.name}"
            self._tasks[key] = self._progress.add_task(description, total=at.total, completed=at.done)
        self._progress.update(self._tasks[key], completed=at.done)
