"""Every field of OpenAI's requests: honoured, refused with a sentence, or without effect by its nature."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import CHAT, COMPLETION, Running, ScriptedEngine, running, until

import mlx_mtp
from mlx_mtp.serving.body import parsed
from mlx_mtp.serving.errors import RequestError

SAID = [{"role": "user", "content": "x"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CACHED = {"type": "ephemeral"}
# From the reference of OpenAI's API, as its own client (openai 3.57) has it.
CHAT_FIELDS = [
    "messages", "model", "audio", "frequency_penalty", "function_call", "functions", "logit_bias", "logprobs",
    "max_completion_tokens", "max_tokens", "metadata", "modalities", "moderation", "n", "parallel_tool_calls",
    "prediction", "presence_penalty", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention",
    "reasoning_effort", "response_format", "safety_identifier", "seed", "service_tier", "stop", "store", "stream",
    "stream_options", "temperature", "tool_choice", "tools", "top_logprobs", "top_p", "user", "verbosity",
    "web_search_options",
]  # fmt: skip
COMPLETION_FIELDS = [
    "model", "prompt", "best_of", "echo", "frequency_penalty", "logit_bias", "logprobs", "max_tokens", "n",
    "presence_penalty", "seed", "stop", "stream", "stream_options", "suffix", "temperature", "top_p", "user",
]  # fmt: skip
PAGE = Path(__file__).parent.parent / "docs/server.md"


@pytest.mark.parametrize(("path", "names"), [(CHAT, CHAT_FIELDS), (COMPLETION, COMPLETION_FIELDS)])
def test_every_field_is_known(path: str, names: list[str]) -> None:
    """Each has a row in the documentation, may be null, and is refused, if at all, by a sentence of its own."""
    needed = {"messages": SAID} if path == CHAT else {"prompt": "x"}
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    with running(ScriptedEngine) as server:
        for name in names:
            assert any(f"`{name}`" in row for row in rows), name
            assert name in needed or server.post(path, needed | {name: None}).status_code == 200, name
            response = server.post(path, needed | {name: {"colour": "red"}})
            if response.status_code != 200:
                error = response.json()["error"]
                assert response.status_code == 400 and str(error["param"]).startswith(name), (name, error)
                assert (error["code"], error["param"]) != ("unknown_field", name)
        error = server.post(path, needed | {"colour": "red"}).json()["error"]
        assert error["code"] == "unknown_field" and error["param"] == "colour"


TAKEN: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"budget": 1024, "stop": [], "seed": None, "logprobs": 0}),
    ({"seed": -1}, {"seed": 2**64 - 1}),
    ({"seed": -(2**63)}, {"seed": 2**63}),
    ({"seed": 2**63 - 1}, {"seed": 2**63 - 1}),
    ({"seed": 2**64 - 1}, {"seed": 2**64 - 1}),
    ({"seed": 0}, {"seed": 0}),
    ({"stop": None}, {"stop": []}),
    ({"stop": []}, {"stop": []}),
    ({"stop": "a"}, {"stop": ["a"]}),
    ({"max_tokens": 1000}, {"budget": 1000}),
    ({"max_tokens": 10**9}, {"budget": 10**9}),
    ({"max_tokens": 2**63 - 1}, {"budget": 2**63 - 1}),
    ({"max_tokens": 5.0}, {"budget": 5}),
    ({"n": 1}, {}),
    ({"user": "me", "store": False, "service_tier": "auto", "metadata": {}, "cache_control": CACHED}, {}),
    # Of the sampling
    ({"temperature": 1, "top_p": 0}, {"temperature": 0.0, "top_p": None}),
    ({"top_p": 0.0}, {"temperature": 0.0, "top_p": None}),
    ({"top_p": 0.5}, {"temperature": None, "top_p": 0.5}),
    ({"temperature": 2, "top_p": 1}, {"temperature": 2.0, "top_p": 1.0}),
    ({"presence_penalty": -2, "frequency_penalty": 2}, {"presence_penalty": -2.0, "frequency_penalty": 2.0}),
    ({"logit_bias": {"5": -100}}, {"logit_bias": {5: -100.0}}),
    ({"logit_bias": None, "temperature": None}, {"logit_bias": None, "temperature": None}),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_what_openai_takes_reaches_the_engine(path: str) -> None:
    needed = {"messages": SAID} if path == CHAT else {"prompt": "x"}
    fake = ScriptedEngine()
    with running(lambda: fake) as server:
        for body, expected in TAKEN:
            response = server.post(path, needed | body)
            assert response.status_code == 200, (body, response.text)
            found = vars(fake.asked[-1]) | vars(fake.asked[-1].sampling)
            assert {name: found[name] for name in expected} == expected, body


def test_a_reply_is_cut_where_the_context_ends() -> None:
    """However many tokens a request asks for; only a limit that was given to the server is one for requests."""
    with running(lambda: mlx_mtp.load(drafter=None, max_context=64)) as server:
        bodies = [{"prompt": [7] * 60, "temperature": 0} | more
                  for more in ({"max_tokens": 64}, {"max_tokens": 65}, {"max_tokens": 10**9}, {})]  # fmt: skip
        replies = [server.post(COMPLETION, body).json() for body in bodies]
        assert {reply["usage"]["completion_tokens"] for reply in replies} == {4}
        assert {reply["choices"][0]["text"] for reply in replies} == {replies[0]["choices"][0]["text"]}
        assert {reply["choices"][0]["finish_reason"] for reply in replies} == {"length"}
    fake = ScriptedEngine(max_context=10)
    with running(lambda: fake, most_tokens=20) as server:
        for most, status in ((20, 200), (21, 400)):
            response = server.post(COMPLETION, {"prompt": "x", "max_tokens": most})
            assert response.status_code == status
        assert "1 to 20" in response.json()["error"]["message"]
        assert server.post(COMPLETION, {"prompt": "x"}).status_code == 200 and fake.asked[-1].budget == 20


MESSAGES: list[tuple[dict[str, Any], str]] = [
    ({"role": "assistant", "content": None}, ""),
    ({"role": "assistant"}, ""),
    ({"role": "assistant", "content": None, "tool_calls": None}, ""),
    ({"role": "assistant", "content": None, "tool_calls": []}, ""),
    ({"role": "assistant", "content": None, "refusal": "I cannot."}, "I cannot."),
    ({"role": "assistant", "content": "a", "refusal": None, "audio": None, "function_call": None}, "a"),
    ({"role": "assistant", "content": [{"type": "text", "text": "a"}, {"type": "refusal", "refusal": "b"}]}, "a\nb"),
    ({"role": "user", "content": [{"type": "text", "text": "a", "cache_control": CACHED}]}, "a"),
    ({"role": "user", "content": [{"type": "text", "text": "a", "prompt_cache_breakpoint": CACHED}]}, "a"),
    ({"role": "user", "content": "a", "cache_control": CACHED, "name": None}, "a"),
    ({"role": "user", "content": ""}, ""),
]  # fmt: skip


def test_messages_that_openai_takes() -> None:
    fake = ScriptedEngine()
    with running(lambda: fake) as server:
        for message, content in MESSAGES:
            response = server.post(CHAT, {"messages": [*SAID, message, *SAID]})
            assert response.status_code == 200, (message, response.text)
            assert fake.tokenizer.seen[-1]["messages"][1]["content"] == content
        for tool in (TOOL | {"cache_control": CACHED}, {**TOOL, "function": TOOL["function"] | {"strict": False}},
                     {**TOOL, "function": TOOL["function"] | {"strict": None, "cache_control": CACHED}}):  # fmt: skip
            assert server.post(CHAT, {"messages": SAID, "tools": [tool]}).status_code == 200, tool
            assert fake.tokenizer.seen[-1]["tools"][0]["function"]["name"] == "f"
        assert server.post(CHAT, {"messages": SAID, "verbosity": "medium"}).status_code == 200


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{**TOOL, "function": {"name": "f", "strict": True}}]}, "tools[0].function.strict", "schema"),
    ({"tools": [{**TOOL, "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict", "schema"),
    ({"verbosity": "low"}, "verbosity", "dial"),
    ({"verbosity": "high"}, "verbosity", "dial"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "b"}]}]},
     "messages[0].content[0].type", "text"),
    ({"messages": [{"role": "system"}]}, "messages[0].content", "required"),
    ({"web_search_options": {}}, "web_search_options", "searches nothing"),
    ({"messages": [*SAID, {"role": "assistant", "tool_calls": [
        {**CALL, "function": {"name": "f", "arguments": '{"a": 1, "a": 2}'}}]}]},
     "messages[1].tool_calls[0].function.arguments", "'a' appears twice"),
    ({"messages": [*SAID, {"role": "assistant", "tool_calls": [
        {**CALL, "function": {"name": "f", "arguments": '{"a": NaN}'}}]}]},
     "messages[1].tool_calls[0].function.arguments", "NaN"),
    ({"messages": [*SAID, {"role": "assistant", "tool_calls": [
        {**CALL, "function": {"name": "f", "arguments": '{"a":' + "[" * 50_000}}]}]},
     "messages[1].tool_calls[0].function.arguments", "levels"),
]


def test_what_would_do_nothing_is_refused() -> None:
    with running(ScriptedEngine) as server:
        for body, param, said in REFUSED:
            error = server.post(CHAT, {"messages": SAID} | body).json()["error"]
            assert error["param"] == param and said in error["message"], (body, error)


@pytest.mark.parametrize(("text", "said"), [
    (b'{"max_tokens": 1, "max_tokens": 2}', "'max_tokens' appears twice"),
    (b'{"logit_bias": {"5": 1, "\\u0035": 2}}', "'5' appears twice"),
    (b'{"user": null, "user": null}', "'user' appears twice"),
    (b'{"metadata": {"a": [{"b": {"c": 1, "c": 1}}]}}', "'c' appears twice"),
    (b'{"temperature": NaN}', "nan"), (b'{"temperature": -Infinity}', "inf"), (b"1e400", "1e400"), (b"-1e999", "1e999"),
    (b"9" * 5000, "digits"), (b"[" * 101 + b"]" * 101, "levels"), (b"[" * 500 + b"]" * 500, "levels"),
    (b"[" * 100_000 + b"]" * 100_000, "levels"), (b"[" * 100_000, "levels"),
    (b"", "not JSON"), (b"{", "not JSON"), (b"[1,]", "not JSON"), (b"\xef\xbb\xbf{}", "not JSON"),
    (b'"\xff"', "UTF-8"), (b'"\\ud800"', "UTF-8"), (b'{"\\udfff": 1}', "UTF-8"),
])  # fmt: skip
def test_json_that_means_nothing(text: bytes, said: str) -> None:
    with pytest.raises(RequestError, match=f"(?i){said}") as error:
        parsed(text)
    assert error.value.body["error"]["code"] == "bad_json" and error.value.status == 400


def test_json_that_means_something() -> None:
    assert parsed(b'{"a": [1, 2.5, null, "\xc3\xa9"]}') == {"a": [1, 2.5, None, "é"]}
    assert parsed(b'[{"a": 1}, {"a": 1}]') == [{"a": 1}, {"a": 1}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(ScriptedEngine, body_bytes=2000) as found:
        yield found


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
BODIES = st.dictionaries(st.sampled_from([*CHAT_FIELDS, "prompt", "colour"]), VALUES, max_size=4)


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with server.http() as found:
        yield found


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(["POST", "GET", "PUT", "DELETE", "OPTIONS", "BREW"]),
    st.sampled_from([CHAT, COMPLETION, "/", "/v1/models/x", "/..%2f", "/%00", "/metrics/x"]),
    st.binary(max_size=3000) | BODIES.map(lambda body: json.dumps({"messages": SAID, **body}).encode()),
    st.sampled_from(["application/json", "application/json", "text/plain", ""]),
)
def test_every_answer_has_one_form(http: httpx.Client, method: str, path: str, body: bytes, kind: str) -> None:
    """Most are refused, some happen to be right; nothing fails inside."""
    response = http.request(method, path, content=body, headers={"Content-Type": kind})
    if response.status_code != 200:
        assert 400 <= response.status_code < 500, (method, path, body, response.text)
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"} and 10 < len(error["message"]) < 1200


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.binary(min_size=1, max_size=400))
def test_bytes_that_are_no_http(server: Running, data: bytes) -> None:
    with server.connect() as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        found = until(connection, b"never")
    assert not found or found.startswith(b"HTTP/1.1 4")
