"""The engine: what a request may ask, how it ends, and the events, text and statistics it returns.

What it does: checks requests, turns runs of tokens into events, finds ends. What it does not do: text and stop strings
(reply.py), the loop (decode.py), rounds (speculate.py), loading (loading.py).

Invariant: everything a request changes belongs to that request, so stopping early, cancelling or an exception in the
consumer leave the engine as it was.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import time
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.backend import threads
from mlx_mtp.chat.conversation import Chat
from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.generation import checks, exactness
from mlx_mtp.generation.cache import CAPACITY_STEP
from mlx_mtp.generation.depth import DepthController, DepthPolicy, FixedDepth
from mlx_mtp.generation.depth_profile import ProfileFile
from mlx_mtp.generation.interfaces import Drafter, Target
from mlx_mtp.generation.loop import Decoder, GenerationRequest, PrefillProgress
from mlx_mtp.generation.prefix import Pair, Session
from mlx_mtp.generation.reply import Reply
from mlx_mtp.generation.round import LogitsProcessor
from mlx_mtp.generation.types import NEUTRAL, Event, Result, Sampling, Stats
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

    depth: drafts per round, "auto" or 0..8. mode: "fast" or "exact". max_context: most tokens of prompt and reply
    together. defaults: sampling where a request leaves it open. profile: file and key under which what the depth
    control learns is kept.
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
        profile: tuple[Path, str] | None = None,
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
        self.exactness = exactness.Probes(target) if mode == "exact" else None
        self._decoder = self._make_decoder(profile)

    @property
    def allowed_depths(self) -> list[int]:
        """Drafts a round that drafter and mode allow, 0 always among them; what depth "auto" chooses from."""
        deepest = min(DEEPEST, self.drafter.max_depth) if self.drafter else 0
        exact = self.exactness.at(CAPACITY_STEP) if self.exactness and deepest else None
        return [d for d in range(deepest + 1) if exact is None or d in exact.depths]

    def _make_decoder(self, profile: tuple[Path, str] | None) -> Decoder:
        drafter, exact, allowed = self.drafter, self.exactness, self.allowed_depths
        if exact is not None and drafter and len(allowed) == 1:
            log.warning("Exact mode: no way was found to verify drafts bit for bit here; decoding plainly.")
        if self.depth != "auto":
            deepest = max(depth for depth in allowed if depth <= int(self.depth))
            if deepest < int(self.depth):
                log.warning("Exact mode: %d drafts a round in place of %s.", deepest, self.depth)
            return Decoder(self.target, drafter, FixedDepth(deepest), exact)
        if len(allowed) == 1:
            return Decoder(self.target, drafter, FixedDepth(0), exact)
        kept = ProfileFile(*profile) if profile else None
        return Decoder(self.target, drafter, DepthController(allowed, kept), exact)

    @property
    def pair(self) -> Pair:
        """Whose K/V a session of this engine holds."""
        return self._decoder.pair

    def generate(self, prompt: Prompt, **options: Any) -> Result:
        """The whole reply to a string, a list of messages or a list of token ids; options as for `stream`."""
        *_, last = self.stream(prompt, **options)
        assert last.result is not None
        return last.result

    def chat(self, system: str | None = None, thinking: bool = False) -> Chat:
        """A new conversation. thinking: checkpoints that can think first, and their thoughts are not kept."""
        return Chat(self, system, thinking)

    def load_chat(self, file: str | Path) -> Chat:
        """A conversation that `Chat.save` wrote; CheckpointError where it is another model's or not whole."""
        return Chat.load(self, file)

    @property
    def plain_seconds_per_token(self) -> float | None:
        """Seconds a token is expected to take without any drafts; None where the depth is fixed or no round was timed.

        An estimate of the depth control, which follows the machine, never a measurement.
        """
        policy = self._decoder.policy
        return policy.costs.plain_seconds if isinstance(policy, DepthController) else None

    @property
    def depth_reason(self) -> str:
        """One sentence: how many tokens are drafted a round without a seed, and why."""
        if self.drafter is None:
            return "Not drafting: no drafter is loaded."
        if self.exactness is not None and len(self.allowed_depths) == 1:
            return "Not drafting: no way was found to verify drafts bit for bit here."
        return self._decoder.policy.reason

    def stream(
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
        tools: bool = True,
    ) -> Generator[Event, None, None]:
        """Events of a reply as they come; the last one carries the Result.

        stop: strings that end the reply where they turn up in its answer, never in a thought or a call of a tool; the
        text ends in front of the first, the tokens with the one that completes it. Of two that the same character
        completes the longer counts. seed: the same seed gives the same reply; without one every reply is another
        (temperature 0 needs none). logprobs: 0 = none, n = that of every token and of the n likeliest of its place.
        raw: continue the prompt as it stands, without the chat template, and take all that comes for answer. thinking:
        asks a checkpoint that can to think first (part of the text then); off as in a chat.
        ignore_end: go on past ending tokens (for timing). logits_processors: Python functions in mlx-lm's convention,
        (tokens so far [T], logits [1, V]) -> logits [1, V]; they run on every row, and rounds are then read one by one.
        on_prefill(done, total) is called after every chunk.
        session: keeps the K/V of this prompt and reply; what the next prompt has in common with them is not run again.
        tools: whether calls of tools are told apart from the answer.
        Raises PromptError and OptionError before anything runs.
        """
        max_tokens = checks.whole("max_tokens", max_tokens, 1)
        logprobs = checks.whole("logprobs", logprobs, 0, min(MOST_LOGPROBS, self.target.info.vocab_size))
        seed = None if seed is None else checks.whole("seed", seed, 0, 2**64 - 1)
        stops = checks.stop_strings(stop)
        if stops and self.tokenizer is None:
            raise OptionError("stop strings need a tokenizer to compare with, and this checkpoint has none.")
        checks.instance("session", session, Session)
        flags = {"raw": raw, "ignore_end": ignore_end, "thinking": thinking, "tools": tools}
        raw, ignore_end, thinking, tools = (checks.flag(name, value) for name, value in flags.items())
        ids = self._checked(prompt_ids(checks.prompt(prompt), self.tokenizer, raw, thinking))
        if session is not None:
            session.check(self.pair)
        request = GenerationRequest(
            ids=ids,
            budget=min(max_tokens, self.max_context - len(ids)),
            sampling=self._checked_sampling(sampling),
            seed=secrets.randbits(63) if seed is None else seed,
            logprobs=logprobs,
            processors=checks.functions("logits_processors", logits_processors),
            on_prefill=checks.function("on_prefill", on_prefill),
            session=session,
        )
        policy = self._decoder.policy
        if seed is not None and request.sampling.temperature and isinstance(policy, DepthController):
            policy = FixedDepth(max(depth for depth in policy.allowed if depth <= SEEDED_DEPTH))
        reply = self._reply_to(ids, stops, raw, tools)
        return threads.each(self._events(request, policy, reply, frozenset() if ignore_end else self.stop_tokens))

    def _reply_to(self, ids: list[int], stop: list[str], raw: bool, tools: bool) -> Reply:
        tokenizer = self.tokenizer
        if tokenizer is None:
            return Reply(None, (), None)
        channels = None if raw or not tokenizer.has_chat_template else Channels(tokenizer.opened_thought(ids), tools)
        return Reply(tokenizer.stream(), stop, channels)

    def _checked_sampling(self, sampling: Sampling | None) -> Sampling:
        checks.instance("sampling", sampling, Sampling)
        resolved = (sampling or Sampling()).over(self.defaults)
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

    def _events(
        self, request: GenerationRequest, policy: DepthPolicy, reply: Reply, stop_tokens: Collection[int]
    ) -> Generator[Event, None, None]:
        stats = Stats(prompt_tokens=len(request.ids), mode=self.mode)
        mx.reset_peak_memory()
        rounds: list[tuple[int, int]] = []  # drafts of each round that was read, and how many of them were accepted
        began = time.perf_counter()
        try:
            with contextlib.closing(self._decoder.decode(request, stats, policy)) as chunks:
                for chunk in chunks:
                    stats.decode_seconds = time.perf_counter() - began - stats.prefill_seconds
                    if chunk.drafted is not None:
                        rounds.append((chunk.drafted, chunk.accepted))
                    reply.extend(chunk, stop_tokens)
                    if reply.has_news:
                        yield reply.event()
                    if reply.over:
                        break
            reply.finish()
        finally:
            if request.session is not None:  # the last token may have no row, unless a stop token came after it
                request.session.cut(len(request.ids) + max(0, len(reply.tokens) - (reply.stop_token is None)))
        stats.peak_memory_bytes = mx.get_peak_memory()
        stats.count(rounds, len(reply.tokens))
        if isinstance(policy, DepthController):
            policy.save()
        reason = "stop" if reply.over else "length"
        logprobs, top = (reply.logprobs, reply.top) if request.logprobs else (None, None)
        yield reply.event(Result(reply.text, reply.tokens, logprobs, reason, stats, top, reply.stop_token))


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
