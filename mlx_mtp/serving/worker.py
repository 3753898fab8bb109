"""The one thread that loads the engine and does all work with it, and the bounded queue in front of it.

What it does: takes work in order of arrival, hands what it yields to the event loop, and drops work nobody waits for.
What it does not do: know what the work is (replies.py).

Invariant: the event loop never waits for this thread, and it never waits for the event loop.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from concurrent.futures import Future
from contextlib import closing
from itertools import takewhile
from typing import Any

from mlx_mtp.backend import threads
from mlx_mtp.engine import Engine
from mlx_mtp.serving.errors import RequestError, stopping, told

# Longest and shortest time after which a client that found the queue full is told to come back, in seconds.
LONGEST_RETRY, SHORTEST_RETRY = 120, 1
# How much the newest reply moves the mean time of a reply.
NEWEST = 0.2


class Cancelled(Exception):
    """Raised inside work whose client has left."""


class Ticket:
    """A place in the queue, and the work once it is known. The event loop iterates over what the work yields and may
    cancel it at any time. progress: how far the work has come, in words; "" before it began.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.work: Work | None = None
        self.progress = ""
        self._loop = loop
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

    async def items(self, seconds: float | None = None) -> AsyncIterator[Any]:
        """What the work yields, as it comes, and None whenever nothing came for so many seconds.

        Raises the RequestError that ended it.
        """
        while True:
            try:
                async with asyncio.timeout(seconds):
                    last, item = await self._items.get()
            except TimeoutError:
                last, item = False, None
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

    def reserve(self) -> Ticket:
        """A place in the queue, kept until the ticket is cancelled; to be called in the event loop.

        RequestError where there is none (429). The thread passes it over until `submit` brings its work.
        """
        ticket = Ticket(asyncio.get_running_loop())
        with self._change:
            if self._stopping:
                raise stopping()
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.cancelled)
            # The thread may not have taken up the first one yet; that one does not wait, it is about to run.
            if len(self._waiting) >= self.places + (self._running is None):
                raise self._full()
            self._waiting.append(ticket)
        return ticket

    def submit(self, ticket: Ticket, work: Work) -> None:
        """Brings the work of a ticket that `reserve` gave."""
        with self._change:
            if self._stopping:
                raise stopping()
            ticket.work = work
            self._change.notify()

    def before(self, ticket: Ticket) -> int:
        """How many requests come before this one, the one that runs among them."""
        with self._change:
            if ticket is self._running:
                return 0
            ahead = takewhile(lambda waiting: waiting is not ticket, self._waiting)
            return sum(not waiting.cancelled for waiting in ahead) + self.running

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
        """The first ticket that has its work and that somebody waits for; None at the end."""
        with self._change:
            while not self._stopping:
                ready = (ticket for ticket in self._waiting if ticket.work is not None and not ticket.cancelled)
                if (ticket := next(ready, None)) is not None:
                    self._waiting.remove(ticket)
                    self._running = ticket
                    return ticket
                self._change.wait()
        return None

    def _serve(self, engine: Engine, ticket: Ticket) -> None:
        """Does one piece of work; whatever becomes of it, the thread goes on."""
        began = time.perf_counter()
        assert ticket.work is not None
        try:
            with closing(ticket.work(engine, ticket)) as items:
                for item in items:
                    ticket.post(item)
                    ticket.check()
            self._mean_seconds += NEWEST * (time.perf_counter() - began - self._mean_seconds)
        except Cancelled:
            pass
        except BaseException as error:
            ticket.post(told(error))
        ticket.end()
