"""Warnings at the right time: after the input was found good, never beside the sentence that refuses it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from logging.handlers import MemoryHandler


def say_more(*loggers: str) -> None:
    """Shows what happens too, not warnings alone; of the library where no loggers are named."""
    for name in loggers or ("mlx_mtp",):
        logging.getLogger(name).setLevel(logging.INFO)


@contextmanager
def held_back() -> Iterator[None]:
    """Log records wait for the end of the block; where it raises they are dropped."""
    root, held = logging.getLogger(), MemoryHandler(capacity=10_000, flushOnClose=False)
    shown, root.handlers = root.handlers, [held]
    try:
        yield
    finally:
        root.handlers = shown
    for record in held.buffer:
        root.handle(record)
