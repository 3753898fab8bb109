"""What one generation is asked for: checked once, by the engine, and handed down to the loop as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import mlx.core as mx

from mlx_mtp.generation.constraint import Grammar
from mlx_mtp.generation.prefix import Session
from mlx_mtp.generation.types import NEUTRAL, Sampling
from mlx_mtp.text.call_grammar import ToolChoice
from mlx_mtp.text.channels import ThoughtTokens

# mlx-lm's convention: (all tokens so far [T], logits [1, V]) -> logits [1, V].
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
# Tokens of the prompt that were run, and how many there are to run.
PrefillProgress = Callable[[int, int], None]


class SamplingFields(TypedDict, total=False):
    """The fields of Sampling as keywords of a request."""

    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    logit_bias: Mapping[int, float] | None


class ReplyOptions(SamplingFields, total=False):
    """The keywords of `Chat.send` and `Chat.retry`, beside the fields of Sampling.

    Attributes:
        max_tokens: The reply ends after so many.
        sampling: How tokens are chosen. Its fields may be given as keywords instead, like `temperature=0.7`.
        stop: Strings that end the reply where they turn up in its answer, never in a thought or a call of a tool.
            The text ends in front of the string, the tokens with the one that completes it; of two strings that
            end at once the longer counts.
        seed: The same seed gives the same reply.
        logprobs: n = those of every token and of the n likeliest of its place; 0 = none.
        ignore_end: Goes on past stop tokens (for timing).
        logits_processors: Functions in mlx-lm's convention, (tokens so far [T], logits [1, V]) -> logits [1, V],
            called for every row; rounds are then read one by one.
        on_prefill: Called with (done, total) after every chunk of the prompt.
        json_schema: An object or a pydantic class that the answer is held to; a thought before it is free.
        grammar: The same, as a lark grammar in the form that llguidance reads.
        regex: The same, as a regular expression.
    """

    max_tokens: int
    sampling: Sampling | None
    stop: str | Sequence[str] | None
    seed: int | None
    logprobs: int
    ignore_end: bool
    logits_processors: Sequence[LogitsProcessor]
    on_prefill: PrefillProgress | None
    json_schema: Mapping[str, Any] | type | None
    grammar: str | None
    regex: str | None


class RequestOptions(ReplyOptions, total=False):
    """The keywords of `Engine.request`, `stream` and `generate`: those of ReplyOptions, and what a chat sees to itself.

    Attributes:
        raw: Continues the prompt as it is, without the chat template, and takes all that comes for answer.
        thinking: Asks a checkpoint that can to think first.
        session: Keeps the K/V of prompt and reply, for what the next prompt has in common with them.
        tools: Whether calls of tools are told apart from the answer; or declarations in OpenAI's form, which go
            into the prompt where it is no list of ids.
        tool_choice: "auto", "required" (a call, no answer), the name of the one tool to call, or a ToolChoice. A
            reply that must call, or may call a tool that is `strict`, is held to a grammar: its calls can always
            be read, and their arguments keep to the tool's schema.
        prediction: A text, or its tokens, that much of the reply is expected to repeat; lookups draft from it.
    """

    raw: bool
    thinking: bool
    session: Session | None
    tools: bool | Sequence[Mapping[str, Any]]
    tool_choice: ToolChoice | str
    prediction: str | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A checked request, of which RequestOptions says the most. sampling has no None left; budget: the most tokens.

    seeded: whether the caller gave the seed, so that the same seed must give the same reply. stop_tokens: they end the
    reply. grammar: what the answer is held to, after the thought where there may be one.
    """

    ids: list[int]
    budget: int
    sampling: Sampling = NEUTRAL
    seed: int = 0
    seeded: bool = False
    logprobs: int = 0
    processors: Sequence[LogitsProcessor] = ()
    on_prefill: PrefillProgress | None = None
    session: Session | None = None
    stop: Sequence[str] = ()
    stop_tokens: frozenset[int] = frozenset()
    raw: bool = False
    tools: bool | Sequence[Mapping[str, Any]] = True
    grammar: Grammar | None = None
    thought: ThoughtTokens | None = None
    prediction: Sequence[int] = ()
