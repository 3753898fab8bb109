"""The one thread in which replies are written, one after the other, and the bounded queue in front of it.

The event loop never waits for this thread, and it never waits for the event loop.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from itertools import takewhile
from queue import SimpleQueue
from typing import Any

from mlx_mtp.serving.errors import RequestError, stopping, told

# Longest and shortest time after which a client that found the queue full is told to come back, in seconds.
LONGEST_RETRY, SHORTEST_RETRY = 120, 1
# How much the newest reply moves the mean time of a reply.
NEWEST = 0.2

Item = dict[str, Any]


class Cancelled(Exception):
    """Raised inside work whose client has left."""


class Ticket:
    """A place in the queue. The event loop iterates over what its work yields and may cancel it at any time.

    progress: how far the work has come, in words; "" before it began. over: done, or nobody waits for it any more.
    """

    def __init__(self) -> None:
        self.progress, self.over = "", False
        self._loop = asyncio.get_running_loop()
        self._items = asyncio.Queue[Item | RequestError | None]()

    def cancel(self) -> None:
        """Nobody waits for this any more: the thread drops it at its next look."""
        self.over = True

    def check(self) -> None:
        """For work: raises Cancelled once nobody waits for it."""
        if self.over:
            raise Cancelled

    def post(self, item: Item | RequestError | None) -> None:
        """Hands an item, an error or None for the end over to the event loop; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody is there to hear it
            self.cancel()

    async def items(self, seconds: float | None = None) -> AsyncIterator[Item | None]:
        """What the work yields, as it comes, and None whenever nothing came for so many seconds.

        Raises the RequestError that ended it.
        """
        while True:
            try:
                async with asyncio.timeout(seconds):
                    item = await self._items.get()
            except TimeoutError:
                yield None
                continue
            if item is None:
                return
            if isinstance(item, RequestError):
                raise item
            yield item


class ReplyQueue:
    """places: how many requests may wait while one runs."""

    def __init__(self, places: int = 32) -> None:
        self.places, self._mean_seconds = places, 1.0
        self._stopping = False
        self._tickets: list[Ticket] = []  # in order of arrival; only the event loop changes it
        self._running: Ticket | None = None
        self._ready = SimpleQueue[tuple[Ticket, Callable[[], Iterable[Item]]] | None]()
        self._thread = threading.Thread(target=self._main, name="mlx-mtp-replies", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether work is taken."""
        return not self._stopping and self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many tickets wait."""
        return sum(not ticket.over and ticket is not self._running for ticket in self._tickets)

    @property
    def running(self) -> int:
        """How many tickets are being worked on: 0 or 1."""
        return int(self._running is not None)

    def before(self, ticket: Ticket) -> int:
        """How many requests come before this one, the one that runs among them."""
        ahead = takewhile(lambda other: other is not ticket, self._tickets)
        return sum(not other.over and other is not self._running for other in ahead) + self.running

    def reserve(self) -> Ticket:
        """A place in the queue, kept until the ticket is over; in the event loop. RequestError where there is none."""
        if self._stopping:
            raise stopping()
        self._tickets = [ticket for ticket in self._tickets if not ticket.over]
        # The thread may not have taken up the first one yet; that one does not wait, it is about to run.
        if self.waiting >= self.places + (not self.running):
            seconds = math.ceil(self._mean_seconds * (self.waiting + 1) / 2)
            raise RequestError(
                f"{self.places} requests are waiting already, which is the most; try again later.",
                status=429, code="queue_full", retry_after=min(LONGEST_RETRY, max(SHORTEST_RETRY, seconds)),
            )  # fmt: skip
        ticket = Ticket()
        self._tickets = [*self._tickets, ticket]
        return ticket

    def submit(self, ticket: Ticket, work: Callable[[], Iterable[Item]]) -> None:
        """Brings the work of a ticket that `reserve` gave."""
        if self._stopping:
            raise stopping()
        self._ready.put((ticket, work))

    def refuse(self) -> None:
        """Takes no more work and ends what there is with an error; from any thread, and without waiting."""
        self._stopping = True
        for ticket in self._tickets:
            ticket.cancel()
            ticket.post(stopping())
        self._ready.put(None)

    def stop(self, seconds: float = 10.0) -> None:
        """`refuse`, and waits for the thread to end, at most so long."""
        self.refuse()
        self._thread.join(seconds)

    def _main(self) -> None:
        while (ready := self._ready.get()) is not None:
            ticket, work = ready
            if not ticket.over:
                self._running = ticket
                self._write(ticket, work)
                self._running = None
            del ready, ticket, work  # whatever they hold must not wait for the next ones

    def _write(self, ticket: Ticket, work: Callable[[], Iterable[Item]]) -> None:
        """Does one piece of work; whatever becomes of it, the thread goes on."""
        began = time.perf_counter()
        try:
            for item in work():
                ticket.post(item)
            self._mean_seconds += NEWEST * (time.perf_counter() - began - self._mean_seconds)
        except Cancelled:
            pass
        except BaseException as error:
            ticket.post(told(error))
        ticket.cancel()
        ticket.post(None)
