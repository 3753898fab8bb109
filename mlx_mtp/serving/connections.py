"""Connections that cannot be held open by saying nothing, and on which every piece of a reply leaves at once.

What it does: uvicorn's HTTP/1.1 protocol with a time limit for the head of a request, which uvicorn has none for,
without Nagle's algorithm, and with OpenAI's form for the answer to what is no HTTP. What it does not do: anything about
bodies (guards.py) or replies.
"""

from __future__ import annotations

import asyncio
import socket

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.guards import refusal


class Connection(H11Protocol):
    """Closes where the head of a request, first byte to empty line, takes longer than `head_seconds`."""

    head_seconds = 15.0
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The client may begin."""
        # asyncio does this only for sockets that were made with TCP named as their protocol, which accepted ones are
        # not; without it a token waits up to 40 ms for the client's system to confirm the one before.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self.app_state = {**self.app_state, "connections": self.connections}  # for CrowdGuard
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes of a head, or of what follows it."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._stop()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """The answer to what is no HTTP, and the end of the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error = RequestError(f"Expected a request in HTTP/1.1, found something else ({msg}).", code="bad_http")
            response = refusal(error)
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (h11.Response(status_code=error.status, headers=headers, reason=b"Bad Request"),
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
