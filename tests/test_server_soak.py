"""The server under load and under nonsense: nothing lost, nothing mixed up, nothing left behind."""

from __future__ import annotations

import gc
import json
import random
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import mlx.core as mx
import pytest
from servers import CHAT, COMPLETION, FAULTS, Running, running

import mlx_mtp

pytestmark = pytest.mark.slow

# Tokens closer than this could change places by rounding; the questions below were chosen so that none are.
NEAR_TIE = 1e-3
STARTS = (
    "import os\n\n\ndef walk(", "class Reader:\n    def ", "def binary_search(", "import json\nimport sys\n\n",
)  # fmt: skip
SESSION_BYTES = 4_000_000


@pytest.fixture(scope="module")
def server(embedded: mlx_mtp.Engine) -> Iterator[Running]:
    """Places for all at once, and room for about six conversations."""
    with running(lambda: mlx_mtp.load(depth=2), places=64, session_bytes=SESSION_BYTES, body_bytes=100_000) as found:
        yield found


Asked = tuple[str, dict[str, Any], str]


def requests(embedded: mlx_mtp.Engine) -> list[Asked]:
    """Paths, bodies and what generate answers: beginnings, two ways to go on after each, told apart late; and chats."""
    tokenizer, greedy, found = embedded.tokenizer, mlx_mtp.Sampling(temperature=0.0), []

    def ask(path: str, body: dict[str, Any], ids: list[int], count: int) -> str:
        result = embedded.generate(ids, max_tokens=count, logprobs=2, sampling=greedy)
        if min(max(row.values()) - min(row.values()) for row in result.top_logprobs) > NEAR_TIE:
            found.append((path, {**body, "max_tokens": count, "temperature": 0}, result.text))
        return result.text

    for i, start in enumerate(STARTS):
        text = start + ask(COMPLETION, {"prompt": start}, tokenizer.encode(start), 5 + i)
        for more in ("\n\n\nclass Writer(", "\n\n\ndef close("):
            ask(COMPLETION, {"prompt": text + more}, tokenizer.encode(text + more), 12 - i)
    for subject in ("zip", "os.walk"):
        said = [{"role": "user", "content": f"What does {subject} do?"}]
        ask(CHAT, {"messages": said}, tokenizer.chat(said, thinking=False), 10)
    assert len(found) >= 12 and len({text for *_, text in found}) >= 10
    return found


def answer(choice: dict[str, Any]) -> str:
    """The text of a choice, whole or a chunk, of either endpoint."""
    return choice["text"] if "text" in choice else choice.get("message", choice.get("delta")).get("content") or ""


def ask(client: httpx.Client, number: int, asked: Asked) -> str:
    """One request: a third streamed and dropped in mid-stream, a third streamed, a third whole; how it went."""
    path, body, expected = asked
    kind = ("dropped", "streamed", "whole")[number % 3]
    if kind == "whole":
        response = client.post(path, json=body)
        assert response.status_code == 200, response.text
        assert answer(response.json()["choices"][0]) == expected
        return kind
    text, ended = "", False
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        for i, line in enumerate(line for line in response.iter_lines() if line.startswith("data: ")):
            data = line.removeprefix("data: ")
            ended = data == "[DONE]"
            text += "" if ended else answer(json.loads(data)["choices"][0])
            if kind == "dropped" and i >= number % 4:
                break
    assert expected.startswith(text) if kind == "dropped" else (text == expected and ended)
    return kind


def test_many_requests_at_a_time(server: Running, embedded: mlx_mtp.Engine) -> None:
    chance, known, memory = random.Random(5), requests(embedded), []
    asked = [chance.choice(known) for _ in range(36)]

    def go(number: int) -> str:
        with server.http() as client:  # a connection of its own, as clients come and go
            return ask(client, number, asked[number])

    kinds: Counter[str] = Counter()
    with ThreadPoolExecutor(12) as pool:
        for start in range(0, 36, 12):
            kinds.update(pool.map(go, range(start, start + 12)))
            assert server.idle()
            gc.collect()
            memory.append(mx.get_active_memory())
    assert kinds == {"dropped": 12, "streamed": 12, "whole": 12}
    # The pool of sessions fills up in the first third and stays within its bound.
    assert max(memory[1:]) <= memory[0] + 2_000_000, memory
    with server.http() as client:
        figures = client.get("/metrics").text
    answered = [line for line in figures.splitlines() if 'route="/v1/c' in line]
    assert len(answered) == 2 and all('status="200"' in line for line in answered)
    assert sum(int(line.split()[1]) for line in answered) == 36
    assert "mlx_mtp_dropped_total 0\n" not in figures
    bytes_kept = next(line for line in figures.splitlines() if line.startswith("mlx_mtp_session_bytes "))
    assert SESSION_BYTES / 2 < float(bytes_kept.split()[1]) <= SESSION_BYTES


GOOD_CHAT = {"messages": [{"role": "user", "content": "What does zip do?"}], "max_tokens": 4}
GOOD_COMPLETION = {"prompt": "import os\n", "max_tokens": 4}
Bad = tuple[str, str, bytes, dict[str, str]]
NO_VALUES: tuple[bytes, ...] = (
    b'{"a": 1, "a": 1}', b'[{"b": [{"a": 1, "a": null}]}]', b"NaN", b"Infinity", b"-Infinity", b"1e999",
    b"9" * 6000, b"-" + b"9" * 30, b"[" * 3000, b'"\\ud83d"', b'"\xff\xfe"', b"'x'", b"tru", b"0x10", b"01", b"1.",
    b"{}}", b'[[[["deep"]]]]', b'{"a": {"b": []}}', b'{"": 1}', b'[{"x": 1.5}]',
)  # fmt: skip


def malformed(chance: random.Random) -> Bad:
    """One request that no server may take: method, path, body, headers."""
    path, good = chance.choice([(CHAT, GOOD_CHAT), (COMPLETION, GOOD_COMPLETION)])
    text, kind = json.dumps(good).encode(), chance.randrange(10)
    headers = {"Content-Type": "application/json"}
    if kind == 0:  # cut short: never the whole of an object
        return "POST", path, text[: chance.randrange(len(text))], headers
    if kind == 1:  # a byte that is no UTF-8
        at = chance.randrange(len(text))
        return "POST", path, text[:at] + bytes([chance.choice([0xFF, 0xC0, 0xF8])]) + text[at:], headers
    if kind == 2:  # chance bytes
        return "POST", path, chance.randbytes(chance.randrange(300)) + b"\x00", headers
    if kind == 3:
        return "POST", path, b'{"messages": ' + b"[" * chance.randint(101, 40_000), headers
    if kind == 4:
        name = "".join(chance.choices("abcdefghij_", k=12))
        return "POST", path, json.dumps(good | {name: 1}).encode(), headers
    if kind == 5:
        wrong = chance.choice(["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "json"])
        return "POST", path, text, {"Content-Type": wrong}
    if kind == 6:
        route = chance.choice(["/", "/v1", "/v1/embeddings", "/v1/chat", "/v1/chat/completions/", "/..%2f", "/%00",
                               f"/{chance.getrandbits(64):x}", "/v1/models/other", "/metrics/x"])  # fmt: skip
        return chance.choice(["GET", "POST", "PUT", "DELETE", "BREW"]), route, text, headers
    if kind == 7:
        method = chance.choice(["GET", "PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"])
        return method, path, text, headers
    if kind == 8 and chance.random() < 0.2:  # seldom, as each is large
        return "POST", path, b" " * chance.randint(100_001, 200_000) + text, headers
    if kind == 9:
        return "POST", path, json.dumps(good | chance.choice(FAULTS[path])[0]).encode(), headers
    fields = ["max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "logit_bias", "stream", "n", "model",
              "response_format", *(["messages", "tools"] if path == CHAT else ["prompt"])]  # fmt: skip
    field = chance.choice(fields)
    rest = {name: value for name, value in good.items() if name != field}
    start = json.dumps(rest).encode()[:-1] + (b", " if rest else b"")
    return "POST", path, start + json.dumps(field).encode() + b": " + chance.choice(NO_VALUES) + b"}", headers


def test_a_thousand_malformed_requests(server: Running, embedded: mlx_mtp.Engine) -> None:
    chance, statuses = random.Random(11), Counter[int]()
    prompt = GOOD_COMPLETION["prompt"]
    expected = embedded.generate(prompt, max_tokens=4, raw=True, sampling=mlx_mtp.Sampling(temperature=0.0)).text

    def works(client: httpx.Client) -> None:
        reply = client.post(COMPLETION, json=GOOD_COMPLETION | {"temperature": 0})
        assert reply.status_code == 200 and reply.json()["choices"][0]["text"] == expected

    with server.http() as client:
        for number in range(1000):
            method, path, body, headers = malformed(chance)
            response = client.request(method, path, content=body, headers=headers)
            sent = (method, path, body[:300], headers, response.text[:300])
            assert 400 <= response.status_code < 500 and "Traceback" not in response.text, sent
            if method != "HEAD":
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"} and 10 < len(error["message"]) < 1200, sent
            statuses[response.status_code] += 1
            if number % 250 == 249:
                works(client)
    assert sum(statuses.values()) == 1000 and {400, 404, 405, 413, 415} <= set(statuses), statuses
    for _ in range(100):
        answer = _raw(server, chance.randbytes(chance.randrange(1, 400)))
        assert not answer or answer.startswith(b"HTTP/1.1 4"), answer
    with server.http() as client:
        works(client)
    assert server.idle()


def _raw(server: Running, data: bytes) -> bytes:
    """What the server answers to bytes that are no HTTP."""
    found = b""
    with server.connect() as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                found += part
        except ConnectionError:
            pass
    return found
