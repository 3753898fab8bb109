"""An OpenAI-compatible HTTP server around one engine.

What it does: endpoints, streams of events, one reply after the other through the engine's thread, an orderly end.
What it does not do: read requests (serving/requests.py), write replies (serving/replies.py), guard (serving/guards.py).

Endpoints: POST /v1/chat/completions, POST /v1/completions, GET /v1/models, GET /v1/models/NAME, GET /health and
GET /metrics (Prometheus). Errors have OpenAI's form everywhere.

    worker = EngineThread(mlx_mtp.load)
    worker.start()
    make_server(create_app(worker, ServerOptions())).run(sockets=[listen("127.0.0.1", 8080)])
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import mlx.core as mx
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlx_mtp.errors import OptionError
from mlx_mtp.generation.types import Sampling
from mlx_mtp.serving.connections import Connection
from mlx_mtp.serving.errors import RequestError, failed, stopping
from mlx_mtp.serving.fields import parsed
from mlx_mtp.serving.guards import (
    LOOPBACK_NAMES,
    Counted,
    CrowdGuard,
    HostGuard,
    KeyGuard,
    PageGuard,
    allowed_host,
    allowed_origin,
    is_loopback,
    read_body,
    refusal,
)
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.replies import Finished, Piece, Replier
from mlx_mtp.serving.requests import Generation, Limits, chat_request, completion_request
from mlx_mtp.serving.responses import ChatForm, CompletionForm, Form
from mlx_mtp.serving.sessions import SessionPool
from mlx_mtp.serving.worker import EngineThread, Ticket
from mlx_mtp.version import __version__

__all__ = ["LOOPBACK_NAMES", "EngineThread", "ServerOptions", "create_app", "is_loopback", "listen", "make_server"]

log = logging.getLogger(__name__)

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
# Connections at a time, those for /health included; beyond it the answer is 503. macOS gives a process 256 files.
MOST_CONNECTIONS = 200
# Bytes of a body from which on its prompt is tokenised one at a time, and threads for the smaller ones: nobody with a
# short prompt waits for a long one.
LARGE_BODY, SMALL_THREADS = 200_000, 4
# Seconds for which running replies may be told that the server ends, once their time is over.
FAREWELL = 5
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a server allows. Sizes in bytes, times in seconds.

    model: the name it serves the engine under; others: names it also takes. api_key: None = none is needed, for
    loopback only. hosts: names in the Host header that are let in, None = all. origins: web pages that may ask (CORS).
    tokens: of a reply whose request names no number; most_tokens: that a request may ask for, None = the context.
    sampling, seed: where a request leaves them open. session_bytes: K/V kept between requests. body_seconds: for a
    body to arrive. stall_seconds: for a client to take what was sent. quiet_seconds: of silence after which a streamed
    reply gets a comment that says what it waits for.
    """

    model: str = "default"
    others: Sequence[str] = ()
    api_key: str | None = None
    hosts: Sequence[str] | None = tuple(LOOPBACK_NAMES)
    origins: Sequence[str] = ()
    tokens: int = 1024
    most_tokens: int | None = None
    sampling: Sampling = Sampling()
    seed: int | None = None
    session_bytes: int = 1_000_000_000
    body_bytes: int = 8_000_000
    body_seconds: float = 30.0
    stall_seconds: float = 60.0
    quiet_seconds: float = 3.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise OptionError("Expected an API key of printable ASCII characters, found another one or an empty one.")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise OptionError("Expected an API key without blanks around it, which no header can carry, found some.")
        for host in self.hosts or ():
            allowed_host(host)
        for origin in self.origins:
            allowed_origin(origin)
        for name in ("tokens", "most_tokens", "body_bytes", "body_seconds", "stall_seconds", "quiet_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise OptionError(f"Expected {name} above 0, found {value}.")
        if self.seed is not None and not 0 <= self.seed < 2**64:
            raise OptionError(f"Expected a seed from 0 to 2^64 - 1, found {self.seed}.")
        if self.session_bytes < 0:
            raise OptionError(f"Expected session_bytes of at least 0, found {self.session_bytes}.")


def create_app(worker: EngineThread, options: ServerOptions) -> Starlette:
    """The ASGI application around an engine's thread that was started; it stops the thread when it ends."""
    endpoints = _Endpoints(worker, options)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        endpoints.close()
        await asyncio.to_thread(worker.stop)

    guards = [Middleware(Counted, metrics=endpoints.metrics, routes=ROUTES)]
    if options.origins:  # around the other guards, so that a page can read why it was refused
        guards.append(Middleware(PageGuard, origins=options.origins))
    guards.append(Middleware(CrowdGuard, most=MOST_CONNECTIONS))
    if options.hosts is not None:
        guards.append(Middleware(HostGuard, hosts=options.hosts))
    if options.api_key is not None:
        guards.append(Middleware(KeyGuard, key=options.api_key, free=("/health",)))
    # Starlette's own is around all guards, where no header for pages is added.
    guards.append(Middleware(ServerErrorMiddleware, handler=_failed))
    routes = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completion, methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/metrics", endpoints.prometheus, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {
        RequestError: _refused, HTTPException: _not_found, ClientDisconnect: _gone, Exception: _failed,
    }  # fmt: skip
    app = Starlette(routes=routes, middleware=guards, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # an address is right or it is not
    app.state.worker = worker
    return app


async def _refused(request: Request, error: RequestError) -> Response:
    return refusal(error)


async def _not_found(request: Request, error: HTTPException) -> Response:
    """No such route, or not with this method."""
    what = "method" if error.status_code == 405 else "address"
    message = f"Expected one of {', '.join(ROUTES)}, found another {what}."
    response = refusal(RequestError(message, status=error.status_code, code="unknown_url"))
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    """Nobody hears this."""
    return refusal(RequestError("The client left.", status=400))


async def _failed(request: Request, error: Exception) -> Response:
    """Starlette raises the error again, so that the log has it and uvicorn ends the connection."""
    response = refusal(failed())
    response.headers["Connection"] = "close"
    return response


class _Endpoints:
    """The endpoints of one server."""

    def __init__(self, worker: EngineThread, options: ServerOptions) -> None:
        self._worker, self._options, self.metrics = worker, options, Metrics()
        self._pool = SessionPool(options.session_bytes)
        self._replier = Replier(self._pool, self.metrics)
        self._limits = Limits(
            most_tokens=options.most_tokens, tokens=options.tokens, sampling=options.sampling, seed=options.seed
        )
        self._small, self._large = ThreadPoolExecutor(SMALL_THREADS), ThreadPoolExecutor(1)
        self._created = int(time.time())

    def close(self) -> None:
        """Nothing more is tokenised."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._reply(request, chat_request, ChatForm)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._reply(request, completion_request, CompletionForm)

    async def _reply(
        self,
        request: Request,
        read: Callable[[object, Limits], tuple[Generation, str | None]],
        form: Callable[[Generation, str], Form],
    ) -> Response:
        body = await read_body(request, self._options.body_bytes, self._options.body_seconds)
        run_in = asyncio.get_running_loop().run_in_executor
        asked, model = await run_in(self._small, lambda: read(parsed(body), self._limits))
        self._check_model(model)
        ticket = self._worker.reserve()

        pool = self._large if len(body) >= LARGE_BODY else self._small

        async def begin() -> None:
            ids = await run_in(pool, self._replier.prepare, asked, self._worker.engine)
            self._worker.submit(ticket, partial(self._replier.reply, asked, ids))

        def waits_for() -> str:
            return ticket.progress or f"waiting, {self._worker.before(ticket)} before you"

        return _Reply(ticket, begin, waits_for, form(asked, self._options.model), asked.stream, self._options,
                      self.metrics)  # fmt: skip

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in (self._options.model, *self._options.others):
            raise RequestError(
                f"Expected the model '{self._options.model}', found '{name[:100]}'; this server has one model.",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._options.model, "object": "model", "created": self._created, "owned_by": "mlx-mtp",
            "max_context": self._worker.engine.max_context,
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        """GET /health: 200 as long as requests are taken."""
        alive = self._worker.alive
        state = {
            "status": "ok" if alive else "stopping", "model": self._options.model, "version": __version__,
            "queue_length": self._worker.waiting, "running": int(self._worker.running),
            "depth": self._worker.engine.depth_reason,
        }  # fmt: skip
        return JSONResponse(state, 200 if alive else 503)

    async def prometheus(self, request: Request) -> Response:
        """GET /metrics."""
        gauges = {
            "queue_length": self._worker.waiting, "running": int(self._worker.running),
            "session_bytes": self._pool.nbytes, "sessions": self._pool.count,
            "active_memory_bytes": mx.get_active_memory(),
        }  # fmt: skip
        return PlainTextResponse(self.metrics.render(gauges), media_type="text/plain; version=0.0.4")


class _Reply(Response):
    """A reply under way: as it comes or as one object. Whoever leaves before its end frees the queue and the engine.

    begin: checks the request and puts it into the queue; waits_for: says in words why nothing comes.
    """

    def __init__(
        self, ticket: Ticket, begin: Callable[[], Awaitable[None]], waits_for: Callable[[], str], form: Form,
        stream: bool, options: ServerOptions, metrics: Metrics,
    ) -> None:  # fmt: skip
        super().__init__()
        self._ticket, self._begin, self._waits_for, self._form = ticket, begin, waits_for, form
        self._stream, self._options, self._metrics = stream, options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: speaks until the end, until the client leaves, or until the server cancels this."""
        speaking = asyncio.create_task(self._speak(scope, receive, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({speaking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if speaking.done():
                speaking.result()
            else:
                self._metrics.add("dropped_total", 1)
        except TimeoutError:
            log.warning("A client took nothing for %g seconds: its reply was dropped.", self._options.stall_seconds)
            self._metrics.add("dropped_total", 1)
        finally:
            self._ticket.cancel()
            for task in (speaking, leaving):
                task.cancel()
            await asyncio.gather(speaking, leaving, return_exceptions=True)

    async def _speak(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._begin()
            if self._stream:
                return await self._events(send)
            *pieces, end = [item async for item in self._ticket.items()] or [None]
            if end is None:
                raise stopping()
            response: Response = JSONResponse(self._form.whole(pieces, end))
        except RequestError as error:
            response = refusal(error)
        await response(scope, receive, send)

    async def _events(self, send: Send) -> None:
        """The reply as server-sent events, from the time on when it waits. An error can only be one of them."""
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await self._send(send, _data(self._form.begin()))
        try:
            async for item in self._ticket.items(self._options.quiet_seconds):
                await self._send(send, self._said(item))
            await self._send(send, "data: [DONE]\n\n")
        except RequestError as error:
            await self._send(send, _data([error.body]))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _said(self, item: Piece | Finished | None) -> str:
        """What came, or in place of nothing a comment, which readers of events skip."""
        if item is None:
            return f": {self._waits_for()}\n\n"
        return _data(self._form.end(item) if isinstance(item, Finished) else self._form.chunks(item))

    async def _send(self, send: Send, text: str) -> None:
        if text:
            async with asyncio.timeout(self._options.stall_seconds):  # the engine does not wait for anybody
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def _data(chunks: Sequence[dict[str, Any]]) -> str:
    return "".join(f"data: {json.dumps(one, ensure_ascii=False, separators=(',', ':'))}\n\n" for one in chunks)


async def _left(receive: Receive) -> None:
    """Returns once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; OptionError where the address cannot be had."""
    if not 0 <= port <= 65535:
        raise OptionError(f"Expected --port from 0 to 65535, found {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        raise OptionError(
            f"Expected an address to listen on, found that {host} port {port} cannot be had ({error}); "
            "choose another --host or --port."
        ) from error


class _Server(uvicorn.Server):
    """uvicorn's, but replies that take longer than the grace at the end are told so."""

    def __init__(self, config: uvicorn.Config, worker: EngineThread, grace: float) -> None:
        super().__init__(config)
        self._worker, self._grace = worker, grace

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets replies finish, and Ctrl-C says so; another one ends the process at once, with 130."""
        if self.should_exit:
            os._exit(130)
        if sig == signal.SIGINT and (replies := self._worker.waiting + self._worker.running):
            what = "1 reply" if replies == 1 else f"{replies} replies"
            with contextlib.suppress(OSError):  # not print: the signal may have come in the middle of one
                os.write(2, f"finishing {what}, Ctrl-C again ends now\n".encode())
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Called by uvicorn once it was told to end."""
        farewell = asyncio.get_running_loop().call_later(self._grace, self._worker.refuse)
        try:
            await super().shutdown(sockets)
        finally:
            farewell.cancel()


def make_server(app: Starlette, *, grace: float = 30.0, access_log: bool = False) -> uvicorn.Server:
    """A server for an application of `create_app`; `run(sockets=[...])` serves until SIGINT or SIGTERM.

    grace: seconds that running and waiting replies have to finish once it was told to end.
    """
    config = uvicorn.Config(
        app, http=Connection, ws="none", loop="asyncio", lifespan="on", log_config=None, access_log=access_log,
        server_header=False, proxy_headers=False,
        timeout_graceful_shutdown=math.ceil(grace) + FAREWELL,
    )  # fmt: skip
    return _Server(config, app.state.worker, grace)
