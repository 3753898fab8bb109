"""Where MLX work is done: in the main thread, or, for all other threads, in one thread of ours that never ends.

MLX keeps compiled graphs and streams per thread. When such a thread ends, C++ destroys them, which needs Python; where
Python is leaving just then, the process aborts (MLX 0.32.4, Python before 3.14). A thread that never ends has no such
moment. It also means one set of compiled graphs for however many threads there are, and that what one thread has
computed is still there for the next one: MLX's arrays belong to the thread that made them until they are evaluated.

Invariant: once the process leaves, the thread is blocked in a system call and never runs Python again.

A fork waits for the products that are being computed, because OpenBLAS ends its threads in front of one, also those
that a product waits for (0.3.21): the parent would stand still for good.
"""

from __future__ import annotations

import atexit
import contextvars
import functools
import os
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

import mlx.core as mx

from mlx_mtp.backend import blas

T = TypeVar("T")
P = ParamSpec("P")

MORE_THAN_A_PIPE_HOLDS = 1 << 24


# What is to be done at the process's end, once no thread of ours runs any more.
at_end: list[Callable[[], None]] = []


class Worker:
    """The thread. It starts with the first work that another thread than the main one has."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Nothing is going on: so it is in a new process, and in a child, which has none of its parent's threads."""
        self._work: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._leaving: tuple[int, int] | None = None  # the ends of a pipe, once the process leaves
        self.streams = [mx.default_stream(mx.cpu)]  # the main thread's, and the thread's once it runs

    def here(self) -> bool:
        """Whether this is a thread in which MLX work is done."""
        return threading.current_thread() in (threading.main_thread(), self._thread)

    def run(self, work: Callable[[], T]) -> T:
        """Does it where MLX work is done, and returns or raises what comes of it; from any thread."""
        if self.here():
            return work()
        with self._starting:
            if self._thread is None and self._leaving is None:
                self._thread = threading.Thread(target=self._main, name="mlx-mtp-device", daemon=True)
                self._thread.start()
        future: Future[T] = Future()
        self._work.put(functools.partial(contextvars.copy_context().run, _answer, future, work))
        return future.result()

    def pause(self) -> None:
        """For long work, between its parts: goes no further where the process leaves."""
        if self._leaving is not None and threading.current_thread() is self._thread:
            while True:  # whoever reads the first byte knows that this thread is inside the write, without Python
                os.write(self._leaving[1], bytes(MORE_THAN_A_PIPE_HOLDS))

    def leave(self) -> None:
        """At the end of the process, after all threads that it waits for."""
        with self._starting:
            self._leaving = os.pipe()
        if self._thread is not None:
            self._work.put(self.pause)
            try:
                os.read(self._leaving[0], 1)
            except KeyboardInterrupt:  # somebody does not want to wait for a long step
                os._exit(130)
        for last in at_end:
            last()

    def _main(self) -> None:
        self.streams.append(mx.default_stream(mx.cpu))
        while True:
            work = self._work.get()
            self.pause()
            work()
            del work  # whatever it holds must not wait for the next work


def _answer(future: Future[T], work: Callable[[], T]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # the thread that asked raises it
        future.set_exception(error)


def _before_fork() -> None:
    """From here on products are computed by the thread that asks; those that are not are waited for."""
    global _blas_threads
    _forking.acquire()  # a second fork meanwhile would take the 1 for what it has to restore
    if _blas_threads := blas.use_threads(1):
        for stream in _worker.streams:
            mx.synchronize(stream)


def _after_fork() -> None:
    if _blas_threads:
        blas.use_threads(_blas_threads)
    _forking.release()


def _in_child() -> None:
    _after_fork()
    _worker.begin()


_worker = Worker()
_forking = threading.Lock()
_blas_threads: int | None = None
run, pause = _worker.run, _worker.pause
atexit.register(_worker.leave)
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


def device_work(function: Callable[P, T]) -> Callable[P, T]:
    """The same function for any thread; other threads than the main one give and get values, not lazy arrays.

    Lazy arrays can be computed only by the thread that made them.
    """

    @functools.wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        if _worker.here():
            return function(*args, **kwargs)
        mx.eval(args, kwargs)

        def evaluated() -> T:
            found = function(*args, **kwargs)
            mx.eval(found)
            return found

        return run(evaluated)

    return wrapped


def each(items: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same items for any thread, and for several in turn; None is no item."""
    try:
        while (item := run(lambda: next(items, None))) is not None:
            yield item
    finally:
        run(items.close)
