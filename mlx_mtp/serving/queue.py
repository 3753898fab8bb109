"""Replies wait in a bounded queue, are written in one thread, one after the other, and sent as they come.

The event loop never waits for this thread, and it never waits for the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_mtp.serving.errors import RequestError, stopping, told
from mlx_mtp.serving.interface import Form, Object
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.options import ServerOptions


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
        self._items = asyncio.Queue[Object | RequestError | None]()

    @property
    def waits_for(self) -> str:
        """Why nothing comes, in words."""
        return self.progress or f"waiting, {self._queue.before(self)} before you"

    def check(self) -> None:
        """For work: raises Cancelled once nobody waits for it."""
        if self.over:
            raise Cancelled

    def post(self, item: Object | RequestError | None) -> None:
        """Hands an item, an error or None for the end over to the event loop; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)
        except RuntimeError:  # the loop is closed: nobody is there to hear it
            self.over = True

    async def items(self, seconds: float | None = None) -> AsyncIterator[Object | None]:
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
        self.places = places
        self.alive = True  # whether work is taken
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
            raise RequestError(message, status=429, code="queue_full")
        ticket = Ticket(self)
        self._tickets = [*self._tickets, ticket]
        return ticket

    def submit(self, ticket: Ticket, work: Callable[[], Iterable[Object]]) -> None:
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

    def _write(self, ticket: Ticket, work: Callable[[], Iterable[Object]]) -> None:
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


class ReplyResponse(StreamingResponse):
    """Whoever leaves before its end frees the queue and the engine.

    begin: checks the request, puts it into the queue and returns the first chunks of its stream. dropped: fields of the
    request that were left out, for a header.
    """

    def __init__(
        self, ticket: Ticket, form: Form, begin: Callable[[], Awaitable[list[Object]]], options: ServerOptions,
        metrics: Metrics, dropped: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._ticket, self._form, self._begin, self._options, self._metrics = ticket, form, begin, options, metrics
        names = ", ".join(dropped)[:4000].encode("ascii", "replace").decode()
        self._dropped = {"x-ignored-fields": names} if names else {}
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no", **self._dropped}
        super().__init__((), headers=headers, media_type="text/event-stream")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: speaks until the end, until the client leaves, or until the server cancels this."""
        speaking = asyncio.create_task(self._speak(scope, receive, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({speaking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if speaking.done() and not isinstance(speaking.exception(), TimeoutError):
                speaking.result()
            else:  # the client left, or took nothing for too long
                self._metrics.add(dropped_total=1)
        finally:
            self._ticket.over = True
            for task in (speaking, leaving):
                task.cancel()
            await asyncio.gather(speaking, leaving, return_exceptions=True)

    async def _speak(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            opening = await self._begin()
            if self._form.streamed:
                return await self._events(opening, send)
            [whole] = [item async for item in self._ticket.items()]
            response: Response = JSONResponse(whole, headers=self._dropped)
        except RequestError as error:
            response = error.response(scope["path"])
        await response(scope, receive, send)

    async def _events(self, opening: list[Object], send: Send) -> None:
        """The reply as server-sent events, from the time on when it waits. An error can only be one of them.

        Where nothing is to be said there is a comment in its place, which readers of events skip.
        """
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send(send, self._lines(opening))
        try:
            async for item in self._ticket.items(self._options.quiet_seconds):
                await self._send(send, f": {self._ticket.waits_for}\n\n" if item is None else self._lines([item]))
            await self._send(send, self._form.done)
        except RequestError as error:
            await self._send(send, self._lines([self._form.failed(error)]))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _lines(self, chunks: Iterable[Object]) -> str:
        return "".join(map(self._form.line, chunks))

    async def _send(self, send: Send, text: str) -> None:
        if text:
            async with asyncio.timeout(self._options.stall_seconds):  # the engine does not wait for anybody
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


async def _left(receive: Receive) -> None:
    """Returns once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
