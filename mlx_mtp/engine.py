"""The engine: checks what a request may ask, runs it, and returns events, text and statistics.

Invariant: everything a request changes belongs to that request, so stopping early, cancelling or an exception in the
consumer leave the engine as it was.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import mlx.core as mx

from mlx_mtp.backend import threads
from mlx_mtp.chat.conversation import Chat
from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.generation import checks, constraint, exactness, scoring
from mlx_mtp.generation.cache import CAPACITY_STEP
from mlx_mtp.generation.depth import DepthController, DepthPolicy, FixedDepth, ProfileFile
from mlx_mtp.generation.interfaces import Drafter, Target
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.generation.prefix import Pair, Session
from mlx_mtp.generation.reply import Reply
from mlx_mtp.generation.request import (
    GenerationRequest,
    LogitsProcessor,
    PrefillProgress,
    RequestOptions,
    SamplingFields,
)
from mlx_mtp.generation.types import NEUTRAL, Event, Result, Sampling, Stats
from mlx_mtp.text.call_grammar import ToolChoice
from mlx_mtp.text.channels import Channels
from mlx_mtp.text.tokenizer import Prompt, Tokenizer, prompt_ids

log = logging.getLogger(__name__)

DEEPEST = 8
MODES = ("fast", "exact")
MOST_LOGPROBS = 64
# Drafts a round when a seed is given and the depth is left to the engine: one seed must give one output, whatever
# the clock says.
SEEDED_DEPTH = 2


class Engine:
    """A target, perhaps a drafter, and the loop. Made by `mlx_mtp.load`.

    Args:
        target: The model whose distribution the output has.
        drafter: Proposes tokens; None = plain decoding.
        tokenizer: None where prompts are token ids.
        stop_tokens: Ids that end a reply.
        depth: Drafts per round, "auto" or 0..8.
        mode: "fast" or "exact".
        max_context: Most tokens of prompt and reply together; None = the model's own limit.
        defaults: Sampling where a request leaves it open.
        profile: Where what the depth control learns is kept.
        probes: Where what exact mode finds out is kept.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        tokenizer: Tokenizer | None,
        *,
        stop_tokens: Collection[int] = (),
        depth: int | str = "auto",
        mode: str = "fast",
        max_context: int | None = None,
        defaults: Sampling = NEUTRAL,
        profile: ProfileFile | None = None,
        probes: exactness.ProbeFile | None = None,
    ) -> None:
        self.mode = checks.one_of("mode", mode, MODES)
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.stop_tokens = frozenset(stop_tokens)
        self.defaults = defaults.over(NEUTRAL)
        self.depth: int | str = _checked_depth(depth, drafter)
        limit = target.info.max_context  # of the model
        self.max_context = limit if max_context is None else checks.whole("max_context", max_context, 2, limit)
        if drafter is not None:
            drafter.attach(target)
        self.exactness = exactness.Probes(target, probes) if mode == "exact" else None
        self.pair: Pair = target, drafter, mode == "exact"  # whose K/V a session of this engine holds
        self._profile = profile
        self._made: Decoder | None = None
        self._making = threading.Lock()

    @property
    def allowed_depths(self) -> list[int]:
        """Drafts a round that drafter and mode allow, 0 always among them; what depth "auto" chooses from.

        In exact mode the first call probes the device.
        """
        deepest = min(DEEPEST, self.drafter.max_depth) if self.drafter else 0
        exact = self.exactness.at(CAPACITY_STEP) if self.exactness and deepest else None
        return [d for d in range(deepest + 1) if exact is None or d in exact.depths]

    @property
    def _decoder(self) -> Decoder:
        """Made at its first use: exact mode then probes the device, which takes a while."""
        with self._making:
            if self._made is None:
                self._made = Decoder(self.target, self.drafter, self._policy(), self.exactness)
            return self._made

    def _policy(self) -> DepthPolicy:
        allowed = self.allowed_depths
        if self.exactness is not None and self.drafter and len(allowed) == 1:
            log.warning("Exact mode: no way was found to verify drafts bit for bit here; decoding plainly.")
        if self.depth != "auto":
            deepest = max(depth for depth in allowed if depth <= int(self.depth))
            if deepest < int(self.depth):
                log.warning("Exact mode: %d drafts a round in place of %s.", deepest, self.depth)
            return FixedDepth(deepest)
        return DepthController(allowed, self._profile) if len(allowed) > 1 else FixedDepth(0)

    @property
    def plain_seconds_per_token(self) -> float | None:
        """Seconds a token is expected to take without any drafts; None where the depth is fixed or no round was timed.

        An estimate of the depth control, which follows the machine, never a measurement.
        """
        return None if self._made is None else self._made.policy.plain_seconds

    @property
    def depth_reason(self) -> str:
        """One sentence: how many tokens are drafted a round without a seed, and why."""
        if self.drafter is None:
            return "Not drafting: no drafter is loaded."
        if self._made is None and self.exactness is not None:
            return "Nothing was decoded yet: exact mode first finds out what this device can verify bit for bit."
        if self.exactness is not None and len(self.allowed_depths) == 1:
            return "Not drafting: no way was found to verify drafts bit for bit here."
        return self._decoder.policy.reason

    def chat(self, system: str | None = None, thinking: bool = False) -> Chat:
        """A new conversation. thinking: checkpoints that can think first, and their thoughts are not kept."""
        return Chat(self, system, thinking)

    def load_chat(self, file: str | Path) -> Chat:
        """A conversation that `Chat.save` wrote; CheckpointError where it is another model's or not whole."""
        return Chat.load(self, file)

    def generate(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Result:
        """The whole reply to a string, a list of messages or a list of token ids; options: RequestOptions."""
        *_, last = self.stream(prompt, **options)
        assert last.result is not None
        return last.result

    def stream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> Generator[Event, None, None]:
        """Events of a reply as they come; the last one carries the Result. Options: RequestOptions.

        Raises PromptError and OptionError before anything runs.
        """
        return self.run(self.request(prompt, **options))

    async def astream(self, prompt: Prompt, **options: Unpack[RequestOptions]) -> AsyncGenerator[Event, None]:
        """`stream` for asyncio: the event loop goes on while a round runs. Leaving early ends the reply.

        Raises PromptError and OptionError at the first event.
        """
        events = await asyncio.to_thread(self.stream, prompt, **options)
        try:
            while (event := await asyncio.to_thread(next, events, None)) is not None:
                yield event
        finally:
            await asyncio.to_thread(events.close)

    def __repr__(self) -> str:
        drafter = "no drafter" if self.drafter is None else self.drafter.name
        return f"<Engine of {self.target.path or 'a target'} with {drafter}, depth {self.depth}, mode {self.mode}>"

    def request(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int | None = None,
        logprobs: int = 0,
        raw: bool = False,
        thinking: bool = False,
        ignore_end: bool = False,
        logits_processors: Sequence[LogitsProcessor] = (),
        on_prefill: PrefillProgress | None = None,
        session: Session | None = None,
        tools: bool | Sequence[Mapping[str, Any]] = True,
        tool_choice: ToolChoice | str = "auto",
        prediction: str | Sequence[int] = (),
        json_schema: Mapping[str, Any] | type | None = None,
        grammar: str | None = None,
        regex: str | None = None,
        **fields: Unpack[SamplingFields],
    ) -> GenerationRequest:
        """Checks a prompt and its options, for `run`; PromptError or OptionError where something is wrong.

        Args:
            prompt: A string, a list of chat messages, or a list of token ids.
            max_tokens: The reply ends after so many; the other options are those of RequestOptions.
        """
        max_tokens = checks.whole("max_tokens", max_tokens, 1)
        logprobs = checks.whole("logprobs", logprobs, 0, min(MOST_LOGPROBS, self.target.info.vocab_size))
        seed = None if seed is None else checks.whole("seed", seed, 0, 2**64 - 1)
        stops = checks.stop_strings(stop)
        if stops and self.tokenizer is None:
            raise OptionError("stop strings need a tokenizer to compare with, and this checkpoint has none.")
        checks.instance("session", session, Session)
        flags = {"raw": raw, "ignore_end": ignore_end, "thinking": thinking}
        raw, ignore_end, thinking = (checks.flag(name, value) for name, value in flags.items())
        tools = checks.declarations("tools", tools)
        declared = [] if isinstance(tools, bool) else list(tools)
        ids = self._checked(prompt_ids(checks.prompt(prompt), self.tokenizer, raw, thinking, declared))
        if session is not None:
            session.check(self.pair)
        checked = GenerationRequest(
            ids=ids, budget=min(max_tokens, self.max_context - len(ids)),
            sampling=self._checked_sampling(sampling, fields),
            seed=secrets.randbits(63) if seed is None else seed, seeded=seed is not None, logprobs=logprobs,
            processors=checks.functions("logits_processors", logits_processors),
            on_prefill=checks.function("on_prefill", on_prefill), session=session, stop=stops,
            stop_tokens=frozenset() if ignore_end else self.stop_tokens,
            raw=raw, tools=tools, prediction=self._expected(prediction),
            grammar=self._grammar({"json_schema": json_schema, "grammar": grammar, "regex": regex}, declared,
                                  ToolChoice.of(tool_choice, declared)),
        )  # fmt: skip
        return self.after_thought(checked, thinking)

    def _grammar(
        self, given: Mapping[str, object], declared: Sequence[Mapping[str, Any]], choice: ToolChoice
    ) -> constraint.Grammar | None:
        """What the reply is held to, compiled; None where it is free."""
        wanted = constraint.wanted(given)
        held = choice.holds(declared)
        if wanted is None and not held:
            return None
        if self.tokenizer is None:
            what = wanted[0] if wanted else "tool_choice"
            raise OptionError(f"{what} needs a tokenizer, and this checkpoint has none; leave it out.")
        if declared and (held or (wanted and wanted[0] == "json_schema")):
            if wanted and wanted[0] != "json_schema":
                raise OptionError(f"{wanted[0]} and tool_choice are both given; a reply can be held to one of them.")
            calls = self.tokenizer.call_grammar()
            if calls is None:
                raise OptionError(
                    "This checkpoint writes calls of tools in a form that cannot be held to a grammar; leave out "
                    "tool_choice, strict, and json_schema beside tools."
                )
            wanted = "tools", calls.text(declared, choice, wanted[1] if wanted else None)
        assert wanted is not None
        vocabulary = self.target.info.vocab_size
        table = self.tokenizer.grammar_table(vocabulary, self.stop_tokens)
        return constraint.Grammar.of(table, vocabulary, self.stop_tokens, *wanted)

    def _expected(self, prediction: str | Sequence[int]) -> list[int]:
        """The tokens of a prediction."""
        if not isinstance(prediction, (str, Sequence)) or isinstance(prediction, bytes):
            raise OptionError(f"prediction must be a text or a list of token ids, not {checks.shown(prediction)}.")
        if not isinstance(prediction, str):
            most = self.target.info.vocab_size - 1
            ids = [checks.whole("Every token of prediction", token, 0, most) for token in prediction]
        elif self.tokenizer is None:
            raise OptionError("prediction must be token ids, as this checkpoint has no tokenizer.")
        else:
            ids = self.tokenizer.encode(prediction, special=False)
        if len(ids) > self.max_context:
            raise OptionError(
                f"prediction has {len(ids)} tokens, and no reply has more than {self.max_context}; shorten it."
            )
        return ids

    def prepare_grammars(self) -> None:
        """Makes what all grammars need of the tokenizer, which takes seconds with a large vocabulary; from any thread.

        The first request under a grammar does so otherwise. Nothing happens where there can be no grammar.
        """
        with contextlib.suppress(OptionError):
            if self.tokenizer is not None:
                self.tokenizer.grammar_table(self.target.info.vocab_size, self.stop_tokens)

    def after_thought(self, request: GenerationRequest, thinking: bool) -> GenerationRequest:
        """The same request, its grammar after the thought that the prompt's messages asked for or opened.

        For callers who make the ids of a prompt themselves. OptionError where such a thought has no tokens around it.
        """
        if request.grammar is None or self.tokenizer is None:
            return request
        return replace(request, thought=self.tokenizer.thought_tokens(request.ids, thinking))

    def run(self, request: GenerationRequest) -> Generator[Event, None, None]:
        """Events of the reply to a request of this engine's `request`."""
        return threads.each(self._events(request))

    def prompt_logprobs(
        self, ids: Sequence[int], most: int = 1, check: Callable[[], object] = lambda: None
    ) -> list[tuple[float, dict[int, float]]]:
        """Of every token of a prompt but the first: its logprob given those before it, and the `most` likeliest there.

        By a run of its own over the whole prompt, before any penalty. check: called after every pass; what it raises
        ends the work.
        """
        most = checks.whole("most", most, 1, min(MOST_LOGPROBS, self.target.info.vocab_size))
        return scoring.scores(self.target, self._checked(list(ids)), most, check)

    def _checked_sampling(self, sampling: Sampling | None, fields: SamplingFields) -> Sampling:
        checks.instance("sampling", sampling, Sampling)
        if sampling is not None and fields:
            raise OptionError(f"sampling and {next(iter(fields))} are both given; put all into one of the two.")
        resolved = (sampling or Sampling(**fields)).over(self.defaults)
        vocabulary, bias = self.target.info.vocab_size, resolved.logit_bias or {}
        if bias and max(bias) >= vocabulary:
            raise OptionError(f"logit_bias must be for token ids from 0 to {vocabulary - 1}, not {max(bias)}.")
        if len(bias) == vocabulary and set(bias.values()) == {-math.inf}:
            raise OptionError("logit_bias bans every token of the vocabulary, so none is left to choose; allow some.")
        return resolved

    def _checked(self, ids: list[int]) -> list[int]:
        vocabulary = self.target.info.vocab_size
        if wrong := [token for token in ids if not 0 <= token < vocabulary]:
            raise PromptError(
                f"Expected token ids from 0 to {vocabulary - 1}, found {wrong[0]}; use this model's own tokenizer."
            )
        if len(ids) >= self.max_context:
            raise PromptError(
                f"Expected a prompt shorter than the context of {self.max_context} tokens, found {len(ids)}; "
                "shorten it or raise --max-context."
            )
        return ids

    def _reply(self, request: GenerationRequest) -> Reply:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return Reply(None, (), None)
        if request.raw or not tokenizer.has_chat_template:
            return Reply(tokenizer.stream(), request.stop, None)
        declared = None if request.tools is True else request.tools
        calls = tokenizer.call_format(declared or None) if request.tools else None
        return Reply(tokenizer.stream(), request.stop, Channels(tokenizer.opened_thought(request.ids), calls))

    def _events(self, request: GenerationRequest) -> Generator[Event, None, None]:
        decoder, reply = self._decoder, self._reply(request)
        seeded = request.seeded and request.sampling.temperature
        policy = decoder.policy.for_seed(SEEDED_DEPTH) if seeded else decoder.policy
        stats = Stats(prompt_tokens=len(request.ids), mode=self.mode)
        mx.reset_peak_memory()
        rounds: list[tuple[int, int]] = []  # drafts of each round that was read, and how many of them were accepted
        began = time.perf_counter()
        try:
            with contextlib.closing(decoder.decode(request, stats, policy)) as chunks:
                for chunk in chunks:
                    stats.decode_seconds = time.perf_counter() - began - stats.prefill_seconds
                    if chunk.drafted is not None:
                        rounds.append((chunk.drafted, chunk.accepted))
                    reply.extend(chunk, request.stop_tokens)
                    if reply.has_news:
                        yield reply.event()
                    if reply.over:
                        break
            reply.finish()
        finally:
            if request.session is not None:  # the last token may have no row, unless a stop token came after it
                request.session.cut(len(request.ids) + max(0, reply.sure - (reply.stop_token is None)))
        stats.peak_memory_bytes = mx.get_peak_memory()
        stats.count(rounds, len(reply.tokens))
        policy.save()
        reason = "stop" if reply.over else "length"
        logprobs, top = (reply.logprobs, reply.top) if request.logprobs else (None, None)
        ends = reply.stop_token, reply.stops.found
        yield reply.event(Result(reply.text, reply.tokens, logprobs, reason, stats, top, *ends))


def _checked_depth(depth: int | str, drafter: Drafter | None) -> int | str:
    """Drafts per round or "auto"; without a drafter there is nothing but 0."""
    if isinstance(depth, str) and depth == "auto":
        return depth if drafter is not None else 0
    deepest = DEEPEST if drafter is None else min(DEEPEST, drafter.max_depth)
    if isinstance(depth, str):
        raise OptionError(f"depth must be 'auto' or a whole number from 0 to {deepest}, not {checks.shown(depth)}.")
    found = checks.whole("depth", depth, 0, deepest)
    if found and drafter is None:
        raise OptionError(f"depth {found} needs a drafter, and there is none; name one, or leave the depth out.")
    return found
