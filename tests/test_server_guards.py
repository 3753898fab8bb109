"""Who may ask and from where: keys, Host headers, web pages, connections; and errors that all have OpenAI's form."""

import threading
from contextlib import ExitStack

import pytest
from servers import CHAT, COMPLETION, FakeTokenizer, Running, ScriptedEngine, eventually, raw_request, running, until

import mlx_mtp
from mlx_mtp.serving.options import ServerOptions

PAGE = "https://app.example"
FORM = {"message", "type", "param", "code"}


def answer(server: Running, request: bytes) -> bytes:
    """What comes back until the server closes."""
    with server.connect() as connection:
        connection.sendall(request)
        return until(connection, b"never")


def test_the_api_key() -> None:
    """The scheme is a word in any case; /health needs no key and, as there is one, no name of this machine."""
    with running(ScriptedEngine, api_key="s3 cret", hosts=None) as server, server.http() as http:
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
    with running(ScriptedEngine, hosts=hosts) as server, server.http() as http:
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
    asked = {"Origin": PAGE, "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
    return asked | {name.replace("_", "-"): value for name, value in more.items()}


def test_a_page_may_ask_from_outside_of_this_network() -> None:
    """Chrome asks first whether a public page may reach a private address; no key is sent with the question."""
    private = {"Access_Control_Request_Private_Network": "true"}
    allow = "Access-Control-Allow-Private-Network"
    with running(ScriptedEngine, origins=[PAGE], api_key="s3cret", hosts=None) as server, server.http() as http:
        good = http.options(CHAT, headers=preflight(**private))
        assert good.status_code == 200 and good.headers[allow] == "true"
        assert good.headers["Access-Control-Allow-Origin"] == PAGE
        assert "authorization" in good.headers["Access-Control-Allow-Headers"] and "POST" in good.headers[
            "Access-Control-Allow-Methods"]  # fmt: skip
        assert "Origin" in good.headers["Vary"] and "Private-Network" in good.headers["Vary"]
        assert allow not in http.options(CHAT, headers=preflight()).headers
        for change in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {"Origin": f"{PAGE}.evil.example"},
                       {"Origin": "http://app.example"}, {"Origin": f"{PAGE}:8443"},
                       {"Access_Control_Request_Method": "DELETE"}):  # fmt: skip
            bad = http.options(CHAT, headers=preflight(**(private | change)))
            assert bad.status_code == 400 and set(bad.json()["error"]) == FORM, change
            assert not [name for name in bad.headers if name.startswith("access-control-allow")]
            assert "Origin" in bad.headers["Vary"]
    with running(ScriptedEngine, origins=["*"]) as server, server.http() as http:
        found = http.options(CHAT, headers=preflight(**private)).headers
        assert (found[allow], found["Access-Control-Allow-Origin"]) == ("true", "*")
    with running(ScriptedEngine) as server, server.http() as http:
        assert allow not in http.options(CHAT, headers=preflight(**private)).headers


def test_a_page_can_read_why_it_was_refused() -> None:
    class Broken(FakeTokenizer):
        def spell(self, token: int) -> tuple[str, bytes | None]:
            raise RuntimeError("a bug")

    engine = ScriptedEngine(tokenizer=Broken())
    page = {"Origin": PAGE}
    with running(lambda: engine, origins=[PAGE], api_key="s3cret") as server, server.http(headers=page) as http:
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
            assert response.headers["Access-Control-Allow-Origin"] == PAGE and "Origin" in response.headers["Vary"]
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
    with running(lambda: fake, origins=[PAGE]) as server, server.http(headers={"Origin": PAGE}) as http:
        with ExitStack() as open_ones:
            for _ in range(2):
                open_ones.enter_context(server.connect()).sendall(raw_request(COMPLETION, {"prompt": "x"}))
            assert eventually(lambda: len(server.server.server_state.connections) == 2)
            response = http.get("/health")
            assert response.status_code == 503 and response.json()["error"]["code"] == "crowded"
            assert int(response.headers["Retry-After"]) > 0 and response.headers["Connection"] == "close"
            assert response.headers["Access-Control-Allow-Origin"] == PAGE
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
    with running(ScriptedEngine) as server:
        for garbage in GARBAGE:
            head, _, body = answer(server, garbage).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 4") and b"application/json" in head.lower(), garbage
            assert b"connection: close" in head.lower() and b'"code":"bad_http"' in body, garbage
