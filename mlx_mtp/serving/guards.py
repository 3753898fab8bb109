"""What stands in front of every endpoint: who may ask, from where, and how much they may send.

What it does: checks the Host header on loopback (a web page that lets its own name point to 127.0.0.1 must not reach
the server), the API key, the body's type, size and speed; counts responses. What it does not do: read what the body
says (fields.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
from collections.abc import Collection

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.metrics import Metrics

# Seconds for which the rest of a body that was refused is still read, so that its sender gets to see the answer.
LINGER = 2.0
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on; names other than localhost count as open."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refusal(error: RequestError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


class HostGuard:
    """Refuses requests whose Host header names none of `hosts` (without ports)."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, frozenset(hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and _host(scope) not in self._hosts:
            error = RequestError(
                "Expected a Host header with this machine's loopback address, found another name; start the server "
                "with --host and --api-key to be reached by other names.", status=403, code="bad_host",
            )  # fmt: skip
            return await refusal(error)(scope, receive, send)
        await self._app(scope, receive, send)


def _host(scope: Scope) -> str:
    """The Host header's name, without port and brackets."""
    value = _header(scope, b"host").lower()
    if value.startswith("["):
        return value[1:].partition("]")[0]
    return value.partition(":")[0]


class KeyGuard:
    """Lets requests pass that bring the API key; `free` paths need none."""

    def __init__(self, app: ASGIApp, key: str, free: Collection[str] = ()) -> None:
        self._app, self._expected, self._free = app, f"Bearer {key}".encode(), frozenset(free)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and scope["path"] not in self._free and not self._admits(scope):
            error = RequestError(
                "Expected this server's API key as 'Authorization: Bearer KEY', found none or another one.",
                status=401, code="invalid_api_key",
            )  # fmt: skip
            return await refusal(error)(scope, receive, send)
        await self._app(scope, receive, send)

    def _admits(self, scope: Scope) -> bool:
        # Always the same time, so that nothing can be learned from how long a wrong key takes.
        return hmac.compare_digest(_header(scope, b"authorization").encode("latin-1"), self._expected)


def _header(scope: Scope, name: bytes) -> str:
    """A header's value, "" where it is missing or not unique."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0].decode("latin-1").strip() if len(values) == 1 else ""


class Counted:
    """Counts responses by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: Collection[str]) -> None:
        self._app, self._metrics, self._routes = app, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        path, answered = scope["path"] if scope["path"] in self._routes else "other", False

        async def noticed(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                self._metrics.answered(path, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noticed)
        except Exception:
            if not answered:  # Starlette answers further out
                self._metrics.answered(path, 500)
            raise


async def read_body(request: Request, most_bytes: int, seconds: float) -> bytes:
    """A JSON body of at most so many bytes that arrives within so many seconds; else RequestError.

    The type is checked because a web page may send text, but not JSON, to another server without asking it first.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    too_large = RequestError(
        f"Expected a body of at most {most_bytes} bytes, found a larger one; shorten it.", status=413,
        code="body_too_large",
    )  # fmt: skip
    if _announced(request) > most_bytes:
        await _linger(request)
        raise too_large
    if kind != "application/json":
        await _linger(request)
        raise RequestError(
            "Expected the header 'Content-Type: application/json', found another type or none.", status=415,
            code="bad_content_type",
        )  # fmt: skip
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(seconds):
            while more and len(body) <= most_bytes:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                body += message.get("body", b"")
                more = message.get("more_body", False)
    except TimeoutError:
        raise RequestError(
            f"Expected the whole body within {seconds:g} seconds, found it still under way.", status=408,
            code="too_slow",
        ) from None  # fmt: skip
    if len(body) > most_bytes:
        await _linger(request)
        raise too_large
    return bytes(body)


def _announced(request: Request) -> int:
    """Bytes of the body as its header says; h11 refuses what is no number."""
    length = request.headers.get("content-length", "0")
    return int(length) if length.isdigit() and len(length) < 20 else 0


async def _linger(request: Request) -> None:
    """Reads and forgets what a client is still sending, for a moment."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER):
            while (await request.receive()).get("more_body"):
                pass
