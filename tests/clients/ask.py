"""Clients of OpenAI's and Anthropic's APIs at their typed defaults, against a running server.

    make clients                                     # their environments, and this against the embedded model
    mlx-mtp serve --model FOLDER --temperature 1 &   # or by hand: a model whose template knows tools
    build/clients/clients/bin/python tests/clients/ask.py http://127.0.0.1:8080 MODEL [WORDS]

A line a client and way of asking: whether what came is what its types say. WORDS: only those whose names have one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field

TOKENS, QUESTION = 300, "Name a city in Switzerland and say how many people live there."
MESSAGES = [{"role": "user", "content": QUESTION}]


class City(BaseModel):
    """A city, within bounds: a very small model writes for ever where it may, and calls one tool after the other."""

    name: str = Field(max_length=40)
    population: int = Field(ge=0, le=100_000_000)


Case = Callable[[], object]


def _openai(model: str) -> dict[str, Case]:
    import openai

    client, tool = openai.OpenAI(max_retries=0), openai.pydantic_function_tool(City)

    def chat() -> object:
        parts = client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=TOKENS, stream=True)
        return "".join(part.choices[0].delta.content or "" for part in parts if part.choices)

    def parse(**more: Any) -> Any:
        asked = client.chat.completions.parse(model=model, messages=MESSAGES, max_tokens=TOKENS, **more)
        return asked.choices[0].message

    def respond() -> object:
        asked = client.responses.parse(model=model, input=QUESTION, max_output_tokens=TOKENS, text_format=City)
        return asked.output_parsed

    return {
        "openai stream": chat, "openai schema": lambda: parse(response_format=City).parsed, "openai responses": respond,
        "openai tool": lambda: parse(tools=[tool], tool_choice="required", parallel_tool_calls=False)
        .tool_calls[0].function.parsed_arguments,
        "openai completion": lambda: client.completions.create(model=model, prompt=QUESTION, max_tokens=8)
        .choices[0].text,
    }  # fmt: skip


def _anthropic(model: str) -> dict[str, Case]:
    import anthropic

    client, asked = anthropic.Anthropic(max_retries=0), {"model": model, "messages": MESSAGES}
    tool = {"name": "city", "input_schema": City.model_json_schema()}

    def stream() -> object:
        with client.messages.stream(max_tokens=TOKENS, **asked) as events:
            return events.get_final_text()

    def call() -> object:
        one = {"type": "any", "disable_parallel_tool_use": True}
        found = client.messages.create(max_tokens=TOKENS, tools=[tool], tool_choice=one, **asked)
        return City.model_validate(found.content[-1].input)

    return {
        "anthropic stream": stream, "anthropic tool": call,
        "anthropic count": lambda: client.messages.count_tokens(**asked).input_tokens,
    }  # fmt: skip


def _instructor(model: str) -> dict[str, Case]:
    import instructor
    import openai

    def ask(mode: str) -> object:
        client = instructor.from_openai(openai.OpenAI(), mode=instructor.Mode[mode])
        return client.chat.completions.create(model=model, response_model=City, messages=MESSAGES, max_retries=0,
                                              max_tokens=TOKENS)  # fmt: skip

    return {f"instructor {mode}": lambda mode=mode: ask(mode) for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA")}


def _pydantic_ai(model: str) -> dict[str, Case]:
    from pydantic_ai import Agent, NativeOutput
    from pydantic_ai.models.anthropic import AnthropicModel
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel

    kinds = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel, "anthropic": AnthropicModel}
    outputs: dict[str, Any] = {"tool": City, "native": NativeOutput(City), "text": str, "bool": bool,
                               "list": Annotated[list[bool], Field(max_length=5)]}  # fmt: skip

    def ask(kind: str, output: Any) -> object:
        agent = Agent(kinds[kind](model), output_type=output)
        return agent.run_sync(QUESTION, model_settings={"max_tokens": TOKENS}).output

    return {
        f"pydantic-ai {kind} {name}": lambda kind=kind, output=output: ask(kind, output)
        for kind in kinds for name, output in outputs.items()
        if (kind, name) != ("anthropic", "native")  # it says by itself that this model's name is not one for that
    }  # fmt: skip


def _langchain(model: str) -> dict[str, Case]:
    from langchain_openai import ChatOpenAI

    def ask(method: str, responses: bool = False) -> object:
        client = ChatOpenAI(model=model, max_tokens=TOKENS, max_retries=0, use_responses_api=responses)
        return client.with_structured_output(City, method=method).invoke(QUESTION)

    def call() -> object:
        client = ChatOpenAI(model=model, max_tokens=TOKENS, max_retries=0)
        return client.bind_tools([City], tool_choice="any").invoke(QUESTION).tool_calls

    return {
        "langchain function_calling": lambda: ask("function_calling"), "langchain tools": call,
        "langchain json_schema": lambda: ask("json_schema"), "langchain responses": lambda: ask("json_schema", True),
    }  # fmt: skip


def _litellm(model: str) -> dict[str, Case]:
    import litellm

    def ask(provider: str, **more: Any) -> object:
        found = litellm.completion(f"{provider}/{model}", MESSAGES, max_tokens=TOKENS, **more)
        text = found.choices[0].message.content
        return City.model_validate_json(text) if more else text

    def respond() -> object:
        return litellm.responses(QUESTION, f"openai/{model}", max_output_tokens=TOKENS).output[0].content[0].text

    return {
        "litellm text": lambda: ask("openai"), "litellm schema": lambda: ask("openai", response_format=City),
        "litellm anthropic": lambda: ask("anthropic"), "litellm responses": respond,
    }  # fmt: skip


def _agents(model: str) -> dict[str, Case]:
    import agents

    agents.set_tracing_disabled(True)

    @agents.function_tool
    def people(city: Annotated[str, Field(max_length=40)]) -> int:
        """How many live in a city."""
        return 134_000

    def ask(api: str, output: Any = None, tools: bool = False) -> object:
        agents.set_default_openai_api(api)  # type: ignore[arg-type]
        settings = agents.ModelSettings(max_tokens=TOKENS, tool_choice="required" if tools else None,
                                        parallel_tool_calls=False if tools else None)
        agent = agents.Agent(name="a", instructions="Be brief.", model=model, model_settings=settings,
                             output_type=output, tools=[people] if tools else [])  # fmt: skip
        return agents.Runner.run_sync(agent, QUESTION, max_turns=3).final_output

    return {
        f"openai-agents {api} {name}": lambda api=api, options=options: ask(api, **options)
        for api in ("responses", "chat_completions")
        for name, options in (("text", {}), ("schema", {"output": City}), ("tool", {"tools": True}))
    }  # fmt: skip


def _llama_index(model: str) -> dict[str, Case]:
    from llama_index.core.prompts import PromptTemplate
    from llama_index.llms.openai_like import OpenAILike

    def ask(native: bool) -> object:
        client = OpenAILike(model=model, is_chat_model=True, is_function_calling_model=True, max_tokens=TOKENS,
                            api_base=os.environ["OPENAI_BASE_URL"], api_key="-", context_window=4096,
                            should_use_structured_outputs=native)  # fmt: skip
        return client.structured_predict(City, PromptTemplate(QUESTION))

    return {"llama-index tools": lambda: ask(False), "llama-index native": lambda: ask(True)}


def _dspy(model: str) -> dict[str, Case]:
    import dspy
    import litellm

    litellm.register_model({f"openai/{model}": {"litellm_provider": "openai", "supports_response_schema": True}})

    def ask() -> object:
        dspy.configure(lm=dspy.LM(f"openai/{model}", max_tokens=TOKENS, cache=False), adapter=dspy.JSONAdapter())
        return dspy.Predict("question -> large: bool, certain: bool")(question=QUESTION)

    return {"dspy": ask}


def _llm(model: str) -> dict[str, Case]:
    import llm  # it is a program of that name: here only to see whether there is one

    program = Path(sys.executable).with_name(llm.__name__)

    def ask() -> object:
        folder = Path(tempfile.mkdtemp())
        (folder / "extra-openai-models.yaml").write_text(
            f"- model_id: here\n  model_name: {model}\n  api_base: {os.environ['OPENAI_BASE_URL']}\n"
            "  supports_schema: true\n"
        )
        command = [program, "-m", "here", "--no-stream", "--schema", json.dumps(City.model_json_schema()), "-o",
                   "max_tokens", str(TOKENS), QUESTION]  # fmt: skip
        found = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LLM_USER_PATH": str(folder)})
        return City.model_validate_json(found.stdout or found.stderr)

    return {"llm --schema": ask}


def _guidance(model: str) -> dict[str, Case]:
    import guidance

    def ask(what: object) -> object:
        client = guidance.models.OpenAI(model, api_key="-", base_url=os.environ["OPENAI_BASE_URL"], echo=False)
        with guidance.user():
            client += QUESTION
        with guidance.assistant():
            client += what
        return client["found"]

    return {
        "guidance json": lambda: City.model_validate_json(ask(guidance.json(name="found", schema=City))),  # type: ignore[arg-type]
        "guidance gen": lambda: ask(guidance.gen(name="found", max_tokens=TOKENS)),
    }  # fmt: skip


def main() -> None:
    """Every client that is installed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    parser.add_argument("words", nargs="*")
    given = parser.parse_args()
    os.environ |= {"OPENAI_API_KEY": "-", "OPENAI_BASE_URL": f"{given.url}/v1", "ANTHROPIC_API_KEY": "-",
                   "ANTHROPIC_BASE_URL": given.url, "LITELLM_LOG": "ERROR"}  # fmt: skip
    failed = 0
    for cases_of in (_openai, _anthropic, _instructor, _pydantic_ai, _langchain, _litellm, _agents, _llama_index, _dspy,
                     _llm, _guidance):  # fmt: skip
        try:
            cases = cases_of(given.model)
        except ModuleNotFoundError as error:
            print(f"not installed  {error.name}")
            continue
        for name, ask in cases.items():
            if given.words and not any(word in name for word in given.words):
                continue
            try:
                print(f"passed  {name}: {str(ask())[:80]!r}", flush=True)
            except Exception as error:  # whatever a client raises
                failed += 1
                print(f"FAILED  {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)
    raise SystemExit(min(failed, 1))


if __name__ == "__main__":
    main()
