"""A reply under way: sent as it comes, or as one object, until its end or until its client leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.interface import Form, Object
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.options import ServerOptions
from mlx_mtp.serving.queue import Ticket


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
