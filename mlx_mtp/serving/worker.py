"""The one thread that loads the engine and does all work with it, and the bounded queue in front of it.

What it does: takes work in order of arrival, hands what it yields to the event loop, and drops work nobody waits for.
What it does not do: know what the work is (replies.py).

Invariant: the event loop never waits for this thread, and it never waits for the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from typing import Any

from mlx_mtp import threads
from mlx_mtp.engine import Engine
from mlx_mtp.errors import MLXMTPError
from mlx_mtp.serving.errors import RequestError, failed, stopping

log = logging.getLogger(__name__)

# Longest and shortest time after which a client that found the queue full is told to come back, in seconds.
LONGEST_RETRY, SHORTEST_RETRY = 120, 1
# How much the newest reply moves the mean time of a reply.
NEWEST = 0.2
MOST_MESSAGE = 1000


class Cancelled(Exception):
    """Raised inside work whose client has left."""


class Ticket:
    """A piece of work in the queue. The event loop iterates over what it yields and may cancel it at any time."""

    def __init__(self, work: Work, loop: asyncio.AbstractEventLoop) -> None:
        self.work, self._loop = work, loop
        self._items: asyncio.Queue[tuple[bool, Any]] = asyncio.Queue()
        self._cancelled = threading.Event()

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for this any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """Nobody waits for this any more: the engine's thread drops it at its next look."""
        self._cancelled.set()

    def check(self) -> None:
        """For work: raises Cancelled once nobody waits for it."""
        if self.cancelled:
            raise Cancelled

    def post(self, item: object) -> None:
        """Hands an item, or a RequestError, over to the event loop; from any thread."""
        self._put(False, item)

    def end(self) -> None:
        """Nothing follows; from any thread."""
        self._put(True, None)

    def _put(self, last: bool, item: object) -> None:
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, (last, item))
        except RuntimeError:  # the loop is closed: nobody is there to hear it
            self.cancel()

    async def items(self) -> AsyncIterator[Any]:
        """What the work yields, as it comes; raises the RequestError that ended it."""
        while True:
            last, item = await self._items.get()
            if last:
                return
            if isinstance(item, RequestError):
                raise item
            yield item


Work = Callable[[Engine, Ticket], Generator[object, None, None]]


class EngineThread:
    """Owns an engine. load: makes it, in the thread. places: how many requests may wait while one runs."""

    def __init__(self, load: Callable[[], Engine], places: int = 32) -> None:
        self._load, self.places = load, places
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._change = threading.Condition()
        self._stopping = False
        self._loaded: Future[Engine] = Future()
        self._mean_seconds = 1.0
        self._thread = threading.Thread(target=self._main, name="mlx-mtp-engine", daemon=True)

    def start(self) -> Engine:
        """Starts the thread, waits until the engine is loaded, and raises what loading raised."""
        self._thread.start()
        return self.engine

    @property
    def engine(self) -> Engine:
        """The engine, for reading its plain values only; its arrays belong to the thread."""
        return self._loaded.result()

    @property
    def alive(self) -> bool:
        """Whether work is taken."""
        return self._thread.is_alive() and not self._stopping

    @property
    def waiting(self) -> int:
        """How many tickets wait."""
        with self._change:
            return sum(not ticket.cancelled for ticket in self._waiting)

    @property
    def running(self) -> bool:
        """Whether a ticket is being worked on."""
        return self._running is not None

    def submit(self, work: Work) -> Ticket:
        """Puts work into the queue; to be called in the event loop. RequestError where there is no place (429)."""
        ticket = Ticket(work, asyncio.get_running_loop())
        with self._change:
            if self._stopping:
                raise stopping()
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
            # The thread may not have taken up the first one yet; that one does not wait, it is about to run.
            if len(self._waiting) >= self.places + (self._running is None):
                raise self._full()
            self._waiting.append(ticket)
            self._change.notify()
        return ticket

    def _full(self) -> RequestError:
        seconds = math.ceil(self._mean_seconds * (len(self._waiting) + 1) / 2)
        return RequestError(
            f"Expected at most {self.places} requests waiting, found the queue full; try again later.",
            status=429, code="queue_full", retry_after=min(LONGEST_RETRY, max(SHORTEST_RETRY, seconds)),
        )  # fmt: skip

    def refuse(self) -> None:
        """Takes no more work and ends what there is with an error; from any thread, and without waiting."""
        with self._change:
            self._stopping = True
            tickets = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._change.notify()
        for ticket in tickets:
            ticket.cancel()
            ticket.post(stopping())
            ticket.end()

    def stop(self, seconds: float = 10.0) -> None:
        """`refuse`, and waits for the thread to end, at most so long."""
        self.refuse()
        self._thread.join(seconds)

    def _main(self) -> None:
        try:
            engine = threads.run(self._load)
        except BaseException as error:  # `start` raises it where it can be told
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(engine)
        while (ticket := self._next()) is not None:
            self._serve(engine, ticket)
            with self._change:
                self._running = None

    def _next(self) -> Ticket | None:
        """The next ticket somebody waits for; None at the end."""
        with self._change:
            while not self._stopping:
                while self._waiting:
                    ticket = self._waiting.popleft()
                    if not ticket.cancelled:
                        self._running = ticket
                        return ticket
                self._change.wait()
        return None

    def _serve(self, engine: Engine, ticket: Ticket) -> None:
        """Does one piece of work; whatever becomes of it, the thread goes on."""
        began = time.perf_counter()
        try:
            with closing(ticket.work(engine, ticket)) as items:
                for item in items:
                    ticket.post(item)
                    ticket.check()
            self._mean_seconds += NEWEST * (time.perf_counter() - began - self._mean_seconds)
        except Cancelled:
            pass
        except RequestError as error:
            ticket.post(error.with_traceback(None))
        except MLXMTPError as error:
            ticket.post(RequestError(str(error)[:MOST_MESSAGE]))
        except BaseException:
            log.exception("A request failed.")
            ticket.post(failed())
        ticket.end()
