"""The server as its clients see it: OpenAI's own client, plain HTTP, and bare sockets."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from conftest import Command, one_sentence
from servers import (
    CHAT,
    COMPLETION,
    FAULTS,
    TOOL,
    Running,
    ScriptedEngine,
    contents,
    eventually,
    raw_request,
    running,
    until,
)
from thinking import TOKENS, thinking_engine

import mlx_mtp
import mlx_mtp.serving
from mlx_mtp.generation.prefix import Session
from mlx_mtp.generation.request import GenerationRequest
from mlx_mtp.serving.server import Connection, listen
from mlx_mtp.serving.sessions import SessionPool
from mlx_mtp.testing import NEAR_TIE

QUESTION = [{"role": "user", "content": "What does shutil.copytree do?"}]


@pytest.fixture(scope="module")
def server(embedded: mlx_mtp.Engine) -> Iterator[Running]:
    with running(mlx_mtp.load(depth=2)) as found:
        yield found


def clear(result: mlx_mtp.Result) -> mlx_mtp.Result:
    """A result whose tokens no rounding could have changed."""
    assert result.top_logprobs is not None
    for best, second, *_ in (sorted(row.values(), reverse=True) for row in result.top_logprobs):
        assert best - second > NEAR_TIE
    return result


def test_chat_is_what_generate_writes(server: Running, embedded: mlx_mtp.Engine) -> None:
    expected = clear(embedded.generate(embedded.tokenizer.chat(QUESTION, thinking=False), max_tokens=12, logprobs=2))
    with server.openai() as client:
        first = client.chat.completions.create(model="test", messages=QUESTION, max_tokens=12, temperature=0)
        again = client.chat.completions.create(model="test", messages=QUESTION, max_completion_tokens=12)
        chunks = list(client.chat.completions.create(
            model="test", messages=QUESTION, max_tokens=12, stream=True, stream_options={"include_usage": True}))
    for reply in (first, again):
        assert reply.choices[0].message.content == expected.text
        assert (reply.choices[0].finish_reason, reply.choices[0].message.role) == ("length", "assistant")
        assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (expected.stats.prompt_tokens, 12)
        details, stats = reply.usage.completion_tokens_details, reply.model_extra["stats"]
        assert details.accepted_prediction_tokens == stats["accepted"] == expected.stats.accepted > 0
        assert details.rejected_prediction_tokens == expected.stats.drafted - expected.stats.accepted
    assert first.id != again.id
    assert again.usage.prompt_tokens_details.cached_tokens == expected.stats.prompt_tokens - 1
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 4
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.total_tokens == expected.stats.prompt_tokens + 12
    assert {chunk.id for chunk in chunks} == {chunks[0].id} and chunks[-2].model_extra["stats"]["tokens"] == 12


def test_completion_of_text_and_of_tokens(server: Running, embedded: mlx_mtp.Engine) -> None:
    prompt = "import os\n\n\ndef walk("
    expected = clear(embedded.generate(prompt, max_tokens=8, raw=True, logprobs=2))
    with server.openai() as client:
        for asked in (prompt, [prompt], embedded.tokenizer.encode(prompt)):
            reply = client.completions.create(model="test", prompt=asked, max_tokens=8)
            assert (reply.choices[0].text, reply.choices[0].finish_reason) == (expected.text, "length")
        chunks = list(client.completions.create(model="test", prompt=prompt, max_tokens=8, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected.text
        stop = expected.text[4:7]
        cut = client.completions.create(model="test", prompt=prompt, max_tokens=8, stop=stop)
        assert cut.choices[0].text == expected.text[: expected.text.find(stop)]
        assert cut.choices[0].finish_reason == "stop"


def test_logprobs_in_both_forms(server: Running, embedded: mlx_mtp.Engine) -> None:
    ids = embedded.tokenizer.chat(QUESTION, thinking=False)
    expected = clear(embedded.generate(ids, max_tokens=6, logprobs=3))
    spelled = [embedded.tokenizer.spell(token)[0] for token in expected.tokens]
    options: dict[str, Any] = {"model": "test", "max_tokens": 6}
    with server.openai() as client:
        ask = client.chat.completions.create
        chat = ask(messages=QUESTION, logprobs=True, top_logprobs=3, **options).choices[0].logprobs.content
        bare = ask(messages=QUESTION, logprobs=True, **options).choices[0].logprobs.content
        chunks = list(ask(messages=QUESTION, logprobs=True, top_logprobs=3, stream=True, **options))
        old = client.completions.create(prompt=ids, logprobs=3, **options).choices[0].logprobs
        parts = list(client.completions.create(prompt=ids, logprobs=0, stream=True, **options))
    streamed = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    for content in (chat, bare, streamed):
        assert [one.token for one in content] == spelled
        assert [one.logprob for one in content] == pytest.approx(expected.logprobs, abs=1e-3)
    assert all(bytes(one.bytes).decode() == one.token for one in chat)
    assert all(one.top_logprobs == [] for one in bare)
    for one, row in zip(chat, expected.top_logprobs, strict=True):
        assert [top.logprob for top in one.top_logprobs] == pytest.approx(list(row.values()), abs=1e-3)
    assert old.tokens == spelled and old.token_logprobs == pytest.approx(expected.logprobs, abs=1e-3)
    assert all(tops[token] == value for tops, token, value in zip(old.top_logprobs, spelled, old.token_logprobs,
                                                                  strict=True))  # fmt: skip
    assert old.text_offset == [len("".join(spelled[:i])) for i in range(len(spelled))]
    assert [t for part in parts if part.choices[0].logprobs for t in part.choices[0].logprobs.tokens] == spelled


CALLS = ('Let me see.<|tool_call>call:get_weather{city:<|"|>Z', 'ürich, "Old', ' Town"<|"|>,days:3,hourly:true}',
         "<tool_call|><|tool_call>call:now{}<tool_call|>")  # fmt: skip
ARGUMENTS = {"city": 'Zürich, "Old Town"', "days": 3, "hourly": True}


class Weather(pydantic.BaseModel):
    """What an answer must be."""

    model_config = pydantic.ConfigDict(extra="forbid")
    city: str = pydantic.Field(max_length=8)
    kind: Literal["rain", "sun"]


def test_answers_by_a_schema(server: Running) -> None:
    """By OpenAI's own helper for pydantic classes, whole and streamed; a schema that is none is a 400."""
    ask = {"model": "test", "messages": QUESTION, "max_tokens": 120, "temperature": 1.0, "seed": 3}
    with server.openai() as client:
        parsed = client.chat.completions.parse(response_format=Weather, **ask).choices[0].message.parsed
        assert isinstance(parsed, Weather)
        kind = {"type": "json_schema", "json_schema": {"name": "weather", "schema": Weather.model_json_schema()}}
        chunks = client.chat.completions.create(stream=True, response_format=kind, **ask)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert Weather.model_validate_json(text) == parsed
        kind["json_schema"]["schema"] = {"type": "nonsense"}
        with pytest.raises(openai.BadRequestError, match="nonsense"):
            client.chat.completions.create(response_format=kind, **ask)


def test_tools_that_nobody_could_read_are_refused() -> None:
    fake = ScriptedEngine(CALLS)
    fake.tokenizer.calls = None
    with running(fake) as server, server.openai() as client:
        with pytest.raises(openai.BadRequestError, match="calls of tools") as refused:
            client.chat.completions.create(model="test", messages=QUESTION, tools=[TOOL])
        assert refused.value.param == "tools" and not fake.asked
        fake.script = ("Rain.",)
        assert client.chat.completions.create(model="test", messages=QUESTION).choices[0].finish_reason == "stop"


def test_tools_both_ways() -> None:
    """Gemma's calls become OpenAI's, whole and streamed; what comes back has objects and names for the template."""
    with running(ScriptedEngine(CALLS)) as server, server.openai() as client:
        ask = client.chat.completions.create
        whole = ask(model="test", messages=QUESTION, tools=[TOOL], tool_choice="auto").choices[0]
        assert (whole.finish_reason, whole.message.content) == ("tool_calls", "Let me see.")
        first, second = whole.message.tool_calls
        assert (first.function.name, json.loads(first.function.arguments)) == ("get_weather", ARGUMENTS)
        assert (second.function.name, second.function.arguments) == ("now", "{}") and first.id != second.id
        assert server.engine.tokenizer.seen[-1]["tools"][0]["function"]["name"] == "get_weather"

        chunks = list(ask(model="test", messages=QUESTION, tools=[TOOL], stream=True))
        deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        heads, rest = deltas[::2], deltas[1::2]
        assert [(call.index, call.function.name) for call in heads] == [(0, "get_weather"), (1, "now")]
        assert all(call.id and call.type == "function" and not call.function.arguments for call in heads)
        assert [json.loads(call.function.arguments) for call in rest] == [ARGUMENTS, {}]
        assert [(call.index, call.id) for call in rest] == [(0, None), (1, None)]
        assert chunks[-1].choices[0].finish_reason == "tool_calls"

        assert server.engine.asked[-1].tools == server.engine.tokenizer.seen[-1]["tools"]
        server.engine.script = ("Rain.",)
        answers = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in (first, second)]
        messages = [*QUESTION, whole.message.model_dump(), *answers]
        assert ask(model="test", messages=messages, tools=[TOOL]).choices[0].message.content == "Rain."
        given = server.engine.tokenizer.seen[-1]["messages"]
        assert given[1]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": ARGUMENTS}
        assert [message["name"] for message in given[2:]] == ["get_weather", "now"]
        ask(model="test", messages=QUESTION, tools=[TOOL], tool_choice="none")
        assert not server.engine.tokenizer.seen[-1]["tools"]


def test_thoughts_are_told_apart() -> None:
    fake = ScriptedEngine(("<|chan", "nel>thought\nFirst ", "this.", "<channel|>Then", " that."))
    with running(fake) as server, server.openai() as client:
        ask = client.chat.completions.create
        message = ask(model="test", messages=QUESTION, reasoning_effort="high").choices[0].message
        assert (message.model_extra["reasoning_content"], message.content) == ("First this.", "Then that.")
        assert fake.tokenizer.seen[-1]["thinking"] is True
        off = {"chat_template_kwargs": {"enable_thinking": False}}
        chunks = list(ask(model="test", messages=QUESTION, stream=True, extra_body=off))
        assert fake.tokenizer.seen[-1]["thinking"] is False
        deltas = [chunk.choices[0].delta for chunk in chunks]
        assert "".join((delta.model_extra or {}).get("reasoning_content") or "" for delta in deltas) == "First this."
        assert "".join(delta.content or "" for delta in deltas) == "Then that."
        history = [*QUESTION, {"role": "assistant", "content": "a", "reasoning_content": "t"}, *QUESTION]
        ask(model="test", messages=history)
        assert fake.tokenizer.seen[-1]["messages"][1]["reasoning_content"] == "t"


def test_what_the_template_drops(server: Running) -> None:
    """The embedded model's knows no thinking and no names: they are without effect."""
    counts = [
        server.post(CHAT, {"messages": messages, "max_tokens": 1, **more}).json()["usage"]["prompt_tokens"]
        for messages, more in (
            (QUESTION, {}), (QUESTION, {"reasoning_effort": "high"}), ([{**QUESTION[0], "name": "Ada"}], {}),
        )
    ]  # fmt: skip
    assert counts == counts[:1] * 3


def test_a_stop_ends_text_usage_and_metrics_at_one_token(tmp_path: Path) -> None:
    """A thought of 5 tokens and its markers, "Yes" and ", sure"; both drafted rounds were read as a whole."""
    with running(thinking_engine(tmp_path, depth=8)) as server, server.http() as http:
        for stop, content, tokens, accepted in (("\n", "Yes, sure.", 8, 7), (", s", "Yes", 7, 6), ("so", None, 8, 7)):
            before = http.get("/metrics").text
            body = {"messages": QUESTION, "stop": [stop], "reasoning_effort": "high", "logprobs": True}
            reply = server.post(CHAT, body).json()
            message, usage = reply["choices"][0]["message"], reply["usage"]
            assert message["content"] == (content or "Yes, sure.") and message["reasoning_content"] == "Hm, so"
            assert len(reply["choices"][0]["logprobs"]["content"]) == usage["completion_tokens"] == tokens
            details = usage["completion_tokens_details"]
            assert details == {"accepted_prediction_tokens": accepted, "rejected_prediction_tokens": 8 - accepted}
            assert reply["stats"]["accepted"] == accepted and reply["choices"][0]["finish_reason"] == "stop"
            assert server.idle()
            after = http.get("/metrics").text
            for name, grown in (("generated", tokens), ("accepted", accepted), ("drafted", 8)):
                one, other = (float(text.split(f"\nmlx_mtp_{name}_tokens_total ")[1].split()[0])
                              for text in (before, after))  # fmt: skip
                assert other - one == grown, name
            chunks = contents(http.post(CHAT, json={**body, "stream": True}))
            deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks[:-1]]
            assert "".join(delta.get("content") or "" for delta in deltas) == (content or "Yes, sure.")
        raw = server.post(COMPLETION, {"prompt": [TOKENS.index("model\n")], "stop": ["\n"]}).json()
        assert raw["choices"][0]["text"] == "<|channel>thought" and raw["usage"]["completion_tokens"] == 2


@pytest.mark.parametrize(("path", "faults"), FAULTS.items())
def test_nothing_is_dropped_in_silence(server: Running, path: str, faults: list[tuple[dict[str, Any], Any]]) -> None:
    good = {"messages": QUESTION, "max_tokens": 1} if path == CHAT else {"prompt": "x", "max_tokens": 1}
    with server.http() as client:
        for change, param in faults:
            response = client.post(path, json=good | change)
            error = response.json()["error"]
            assert response.status_code == 400, change
            assert (error["param"], error["type"]) == (param, "invalid_request_error"), (change, error)
            assert error["message"].endswith(".") and 20 < len(error["message"]) < 1100, error
        ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "n": 1, "unknown": None,
                   "response_format": {"type": "text"}}  # fmt: skip
        assert client.post(path, json=good | ignored).status_code == 200


def test_models_errors_and_addresses(server: Running) -> None:
    with server.openai() as client:
        assert [model.id for model in client.models.list()] == ["test"]
        assert client.models.retrieve("test").id == "test"
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="gpt-9", messages=QUESTION)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="test", prompt=[7] * 9000)
        assert long.value.code == "context_length_exceeded"
    with server.http() as client:
        for method, path, status in (("GET", "/v2", 404), ("PUT", "/v1/models", 405), ("GET", CHAT, 405),
                                     ("POST", "/health", 405), ("GET", "/v1/models/other", 404),
                                     ("BREW", CHAT, 405), ("GET", "/..%2f", 404), ("GET", "/%00", 404)):  # fmt: skip
            response = client.request(method, path)
            assert response.status_code == status and "message" in response.json()["error"], (method, path)
        assert client.post(CHAT, content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        assert client.get("/health").json()["status"] == "ok"


def test_the_pool_of_sessions() -> None:
    class Sized(Session):
        nbytes = 10

    def held(*ids: int) -> Session:
        return Sized(ids=list(ids))

    pool = SessionPool(30)
    for session in (one := held(1, 2, 3, 4), two := held(1, 2, 9), three := held(5, 5)):
        assert not pool.keep(session, 2)
    assert (pool.nbytes, pool.count) == (30, 3)
    assert pool.take([1, 2, 3, 7]) is one and pool.count == 2  # most in common
    assert not pool.keep(one, 3)
    assert pool.take([8]) not in (one, two, three) and pool.count == 3
    assert pool.keep(held(6), 1) and pool.nbytes == 30  # the least recently used one went: two
    assert pool.take([1, 2, 3, 9]) is one
    pool.keep(Session(), 1)
    assert pool.take([5, 5]) is three and pool.count == 1
    alike = [*range(40)]
    pool.keep(long := held(*alike, *range(100, 140)), 70)
    copied = pool.take([*alike, 7])  # begins alike, and is another conversation
    assert copied is not long and copied.ids == long.ids
    assert pool.take([*alike, *range(100, 125), *range(5)]) is not long  # another name at the end of the same question
    assert pool.take([*alike, *range(100, 125), *range(30)]) is long  # its reply, and a turn more
    pool.keep(long, 70)
    assert pool.take([*alike, *range(100, 130), 3]) is long
    nothing = SessionPool(0)
    nothing.keep(held(1), 1)
    assert nothing.count == 0


def test_a_full_queue() -> None:
    """One runs, two wait, the fourth is told when to come back; who leaves the queue makes room."""
    replies: list[httpx.Response] = []
    with running(ScriptedEngine(gate=threading.Semaphore(0)), places=2) as server:
        asking = [threading.Thread(target=lambda: replies.append(server.post(COMPLETION, {"prompt": "x"})))
                  for _ in range(2)]  # fmt: skip
        asking[0].start()
        assert eventually(lambda: server.queue.running)
        asking[1].start()
        leaving = server.connect()
        leaving.sendall(raw_request(COMPLETION, {"prompt": "x"}))
        assert eventually(lambda: server.queue.waiting == 2)
        refused = server.post(COMPLETION, {"prompt": "x"})
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 120
        assert refused.json()["error"]["code"] == "queue_full"
        with server.openai() as client, pytest.raises(openai.RateLimitError):
            client.completions.create(model="test", prompt="x")
        leaving.close()
        assert eventually(lambda: server.queue.waiting == 1)
        server.engine.gate.release(100)
        for thread in asking:
            thread.join()
        assert [reply.json()["choices"][0]["text"] for reply in replies] == ["Hello!"] * 2
    assert len(server.engine.asked) == 2


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("half", [True, False])
def test_who_leaves_frees_the_engine(stream: bool, half: bool) -> None:
    with running(ScriptedEngine(gate=threading.Semaphore(0))) as server, server.connect() as leaving:
        leaving.sendall(raw_request(COMPLETION, {"prompt": "x", "stream": stream}))
        if stream:
            assert b"Hel" in until(leaving, b"Hel")
        assert eventually(lambda: server.engine.written)  # before its first event a reply has nothing to close
        ticket = server.queue._running
        if half:
            leaving.shutdown(socket.SHUT_WR)
        else:
            leaving.close()
        assert eventually(lambda: ticket.over)
        server.engine.gate.release(1)  # the round under way ends; no other one begins
        assert server.idle() and server.engine.closed == 1
        server.engine.gate.release(2)
        assert server.post(COMPLETION, {"prompt": "x"}).json()["choices"][0]["text"] == "Hello!"


def test_a_failure_is_told_without_its_inside(caplog: pytest.LogCaptureFixture) -> None:
    with running(ScriptedEngine(fails_at=0)) as server, server.openai() as client:
        with pytest.raises(openai.InternalServerError) as whole:
            client.completions.create(model="test", prompt="x")
        assert "secret" not in str(whole.value) and whole.value.code == "internal_error"
        server.engine.fails_at = 1
        with server.http() as http, http.stream("POST", COMPLETION, json={"prompt": "x", "stream": True}) as response:
            events = contents(response)
        assert response.status_code == 200 and len(events) == 2
        assert json.loads(events[-1])["error"]["type"] == "server_error" and "secret" not in events[-1]
        with pytest.raises(openai.APIError, match="failed"):
            list(client.completions.create(model="test", prompt="x", stream=True))
        server.engine.fails_at = None
        assert client.completions.create(model="test", prompt="x").choices[0].text == "Hello!"
    assert caplog.text.count("a secret of the inside") >= 3


def test_a_failure_leaves_no_session() -> None:
    """After an error that nobody expected, what stands in the buffers is anybody's guess."""
    broken: list[bool] = []

    def load() -> mlx_mtp.Engine:
        found = mlx_mtp.load(drafter=None)
        inner = found.run

        def run(request: GenerationRequest) -> Any:
            for i, event in enumerate(inner(request)):
                if broken and i == 2:
                    raise RuntimeError("no memory")
                yield event

        found.run = run
        return found

    with running(load()) as server:
        for fails, status, kept in ((False, 200, 1), (True, 500, 0), (False, 200, 1)):
            broken[:] = [True] * fails
            assert server.post(COMPLETION, {"prompt": "import os\n", "max_tokens": 5}).status_code == status
            assert server.idle()
            with server.http() as http:
                assert f"mlx_mtp_sessions {kept}\n" in http.get("/metrics").text


def test_connections_that_never_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "head_seconds", 0.5)
    good = raw_request(COMPLETION, {"prompt": "x"})
    with (
        running(ScriptedEngine(), body_seconds=1.0) as server, server.connect() as late, server.connect() as silent,
        server.connect() as half, server.connect() as cut,
    ):  # fmt: skip
        late.sendall(raw_request(COMPLETION, b'{"prompt"', length=50))
        assert b"Hello!" in server.post(COMPLETION, {"prompt": "x"}).content  # nobody waits for it
        silent.sendall(b"POST /v1/completions HTT")
        half.sendall(good)
        half.shutdown(socket.SHUT_WR)
        cut.sendall(good[: len(good) // 2])
        cut.shutdown(socket.SHUT_WR)
        answer = until(late, b"too_slow")
        assert answer.startswith(b"HTTP/1.1 408") and b"connection: close" in answer.lower()
        assert until(silent, b"nothing") == b""  # closed
        assert b" 200 OK" not in until(cut, b"nothing")


def test_slow_and_large_bodies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_mtp.serving.body, "LINGER", 0.1)
    good = raw_request(COMPLETION, {"prompt": "x"})
    with running(ScriptedEngine(), body_bytes=1000) as server:
        with server.connect() as drip:  # slow, but in time
            for start in range(0, len(good), 20):
                drip.sendall(good[start : start + 20])
            assert b"Hello!" in until(drip, b"Hello!")
            sockets = [one.transport.get_extra_info("socket") for one in server.server.server_state.connections]
            assert [one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) for one in sockets] == [1]
        with server.connect() as large:
            large.sendall(raw_request(COMPLETION, b"x" * 100, length=10**12))
            assert until(large, b"body_too_large").startswith(b"HTTP/1.1 413")
        with server.connect() as chunked:
            head = raw_request(COMPLETION, b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
            chunked.sendall(head + b"400\r\n" + b" " * 1024 + b"\r\n")
            assert until(chunked, b"body_too_large").startswith(b"HTTP/1.1 413")
        assert b"Hello!" in server.post(COMPLETION, {"prompt": "x"}).content


def test_a_reader_that_takes_nothing() -> None:
    """The engine goes on with others; the reply that nobody takes is let go of."""
    with running(ScriptedEngine(["x" * 100_000] * 100), stall_seconds=0.5) as server:
        stuck = socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with stuck:
            stuck.connect(("127.0.0.1", server.port))
            stuck.sendall(raw_request(COMPLETION, {"prompt": "x", "stream": True}))
            assert eventually(lambda: server.engine.asked) and server.idle()
            with server.http() as http:
                assert eventually(lambda: "mlx_mtp_dropped_total 1" in http.get("/metrics").text)


def test_replies_that_take_too_long_are_told_so() -> None:
    waiting: list[httpx.Response] = []
    with running(ScriptedEngine(gate=threading.Semaphore(0)), grace=0.2) as server, server.http() as http:
        with http.stream("POST", COMPLETION, json={"prompt": "x", "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            second = threading.Thread(target=lambda: waiting.append(server.post(COMPLETION, {"prompt": "x"})))
            second.start()
            assert eventually(lambda: server.queue.waiting == 1)
            ending = threading.Thread(target=server.stop)
            ending.start()
            last = list(lines)[-2]
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stopping"
        second.join()
        server.engine.gate.release(5)
        ending.join()
    assert waiting[0].status_code == 503 and waiting[0].json()["error"]["code"] == "stopping"


def test_what_the_command_refuses(monkeypatch: pytest.MonkeyPatch, command: Command) -> None:
    def refused(*args: object) -> str:
        return one_sentence(*command("serve", *args))

    monkeypatch.delenv("MLX_MTP_API_KEY", raising=False)
    assert "--api-key" in refused("--host", "0.0.0.0")
    assert "--api-key" in refused("--host", "::")
    assert "API key" in refused("--api-key", "")
    assert "origin" in refused("--cors", "app.example")
    assert "host" in refused("--allow-host", "host.docker.internal:8080")
    assert "host" in refused("--allow-host", "*", "--api-key", "k")
    assert "--queue" in refused("--queue", -1)
    with listen("127.0.0.1", 0) as taken:
        assert "--port" in refused("--port", taken.getsockname()[1])
    assert "--port" in refused("--port", 99999)
    assert "/no/such" in refused("--port", 0, "--model", "/no/such/model")
    assert "depth" in refused("--port", 0, "--depth", "99")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "mlx_mtp.serving.server")
    monkeypatch.delattr(mlx_mtp.serving, "server")
    assert "pip install '.[serve]'" in refused()
