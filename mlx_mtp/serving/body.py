"""A request's body: its type, size and speed, and JSON in the strict sense.

Refused are NaN, numbers beyond a float, lone surrogates, a name twice in one object, and more nesting than any request
needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import reprlib
from collections import Counter
from typing import Any

from starlette.requests import ClientDisconnect, Request

from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.options import ServerOptions

# Seconds for which the rest of a body that was refused is still read.
LINGER = 2.0
DEEPEST = 100
NAMES = {dict: "an object", list: "a list", type(None): "null"}

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def shown(value: object) -> str:
    """A value as a short part of a sentence, whatever its size."""
    return NAMES.get(type(value)) or _brief.repr(value)


async def read_body(request: Request, options: ServerOptions) -> bytes:
    """A JSON body that is not too large and arrives in time; else RequestError, with which the connection ends.

    The type is checked because a web page may send text, but not JSON, to another server without asking it first.
    """
    most_bytes, seconds = options.body_bytes, options.body_seconds
    too_large = f"The body has more than {most_bytes} bytes; shorten it."
    kind, body = request.headers.get("content-type", "").partition(";")[0].strip().lower(), bytearray()
    try:
        async with asyncio.timeout(seconds):
            if int(request.headers.get("content-length", 0)) > most_bytes:  # a number, or it were no HTTP
                raise RequestError(too_large, status=413, code="body_too_large", close=True)
            if kind != "application/json":
                message = "The header 'Content-Type: application/json' is missing."
                raise RequestError(message, status=415, code="bad_content_type", close=True)
            async for part in request.stream():
                body += part
                if len(body) > most_bytes:
                    raise RequestError(too_large, status=413, code="body_too_large", close=True)
            return bytes(body)
    except TimeoutError:
        message = f"The whole body did not arrive within {seconds:g} seconds."
        raise RequestError(message, status=408, code="too_slow", close=True) from None
    except ClientDisconnect:
        raise RequestError("The client left.") from None  # nobody hears this
    except RequestError:  # its sender gets to see the answer only once it has sent the rest
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER):
                while (await request.receive()).get("more_body"):
                    pass
        raise


def as_json(value: object) -> str:
    """JSON in one line; ValueError for NaN and infinities, which it has not."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def parsed(body: bytes) -> object:
    """The JSON value of a body; RequestError for anything that is not strictly JSON in UTF-8."""
    try:
        return strict(body.decode())
    except UnicodeError:
        raise RequestError("The body has bytes or escapes that are not UTF-8.", code="bad_json") from None
    except ValueError as error:
        raise RequestError(f"The body is not JSON ({error}).", code="bad_json") from None


def strict(text: str) -> object:
    """The value of a JSON text; ValueError that says what is not JSON in it, UnicodeError for lone surrogates."""
    try:
        value: object = json.loads(
            text, parse_constant=_finite, parse_float=_finite, object_pairs_hook=_unique
        )  # numbers of thousands of digits are a ValueError too
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate, escaped as \\ud800, is no text
        if _depth(value) <= DEEPEST:
            return value
    except RecursionError:
        pass
    raise ValueError(f"more than {DEEPEST} levels of lists and objects")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; which of two values under one name was meant, nobody can know."""
    found = dict(pairs)
    if len(found) < len(pairs):
        [(name, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"the name {shown(name)} appears twice in one object")
    return found


def _finite(text: str) -> float:
    """A float; NaN and Infinity are no JSON."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {shown(text)} is out of range")
    return number


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max((_depth(one) for one in inner if isinstance(one, (dict, list))), default=0)
