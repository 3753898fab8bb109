"""Who may ask, and from where: the Host header, web pages, the API key, the number of connections.

Starlette's TrustedHostMiddleware answers in plain text and cannot tell `localhost.` or two spellings of one IPv6
address, so the Host header is read here; CORS is Starlette's.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.options import ServerOptions, host_name

# Connections at a time, those for /health included; beyond it the answer is 503. macOS gives a process 256 files.
MOST_CONNECTIONS = 200
KEYLESS = ("/", "/health")


class PageGuard(CORSMiddleware):
    """Tells browsers which web pages may ask, from the network of this machine too, and which may not."""

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        super().__init__(
            app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            allow_private_network=True, expose_headers=["Retry-After"],
        )  # fmt: skip

    def preflight_response(self, request_headers: Headers) -> Response:
        """A browser's question before a request; a refusal grants nothing and has OpenAI's form."""
        found = super().preflight_response(request_headers)
        if found.status_code == 200:
            return found
        response = RequestError(
            "Only GET and POST of web pages whose origin was given to --cors are let in.", code="bad_origin"
        ).response()
        response.headers["Vary"] = found.headers["Vary"]
        return response


class Gate:
    """Refuses requests that must not reach an endpoint, and counts responses by route and status."""

    def __init__(self, app: ASGIApp, options: ServerOptions, metrics: Metrics, routes: Collection[str]) -> None:
        self._app, self._options, self._metrics, self._routes = app, options, metrics, frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._routes else "other"
                self._metrics.add(**{f'requests_total{{route="{path}",status="{message["status"]}"}}': 1})
            await send(message)

        error = self._refusal(scope)
        await (error.response(scope["path"]) if error else self._app)(scope, receive, counted)

    def _refusal(self, scope: Scope) -> RequestError | None:
        options, headers = self._options, Headers(scope=scope)

        def unique(name: str) -> str:
            """A header's value, "" where it is missing or there are several."""
            values = headers.getlist(name)
            return values[0].strip() if len(values) == 1 else ""

        # Of the connections the server's protocol keeps count.
        if len(scope.get("state", {}).get("connections", ())) > MOST_CONNECTIONS:
            message = f"This server has more than {MOST_CONNECTIONS} connections; try again later."
            return RequestError(message, status=503, code="crowded", close=True)
        # A web page that lets its own name point to 127.0.0.1 must not reach the server.
        if options.hosts is not None and host_name(unique("host")) not in options.hosts:
            return RequestError(
                "The Host header does not name this machine's loopback address; start the server with --allow-host "
                "NAME to let that name in, or with --api-key KEY to let in every name that brings the key.",
                status=403, code="bad_host",
            )  # fmt: skip
        if options.api_key is None or scope["path"] in KEYLESS:
            return None
        scheme, _, key = unique("authorization").partition(" ")
        if not scheme:  # Anthropic's way
            scheme, key = "bearer", unique("x-api-key")
        # Always the same time, so that nothing can be learned from how long a wrong key takes.
        same = hmac.compare_digest(key.strip().encode("latin-1"), options.api_key.encode())
        if same and scheme.lower() == "bearer":
            return None
        return RequestError("This server needs its API key as 'Authorization: Bearer KEY' or 'x-api-key: KEY'; there "
                            "was none or another one.", status=401, code="invalid_api_key")  # fmt: skip
