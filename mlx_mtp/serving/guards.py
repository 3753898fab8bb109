"""What stands in front of every endpoint: who may ask, from where, and how much they may send.

What it does: checks the Host header on loopback (a web page that lets its own name point to 127.0.0.1 must not reach
the server), the origin of web pages, the API key, the number of connections, the body's type, size and speed; counts
responses. What it does not do: read what the body says (fields.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import re
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp.errors import OptionError
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.metrics import Metrics

# Seconds for which the rest of a body that was refused is still read, so that its sender gets to see the answer.
LINGER = 2.0
# Seconds after which a client that found too many connections is told to come back.
CROWDED_RETRY = 5
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
# A Host header: a name, an IPv4 address or an IPv6 address in brackets; perhaps a port (RFC 9110, 7.2; RFC 3986, 3.2).
HOST = re.compile(r"(?:(?P<name>[\w.~%!$&'()*+,;=-]+)|\[(?P<address>[0-9a-fA-F:.]+)\])(?::[0-9]{0,5})?", re.ASCII)
DEFAULT_PORTS = {"http": 80, "https": 443}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address to listen on; names other than localhost count as open."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def refusal(error: RequestError) -> JSONResponse:
    """An error as a response."""
    return JSONResponse(error.body, error.status, error.headers)


def host_name(header: str) -> str | None:
    """The name in a Host header, in one spelling: in lower case, without port, brackets and the root's dot, an IPv6
    address compressed. None for what is no such header.
    """
    match = HOST.fullmatch(header)
    if match is None:
        return None
    if match["name"] is not None:
        return match["name"].lower().removesuffix(".") or None
    try:
        return ipaddress.IPv6Address(match["address"]).compressed
    except ValueError:
        return None


def allowed_host(name: str) -> str:
    """A name or address of a server as `host_name` spells it; OptionError for anything else, a port among it."""
    found = host_name(f"[{name.strip('[]')}]" if ":" in name else name)
    if found is None or "*" in name:
        raise OptionError(
            f"Expected a host as a name or an address without a port, such as host.docker.internal, found {name!r}."
        )
    return found


class HostGuard:
    """Refuses requests whose Host header names none of `hosts`, whatever the port."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, frozenset(map(allowed_host, hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and host_name(_header(scope, b"host")) not in self._hosts:
            error = RequestError(
                "Expected a Host header with this machine's loopback address, found another name or none; start the "
                "server with --allow-host NAME to let that name in, or with --api-key KEY to let in every name that "
                "brings the key.", status=403, code="bad_host",
            )  # fmt: skip
            return await refusal(error)(scope, receive, send)
        await self._app(scope, receive, send)


def allowed_origin(text: str) -> str:
    """A web page's origin as browsers send it, '*' or 'null'; OptionError for what no browser would ever send."""
    if text in ("*", "null"):
        return text
    try:
        parts = urlsplit(text.strip())
        host, port = (parts.hostname or "").encode("idna").decode(), parts.port
    except ValueError:  # UnicodeError too
        host, port, parts = "", None, urlsplit("")
    bare = not (parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc or "*" in host)
    if not parts.scheme or not host or not bare:
        raise OptionError(
            f"Expected the origin of a web page, such as https://app.example or http://localhost:3000, '*' or 'null', "
            f"found {text!r}."
        )
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}" + (f":{port}" if port not in (None, DEFAULT_PORTS.get(parts.scheme)) else "")


class PageGuard(CORSMiddleware):
    """Tells browsers which web pages may ask, from the network of this machine too, and which may not."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app, allow_origins=[allowed_origin(one) for one in origins], allow_methods=["GET", "POST"],
            allow_headers=["*"], allow_private_network=True, expose_headers=["Retry-After"],
        )  # fmt: skip

    def preflight_response(self, request_headers: Headers) -> Response:
        """A browser's question before a request; a refusal grants nothing and has OpenAI's form."""
        found = super().preflight_response(request_headers)
        if found.status_code == 200:
            return found
        response = refusal(RequestError(
            "Expected a GET or POST of a web page whose origin was given to --cors, found another one.",
            code="bad_origin",
        ))  # fmt: skip
        response.headers["Vary"] = found.headers["Vary"]
        return response


class CrowdGuard:
    """Refuses requests while there are more than `most` connections, of which the server's protocol keeps count."""

    def __init__(self, app: ASGIApp, most: int) -> None:
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http" and len(scope.get("state", {}).get("connections", ())) > self._most:
            error = RequestError(
                f"Expected at most {self._most} connections, found more; try again later.", status=503, code="crowded",
                retry_after=CROWDED_RETRY,
            )  # fmt: skip
            response = refusal(error)
            response.headers["Connection"] = "close"
            return await response(scope, receive, send)
        await self._app(scope, receive, send)


class KeyGuard:
    """Lets requests pass that bring the API key; `free` paths need none."""

    def __init__(self, app: ASGIApp, key: str, free: Collection[str] = ()) -> None:
        self._app, self._expected, self._free = app, key.encode(), frozenset(free)

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
        scheme, _, key = _header(scope, b"authorization").partition(" ")
        # Always the same time, so that nothing can be learned from how long a wrong key takes.
        return hmac.compare_digest(key.strip().encode("latin-1"), self._expected) and scheme.lower() == "bearer"


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
