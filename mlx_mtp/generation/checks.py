"""What callers hand in, checked before anything runs; the ranges of a checkpoint (vocabulary, context) are its own.

Every check returns the value as plain Python (NumPy's numbers and arrays are welcome) or raises OptionError or
PromptError with one sentence.
"""

from __future__ import annotations

import math
import operator
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any, SupportsIndex

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import MLXMTPError, OptionError, PromptError

# Sampling happens in float32: what is larger overflows there, what is smaller and not 0 becomes 0.
LARGEST, SMALLEST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def whole(name: str, value: object, low: int, high: int | None = None) -> int:
    """A whole number from `low` to `high` (None = no limit); True, 1.0 and '1' are none."""
    found, span = _index(value), f"of at least {low}" if high is None else f"from {low} to {high}"
    if found is None or found < low or (high is not None and found > high):
        raise _odd(name, f"a whole number {span}", value)
    return found


def number(name: str, value: object, low: float, high: float, note: str = "") -> float:
    """A number from `low` to `high` that float32 can hold: finite, and 0 or not too close to it."""
    found = _float(value)
    if not low <= found <= high or abs(found) > LARGEST:
        raise OptionError(f"{name} must be a number from {low:g} to {high:g}, not {shown(value)}{note}.")
    if 0 < abs(found) < SMALLEST:
        raise OptionError(f"{name} must be 0 or at least {SMALLEST:.2g}, the least that float32 holds, not {found:g}.")
    return found


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise _odd(name, "True or False", value)
    return bool(value)


def text(name: str, value: object, error: type[MLXMTPError] = OptionError) -> str:
    """A string that UTF-8 can write."""
    if not isinstance(value, str):
        raise _odd(name, "a string", value, error)
    try:
        value.encode()
    except UnicodeError:
        raise error(f"{name} holds bytes that are not UTF-8; convert the text first.") from None
    return value


def place(name: str, value: object) -> str | Path:
    """A folder, a file or a hub name."""
    if not isinstance(value, (str, Path)) or not str(value).strip():
        raise _odd(name, "a path or a name", value)
    return value


def function(name: str, value: object) -> Callable[..., Any] | None:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise _odd(name, "a function", value)
    return value


def functions(name: str, value: object) -> tuple[Callable[..., Any], ...]:
    """A sequence of things to call; None for none."""
    if isinstance(value, str) or not isinstance(value, Iterable | None):
        raise _odd(name, "a list of functions", value)
    found = tuple(value or ())
    if wrong := [one for one in found if not callable(one)]:
        raise OptionError(f"{name} must be a list of functions; {shown(wrong[0])} in it is not one.")
    return found


def one_of(name: str, value: object, choices: Collection[str]) -> str:
    """One of some words."""
    if not isinstance(value, str) or value not in choices:
        *first, last = (f"'{choice}'" for choice in choices)
        raise _odd(name, f"{', '.join(first)} or {last}", value)
    return value


def instance(name: str, value: object, kind: type) -> None:
    """None or an object of one class."""
    if value is not None and not isinstance(value, kind):
        raise _odd(name, f"a {kind.__name__}", value)


def declarations(name: str, value: object) -> bool | list[Mapping[str, Any]]:
    """True, False, or a list of tools in OpenAI's form."""
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if not isinstance(value, Sequence) or not all(isinstance(one, Mapping) for one in value):
        raise OptionError(f"{name} must be True, False or a list of declared tools, not {shown(value)}.")
    for tool in value:
        function = tool.get("function")
        parameters = function.get("parameters") or {} if isinstance(function, Mapping) else None
        if not isinstance(parameters, Mapping) or not isinstance(function.get("name"), str):
            raise OptionError(f"{name} must declare functions as {{'type': 'function', 'function': {{'name': ..., "
                              f"'parameters': ...}}}}, not {shown(tool)}.")  # fmt: skip
    return list(value)


def stop_strings(value: object) -> list[str]:
    """What ends a reply: a string, some strings, or None for none; an empty one would end every reply at once."""
    given = [] if value is None else [value] if isinstance(value, str) else value
    if isinstance(given, (bytes, Mapping)) or not isinstance(given, Iterable):
        raise _odd("stop", "a string or a list of strings", value)
    found = [text("Every stop string", one) for one in given]
    if "" in found:
        raise OptionError("Every stop string needs at least one character; leave the empty one out.")
    return found


def bias(value: object) -> dict[int, float]:
    """logit_bias: token id -> what is added to its logit; -inf bans a token."""
    if not isinstance(value, Mapping):
        raise OptionError(f"logit_bias must map token ids to numbers, not be {shown(value)}.")
    found = {}
    for token, added in value.items():
        name, key = f"logit_bias of token {shown(token)}", _index(token)
        if key is None or key < 0:
            raise OptionError(f"logit_bias must map token ids to numbers; {shown(token)} is no token id.")
        banned = _float(added) == -math.inf
        found[key] = -math.inf if banned else number(name, added, -LARGEST, LARGEST, " (-inf bans a token)")
    return found


def prompt(value: object) -> str | list[int] | list[dict[str, Any]]:
    """A string, chat messages, or token ids, as plain Python; PromptError for anything else."""
    if isinstance(value, str):
        return text("The prompt", value, PromptError)
    if isinstance(value, (np.ndarray, mx.array)):
        value = value.tolist()
    if isinstance(value, Mapping):
        raise PromptError("A prompt of chat messages must be a list of them; put the one message into a list.")
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray, memoryview)):
        raise PromptError(f"The prompt must be a string, a list of chat messages or token ids, not {shown(value)}.")
    if value and all(isinstance(message, Mapping) for message in value):
        return [_message(i, message) for i, message in enumerate(value)]
    found = [_index(token) for token in value]
    if None in found:
        wrong = value[found.index(None)]
        raise PromptError(
            f"A prompt in a list must be chat messages (each a dict with 'role' and 'content') or token ids (whole "
            f"numbers); {shown(wrong)} in it is neither or does not go with the rest."
        )
    return [token for token in found if token is not None]


def _message(place: int, message: Mapping[Any, Any]) -> dict[str, Any]:
    """One chat message; whether the template has a place for its role is the template's affair."""
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise PromptError(f"Message {place + 1} needs a 'role' such as 'user' or 'assistant', not {shown(role)}.")
    content = message.get("content")
    if content is not None and not isinstance(content, (str, list, tuple)):
        raise PromptError(f"The content of message {place + 1} must be a string, not {shown(content)}.")
    if isinstance(content, str):
        text(f"The content of message {place + 1}", content, PromptError)
    return dict(message)


def _float(value: object) -> float:
    """A number of any library as a float, NaN for everything else, and infinite where it is too large for one."""
    if not isinstance(value, Real) or isinstance(value, (bool, np.bool_)):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf  # type: ignore[operator]


def _index(value: object) -> int | None:
    """A whole number of any library as an int, None for everything else, truth values included."""
    if isinstance(value, (bool, np.bool_, mx.array)) or not isinstance(value, SupportsIndex):
        return None
    try:
        return operator.index(value)
    except TypeError:  # a NumPy array of more than one number has the method too
        return None


def _odd(name: str, wanted: str, value: object, error: type[MLXMTPError] = OptionError) -> MLXMTPError:
    return error(f"{name} must be {wanted}, not {shown(value)}.")


def shown(value: object) -> str:
    """A value in a message: short, whatever it is."""
    return "nothing" if value is None else reprlib.repr(value)
