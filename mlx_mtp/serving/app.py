"""An OpenAI-compatible HTTP server around one engine: endpoints, and replies sent as they come.

    app = create_app(mlx_mtp.load(), ServerOptions())
    Server(app).run(sockets=[listen("127.0.0.1", 8080)])
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import mlx.core as mx
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mlx_mtp.engine import Engine
from mlx_mtp.serving.body import read_body
from mlx_mtp.serving.errors import RequestError, failed
from mlx_mtp.serving.guards import Gate, PageGuard
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.options import ServerOptions
from mlx_mtp.serving.queue import ReplyQueue, Ticket
from mlx_mtp.serving.replies import Replier
from mlx_mtp.serving.responses import ChatForm, CompletionForm, Form, Object
from mlx_mtp.serving.schemas import ChatBody, CompletionBody, Generation, GenerationBody, read
from mlx_mtp.serving.sessions import SessionPool
from mlx_mtp.version import __version__

log = logging.getLogger(__name__)

ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics")
# Bytes of a body from which on its prompt is tokenised one at a time, and threads for the smaller ones: nobody with a
# short prompt waits for a long one.
LARGE_BODY, SMALL_THREADS = 200_000, 4
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip


def create_app(engine: Engine, options: ServerOptions, places: int = 32) -> Starlette:
    """The ASGI application around an engine. places: how many requests may wait while one runs."""
    endpoints = _Endpoints(engine, options, places)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await endpoints.close()

    guards = [
        Middleware(Gate, options=options, metrics=endpoints.metrics, routes=ROUTES),
        # Starlette's own is around all guards, where no header for pages is added.
        Middleware(ServerErrorMiddleware, handler=_failed),
    ]
    if options.origins:  # around the other guards, so that a page can read why it was refused
        guards.insert(0, Middleware(PageGuard, origins=options.origins))
    routes = [
        Route("/v1/chat/completions", endpoints.chat, methods=["POST"]),
        Route("/v1/completions", endpoints.completion, methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/metrics", endpoints.prometheus, methods=["GET"]),
    ]
    handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _not_found, ClientDisconnect: _gone}
    app = Starlette(routes=routes, middleware=guards, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # an address is right or it is not
    app.state.queue = endpoints.queue
    return app


async def _refused(request: Request, error: RequestError) -> Response:
    return error.response()


async def _not_found(request: Request, error: HTTPException) -> Response:
    """No such route, or not with this method."""
    what = "This address takes another method" if error.status_code == 405 else "There is no such address"
    message = f"{what}; those of this server are {', '.join(ROUTES)}."
    response = RequestError(message, status=error.status_code, code="unknown_url").response()
    response.headers.update(error.headers or {})
    return response


async def _gone(request: Request, error: ClientDisconnect) -> Response:
    """Nobody hears this."""
    return RequestError("The client left.").response()


async def _failed(request: Request, error: Exception) -> Response:
    """Starlette raises the error again, so that the log has it and uvicorn ends the connection."""
    return failed().response()


class _Endpoints:
    """The endpoints of one server."""

    def __init__(self, engine: Engine, options: ServerOptions, places: int) -> None:
        self._engine, self._options, self.metrics = engine, options, Metrics()
        self.queue, self._pool = ReplyQueue(places), SessionPool(options.session_bytes)
        self._replier = Replier(engine, self._pool, self.metrics)
        self._small, self._large = ThreadPoolExecutor(SMALL_THREADS), ThreadPoolExecutor(1)
        self._created = int(time.time())

    async def close(self) -> None:
        """Nothing more is tokenised or written."""
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.queue.stop)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._reply(request, ChatBody, ChatForm)

    async def completion(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._reply(request, CompletionBody, CompletionForm)

    async def _reply(self, request: Request, schema: type[GenerationBody], form_of: type[Form]) -> Response:
        body = await read_body(request, self._options.body_bytes, self._options.body_seconds)
        run_in = asyncio.get_running_loop().run_in_executor
        asked = await run_in(self._small, self._read, body, schema)
        ticket, form = self.queue.reserve(), form_of(asked, self._options.model, self._engine.tokenizer)

        async def begin() -> None:
            pool = self._large if len(body) >= LARGE_BODY else self._small
            prepared = await run_in(pool, self._replier.prepare, asked)
            self.queue.submit(ticket, partial(self._replier.reply, prepared, asked.stream, form, ticket))

        def waits_for() -> str:
            return ticket.progress or f"waiting, {self.queue.before(ticket)} before you"

        first = form.begin() if asked.stream else None
        return _Reply(ticket, begin, waits_for, first, self._options, self.metrics)

    def _read(self, body: bytes, schema: type[GenerationBody]) -> Generation:
        given = read(body, schema)
        self._check_model(given.model)
        return given.generation(self._options)

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in (self._options.model, *self._options.others):
            raise RequestError(
                f"This server has no model '{name[:100]}' but one named '{self._options.model}'.",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> Object:
        return {
            "id": self._options.model, "object": "model", "created": self._created, "owned_by": "mlx-mtp",
            "max_context": self._engine.max_context,
        }  # fmt: skip

    async def health(self, request: Request) -> Response:
        """GET /health: 200 as long as requests are taken."""
        alive = self.queue.alive
        state = {
            "status": "ok" if alive else "stopping", "model": self._options.model, "version": __version__,
            "queue_length": self.queue.waiting, "running": self.queue.running, "depth": self._engine.depth_reason,
        }  # fmt: skip
        return JSONResponse(state, 200 if alive else 503)

    async def prometheus(self, request: Request) -> Response:
        """GET /metrics."""
        gauges = {
            "queue_length": self.queue.waiting, "running": self.queue.running, "session_bytes": self._pool.nbytes,
            "sessions": self._pool.count, "active_memory_bytes": mx.get_active_memory(),
        }  # fmt: skip
        return PlainTextResponse(self.metrics.render(gauges), media_type="text/plain; version=0.0.4")


class _Reply(Response):
    """A reply under way: as it comes or as one object. Whoever leaves before its end frees the queue and the engine.

    begin: checks the request and puts it into the queue; waits_for: says in words why nothing comes. first: the chunks
    before all others, None where the reply is not streamed.
    """

    def __init__(
        self, ticket: Ticket, begin: Callable[[], Awaitable[None]], waits_for: Callable[[], str],
        first: list[Object] | None, options: ServerOptions, metrics: Metrics,
    ) -> None:  # fmt: skip
        super().__init__()
        self._ticket, self._begin, self._waits_for, self._first = ticket, begin, waits_for, first
        self._options, self._metrics = options, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI: speaks until the end, until the client leaves, or until the server cancels this."""
        speaking = asyncio.create_task(self._speak(scope, receive, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait({speaking, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if speaking.done():
                speaking.result()
            else:
                self._metrics.add("dropped_total")
        except TimeoutError:
            log.warning("A client took nothing for %g seconds: its reply was dropped.", self._options.stall_seconds)
            self._metrics.add("dropped_total")
        finally:
            self._ticket.cancel()
            for task in (speaking, leaving):
                task.cancel()
            await asyncio.gather(speaking, leaving, return_exceptions=True)

    async def _speak(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._begin()
            if self._first is not None:
                return await self._events(self._first, send)
            [whole] = [item async for item in self._ticket.items()]
            response: Response = JSONResponse(whole)
        except RequestError as error:
            response = error.response()
        await response(scope, receive, send)

    async def _events(self, first: list[Object], send: Send) -> None:
        """The reply as server-sent events, from the time on when it waits. An error can only be one of them.

        Where nothing is to be said there is a comment in its place, which readers of events skip.
        """
        await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})
        await self._send(send, _data(first))
        try:
            async for item in self._ticket.items(self._options.quiet_seconds):
                await self._send(send, f": {self._waits_for()}\n\n" if item is None else _data([item]))
            await self._send(send, "data: [DONE]\n\n")
        except RequestError as error:
            await self._send(send, _data([error.body]))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, text: str) -> None:
        if text:
            async with asyncio.timeout(self._options.stall_seconds):  # the engine does not wait for anybody
                await send({"type": "http.response.body", "body": text.encode(), "more_body": True})


def _data(chunks: Iterable[Object]) -> str:
    return "".join(f"data: {json.dumps(one, ensure_ascii=False, separators=(',', ':'))}\n\n" for one in chunks)


async def _left(receive: Receive) -> None:
    """Returns once the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
