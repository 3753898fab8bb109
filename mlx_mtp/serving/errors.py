"""What a client did wrong, or the server could not do: one exception with its status, and JSON in the API's form."""

from __future__ import annotations

import logging
from typing import Any

from starlette.responses import JSONResponse

from mlx_mtp.errors import MLXMTPError

log = logging.getLogger(__name__)

MOST_MESSAGE = 1000
RETRY = "5"  # seconds after which a client that found no place is told to come back
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ANTHROPIC, ANTHROPIC_KINDS = "/v1/messages", {"server_error": "api_error"}


class RequestError(MLXMTPError):
    """A request that gets an error in place of a reply.

    status: HTTP status. param: the field of the request that is to blame. code: a short name for programs.
    close: whether the connection ends with it.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self._close = status, close
        kind = KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")
        self.body: dict[str, Any] = {"error": {"message": str(self), "type": kind, "param": param, "code": code}}

    def response(self, path: str = "") -> JSONResponse:
        """The error as a response, in the form of the interface that an address belongs to."""
        response = JSONResponse(anthropic(self.body) if path.startswith(ANTHROPIC) else self.body, self.status)
        if self.status in (429, 503):
            response.headers["Retry-After"] = RETRY
        if self.status == 401:
            response.headers["WWW-Authenticate"] = "Bearer"
        if self._close:
            response.headers["Connection"] = "close"
        return response


def anthropic(body: dict[str, Any]) -> dict[str, Any]:
    """An error in the form of Anthropic's API."""
    told = body["error"]
    kind = ANTHROPIC_KINDS.get(told["type"], told["type"])
    return {"type": "error", "error": {"type": kind, "message": told["message"]}}


def failed() -> RequestError:
    """A failure of the server's own; what it was is in the log and nowhere else."""
    return RequestError("The server failed at this request; its log says why.", status=500, code="internal_error",
                        close=True)  # fmt: skip


def told(error: BaseException) -> RequestError:
    """What a client hears of any error; one that nobody expected goes into the log."""
    if isinstance(error, RequestError):
        return error.with_traceback(None)
    if isinstance(error, MLXMTPError):
        return RequestError(str(error)[:MOST_MESSAGE])
    log.error("A request failed.", exc_info=error)
    return failed()


def stopping() -> RequestError:
    """The server ends before the reply does."""
    return RequestError("The server is shutting down; send the request again later.", status=503, code="stopping")
