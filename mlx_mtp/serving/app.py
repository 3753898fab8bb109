"""An HTTP server around one engine that speaks OpenAI's and Anthropic's APIs.

    app = create_app(mlx_mtp.load(), ServerOptions())
    Server(app).run(sockets=[listen("127.0.0.1", 8080)])
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mlx_mtp.engine import Engine
from mlx_mtp.serving.chat import ChatBody, ChatForm
from mlx_mtp.serving.completions import CompletionBody, CompletionForm
from mlx_mtp.serving.endpoints import Endpoints
from mlx_mtp.serving.errors import RequestError, failed
from mlx_mtp.serving.guards import Gate, PageGuard
from mlx_mtp.serving.messages import MessagesBody, MessagesForm, PromptBody
from mlx_mtp.serving.options import ServerOptions
from mlx_mtp.serving.responses import ResponsesBody, ResponsesForm


def create_app(engine: Engine, options: ServerOptions, places: int = 32) -> Starlette:
    """The ASGI application around an engine. places: how many requests may wait while one runs."""
    endpoints = Endpoints(engine, options, places)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        endpoints.prepare()
        yield
        await endpoints.close()

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
    app = Starlette(routes=routes, middleware=guards, lifespan=lifespan, exception_handlers=handlers)
    app.router.redirect_slashes = False  # an address is right or it is not
    app.state.queue, app.state.paths = endpoints.queue, paths
    return app


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
