"""Every field of OpenAI's requests: honoured, refused in a sentence, or without effect; and who may ask, from where."""

import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from servers import CHAT, COMPLETION, FakeTokenizer, Running, ScriptedEngine, eventually, raw_request, running, until

import mlx_mtp
from mlx_mtp.serving.body import parsed
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.options import ServerOptions

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
    with running(ScriptedEngine()) as server:
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
    with running(ScriptedEngine()) as server:
        for body, expected in TAKEN:
            response = server.post(path, needed | body)
            assert response.status_code == 200, (body, response.text)
            found = vars(server.engine.asked[-1]) | vars(server.engine.asked[-1].sampling)
            assert {name: found[name] for name in expected} == expected, body


def test_a_reply_is_cut_where_the_context_ends() -> None:
    """However many tokens a request asks for; only a limit that was given to the server is one for requests."""
    with running(mlx_mtp.load(drafter=None, max_context=64)) as server:
        bodies = [{"prompt": [7] * 60, "temperature": 0} | more
                  for more in ({"max_tokens": 64}, {"max_tokens": 65}, {"max_tokens": 10**9}, {})]  # fmt: skip
        replies = [server.post(COMPLETION, body).json() for body in bodies]
        assert {reply["usage"]["completion_tokens"] for reply in replies} == {4}
        assert {reply["choices"][0]["text"] for reply in replies} == {replies[0]["choices"][0]["text"]}
        assert {reply["choices"][0]["finish_reason"] for reply in replies} == {"length"}
    with running(ScriptedEngine(max_context=10), most_tokens=20) as server:
        for most, status in ((20, 200), (21, 400)):
            response = server.post(COMPLETION, {"prompt": "x", "max_tokens": most})
            assert response.status_code == status
        assert "1 to 20" in response.json()["error"]["message"]
        assert server.post(COMPLETION, {"prompt": "x"}).status_code == 200 and server.engine.asked[-1].budget == 20


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
    with running(ScriptedEngine()) as server:
        for message, content in MESSAGES:
            response = server.post(CHAT, {"messages": [*SAID, message, *SAID]})
            assert response.status_code == 200, (message, response.text)
            assert server.engine.tokenizer.seen[-1]["messages"][1]["content"] == content
        for tool in (TOOL | {"cache_control": CACHED}, {**TOOL, "function": TOOL["function"] | {"strict": False}},
                     {**TOOL, "function": TOOL["function"] | {"strict": None, "cache_control": CACHED}}):  # fmt: skip
            assert server.post(CHAT, {"messages": SAID, "tools": [tool]}).status_code == 200, tool
            assert server.engine.tokenizer.seen[-1]["tools"][0]["function"]["name"] == "f"
        assert server.post(CHAT, {"messages": SAID, "verbosity": "medium"}).status_code == 200


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"tools": [{**TOOL, "function": {"name": "f", "strict": "yes"}}]}, "tools[0].function.strict", "boolean"),
    ({"verbosity": "low"}, "verbosity", "dial"),
    ({"verbosity": "high"}, "verbosity", "dial"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
    ({"messages": [{"role": "user", "content": [{"type": "refusal", "refusal": "b"}]}]},
     "messages[0].content[0].type", "text"),
    ({"web_search_options": {}}, "web_search_options", "searches nothing"),
    *(({"messages": [*SAID, {"role": "assistant", "tool_calls": [
        {**CALL, "function": {"name": "f", "arguments": arguments}}]}]},
       "messages[1].tool_calls[0].function.arguments", said)
      for arguments, said in (('{"a": 1, "a": 2}', "'a' appears twice"), ('{"a": NaN}', "NaN"),
                              ('{"a":' + "[" * 50_000, "levels"))),
]


def test_what_would_do_nothing_is_refused() -> None:
    with running(ScriptedEngine()) as server:
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


# Keys, Host headers, web pages, connections; and errors that all have OpenAI's form

ORIGIN = "https://app.example"
FORM = {"message", "type", "param", "code"}


def answer(server: Running, request: bytes) -> bytes:
    """What comes back until the server closes."""
    with server.connect() as connection:
        connection.sendall(request)
        return until(connection, b"never")


def test_the_api_key() -> None:
    """The scheme is a word in any case; /health needs no key and, as there is one, no name of this machine."""
    with running(ScriptedEngine(), api_key="s3 cret", hosts=None) as server, server.http() as http:
        with server.openai() as client:
            assert client.models.list().data[0].id == "test"
        for value in ("Bearer s3 cret", "bearer s3 cret", "BEARER   s3 cret"):
            assert http.get("/v1/models", headers={"Authorization": value}).status_code == 200, value
        for value in ("Bearer", "Bearers3 cret", "Basic s3 cret", "s3 cret", "Bearer S3 cret", "Bearer s3",
                      "Bearer s3 cret x", "Bearer Bearer s3 cret", "Bearer s3 cret\xe9"):  # fmt: skip
            for path in ("/v1/models", "/metrics", "/v1/nothing"):
                response = http.get(path, headers={"Authorization": value.encode("latin-1")})
                assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer", value
                assert response.json()["error"]["code"] == "invalid_api_key"
        twice = [("Authorization", "Bearer s3 cret"), ("Authorization", "Bearer s3 cret")]
        assert http.get("/v1/models", headers=twice).status_code == 401
        assert http.get("/health", headers={"Host": "any.example"}).status_code == 200
    for key in ("", " s3cret", "s3cret ", "s3\ncret", "sécret"):
        with pytest.raises(mlx_mtp.OptionError, match="API key"):
            ServerOptions(api_key=key)


LET_IN = ("127.0.0.1", "127.0.0.1:1", "localhost", "LocalHost:8080", "localhost.", "localhost.:80", "localhost:",
          "[::1]", "[::1]:80", "[0:0:0:0:0:0:0:1]:80", "[0000::0001]", "host.docker.internal",
          "HOST.docker.internal.:8080", "[fd00::2]")  # fmt: skip
KEPT_OUT = (
    "[::1].evil.example", "[::1]evil.example:80", "[::1]:80.evil.example", "[::1", "::1", "[::2]", "[localhost]",
    "[127.0.0.1]", "[::1%25lo0]", "[::ffff:127.0.0.1]", "evil.example", "localhost.evil.example", "localhost..",
    ".localhost", "evil.example:localhost", "localhost@evil.example", "user@localhost", "localhost:80:80",
    "localhost:port", "localhost:999999", "localhost/", "localhost?", "localhost, evil.example",
    "localhost\\.evil.example", "127.0.0.1.evil.example", "127.0.0.1.nip.io", "xlocalhost", "internal",
    "docker.internal", "", ".", "*",
)  # fmt: skip


def test_one_way_to_read_a_host() -> None:
    hosts = ("localhost", "127.0.0.1", "::1", "Host.Docker.Internal", "FD00:0::2")
    with running(ScriptedEngine(), hosts=hosts) as server, server.http() as http:
        for host in LET_IN:
            assert http.get("/health", headers={"Host": host}).status_code == 200, host
        for host in KEPT_OUT:
            response = http.get("/health", headers={"Host": host})
            assert response.status_code == 403, host
            assert "--allow-host" in response.json()["error"]["message"]
        assert answer(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403")
        assert answer(server, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 200")
        two = b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n"
        assert answer(server, two).startswith(b"HTTP/1.1 400")
    for host in ("localhost:80", "", "a b", "*", "*.internal", "http://x", "[::1]:80", "127.0.0.1:80", "fe80::1%en0"):
        with pytest.raises(mlx_mtp.OptionError, match="host"):
            ServerOptions(hosts=[host])


def preflight(**more: str) -> dict[str, str]:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    return asked | {name.replace("_", "-"): value for name, value in more.items()}


def test_a_page_may_ask_from_outside_of_this_network() -> None:
    """Chrome asks first whether a public page may reach a private address; no key is sent with the question."""
    private = {"Access_Control_Request_Private_Network": "true"}
    allow = "Access-Control-Allow-Private-Network"
    with running(ScriptedEngine(), origins=[ORIGIN], api_key="s3cret", hosts=None) as server, server.http() as http:
        good = http.options(CHAT, headers=preflight(**private))
        assert good.status_code == 200 and good.headers[allow] == "true"
        assert good.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert "authorization" in good.headers["Access-Control-Allow-Headers"] and "POST" in good.headers[
            "Access-Control-Allow-Methods"]  # fmt: skip
        assert "Origin" in good.headers["Vary"] and "Private-Network" in good.headers["Vary"]
        assert allow not in http.options(CHAT, headers=preflight()).headers
        for change in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": f"{ORIGIN}.evil.example"},
                       {"Origin": "http://app.example"}, {"Origin": f"{ORIGIN}:8443"},
                       {"Access_Control_Request_Method": "DELETE"}):  # fmt: skip
            bad = http.options(CHAT, headers=preflight(**(private | change)))
            assert bad.status_code == 400 and set(bad.json()["error"]) == FORM, change
            assert not [name for name in bad.headers if name.startswith("access-control-allow")]
            assert "Origin" in bad.headers["Vary"]
    with running(ScriptedEngine(), origins=["*"]) as server, server.http() as http:
        found = http.options(CHAT, headers=preflight(**private)).headers
        assert (found[allow], found["Access-Control-Allow-Origin"]) == ("true", "*")
    with running(ScriptedEngine()) as server, server.http() as http:
        assert allow not in http.options(CHAT, headers=preflight(**private)).headers


def test_a_page_can_read_why_it_was_refused() -> None:
    class Broken(FakeTokenizer):
        def spell(self, token: int) -> tuple[str, bytes | None]:
            raise RuntimeError("a bug")

    engine = ScriptedEngine(tokenizer=Broken())
    page = {"Origin": ORIGIN}
    with running(engine, origins=[ORIGIN], api_key="s3cret") as server, server.http(headers=page) as http:
        good = {"Authorization": "Bearer s3cret"}
        found = {
            401: http.get("/v1/models"),
            403: http.get("/health", headers={"Host": "evil.example"}),
            404: http.get("/v2", headers=good),
            405: http.get(CHAT, headers=good),
            415: http.post(CHAT, content=b"{}", headers=good),
            400: http.post(COMPLETION, json={}, headers=good),
            500: http.post(COMPLETION, json={"prompt": "x", "logprobs": 1}, headers=good),
        }
        for status, response in found.items():
            assert response.status_code == status and set(response.json()["error"]) == FORM, response.text
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN and "Origin" in response.headers["Vary"]
            assert "Retry-After" in response.headers["Access-Control-Expose-Headers"]
        elsewhere = http.get("/v2", headers=good | {"Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in elsewhere.headers and "Origin" in elsewhere.headers["Vary"]


@pytest.mark.parametrize(("given", "sent"), [
    ("https://App.Example/", "https://app.example"), ("https://app.example:443", "https://app.example"),
    ("http://localhost:3000", "http://localhost:3000"), ("http://[::1]:5173/", "http://[::1]:5173"),
    ("https://bücher.example", "https://xn--bcher-kva.example"), ("chrome-extension://abc", "chrome-extension://abc"),
    ("null", "null"),
])  # fmt: skip
def test_origins_as_people_write_them(given: str, sent: str) -> None:
    assert ServerOptions(origins=[given]).origins == [sent]


def test_origins_that_no_browser_sends() -> None:
    for origin in ("app.example", "", "https://", "https://*.example", "https://a.example/b", "https://me@a.example",
                   "https://a.example:x", "https://a.example?b", "localhost:3000"):  # fmt: skip
        with pytest.raises(mlx_mtp.OptionError, match="origin"):
            ServerOptions(origins=[origin])


def test_too_many_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_mtp.serving.guards, "MOST_CONNECTIONS", 2)
    fake = ScriptedEngine(gate=threading.Semaphore(0))
    with running(fake, origins=[ORIGIN]) as server, server.http(headers={"Origin": ORIGIN}) as http:
        with ExitStack() as open_ones:
            for _ in range(2):
                open_ones.enter_context(server.connect()).sendall(raw_request(COMPLETION, {"prompt": "x"}))
            assert eventually(lambda: len(server.server.server_state.connections) == 2)
            response = http.get("/health")
            assert response.status_code == 503 and response.json()["error"]["code"] == "crowded"
            assert int(response.headers["Retry-After"]) > 0 and response.headers["Connection"] == "close"
            assert response.headers["Access-Control-Allow-Origin"] == ORIGIN
        assert eventually(lambda: not server.server.server_state.connections)
        fake.gate.release(100)
        assert http.get("/health").status_code == 200


GARBAGE = (
    b"\x16\x03\x01\x02\x00\x01\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: a b\r\nX: \0\r\n\r\n", b"\r\n" * 9 + b"\0\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
)  # fmt: skip


def test_what_is_no_http_gets_an_error_in_json() -> None:
    with running(ScriptedEngine()) as server:
        for garbage in GARBAGE:
            head, _, body = answer(server, garbage).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 4") and b"application/json" in head.lower(), garbage
            assert b"connection: close" in head.lower() and b'"code":"bad_http"' in body, garbage
