"""Requests in OpenAI's form to what the engine is asked for.

What it does: reads every field of /v1/chat/completions and /v1/completions, checks types and ranges, and refuses what
would change the output and is not implemented. What it does not do: anything that needs the model (replies.py).

Ignored, because no reply could differ: IGNORED, stream_options.include_obfuscation, and marks for caches. The table in
docs/server.md has every field.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from mlx_mtp.errors import OptionError
from mlx_mtp.generation.types import Sampling
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.fields import Fields, shown
from mlx_mtp.serving.messages import CACHING, Message, read_messages, read_tools

IGNORED = (
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "prompt_cache_options", "prediction", CACHING,
)  # fmt: skip
UNTHINKING = ("none", "minimal")
EFFORTS = (*UNTHINKING, "low", "medium", "high", "xhigh", "max")
MOST_STOPS = 16
MOST_LOGPROBS = 20
MOST_BIASES = 4096
MOST_TOKENS = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a server lets a request ask for, and what a request gets that does not ask.

    most_tokens: of a reply, None = what the context leaves, to which every reply is cut. tokens: of a reply whose
    request names no number.
    """

    most_tokens: int | None
    tokens: int
    sampling: Sampling = Sampling()
    seed: int | None = None


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One request. Either messages (with tools, thinking) or a prompt, a string or token ids.

    logprobs: None = none, n = that of every token and of the n likeliest. parallel: whether a reply may hold several
    tool calls. thinking: the model shall think first. effort: the level that was named, for templates with levels.
    """

    messages: list[Message] | None = None
    prompt: str | list[int] | None = None
    tools: list[dict[str, Any]] | None = None
    thinking: bool = False
    effort: str | None = None
    parallel: bool = True
    max_tokens: int
    sampling: Sampling
    stop: list[str]
    seed: int | None
    logprobs: int | None
    stream: bool
    include_usage: bool


def chat_request(body: object, limits: Limits) -> tuple[Generation, str | None]:
    """What /v1/chat/completions is asked for, and the model it names; RequestError where a field is wrong."""
    given = Fields(body)
    model, messages, tools = given.text("model"), read_messages(given), read_tools(given)
    parallel = given.flag("parallel_tool_calls")
    wanted, most = given.flag("logprobs"), given.whole("top_logprobs", 0, MOST_LOGPROBS)
    if most and not wanted:
        raise RequestError("Expected logprobs true beside top_logprobs, found it not.", param="top_logprobs")
    given.only("modalities", ["text"], because="this server only writes text")
    given.only("verbosity", "medium", because="this server has no such dial")
    given.only("audio", because="this server only writes text")
    given.only("web_search_options", because="this server searches nothing")
    given.only("moderation", because="this server moderates nothing")
    for name in ("functions", "function_call"):
        given.only(name, [], "none", "auto", because="it was replaced by tools and tool_choice")
    thinking, effort = _thinking(given)
    found = Generation(
        messages=messages, tools=tools, thinking=thinking, effort=effort, parallel=parallel is not False,
        logprobs=(most or 0) if wanted else None, **_common(given, limits),
    )  # fmt: skip
    given.finish()
    return found, model


def completion_request(body: object, limits: Limits) -> tuple[Generation, str | None]:
    """What /v1/completions is asked for, and the model it names; RequestError where a field is wrong."""
    given = Fields(body)
    model, prompt = given.text("model"), _prompt(given)
    given.only("echo", False, because="the prompt is not sent back")
    given.only("suffix", "", because="this server cannot fill in")
    given.only("best_of", 1, because="one reply is written and returned")
    logprobs = given.whole("logprobs", 0, MOST_LOGPROBS)
    found = Generation(prompt=prompt, logprobs=logprobs, **_common(given, limits))
    given.finish()
    return found, model


def _common(given: Fields, limits: Limits) -> dict[str, Any]:
    """What both endpoints have."""
    given.only("n", 1, because="one reply is written for a request")
    given.only("response_format", {"type": "text"}, because="this server cannot force a format")
    for name in IGNORED:
        given.take(name)
    stream, options = given.flag("stream") or False, given.fields("stream_options")
    include_usage = False
    if options is not None:
        if not stream:
            raise RequestError("Expected stream_options only with stream true.", param="stream_options")
        include_usage = options.flag("include_usage") or False
        options.take("include_obfuscation")
        options.finish()
    seed = given.whole("seed", -(2**63), 2**64 - 1)
    return {
        "max_tokens": _max_tokens(given, limits), "sampling": _sampling(given).over(limits.sampling),
        "stop": _stops(given), "seed": limits.seed if seed is None else seed % 2**64, "stream": stream,
        "include_usage": include_usage,
    }  # fmt: skip


def _max_tokens(given: Fields, limits: Limits) -> int:
    most = limits.most_tokens or MOST_TOKENS
    old, new = (given.whole(name, 1, most) for name in ("max_tokens", "max_completion_tokens"))
    if old and new and old != new:
        raise RequestError(
            f"Expected max_tokens or max_completion_tokens, found both and not the same ({old}, {new}).",
            param="max_tokens",
        )
    return new or old or min(limits.tokens, most)


def _sampling(given: Fields) -> Sampling:
    found: dict[str, Any] = {}
    for field in fields(Sampling):
        if field.name == "logit_bias":
            continue
        value = given.number(field.name)
        if value is None:
            continue
        if field.name == "top_p" and value == 0:  # nothing but the likeliest token
            found["temperature"] = 0.0
            continue
        one: dict[str, Any] = {field.name: value}
        try:
            Sampling(**one)
        except OptionError as error:
            raise RequestError(str(error)[:500], param=field.name) from None
        found[field.name] = int(value) if field.name == "top_k" else float(value)
    bias = given.take("logit_bias")
    if bias is not None:
        found["logit_bias"] = _biases(given, bias)
    return Sampling(**found)


def _biases(given: Fields, value: object) -> dict[int, float]:
    """logit_bias: token ids, as JSON has them for names, to numbers."""
    if not isinstance(value, dict) or len(value) > MOST_BIASES:
        raise given.wrong("logit_bias", f"an object of at most {MOST_BIASES} token ids and numbers", value)
    inner, found = Fields(value, "logit_bias"), {}
    for name in value:
        bias = inner.number(name)
        if not (name.isascii() and name.isdigit() and len(name) < 10) or bias is None or not -100 <= bias <= 100:
            raise RequestError(
                f"Expected logit_bias as numbers from -100 to 100 by token ids, found {shown(name)}: {shown(bias)}.",
                param="logit_bias",
            )
        found[int(name)] = float(bias)
    return found


def _stops(given: Fields) -> list[str]:
    value = given.take("stop")
    stops = [value] if isinstance(value, str) else [] if value is None else value
    good = isinstance(stops, list) and len(stops) <= MOST_STOPS
    if not good or not all(isinstance(stop, str) and stop for stop in stops):
        raise given.wrong("stop", f"a string or up to {MOST_STOPS} strings, none of them empty", value)
    return list(stops)


def _thinking(given: Fields) -> tuple[bool, str | None]:
    """Whether the model is asked to think first, and the level of reasoning_effort, which is a finer word for it.

    A template that knows levels is given the level; one with a switch is off at "none" and "minimal", else on.
    """
    effort, options = given.choice("reasoning_effort", EFFORTS), given.fields("chat_template_kwargs")
    by_effort = None if effort is None else effort not in UNTHINKING
    by_option = None
    if options is not None:
        by_option = options.flag("enable_thinking")
        options.finish()
    if by_effort is not None and by_option is not None and by_effort != by_option:
        raise RequestError(
            f"Expected reasoning_effort and enable_thinking to agree, found '{effort}' and {shown(by_option)}.",
            param="reasoning_effort",
        )
    return by_effort or by_option or False, effort


def _prompt(given: Fields) -> str | list[int]:
    """A string or token ids; a list of one of these is that one."""
    value = given.take("prompt")
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)):
        value = value[0]
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value:
        if all(isinstance(token, int) and not isinstance(token, bool) for token in value):
            return value
        if all(isinstance(one, (str, list)) for one in value):
            raise RequestError(
                f"Expected one prompt, found {len(value)}: one reply is written for a request; send one for each.",
                param="prompt", code="unsupported_value",
            )  # fmt: skip
    raise given.wrong("prompt", "a string or a list of token ids, not empty", value)
