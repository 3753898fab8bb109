"""What a client did wrong, or the server could not do, in the form in which OpenAI's API says so.

What it does: one exception with a status and the JSON object of the response. What it does not do: decide anything.
"""

from __future__ import annotations

import logging
from typing import Any

from mlx_mtp.errors import MLXMTPError

log = logging.getLogger(__name__)

MOST_MESSAGE = 1000
KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

# Statuses of bodies that were not read to their end: nothing else can follow on such a connection.
UNREAD = (408, 413, 415)


class RequestError(MLXMTPError):
    """A request that gets an error in place of a reply.

    status: HTTP status. param: the field of the request that is to blame. code: a short name for programs.
    retry_after: seconds after which the same request may succeed.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.retry_after = message, status, param, code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON object."""
        kind = KINDS.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        found = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            found["WWW-Authenticate"] = "Bearer"
        if self.status in UNREAD:
            found["Connection"] = "close"
        return found


def failed() -> RequestError:
    """A failure of the server's own; what it was stands in the log and nowhere else."""
    return RequestError("The server failed at this request; its log says why.", status=500, code="internal_error")


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
