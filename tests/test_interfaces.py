"""Responses, Anthropic's Messages and the rest of the interfaces, by their makers' own clients."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import numpy as np
import openai
import pytest
from pydantic import BaseModel
from references import log_softmax
from servers import CHAT, COMPLETION, Running, ScriptedEngine, contents, running
from tool_templates import embedded_with_tools

import mlx_mtp
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.store import ResponseStore, Stored

RESPONSES, MESSAGES = "/v1/responses", "/v1/messages"
QUESTION = [{"role": "user", "content": "What is os.path?"}]
CITY = {
    "type": "object", "properties": {"city": {"type": "string", "enum": ["Bern", "Rome"]}, "days": {"type": "integer"}},
    "required": ["city"], "additionalProperties": False,
}  # fmt: skip
NOW = {"type": "object", "properties": {}, "additionalProperties": False}
# What a scripted engine writes: a thought, an answer, two calls in Gemma's notation.
WRITTEN = ("<|channel>thought\nHm.<channel|>", "Let me ", "see.", "<|tool_call>call:weather{city:<|\"|>Bern<|\"|>}",
           "<tool_call|><|tool_call>call:now{}<tool_call|>")  # fmt: skip


class Place(BaseModel):
    """What an answer is held to."""

    name: str
    north: bool


@contextmanager
def with_tools(folder: Path) -> Iterator[Running]:
    """The embedded model with a template that knows tools and thoughts by other marks than its own."""
    target = embedded_with_tools(folder)
    with running(mlx_mtp.load(target, drafter="lookup", depth=3), seed=7) as found:
        yield found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with with_tools(tmp_path_factory.mktemp("tools")) as found:
        yield found


@pytest.fixture
def fresh_server(tmp_path: Path) -> Iterator[Running]:
    """One that keeps no K/V of other tests' conversations."""
    with with_tools(tmp_path) as found:
        yield found


@pytest.fixture
def scripted() -> Iterator[Running]:
    with running(ScriptedEngine(WRITTEN)) as found:
        yield found


def claude(server: Running) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="-", max_retries=0, timeout=300)


def chat_tool(name: str, parameters: Any, **more: Any) -> Any:
    """A tool as Chat Completions declares it."""
    return {"type": "function", "function": {"name": name, "parameters": parameters, **more}}


CHAT_TOOLS = [chat_tool("weather", CITY), chat_tool("now", NOW)]
TOOLS: Any = [{"type": "function", "name": tool["function"]["name"], "parameters": tool["function"]["parameters"],
               "strict": False} for tool in CHAT_TOOLS]  # fmt: skip
CLAUDE_TOOLS: Any = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in TOOLS]


def check_call(name: str, arguments: str, among: tuple[str, ...] = ("weather", "now")) -> None:
    given = json.loads(arguments)
    assert name in among and (given["city"] in ("Bern", "Rome") if name == "weather" else given == {})


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_calls_that_must_be_made(server: Running, temperature: float) -> None:
    """A small model that knows nothing of tools calls one where it must, in every interface, whole and streamed."""
    ask: dict[str, Any] = {"model": "test", "max_tokens": 200, "temperature": temperature}
    with server.openai() as client, claude(server) as other:
        for choice, among in (("required", ("weather", "now")), ({"type": "function", "function": {"name": "weather"}},
                                                                 ("weather",))):  # fmt: skip
            make = client.chat.completions.create
            made = make(messages=QUESTION, tools=CHAT_TOOLS, tool_choice=choice, parallel_tool_calls=False, **ask)
            [call] = made.choices[0].message.tool_calls
            check_call(call.function.name, call.function.arguments, among)
            assert (made.choices[0].finish_reason, made.choices[0].message.content) == ("tool_calls", None)
        some = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [
            {"type": "function", "function": {"name": "weather"}}]}}  # fmt: skip
        body = {"messages": QUESTION, "tools": CHAT_TOOLS, "tool_choice": some, **ask}
        for call in server.post(CHAT, body).json()["choices"][0]["message"]["tool_calls"]:
            check_call(call["function"]["name"], call["function"]["arguments"], ("weather",))

        asked = {"model": "test", "input": "Rain?", "tools": TOOLS, "tool_choice": "required",
                 "max_output_tokens": 200, "temperature": temperature, "parallel_tool_calls": False}  # fmt: skip
        [item] = client.responses.create(**asked).output
        check_call(item.name, item.arguments)
        with client.responses.stream(**asked) as stream:
            kinds = [event.type for event in stream]
            [item] = stream.get_final_response().output
        check_call(item.name, item.arguments)
        assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
        assert "response.function_call_arguments.done" in kinds

        asked = {"model": "test", "max_tokens": 200, "messages": QUESTION, "tools": CLAUDE_TOOLS,
                 "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
                 "extra_body": {"temperature": temperature}}  # fmt: skip
        said = other.messages.create(**asked)
        [block] = said.content
        check_call(block.name, json.dumps(block.input))
        assert said.stop_reason == "tool_use"
        with other.messages.stream(**asked) as stream:
            [block] = stream.get_final_message().content
        check_call(block.name, json.dumps(block.input))


def test_strict_tools_are_called_by_their_schema_or_not_at_all(server: Running) -> None:
    strict = [chat_tool("weather", CITY, strict=True)]
    body = {"messages": QUESTION, "tools": strict, "max_tokens": 8, "temperature": 1}
    assert server.post(CHAT, body).json()["choices"][0]["message"]["content"]
    bad = [chat_tool("weather", {"type": "nonsense"}, strict=True)]
    refused = server.post(CHAT, {"messages": QUESTION, "tools": bad})
    assert refused.status_code == 400 and "nonsense" in refused.json()["error"]["message"]


def test_answers_by_a_schema_in_every_interface(server: Running) -> None:
    schema = Place.model_json_schema() | {"additionalProperties": False}
    with server.openai() as client, claude(server) as other:
        ask: dict[str, Any] = {"model": "test", "temperature": 1.0}
        found = client.responses.parse(input="Where?", text_format=Place, max_output_tokens=200, **ask)
        assert isinstance(found.output_parsed, Place)
        held: Any = {"format": {"type": "json_schema", "schema": schema}}
        said = other.messages.create(model="test", messages=QUESTION, max_tokens=200, output_config=held)
        Place.model_validate_json(said.content[0].text)
        # Beside tools the answer is by the schema, or a call.
        made = client.chat.completions.create(
            messages=QUESTION, tools=CHAT_TOOLS, max_tokens=200, **ask,
            response_format={"type": "json_schema", "json_schema": {"name": "place", "schema": schema}},
        )  # fmt: skip
        message = made.choices[0].message
        assert message.tool_calls or Place.model_validate_json(message.content)


def test_thoughts_answers_and_calls_in_responses(scripted: Running) -> None:
    """Whole and streamed alike; the next request goes on from it, with all that was said in the template's form."""
    with scripted.openai() as client:
        whole = client.responses.create(model="test", input="Rain?", instructions="Be brief.", tools=TOOLS)
        with client.responses.stream(model="test", input="Rain?", tools=TOOLS) as stream:
            events = list(stream)
            streamed = stream.get_final_response()
        for found in (whole, streamed):
            assert [item.type for item in found.output] == ["reasoning", "message", *["function_call"] * 2]
            thought, message, first, second = found.output
            assert (thought.content[0].text, message.content[0].text) == ("Hm.", "Let me see.")
            assert [(call.name, json.loads(call.arguments)) for call in (first, second)] == [
                ("weather", {"city": "Bern"}), ("now", {})]  # fmt: skip
            assert found.status == "completed" and found.usage.output_tokens == len(WRITTEN)
        assert [event.sequence_number for event in events] == [*range(len(events))]
        deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
        assert deltas == ["Let me ", "see."]
        seen = scripted.engine.tokenizer.seen[0]["messages"]
        assert seen == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]

        calls = [item for item in whole.output if item.type == "function_call"]
        answers = [{"type": "function_call_output", "call_id": call.call_id, "output": "no"} for call in calls]
        after = client.responses.create(model="test", input=answers, previous_response_id=whole.id, tools=TOOLS)
        said = scripted.engine.tokenizer.seen[-1]["messages"]
        assert [message["role"] for message in said] == ["user", "assistant", "tool", "tool"]
        assert (said[1]["content"], said[1]["reasoning_content"]) == ("Let me see.", "Hm.")
        assert [call["function"]["name"] for call in said[1]["tool_calls"]] == ["weather", "now"]
        assert [message["name"] for message in said[2:]] == ["weather", "now"]
        # The same without memory: the client sends all items back.
        given = [{"role": "user", "content": "Rain?"}, *(item.model_dump() for item in whole.output), *answers]
        client.responses.create(model="test", input=given, tools=TOOLS, store=False)
        assert scripted.engine.tokenizer.seen[-1]["messages"] == said

        assert client.responses.retrieve(after.id).output[1].content[0].text == "Let me see."
        items = client.responses.input_items.list(after.id, order="asc").data
        assert [item.type for item in items][:2] == ["message", "reasoning"] and len(items) == 7
        assert client.responses.input_tokens.count(model="test", input="Rain?").input_tokens > 0
        client.responses.delete(after.id)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(after.id)
        with pytest.raises(openai.BadRequestError, match="No response 'resp_none'"):
            client.responses.create(model="test", input="x", previous_response_id="resp_none")


def test_a_response_that_its_length_ends(server: Running) -> None:
    with server.openai() as client:
        found = client.responses.create(model="test", input="What is os.path?", max_output_tokens=3)
        assert (found.status, found.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        ask: dict[str, Any] = {"top_logprobs": 2, "include": ["message.output_text.logprobs"]}
        [item] = client.responses.create(model="test", input="x", max_output_tokens=3, **ask).output
        scores = item.content[0].logprobs
        assert len(scores) == 3 and all(len(score.top_logprobs) == 2 for score in scores)


def test_thoughts_answers_and_calls_in_messages(scripted: Running) -> None:
    with claude(scripted) as client:
        ask: dict[str, Any] = {"model": "test", "max_tokens": 50, "tools": CLAUDE_TOOLS, "messages": QUESTION}
        whole = client.messages.create(**ask, system=[{"type": "text", "text": "Be brief."}],
                                       thinking={"type": "enabled", "budget_tokens": 1024})  # fmt: skip
        assert scripted.engine.tokenizer.seen[-1]["messages"][0] == {"role": "system", "content": "Be brief."}
        assert scripted.engine.tokenizer.seen[-1]["thinking"] is True
        with client.messages.stream(**ask) as stream:
            kinds = [event.type for event in stream]
            streamed = stream.get_final_message()
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
        for found in (whole, streamed):
            assert [block.type for block in found.content] == ["thinking", "text", "tool_use", "tool_use"]
            thought, text, first, second = found.content
            assert (thought.thinking, text.text) == ("Hm.", "Let me see.")
            assert [(use.name, use.input) for use in (first, second)] == [("weather", {"city": "Bern"}), ("now", {})]
            assert (found.stop_reason, found.usage.output_tokens) == ("tool_use", len(WRITTEN))
        results = [{"type": "tool_result", "tool_use_id": use.id, "content": "no"} for use in (first, second)]
        history = [*QUESTION, {"role": "assistant", "content": [block.model_dump() for block in streamed.content]},
                   {"role": "user", "content": [*results, {"type": "text", "text": "So?"}]}]  # fmt: skip
        client.messages.create(**ask | {"messages": history})
        said = scripted.engine.tokenizer.seen[-1]["messages"]
        assert [message["role"] for message in said] == ["user", "assistant", "tool", "tool", "user"]
        assert said[1]["reasoning_content"] == "Hm." and said[2]["name"] == "weather"
        count = client.messages.count_tokens(model="test", messages=QUESTION).input_tokens
        assert count == whole.usage.input_tokens - len("system: Be brief.\n") - 1 + len("False") - len("True") + 1


def test_stop_sequences_and_lengths_in_messages(server: Running) -> None:
    with claude(server) as client:
        ask: dict[str, Any] = {"model": "test", "messages": QUESTION, "extra_body": {"temperature": 0}}
        whole = client.messages.create(max_tokens=30, **ask)
        text, reason = whole.content[0].text, whole.stop_reason
        assert reason in ("end_turn", "max_tokens")
        stop = text[5:8]
        cut = client.messages.create(max_tokens=30, stop_sequences=[stop, "never"], **ask)
        assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", stop)
        assert cut.content[0].text == text[: text.index(stop)] if cut.content else text.index(stop) == 0
        assert cut.usage.cache_read_input_tokens > 0
        assert client.messages.create(max_tokens=1, **ask).stop_reason == "max_tokens"


def test_errors_in_each_interfaces_form(server: Running) -> None:
    with server.openai() as client, claude(server) as other:
        with pytest.raises(anthropic.NotFoundError) as missing:
            other.messages.create(model="none", max_tokens=1, messages=QUESTION)
        assert missing.value.body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError, match="last message must be the user"):
            begun = [*QUESTION, {"role": "assistant", "content": "A"}]
            other.messages.create(model="test", max_tokens=1, messages=begun)
        assert other.models.list().data[0].id == "test"
        assert client.models.retrieve("test").model_extra["context_length"] == 8192


def test_keys_of_both_kinds() -> None:
    with running(ScriptedEngine(), api_key="secret", hosts=None) as server:
        assert server.post(MESSAGES, {"messages": QUESTION, "max_tokens": 1}, **{"x-api-key": "secret"}).is_success
        refused = server.post(MESSAGES, {"messages": QUESTION, "max_tokens": 1}, **{"x-api-key": "wrong"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (401, "authentication_error")


def test_several_choices_and_prompts(server: Running) -> None:
    """Choices differ by their seeds; the prompt is run once; a stream has all of them, and one usage.

    Of a few tokens each: K/V of a kept session are rounded otherwise than those of a new run, which may change a draw
    where thousands of tokens are all but impossible.
    """
    body = {"messages": QUESTION, "n": 3, "max_tokens": 12, "temperature": 1.2, "top_k": 8, "seed": 3}
    whole = server.post(CHAT, body).json()
    texts = [choice["message"]["content"] for choice in whole["choices"]]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    one = server.post(CHAT, body | {"n": 1, "seed": 4}).json()
    assert one["choices"][0]["message"]["content"] == texts[1]
    assert whole["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert whole["usage"]["completion_tokens"] == sum(choice["stats"]["tokens"] for choice in whole["choices"])
    assert all(choice["stats"]["prefilled_tokens"] == 1 for choice in whole["choices"][1:])
    chunks = [json.loads(data) for data in contents(server.post(
        CHAT, body | {"stream": True, "stream_options": {"include_usage": True}}))[:-1] if data[0] == "{"]  # fmt: skip
    streamed = ["", "", ""]
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts and chunks[-1]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]

    body = {"prompt": ["import os", [5, 6, 7]], "n": 2, "max_tokens": 4, "echo": True, "seed": 1, "top_k": 8}
    found = server.post(COMPLETION, body).json()["choices"]
    assert len(found) == 4 and all(choice["text"].startswith("import os") for choice in found[:2])
    lines = [json.loads(data) for data in contents(server.post(COMPLETION, body | {"stream": True}))[:-1]
             if data[0] == "{"]  # fmt: skip
    texts = [""] * 4
    for chunk in lines:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == [choice["text"] for choice in found]


def test_logprobs_of_a_prompt(server: Running, embedded: mlx_mtp.Engine) -> None:
    """As those who measure models ask for them: against the whole text in one pass without a cache, past the window."""
    texts: list[Any] = ["import os\n\nos.path.join(", np.random.default_rng(1).integers(6, 4096, 150).tolist()]
    body = {"prompt": texts, "n": 2, "max_tokens": 3, "echo": True, "logprobs": 2, "seed": 1, "temperature": 0}
    for choice in server.post(COMPLETION, body).json()["choices"]:
        prompt, scores = texts[choice["index"] // 2], choice["logprobs"]
        ids = embedded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        assert choice["text"].startswith(prompt if isinstance(prompt, str) else embedded.tokenizer.decode(ids))
        assert len(scores["tokens"]) == len(scores["text_offset"]) == len(ids) + 3
        expected = log_softmax(np.array(embedded.target.logits(mx.array([ids])))[0].astype(np.float64))
        assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
        given = np.array(scores["token_logprobs"][1 : len(ids)])
        assert np.abs(given - expected[np.arange(len(ids) - 1), ids[1:]]).max() < 1e-3
        assert [max(top.values()) for top in scores["top_logprobs"][1 : len(ids)]] == pytest.approx(
            expected[:-1].max(axis=-1), abs=1e-3
        )
    whole = server.post(COMPLETION, body).json()["choices"]
    pieces = list(server.openai().completions.create(model="test", stream=True, **body))
    for choice in whole:
        mine = [one.choices[0] for one in pieces if one.choices and one.choices[0].index == choice["index"]]
        assert "".join(one.text for one in mine) == choice["text"]
        scores = [score for one in mine if one.logprobs for score in one.logprobs.token_logprobs]
        assert scores == choice["logprobs"]["token_logprobs"]


def test_agents_and_a_chat_in_turns(fresh_server: Running) -> None:
    """Two agents with the same tools and a chat, interleaved: each runs what it would run alone, and no more."""
    system = {"role": "system", "content": "You look after files. " * 30}

    def turns(name: str, alone: bool) -> list[int]:
        """Prefilled tokens of each turn."""
        tools = {} if name == "chat" else {"tools": CHAT_TOOLS}
        said, found = [system, {"role": "user", "content": f"I am {name} {'A' if alone else 'B'}."}], []
        for i in range(4):
            reply = fresh_server.post(CHAT, {"messages": said, "max_tokens": 6, **tools}).json()
            found.append(reply["stats"]["prefilled_tokens"])
            said += [reply["choices"][0]["message"], {"role": "user", "content": f"And {i}?"}]
            if not alone:
                yielded.append((name, i))
                turn.wait(60)
        return found

    yielded: list[tuple[str, int]] = []
    turn = threading.Barrier(3)
    names = ("one", "two", "chat")
    separate = [turns(name, True) for name in names]
    with ThreadPoolExecutor(3) as pool:
        together = [*pool.map(lambda name: turns(name, False), names)]
    assert len(yielded) == 12 and {name for name, _ in yielded[:3]} == set(names)
    for first, second in zip(separate, together, strict=True):
        assert second[1:] == first[1:]
    # Whichever agent comes first runs what both begin with, and the other one does not.
    assert sum(second[0] for second in together) == sum(first[0] for first in separate)


def test_a_prediction_is_drafted_from(server: Running) -> None:
    """The same reply, in fewer passes."""
    body = {"messages": QUESTION, "max_tokens": 40, "temperature": 0}
    free = server.post(CHAT, body).json()
    text = free["choices"][0]["message"]["content"]
    for content in (text, [{"type": "text", "text": text}]):
        helped = server.post(CHAT, body | {"prediction": {"type": "content", "content": content}}).json()
        assert helped["choices"][0]["message"]["content"] == text
        assert helped["stats"]["accepted"] > free["stats"]["accepted"]
    assert server.post(CHAT, body).json()["stats"]["accepted"] < helped["stats"]["accepted"]  # expected that once only
    refused = server.post(CHAT, body | {"prediction": {"type": "moon"}})
    assert refused.json()["error"]["param"] == "prediction.type"


def test_counting_and_spelling_tokens(server: Running) -> None:
    made = server.post("/tokenize", {"prompt": "import os"}).json()
    assert made["count"] == len(made["tokens"]) and made["max_model_len"] == 8192
    plain = server.post("/tokenize", {"content": "import os", "add_special_tokens": False}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": plain}).json()["prompt"] == "import os"
    assert server.post("/tokenize", {}).json()["error"]["param"] == "prompt"


def test_a_lenient_server_names_what_it_leaves_out() -> None:
    body = {"messages": [{"role": "user", "content": "x", "colour": "red"}], "shape": {"a": 1}, "n": 1}
    with running(ScriptedEngine(), lenient=True) as server:
        for more in ({}, {"stream": True}):
            found = server.post(CHAT, body | more)
            assert found.is_success and set(found.headers["x-ignored-fields"].split(", ")) == {
                "messages[0].colour", "shape"}  # fmt: skip
        assert "x-ignored-fields" not in server.post(CHAT, {"messages": QUESTION}).headers
        assert server.post(CHAT, body | {"temperature": "hot"}).status_code == 400
        # Tools that an agent would have the server run: it does without them, and knows it.
        tools = [TOOLS[0], {"type": "namespace", "name": "n", "tools": TOOLS}, TOOLS[1], {"type": "web_search"}]
        found = server.post(RESPONSES, {"input": "x", "tools": tools})
        assert found.is_success and found.headers["x-ignored-fields"] == "tools[1], tools[3]"
        assert [tool["name"] for tool in found.json()["tools"]] == ["weather", "now"]
    with running(ScriptedEngine()) as server:
        assert server.post(CHAT, body).status_code == 400


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    (RESPONSES, {"input": "x", "previous_response_id": 1}, "previous_response_id"),
    (RESPONSES, {"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    (RESPONSES, {"input": "x", "background": True}, "background"),
    (RESPONSES, {"input": "x", "conversation": "c"}, "conversation"),
    (RESPONSES, {"input": "x", "truncation": "auto"}, "truncation"),
    (RESPONSES, {"input": "x", "text": {"format": {"type": "json_schema", "schema": {}, "shape": 1}}},
     "text.format.shape"),
    (RESPONSES, {"input": [{"id": "item_none"}]}, "input[0].id"),
    (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": "x"}]}, "input"),
    (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]},
     "input[0].content[0].type"),
    (RESPONSES, {"input": "x", "colour": "red"}, "colour"),
    (MESSAGES, {"messages": QUESTION}, "max_tokens"),
    (MESSAGES, {"messages": QUESTION, "max_tokens": 1, "mcp_servers": [{}]}, "mcp_servers"),
    (MESSAGES, {"messages": QUESTION, "max_tokens": 1, "tool_choice": {"type": "tool"}}, "tool_choice"),
    (MESSAGES, {"messages": QUESTION, "max_tokens": 1, "tools": [{"name": "f"}]}, "tools[0].input_schema"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "u"}]}],
                "max_tokens": 1}, "messages[0]"),
    (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}], "max_tokens": 1},
     "messages[0].content[0].type"),
]  # fmt: skip


def test_every_fault_is_named(server: Running) -> None:
    for path, body, place in FAULTS:
        refused = server.post(path, body)
        message = refused.json()["error"]["message"]
        assert refused.status_code == 400 and place in message, (body, message)


def test_the_store_keeps_what_was_used_last() -> None:
    store = ResponseStore(most_bytes=300)
    for name in "abc":
        store.keep(Stored({"id": name, "output": [{"id": f"i{name}", "text": "x" * 60}]}, []))
        if name != "c":
            store.get("a")
    assert store.get("a").response["id"] == "a" and store.item("ic", "input")["text"]
    with pytest.raises(RequestError):
        store.get("b")
    store.drop("a")
    with pytest.raises(RequestError):
        store.drop("a")


def test_the_middle_is_filled_in(tmp_path: Path) -> None:
    from tokenizers import AddedToken
    from tokenizers_at_hand import byte_level, write

    from mlx_mtp.text.tokenizer import Tokenizer

    made = byte_level()
    plain = Tokenizer.load(write(tmp_path / "plain", made))
    assert plain.fill_in("a", "b") is None
    names = ("prefix", "suffix", "middle")
    made.add_special_tokens([AddedToken(f"<|fim_{name}|>", normalized=False) for name in names])
    known = Tokenizer.load(write(tmp_path / "known", made))
    assert known.decode(known.fill_in("a", "b")) == "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>"
