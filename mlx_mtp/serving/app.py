"""An HTTP server around one engine that speaks OpenAI's and Anthropic's APIs.

    app = create_app(mlx_mtp.load(), ServerOptions())
    Server(app).run(sockets=[listen("127.0.0.1", 8080)])
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from typing import Annotated, Any, TypeVar

import mlx.core as mx
from pydantic import AliasChoices, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from mlx_mtp.engine import Engine
from mlx_mtp.serving.body import read_body
from mlx_mtp.serving.chat import ChatBody, ChatForm
from mlx_mtp.serving.completions import CompletionBody, CompletionForm
from mlx_mtp.serving.errors import RequestError, failed, told
from mlx_mtp.serving.guards import Gate, PageGuard
from mlx_mtp.serving.interface import Context, Form, GenerationBody, Object, now
from mlx_mtp.serving.messages import MessagesBody, MessagesForm, PromptBody
from mlx_mtp.serving.metrics import Metrics
from mlx_mtp.serving.options import ServerOptions
from mlx_mtp.serving.queue import ReplyQueue, ReplyResponse
from mlx_mtp.serving.replies import Replier
from mlx_mtp.serving.responses import ResponsesBody, ResponsesForm
from mlx_mtp.serving.schema import Body, ModelBody, read
from mlx_mtp.serving.sessions import SessionPool
from mlx_mtp.serving.store import ResponseStore
from mlx_mtp.version import __version__

# Bytes of a body from which on its prompt is tokenised one at a time, and threads for the smaller ones: nobody with a
# short prompt waits for a long one.
LARGE_BODY, SMALL_THREADS = 200_000, 4
# Names under which clients look for the length of the context.
CONTEXT_FIELDS = ("max_context", "context_length", "context_window", "max_model_len", "max_input_tokens")
PAGE_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
Found = TypeVar("Found")
Endpoint = Callable[[Request], Awaitable[Response]]


def create_app(engine: Engine, options: ServerOptions, places: int = 32) -> Starlette:
    """The ASGI application around an engine. places: how many requests may wait while one runs."""
    endpoints = Endpoints(engine, options, places)
    answers, count = endpoints.answers, endpoints.count
    routes = [
        Route("/v1/chat/completions", endpoints.replies(ChatBody, ChatForm), methods=["POST"]),
        Route("/v1/completions", endpoints.replies(CompletionBody, CompletionForm), methods=["POST"]),
        Route("/v1/responses", endpoints.replies(ResponsesBody, ResponsesForm), methods=["POST"]),
        Route("/v1/responses/input_tokens", answers(partial(count, ResponsesBody)), methods=["POST"]),
        Route("/v1/responses/{name}", endpoints.response, methods=["GET", "DELETE"]),
        Route("/v1/responses/{name}/input_items", endpoints.input_items, methods=["GET"]),
        Route("/v1/messages", endpoints.replies(MessagesBody, MessagesForm), methods=["POST"]),
        Route("/v1/messages/count_tokens", answers(partial(count, PromptBody)), methods=["POST"]),
        Route("/v1/models", endpoints.models, methods=["GET"]),
        Route("/v1/models/{name:path}", endpoints.model, methods=["GET"]),
        Route("/tokenize", answers(endpoints.tokenize), methods=["POST"]),
        Route("/detokenize", answers(endpoints.detokenize), methods=["POST"]),
        Route("/", endpoints.page, methods=["GET"]),
        Route("/health", endpoints.health, methods=["GET"]),
        Route("/metrics", endpoints.prometheus, methods=["GET"]),
    ]
    paths = [route.path for route in routes if "{" not in route.path]
    guards = [
        Middleware(Gate, options=options, metrics=endpoints.metrics, routes=paths),
        # Starlette's own is around all guards, where no header for pages is added.
        Middleware(ServerErrorMiddleware, handler=_refused),
    ]
    if options.origins:  # around the other guards, so that a page can read why it was refused
        guards.insert(0, Middleware(PageGuard, origins=options.origins))
    handlers: dict[Any, Any] = {RequestError: _refused, HTTPException: _not_found}
    app = Starlette(routes=routes, middleware=guards, lifespan=endpoints.lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # an address is right or it is not
    app.state.queue, app.state.paths = endpoints.queue, paths
    return app


class TokenizeBody(ModelBody):
    """/tokenize: a text, under the names of vLLM and llama.cpp."""

    prompt: Annotated[str, Field(validation_alias=AliasChoices("prompt", "content"))]
    add_special_tokens: bool = True


class DetokenizeBody(ModelBody):
    """/detokenize: token ids."""

    tokens: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=1_000_000)]


class Endpoints:
    """The endpoints of one server around one engine. places: how many requests may wait while one runs."""

    def __init__(self, engine: Engine, options: ServerOptions, places: int) -> None:
        self._engine, self._options, self.metrics = engine, options, Metrics()
        self.queue, self._pool = ReplyQueue(places), SessionPool(options.session_bytes)
        self._replier = Replier(engine, self._pool, self.metrics)
        self._context = Context(options, engine.tokenizer, ResponseStore())
        self._small, self._large = ThreadPoolExecutor(SMALL_THREADS), ThreadPoolExecutor(1)
        self._created = now()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Begins, beside everything else, what would keep the first request under a grammar waiting; ends all work."""
        self._large.submit(self._engine.prepare_grammars)
        yield
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.queue.stop)

    def replies(self, schema: type[GenerationBody], form_of: type[Form]) -> Endpoint:
        async def endpoint(request: Request) -> Response:
            data, dropped = await read_body(request, self._options), list[str]()

            def read() -> Form:
                body = self._read(data, schema, dropped)
                return form_of(body, self._context, body.generation(self._context))

            form, ticket = await _told(self._small, read), self.queue.reserve()

            async def begin() -> list[Object]:
                requests = await _told(self._threads(data), partial(self._replier.prepare, form.asked))
                opening = form.begin(len(requests[0].ids))
                self.queue.submit(ticket, partial(self._replier.reply, form, requests, ticket))
                return opening

            return ReplyResponse(ticket, form, begin, self._options, self.metrics, dropped)

        return endpoint

    def answers(self, work: Callable[[bytes], Object]) -> Endpoint:
        """An endpoint whose answer is worked out of a body alone."""

        async def endpoint(request: Request) -> Response:
            data = await read_body(request, self._options)
            return JSONResponse(await _told(self._threads(data), partial(work, data)))

        return endpoint

    def _threads(self, data: bytes) -> ThreadPoolExecutor:
        return self._large if len(data) >= LARGE_BODY else self._small

    def _read(self, data: bytes, schema: type[Body], dropped: list[str]) -> Body:
        """A body for the model that is served. dropped: where names of fields go that a lenient server leaves out."""
        body = read(data, schema, dropped if self._options.lenient else None)
        self._check_model(body.model)
        return body

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in (self._options.model, *self._options.others):
            raise RequestError(
                f"This server has no model '{name[:100]}' but one named '{self._options.model}'.",
                status=404, param="model", code="model_not_found",
            )  # fmt: skip

    async def response(self, request: Request) -> Response:
        name = request.path_params["name"]
        if request.method == "DELETE":
            self._context.responses.drop(name)
            return JSONResponse({"id": name, "object": "response", "deleted": True})
        return JSONResponse(self._context.responses.get(name).response)

    async def input_items(self, request: Request) -> Response:
        """GET /v1/responses/NAME/input_items: all of them, the newest first unless `order` is asc."""
        items = self._context.responses.get(request.path_params["name"]).given
        items = items if request.query_params.get("order") == "asc" else items[::-1]
        ends = {"first_id": items[0].get("id"), "last_id": items[-1].get("id")}
        return JSONResponse({"object": "list", "data": items, "has_more": False, **ends})

    def count(self, schema: type[GenerationBody], data: bytes) -> Object:
        """The tokens of a request's prompt."""
        [ids] = self._replier.prompts(self._read(data, schema, []).generation(self._context))
        return {"object": "response.input_tokens", "input_tokens": len(ids)}

    def tokenize(self, data: bytes) -> Object:
        body, tokenizer = self._read(data, TokenizeBody, []), self._replier.tokenizer()
        ids = tokenizer.encode(body.prompt, body.add_special_tokens)
        return {"tokens": ids, "count": len(ids), "max_model_len": self._engine.max_context}

    def detokenize(self, data: bytes) -> Object:
        text = self._replier.tokenizer().decode(self._read(data, DetokenizeBody, []).tokens)
        return {"prompt": text, "content": text}

    async def page(self, request: Request) -> Response:
        """GET /: a page to chat on, in one file that asks nobody but this server."""
        text = files("mlx_mtp.assets").joinpath("page.html").read_text("utf-8")
        return HTMLResponse(text, headers={"content-security-policy": PAGE_POLICY, "referrer-policy": "no-referrer"})

    async def models(self, request: Request) -> Response:
        """GET /v1/models, in OpenAI's form and Anthropic's at once."""
        model, name = self._model(), self._options.model
        return JSONResponse({"object": "list", "data": [model], "has_more": False, "first_id": name, "last_id": name})

    async def model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> Object:
        name = self._options.model
        return {
            "id": name, "object": "model", "created": self._created, "owned_by": "mlx-mtp", "type": "model",
            "display_name": name, "created_at": datetime.fromtimestamp(self._created, UTC).isoformat(),
            **dict.fromkeys(CONTEXT_FIELDS, self._engine.max_context),
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
        text = self.metrics.render(
            queue_length=self.queue.waiting, running=self.queue.running, session_bytes=self._pool.nbytes,
            sessions=self._pool.count, active_memory_bytes=mx.get_active_memory(),
        )  # fmt: skip
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _told(threads: ThreadPoolExecutor, work: Callable[[], Found]) -> Found:
    """Work in a thread; RequestError for whatever it raises."""

    def run() -> Found:
        try:
            return work()
        except BaseException as error:  # a tokenizer's panic is no Exception
            raise told(error) from None

    return await asyncio.get_running_loop().run_in_executor(threads, run)


async def _not_found(request: Request, error: HTTPException) -> Response:
    """No such route, or not with this method."""
    what = "This address takes another method" if error.status_code == 405 else "There is no such address"
    message = f"{what}; those of this server are {', '.join(request.app.state.paths)}."
    response = RequestError(message, status=error.status_code, code="unknown_url").response(request.url.path)
    response.headers.update(error.headers or {})
    return response


async def _refused(request: Request, error: Exception) -> Response:
    """What failed, Starlette raises again, so that the log has it and uvicorn ends the connection."""
    return (error if isinstance(error, RequestError) else failed()).response(request.url.path)
