"""A progress bar that stays out of the way: on a terminal only, and only for what takes longer than a second."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn

PATIENCE_SECONDS = 1.0  # below this a bar would only flicker


class PatientBar(AbstractContextManager["PatientBar"]):
    """Bars on the console, one for each thing that is done, with these columns between its name and the time left.

    Shown once something has taken a second since this was made; gone at the end of the block.
    """

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        shown = TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn()
        self._progress = Progress(*shown, console=console, transient=True)
        self._tasks: dict[str, TaskID] = {}
        self._began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, what: str, done: int, total: int) -> None:
        """How far it is."""
        if what not in self._tasks:
            early = time.perf_counter() - self._began < PATIENCE_SECONDS
            if early or done >= total or not self._progress.console.is_interactive:
                return
            self._progress.start()
            # What was done before does not count for the speed.
            self._tasks[what] = self._progress.add_task(what, total=total, completed=done)
        self._progress.update(self._tasks[what], completed=done)

    def close(self) -> None:
        """Removes the bars; harmless when there are none."""
        if self._tasks:  # a Progress that was never started prints an empty line when stopped
            self._progress.stop()
            self._tasks = {}
