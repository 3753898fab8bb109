"""What a client sees while it waits and under load: headers at once, comments in place of silence, nothing mixed up.

The engine writes what it is told to, and only once the test lets it: nothing here depends on how fast anything is.
"""

import gc
import json
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import httpx
import mlx.core as mx
import pytest
from servers import CHAT, COMPLETION, FakeTokenizer, Running, ScriptedEngine, eventually, raw_request, running

import mlx_mtp
from mlx_mtp.generation.request import GenerationRequest
from mlx_mtp.generation.types import Event
from mlx_mtp.testing import NEAR_TIE

PROMPT = {"prompt": "x", "stream": True}
ALWAYS = 0.02  # seconds of silence before a comment


class Prefilling(ScriptedEngine):
    """Reads a prompt in four chunks, each after the gate has opened for it."""

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        assert self.gate is not None
        for done in (1024, 2048, 3072, 4096):
            request.on_prefill(done, 4096)
            self.gate.acquire()
        yield from super().run(request)


@dataclass
class Slow(FakeTokenizer):
    """A tokenizer that takes until it is let go for every text with `mark` in it."""

    mark: str = "long"
    free: threading.Event = field(default_factory=threading.Event)
    begun: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def encode(self, text: str, special: bool = True) -> list[int]:
        if self.mark in text:
            self.begun.append(text)
            assert self.free.wait(30)
            text = text[:20]
        return super().encode(text, special)


def test_a_stream_says_how_many_are_before_it() -> None:
    fake = ScriptedEngine(gate=threading.Semaphore(0))
    chat = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    expected = (": generating", ": waiting, 1 before you", ": waiting, 2 before you")
    with running(fake, quiet_seconds=ALWAYS) as server, server.http() as http, ExitStack() as open_ones:
        waiting, asked = [], [(COMPLETION, PROMPT), (COMPLETION, PROMPT), (CHAT, chat)]
        for (path, body), said in zip(asked, expected, strict=True):
            response = open_ones.enter_context(http.stream("POST", path, json=body))
            assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            assert any(line == said for line in islice(lines, 1000))
            waiting.append(lines)
        assert len(fake.asked) == 1
        fake.gate.release(100)
        for lines in waiting:
            rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]" and all(line.startswith((": ", "data: ")) for line in rest)


def test_openais_client_reads_over_comments() -> None:
    with running(Prefilling(gate=threading.Semaphore(0)), quiet_seconds=ALWAYS) as server, server.openai() as client:
        with server.http() as http, http.stream("POST", COMPLETION, json=PROMPT) as other:
            found: list[str] = []
            stream = client.completions.create(model="test", prompt="x", stream=True)  # its headers are there
            lines = other.iter_lines()
            assert any(line == ": prefill 1024/4096 tokens" for line in islice(lines, 1000))
            server.engine.gate.release(1)
            assert any(line == ": prefill 2048/4096 tokens" for line in islice(lines, 1000))
            server.engine.gate.release(100)
            assert list(lines)[-2] == "data: [DONE]"
            found += [chunk.choices[0].text for chunk in stream]
        assert "".join(found) == "Hello!"


def test_who_leaves_a_long_prompt_ends_it_at_the_next_chunk() -> None:
    with running(Prefilling(gate=threading.Semaphore(0)), quiet_seconds=ALWAYS) as server, server.http() as http:
        with http.stream("POST", COMPLETION, json=PROMPT) as response:
            assert any(line.startswith(": prefill 1024") for line in islice(response.iter_lines(), 1000))
            ticket = server.queue._running
        assert ticket is not None and eventually(lambda: ticket.over)
        server.engine.gate.release(1)
        assert server.idle() and server.engine.written == 0


def test_what_is_wrong_is_said_before_the_headers() -> None:
    """While another reply runs: a stream that can be refused gets a status, not an event, and waits for nobody."""

    class Strict(ScriptedEngine):
        def request(self, ids: list[int], *, max_tokens: int, **options: Any) -> GenerationRequest:
            if options["stop"] == ["none"]:
                raise mlx_mtp.OptionError("Expected another stop.")
            return super().request(ids, max_tokens=max_tokens, **options)

    fake = Strict(gate=threading.Semaphore(0), max_context=50)
    with running(fake) as server, server.http() as http, http.stream("POST", COMPLETION, json=PROMPT):
        assert eventually(lambda: fake.written)
        for change, said in (({"prompt": "x" * 60}, "context of 50"), ({"stop": "none"}, "another stop"),
                             ({"model": "other"}, "has no model")):  # fmt: skip
            response = http.post(COMPLETION, json=PROMPT | change)
            assert response.status_code in (400, 404) and said in response.json()["error"]["message"]
        assert server.queue.waiting == 0
        fake.gate.release(100)


@pytest.mark.parametrize("path", [COMPLETION, CHAT])
def test_nobody_waits_for_a_prompt_that_is_tokenised(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six long prompts, more than there are threads for short ones; their places in the queue are theirs meanwhile."""
    monkeypatch.setattr(mlx_mtp.serving.app, "LARGE_BODY", 300)
    tokenizer = Slow()

    def body(text: str) -> dict[str, Any]:
        return {"prompt": text} if path == COMPLETION else {"messages": [{"role": "user", "content": text}]}

    with running(ScriptedEngine(tokenizer=tokenizer), places=7) as server, ThreadPoolExecutor(6) as pool:
        long = [pool.submit(server.post, path, body("long" * 100)) for _ in range(6)]
        assert eventually(lambda: server.queue.waiting == 6) and eventually(lambda: tokenizer.begun)
        for text in ("a", "b", "c"):
            assert server.post(path, body(text)).status_code == 200
        with server.http() as http:
            assert http.get("/health").json()["queue_length"] == 6
        assert len(tokenizer.begun) == 1  # the others wait for it
        tokenizer.free.set()
        assert all(reply.result().status_code == 200 for reply in long)


def test_who_leaves_while_its_prompt_is_tokenised_costs_the_engine_nothing() -> None:
    tokenizer = Slow()
    with running(ScriptedEngine(tokenizer=tokenizer), places=0) as server:
        with server.connect() as leaving:
            leaving.sendall(raw_request(COMPLETION, {"prompt": "a long one"}))
            assert eventually(lambda: tokenizer.begun)
            assert server.post(COMPLETION, {"prompt": "x"}).status_code == 429
        assert eventually(lambda: not server.queue.waiting)
        assert server.post(COMPLETION, {"prompt": "x"}).status_code == 200
        tokenizer.free.set()
        assert server.idle()
    assert len(server.engine.asked) == 1


def test_a_tokenizer_that_fails_is_told_of_without_its_inside(caplog: pytest.LogCaptureFixture) -> None:
    class Panic(BaseException):
        """As Rust's panics come to Python."""

    class Broken(FakeTokenizer):
        def encode(self, text: str, special: bool = True) -> list[int]:
            raise Panic("a secret of the inside")

    with running(ScriptedEngine(tokenizer=Broken())) as server:
        for stream in (True, False):
            response = server.post(COMPLETION, {"prompt": "x", "stream": stream})
            assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
        assert server.idle()
    assert caplog.text.count("a secret of the inside") >= 2


def test_what_cannot_fit_is_not_even_tokenised() -> None:
    """One token stands for at most 5 characters here, so 250 characters that are no blanks are 50 tokens or more."""
    tokenizer = Slow(mark="y")
    tokenizer.longest_token = 5
    with running(ScriptedEngine(tokenizer=tokenizer, max_context=50)) as server:
        for path, body in ((COMPLETION, {"prompt": "y" * 250}),
                           (CHAT, {"messages": [{"role": "user", "content": "y" * 125}] * 2})):  # fmt: skip
            error = server.post(path, body).json()["error"]
            assert error["code"] == "context_length_exceeded" and "at least 50" in error["message"]
        assert not tokenizer.begun
        tokenizer.free.set()
        blanks = server.post(COMPLETION, {"prompt": "y" * 249 + " \n\t" * 100})  # a tokenizer may drop blanks
        assert blanks.status_code == 200 and tokenizer.begun


def test_the_longest_token_of_a_real_tokenizer(embedded: mlx_mtp.Engine) -> None:
    tokenizer = embedded.tokenizer
    spelled = [tokenizer.decode([token]) for token in range(4096)]
    assert tokenizer.longest_token >= max(len(text) for text in spelled if "\ufffd" not in text)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_server_at_once(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mlx_mtp.serving.server.os, "_exit", sys.exit)
    fake = ScriptedEngine(gate=threading.Semaphore(0))
    with running(fake) as server, server.http() as http, http.stream("POST", COMPLETION, json=PROMPT):
        assert eventually(lambda: fake.written)
        server.server.handle_exit(number, None)
        with pytest.raises(SystemExit, match="130"):
            server.server.handle_exit(number, None)
        fake.gate.release(100)
    said = "finishing 1 reply, Ctrl-C again ends now\n"
    assert capfd.readouterr().err == (said if number == signal.SIGINT else "")


# Many at a time, by the embedded pair

STARTS = (
    "import os\n\n\ndef walk(", "class Reader:\n    def ", "def binary_search(", "import json\nimport sys\n\n",
)  # fmt: skip
SESSION_BYTES = 4_000_000


@pytest.fixture(scope="module")
def server(embedded: mlx_mtp.Engine) -> Iterator[Running]:
    """Places for all at once, and room for about six conversations."""
    with running(mlx_mtp.load(depth=2), places=64, session_bytes=SESSION_BYTES, body_bytes=100_000) as found:
        yield found


Asked = tuple[dict[str, Any], str]


def requests(embedded: mlx_mtp.Engine) -> list[Asked]:
    """Bodies and what generate answers: beginnings, and two ways to go on after each, told apart late."""
    greedy, found = mlx_mtp.Sampling(temperature=0.0), list[Asked]()

    def ask(prompt: str, count: int) -> str:
        result = embedded.generate(prompt, max_tokens=count, logprobs=2, sampling=greedy, raw=True)
        if min(max(row.values()) - min(row.values()) for row in result.top_logprobs) > NEAR_TIE:
            found.append(({"prompt": prompt, "max_tokens": count, "temperature": 0}, result.text))
        return prompt + result.text

    for i, start in enumerate(STARTS):
        text = ask(start, 5 + i)
        for more in ("\n\n\nclass Writer(", "\n\n\ndef close("):
            ask(text + more, 12 - i)
    assert len(found) >= 10 and len({text for _, text in found}) >= 8
    return found


def ask(client: httpx.Client, number: int, asked: Asked) -> str:
    """One request: a third streamed and dropped in mid-stream, a third streamed, a third whole; how it went."""
    body, expected = asked
    kind = ("dropped", "streamed", "whole")[number % 3]
    if kind == "whole":
        assert client.post(COMPLETION, json=body).json()["choices"][0]["text"] == expected
        return kind
    text, ended = "", False
    with client.stream("POST", COMPLETION, json={**body, "stream": True}) as response:
        assert response.status_code == 200
        for i, line in enumerate(line for line in response.iter_lines() if line.startswith("data: ")):
            data = line.removeprefix("data: ")
            ended = data == "[DONE]"
            text += "" if ended else json.loads(data)["choices"][0]["text"]
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
    assert 'requests_total{route="/v1/completions",status="200"} 36\n' in figures
    assert "mlx_mtp_dropped_total 0\n" not in figures
    bytes_kept = next(line for line in figures.splitlines() if line.startswith("mlx_mtp_session_bytes "))
    assert SESSION_BYTES / 2 < float(bytes_kept.split()[1]) <= SESSION_BYTES
