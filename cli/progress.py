"""What is shown beside the work and stays out of its way: bars for what takes long, warnings at the right time."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from logging.handlers import MemoryHandler

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


@contextmanager
def held_back() -> Iterator[None]:
    """Log records wait for the end of the block, when the input was found good; where it raises they are dropped."""
    root, held = logging.getLogger(), MemoryHandler(capacity=10_000, flushOnClose=False)
    shown, root.handlers = root.handlers, [held]
    try:
        yield
    finally:
        root.handlers = shown
    for record in held.buffer:
        root.handle(record)
