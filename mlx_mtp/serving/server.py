"""uvicorn around the application: an address to listen on, connections, and an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
from types import FrameType

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_mtp.errors import OptionError
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.queue import ReplyQueue

# Seconds for which running replies may be told that the server ends, once their time is over.
FAREWELL = 5


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OptionError where the address cannot be had."""
    if not 0 <= port <= 65535:
        raise OptionError(f"--port must be from 0 to 65535, not {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"Nothing can listen on {host} port {port} ({error}); choose another --host or --port."
        ) from error
    # asyncio takes Nagle's algorithm off connections only where TCP is named as their protocol; with it a token waits
    # up to 40 ms for the client's system to confirm the one before.
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.detach())


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 with a time limit for the head of a request, first byte to empty line, and with OpenAI's form
    for the answer to what is no HTTP."""

    head_seconds = 15.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connections": self.connections}  # for guards.Gate
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP, and the end of the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = RequestError(f"This is no request in HTTP/1.1 ({msg}).", code="bad_http", close=True).response()
            for event in (h11.Response(status_code=400, headers=response.raw_headers, reason=b"Bad Request"),
                          h11.Data(data=bytes(response.body)), h11.EndOfMessage()):  # fmt: skip
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(self.head_seconds, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """Serves an application of `create_app` with `run(sockets=[...])` until SIGINT or SIGTERM.

    grace: seconds that running and waiting replies have to finish once it was told to end; those that take longer are
    told so.
    """

    def __init__(self, app: Starlette, *, grace: float = 30.0, access_log: bool = False) -> None:
        super().__init__(uvicorn.Config(
            app, http=Connection, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=access_log,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=math.ceil(grace) + FAREWELL,
        ))  # fmt: skip
        self._queue: ReplyQueue = app.state.queue
        self._grace = grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets replies finish, and Ctrl-C says so; another one ends the process at once, with 130."""
        if self.should_exit:
            os._exit(130)
        if sig == signal.SIGINT and (replies := self._queue.waiting + self._queue.running):
            what = "1 reply" if replies == 1 else f"{replies} replies"
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, f"finishing {what}, Ctrl-C again ends now\n".encode())
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        farewell = asyncio.get_running_loop().call_later(self._grace, self._queue.refuse)
        try:
            await super().shutdown(sockets)
        finally:
            farewell.cancel()
