"""The server under load: nothing lost, nothing mixed up, nothing left behind."""

import gc
import json
import random
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import mlx.core as mx
import pytest
from servers import CHAT, COMPLETION, Running, running

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
