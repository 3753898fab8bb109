"""Requests that are wrong in one place, over all interfaces: a sentence and a 4xx, never a 5xx.

Every place of a whole request of each interface is given every kind of wrong value in turn.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from servers import CHAT, COMPLETION, Running, running

import mlx_mtp

SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}
USER, SAID = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}
SAMPLED = {"temperature": 0.5, "top_p": 0.9, "stream": False}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "test", "messages": [{"role": "system", "content": "Be short."}, USER, SAID,
                                      {"role": "user", "content": [{"type": "text", "text": "Go on."}]}],
        "max_completion_tokens": 2, "n": 1, "stop": ["."], "seed": 1, "logprobs": True, "top_logprobs": 1,
        "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"7": 1}, "reasoning_effort": "none",
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}},
        "prediction": {"type": "content", "content": "Yes."}, "stream_options": None, **SAMPLED,
    },
    COMPLETION: {
        "model": "test", "prompt": ["Hi."], "max_tokens": 2, "n": 1, "best_of": 1, "echo": True, "stop": ".", "seed": 1,
        "logprobs": 1, "presence_penalty": 0.1, "frequency_penalty": 0.1, "logit_bias": {"7": 1}, **SAMPLED,
    },
    "/v1/responses": {
        "model": "test", "input": [{"type": "message", "role": "user",
                                     "content": [{"type": "input_text", "text": "Hi."}]}],
        "instructions": "Be short.", "max_output_tokens": 2, "store": True, "top_logprobs": 1, "tool_choice": "none",
        "tools": [{"type": "function", "name": "f", "description": "Does.", "parameters": SCHEMA, "strict": True}],
        "parallel_tool_calls": True, "include": ["message.output_text.logprobs"], "truncation": "disabled",
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}, "reasoning": {"effort": "none"},
        **SAMPLED,
    },
    "/v1/messages": {
        "model": "test", "max_tokens": 2, "system": [{"type": "text", "text": "Be short."}],
        "messages": [USER, SAID, {"role": "user", "content": [{"type": "text", "text": "Go on."}]}],
        "stop_sequences": ["."], "top_k": 5, "thinking": {"type": "disabled"}, "tool_choice": {"type": "none"},
        "tools": [{"name": "f", "description": "Does.", "input_schema": SCHEMA}], **SAMPLED,
    },
}  # fmt: skip
WRONG = (None, True, -1, 0, 1.5, 10**30, "", "no such word", "\x00", [], [[]], {}, {"type": "unknown"}, float("inf"))
# What is found out where no field is looked at any more: no JSON, a grammar, tokens, what the template drops.
ELSEWHERE = ("The body is not JSON", "json_schema cannot be compiled", "Expected token ids", "Expected no tools")
Place = tuple[str | int, ...]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(mlx_mtp.load(drafter="lookup", depth=2)) as found:
        yield found


def places(value: Any, before: Place = ()) -> Iterator[Place]:
    """Of all that stands in a body, itself included."""
    yield before
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inside:
        yield from places(one, (*before, key))


def wrong_at(body: Any, place: Place, value: Any) -> Any:
    """The body with another value there."""
    if not place:
        return value
    found = copy.deepcopy(body)
    inner = found
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return found


def check(found: httpx.Response, sent: Any, place: Place) -> int:
    """The status, once it is seen that a refusal says why in a sentence, and names the place or what holds it."""
    assert found.status_code < 500, (sent, found.text)
    if found.status_code != 200:
        error = found.json()["error"]
        message, named = error["message"], str(error.get("param") or error["message"])  # Anthropic's has no param
        where = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place).removeprefix(".")
        assert message.startswith(ELSEWHERE) or where in named or where.startswith(named), (sent, error)
        assert 10 < len(message) < 1000 and message.endswith(".") and "\n" not in message, (sent, message)
        assert "Traceback" not in message and "pydantic" not in message and "NoneType" not in message, (sent, message)
    return found.status_code


@pytest.mark.parametrize("path", BODIES)
def test_one_wrong_value(server: Running, path: str) -> None:
    body, refused, tried = BODIES[path], 0, 0
    with server.http(headers={"content-type": "application/json"}) as client:
        whole = client.post(path, json=body)
        assert whole.status_code == 200, whole.text
        for place, value in itertools.product(places(body), WRONG):
            sent = json.dumps(wrong_at(body, place, value))
            refused += check(client.post(path, content=sent), sent, place) != 200
            tried += 1
        assert client.post(path, json=body).status_code == 200 and server.idle()
    assert tried > 250 and tried / 2 < refused < tried, (tried, refused)
