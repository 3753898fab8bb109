"""The one thread in which replies are written, one after the other, and the bounded queue in front of it.

The event loop never waits for this thread, and it never waits for the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from typing import Any

from mlx_mtp.serving.errors import RETRY, RequestError, stopping, told

Item = dict[str, Any]


class Cancelled(Exception):
    """Raised inside work whose client has left."""


class Ticket:
    """A place in the queue. The event loop iterates over what its work yields and may set `over` at any time.

    progress: how far the work has come, in words; "" before it began. over: done, or nobody waits for it any more
    and the thread drops it at its next look.
    """

    def __init__(self, queue: ReplyQueue) -> None:
        self.progress, self.over, self._queue = "", False, queue
        self._loop = asyncio.get_running_loop()
        self._items = asyncio.Queue[Item | RequestError | None]()

    @property
    def waits_for(self) -> str:
        """Why nothing comes, in words."""
        return self.progress or f"waiting, {self._queue.before(self)} before you"

    def check(self) -> None:
        """For work: raises Cancelled once nobody waits for it."""
        if self.over:
            raise Cancelled

    def post(self, item: Item | RequestError | None) -> None:
        """Hands an item, an error or None for the end over to the event loop; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody is there to hear it
            self.over = True

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
        self.places, self.alive = places, True  # whether work is taken
        self._tickets: list[Ticket] = []  # in order of arrival; only the event loop changes it
        self._running: Ticket | None = None
        self._thread = ThreadPoolExecutor(1, "mlx-mtp-replies")

    @property
    def waiting(self) -> int:
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
        if not self.alive:
            raise stopping()
        self._tickets = [ticket for ticket in self._tickets if not ticket.over]
        # The thread may not have taken up the first one yet; that one does not wait, it is about to run.
        if self.waiting >= self.places + (not self.running):
            message = f"{self.places} requests are waiting already, which is the most; try again later."
            raise RequestError(message, status=429, code="queue_full", retry_after=RETRY)
        ticket = Ticket(self)
        self._tickets = [*self._tickets, ticket]
        return ticket

    def submit(self, ticket: Ticket, work: Callable[[], Iterable[Item]]) -> None:
        """Brings the work of a ticket that `reserve` gave."""
        if not self.alive:
            raise stopping()
        self._thread.submit(self._write, ticket, work)

    def refuse(self) -> None:
        """Takes no more work and ends what there is with an error; from any thread, and without waiting."""
        self.alive = False
        for ticket in self._tickets:
            ticket.over = True
            ticket.post(stopping())

    def stop(self) -> None:
        """`refuse`, and waits for the round under way to end."""
        self.refuse()
        self._thread.shutdown()

    def _write(self, ticket: Ticket, work: Callable[[], Iterable[Item]]) -> None:
        """Does one piece of work; whatever becomes of it, the thread goes on."""
        if ticket.over:
            return
        self._running = ticket
        try:
            for item in work():
                ticket.post(item)
        except Cancelled:
            pass
        except BaseException as error:
            ticket.post(told(error))
        ticket.over = True
        ticket.post(None)
        self._running = None
