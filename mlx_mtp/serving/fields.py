"""JSON from strangers: the body's bytes to plain values, and fields read one by one with a sentence for each fault.

What it does: refuses what is not JSON in the strict sense (NaN, numbers beyond a float, lone surrogates, a name twice
in one object, more nesting than any request needs) and every field nobody asked for. What it does not do: know what a
request means (requests.py).

Invariant: a field is read or refused, never dropped in silence; null means "not given".
"""

from __future__ import annotations

import json
import math
import reprlib
from collections import Counter
from collections.abc import Collection
from typing import Any, TypeVar

from mlx_mtp.serving.errors import RequestError

DEEPEST = 100
NAMES = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "null"}

Kind = TypeVar("Kind")

_brief = reprlib.Repr()
_brief.maxstring = _brief.maxother = _brief.maxlong = 60


def shown(value: object) -> str:
    """A value as a short part of a sentence, whatever its size."""
    return NAMES[type(value)] if isinstance(value, (dict, list)) or value is None else _brief.repr(value)


def parsed(body: bytes) -> object:
    """The JSON value of a body; RequestError for anything that is not strictly JSON in UTF-8."""
    try:
        return strict(body.decode("utf-8"))
    except UnicodeError:
        raise RequestError("Expected a body in UTF-8, found bytes or escapes that are not.", code="bad_json") from None
    except ValueError as error:
        raise RequestError(f"Expected a body in JSON, found something else ({error}).", code="bad_json") from None


def strict(text: str) -> object:
    """The value of a JSON text; ValueError that says what is not JSON in it, UnicodeError for lone surrogates."""
    try:
        value: object = json.loads(
            text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_unique
        )  # numbers of thousands of digits are a ValueError too
        json.dumps(value, ensure_ascii=False).encode()  # a lone surrogate, escaped as \\ud800, is no text
        _check_depth(value)
    except RecursionError:
        raise _too_deep() from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; which of two values under one name was meant, nobody can know."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = Counter(name for name, _ in pairs)
        raise ValueError(f"the name {shown(max(names, key=lambda name: names[name]))} appears twice in one object")
    return found


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"the number {shown(text)} is out of range")
    return number


def _too_deep() -> ValueError:
    return ValueError(f"more than {DEEPEST} levels of lists and objects")


def _check_depth(value: object) -> None:
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [item for item in level if isinstance(item, (dict, list))]
        if not inner:
            return
        level = [part for item in inner for part in (item.values() if isinstance(item, dict) else item)]
    raise _too_deep()


class Fields:
    """One JSON object, read field by field; `finish` refuses what nobody read. Every fault is a RequestError.

    where: what the object is called in messages, "" for the body.
    """

    def __init__(self, value: object, where: str = "") -> None:
        if not isinstance(value, dict):
            raise RequestError(
                f"Expected {where or 'the body'} as an object, found {shown(value)}.", param=where or None
            )
        self.where = where
        self._known: set[str] = set()
        self._left = {name: item for name, item in value.items() if item is not None}

    def take(self, name: str) -> Any:
        """A field as it is, None where it is not given; whoever takes it checks it."""
        self._known.add(name)
        return self._left.pop(name, None)

    def path(self, name: str) -> str:
        """A field's name as messages say it."""
        return f"{self.where}.{name}" if self.where else name

    def wrong(self, name: str, expected: str, found: object) -> RequestError:
        """The error for a field with another value than expected."""
        return RequestError(f"Expected {self.path(name)} as {expected}, found {shown(found)}.", param=self.path(name))

    def text(self, name: str) -> str | None:
        """A string."""
        return self._typed(name, str)

    def flag(self, name: str) -> bool | None:
        """true or false."""
        return self._typed(name, bool)

    def whole(self, name: str, low: int, high: int) -> int | None:
        """A whole number from low to high."""
        value = self.number(name)
        if value is None:
            return None
        if value != int(value) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low} to {high}", value)
        return int(value)

    def number(self, name: str) -> int | float | None:
        """A number."""
        value = self.take(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise self.wrong(name, "a number", value)
        return value

    def items(self, name: str) -> list[Any] | None:
        """A list."""
        return self._typed(name, list)

    def _typed(self, name: str, kind: type[Kind]) -> Kind | None:
        value = self.take(name)
        if value is not None and not isinstance(value, kind):
            raise self.wrong(name, NAMES[kind], value)
        return value

    def fields(self, name: str) -> Fields | None:
        """An object."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def choice(self, name: str, allowed: Collection[str]) -> str | None:
        """One of some strings."""
        value = self.take(name)
        if value is not None and (not isinstance(value, str) or value not in allowed):
            raise self.wrong(name, " or ".join(f"'{one}'" for one in allowed), value)
        return value

    def only(self, name: str, *neutral: object, because: str) -> None:
        """A field that may be there as long as it asks for nothing special."""
        value = self.take(name)
        if value is not None and not any(value == one and type(value) is type(one) for one in neutral):
            raise RequestError(
                f"Expected no {self.path(name)}, found {shown(value)}: {because}; leave it out.",
                param=self.path(name), code="unsupported_value",
            )  # fmt: skip

    def finish(self) -> None:
        """Refuses every field that was not read."""
        if self._left:
            name = next(iter(self._left))
            raise RequestError(
                f"Expected no field {shown(self.path(name))}, which this server does not know and would have to drop; "
                f"leave it out. Known here: {', '.join(sorted(self._known))}.",
                param=self.path(name)[:100], code="unknown_field",
            )  # fmt: skip
