"""Servers for tests: a real uvicorn on a free port of this machine, and an engine that writes what it is told to."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import uvicorn

from mlx_mtp.generation.request import GenerationRequest
from mlx_mtp.generation.types import Event, Result, Stats
from mlx_mtp.serving.app import create_app
from mlx_mtp.serving.options import ServerOptions
from mlx_mtp.serving.queue import ReplyQueue
from mlx_mtp.serving.server import Server, listen
from mlx_mtp.text.channels import GEMMA, CallFormat, Channels, Pieces, joined

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@dataclass
class Running:
    """A server under test."""

    port: int
    queue: ReplyQueue
    server: uvicorn.Server
    stop: Callable[[], None]
    engine: Any
    key: str = "-"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self) -> openai.OpenAI:
        """OpenAI's own client, without its second tries."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=300)

    def http(self, **options: Any) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=300, trust_env=False, verify=False, **options)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        with self.http() as client:
            return client.post(path, json=body, headers=headers)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=300)

    def idle(self) -> bool:
        """Whether nothing runs or waits, after a while for what is ending."""
        return eventually(lambda: not self.queue.running and not self.queue.waiting)


def eventually(true: Callable[[], object], seconds: float = 120.0) -> bool:
    """Whether something comes true; looks again and again."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.01)
    return bool(true())


@contextmanager
def running(engine: Any, places: int = 32, grace: float = 5.0, **options: Any) -> Iterator[Running]:
    """A server until the end of the block."""
    app = create_app(engine, ServerOptions(model="test", **options), places)
    listener = listen("127.0.0.1", 0)
    server = Server(app, grace=grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()

    def stop() -> None:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive() and not app.state.queue.alive

    try:
        yield Running(listener.getsockname()[1], app.state.queue, server, stop, engine, options.get("api_key") or "-")
    finally:
        stop()


class FakeTokenizer:
    """One token a character; the template writes roles and contents down, and remembers what it was given."""

    has_chat_template = True
    longest_token = 1

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.calls: CallFormat | None = GEMMA

    def encode(self, text: str, special: bool = True) -> list[int]:
        return [ord(character) % 1000 for character in text]

    def spell(self, token: int) -> tuple[str, bytes | None]:
        return chr(token), chr(token).encode()

    def call_format(self, tools: Any = None) -> CallFormat | None:
        return self.calls

    def opened_thought(self, ids: Sequence[int]) -> str | None:
        return None

    def chat(self, messages: Any, thinking: bool = False, tools: Any = None, effort: str | None = None) -> list[int]:
        self.seen.append({"messages": messages, "thinking": thinking, "tools": tools, "effort": effort})
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.encode(f"{bool(thinking)}{len(tools or [])}{text}")


@dataclass
class ScriptedEngine:
    """Writes `script`, one string an event, with thoughts and calls told apart unless it is asked for raw.

    Waits for the gate before each but the first where there is one.

    asked: every request that was run; written: how many events there were; closed: how many replies ended before
    their time; fails_at: the event in whose place it raises.
    """

    script: Sequence[str] = ("Hel", "lo", "!")
    gate: threading.Semaphore | None = None
    fails_at: int | None = None
    max_context: int = 1000
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    asked: list[GenerationRequest] = field(default_factory=list)
    written: int = 0
    closed: int = 0
    target: Any = field(default_factory=lambda: SimpleNamespace(path=None))
    depth_reason: str = "Not drafting: no drafter is loaded."

    def request(self, ids: list[int], *, max_tokens: int, **options: Any) -> GenerationRequest:
        """Checks nothing."""
        assert options.pop("json_schema") is None
        options.pop("tool_choice")
        options.pop("prediction")
        return GenerationRequest(ids=ids, budget=max_tokens, **options)

    def prepare_grammars(self) -> None:
        """There are none."""

    def after_thought(self, request: GenerationRequest, thinking: bool) -> GenerationRequest:
        """No grammar, no change."""
        return request

    def run(self, request: GenerationRequest) -> Iterator[Event]:
        self.asked.append(request)
        prompt = len(request.ids)
        request.on_prefill(prompt, prompt)
        channels = None if request.raw else Channels(calls=GEMMA)
        stats = Stats(prompt_tokens=prompt, prefilled_tokens=prompt, tokens=len(self.script))
        try:
            for i, text in enumerate(self.script):
                if self.gate is not None and i:
                    self.gate.acquire()
                if i == self.fails_at:
                    raise RuntimeError("a secret of the inside")
                self.written += 1
                found = joined([*channels.split(text)]) if channels else Pieces(text)
                yield Event(text, [1], thinking=found.thinking, content=found.text, calls=found.calls)
        except GeneratorExit:
            self.closed += 1
            raise
        found = joined([*channels.split("", final=True)]) if channels else Pieces()
        result = Result("".join(self.script), [1] * len(self.script), None, "stop", stats)
        yield Event("", [], result, thinking=found.thinking, content=found.text, calls=found.calls)


def contents(response: httpx.Response) -> list[str]:
    """The data of a streamed response, event by event."""
    response.read()
    return [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]


def raw_request(path: str, body: Any, *more: str, length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *more]
    return "\r\n".join([*lines, f"Content-Length: {len(data) if length is None else length}", "", ""]).encode() + data


def until(connection: socket.socket, end: bytes) -> bytes:
    """What comes up to some bytes, or to the end of the connection."""
    found = b""
    while end not in found and (part := connection.recv(65536)):
        found += part
    return found


# Requests that are refused with 400, and the field that the refusal names; one wrong value is in test_malformed.py

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}  # fmt: skip
FAULTS: dict[str, list[tuple[dict[str, Any], str | None]]] = {CHAT: [
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
     "messages[0].content[0].type"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "unknown"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": "x", "colour": "red"}]}, "messages[0].colour"),
    ({"messages": [{"role": "assistant", "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]},
     "messages[0].tool_calls[0].function.arguments"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "system", "content": "late"}]}, "messages"),
    ({"n": 129}, "n"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    # This checkpoint's template has no place for these two.
    ({"tools": [TOOL]}, "tools"),
    ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]}, "messages"),
    ({"tools": [{"type": "function", "function": {"name": "with space"}}]}, "tools[0].function.name"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": "sometimes"}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
    ({"tool_choice": {"type": "function"}}, "tool_choice.function"),
    ({"reasoning_effort": "none", "chat_template_kwargs": {"enable_thinking": True}}, "reasoning_effort"),
    ({"chat_template_kwargs": {"colour": "red"}}, "chat_template_kwargs.colour"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"top_k": 1.5}, "top_k"),
    ({"presence_penalty": 10**400}, "presence_penalty"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"999999": 1}}, None),
    ({"grammar": "root"}, "grammar"),
    ({"functions": [{"name": "f"}]}, "functions"),
], COMPLETION: [
    ({"prompt": ["a"] * 129}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [7] * 9000}, "prompt"),
    ({"suffix": "x"}, "suffix"),
    ({"best_of": 2}, "best_of"),
]}  # fmt: skip
