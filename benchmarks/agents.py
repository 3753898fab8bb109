"""Two agents with tools and a chat at one server: whether any reads more of its conversation again than it would alone.

    python benchmarks/agents.py --model FOLDER [--turns 20] [--json FILE]

FOLDER: a model whose chat template knows tools. An agent calls a tool, held to its schema, and then answers by a JSON
schema, and so on; a conversation's next request waits until all three have had theirs. Once one conversation after the
other, once together, each time with a server of its own: greedy, so that the same is said. Prefilled tokens a turn.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import common
import httpx

NAMES = ("one", "two", "chat")
PATIENCE = 600.0  # seconds, a backstop
MODEL = "model"
TOOLS = [
    {"type": "function", "function": {"name": "rain", "description": "Millimetres of rain in a city.", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "enum": ["Bern", "Rome", "Oslo"]}},
        "required": ["city"], "additionalProperties": False,
    }}},
    {"type": "function", "function": {"name": "now", "description": "The time.", "parameters": {
        "type": "object", "properties": {}, "additionalProperties": False,
    }}},
]  # fmt: skip
WET = {"type": "object", "properties": {"wet": {"type": "boolean"}}, "required": ["wet"], "additionalProperties": False}
CALL = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 60}
ANSWER = {"tools": TOOLS, "max_tokens": 60,
          "response_format": {"type": "json_schema", "json_schema": {"name": "wet", "schema": WET}}}  # fmt: skip


@contextmanager
def server(model: str) -> Iterator[httpx.Client]:
    """`mlx-mtp serve` until the end of the block, and a client of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("mlx-mtp"))
    process = subprocess.Popen([program, "serve", "--model", model, "--model-name", MODEL, "--port", str(port)])
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, trust_env=False) as client:
            ready = False
            while not ready:
                if process.poll() is not None:
                    sys.exit("The server did not start.")
                time.sleep(0.1)
                with suppress(httpx.ConnectError):
                    ready = client.get("/health").is_success
            yield client
    finally:
        process.terminate()
        process.wait()


def conversation(client: httpx.Client, name: str, turns: int, after_each: Callable[[], object]) -> list[dict[str, int]]:
    """Tokens of each turn's prompt, and those of them that were prefilled."""
    said: list[Any] = [{"role": "system", "content": "You look after the weather of three cities. " * 10},
                       {"role": "user", "content": f"I am {name}. Is it wet in Bern?"}]  # fmt: skip
    found = []
    for i in range(turns):
        asked = {"max_tokens": 20} if name == "chat" else ANSWER if i % 2 else CALL
        answer = client.post("/v1/chat/completions", json={"model": MODEL, "messages": said, "temperature": 0, **asked})
        reply = answer.raise_for_status().json()
        found.append({"prompt": reply["usage"]["prompt_tokens"], "prefilled": reply["stats"]["prefilled_tokens"]})
        message = reply["choices"][0]["message"]
        said.append(message)
        if calls := message.get("tool_calls"):
            said.append({"role": "tool", "tool_call_id": calls[0]["id"], "content": f"Rain, {i} mm."})
        else:
            assert name == "chat" or set(json.loads(message["content"])) == {"wet"}
            said.append({"role": "user", "content": f"And {i} hours later?"})
        after_each()
    return found


def main() -> None:
    args = common.options(__doc__, model=str, turns=20)
    with server(args.model) as client:
        alone = {name: conversation(client, name, args.turns, lambda: None) for name in NAMES}
    turn = threading.Barrier(len(NAMES))
    with server(args.model) as client, ThreadPoolExecutor(len(NAMES)) as pool:
        work = {name: pool.submit(conversation, client, name, args.turns, turn.wait) for name in NAMES}
        together = {name: future.result() for name, future in work.items()}
    found = {"turns": args.turns, "alone": alone, "together": together}
    for name in NAMES:
        same = sum(mine == its for mine, its in zip(alone[name][1:], together[name][1:], strict=True))
        after = [row["prefilled"] for row in together[name][1:]]
        print(f"{name}: {same} of {len(after)} turns after the first as alone; prefilled {statistics.median(after):g} "
              f"tokens in the middle, {max(after)} at most; of {together[name][-1]['prompt']} in the end")  # fmt: skip
    first = [sum(found[name][0]["prefilled"] for name in NAMES) for found in (alone, together)]
    print(f"All three first turns, of which some begin alike: {first[0]} tokens alone, {first[1]} together")
    common.save(args.json, found)


if __name__ == "__main__":
    main()
