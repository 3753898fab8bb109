"""The engine: what a request may ask, how it ends, and the events, text and statistics it returns.

What it does: checks requests, turns runs of tokens into events, finds ends and stop strings. What it does not do:
the loop (decode.py), rounds (speculate.py), loading (loading.py).

Invariant: everything a request changes belongs to that request, so stopping early, cancelling or an exception in the
consumer leave the engine as it was.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Collection, Generator, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp import exactness
from mlx_mtp.chat import Chat
from mlx_mtp.chat_file import load_chat
from mlx_mtp.decode import Asked, Decoder, PrefillProgress
from mlx_mtp.depth import DepthController, DepthPolicy, FixedDepth
from mlx_mtp.depth_profile import ProfileFile
from mlx_mtp.errors import OptionError, PromptError
from mlx_mtp.interfaces import Drafter, Target
from mlx_mtp.results import NEUTRAL, Event, Result, Sampling, Stats
from mlx_mtp.session import Session
from mlx_mtp.speculate import LogitsProcessor
from mlx_mtp.tokens import Prompt, StopStrings, Tokenizer, prompt_ids

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
        end_tokens: Collection[int] = (),
        depth: int | str = "auto",
        mode: str = "fast",
        max_context: int | None = None,
        defaults: Sampling = NEUTRAL,
        profile: tuple[Path, str] | None = None,
    ) -> None:
        if mode not in MODES:
            raise OptionError(f"Expected mode 'fast' or 'exact', found {mode!r}.")
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.end_tokens = frozenset(end_tokens)
        self.mode = mode
        self.defaults = defaults.over(NEUTRAL)
        self.depth: int | str = _checked_depth(depth, drafter)
        limit = target.info.max_context
        if max_context is not None and not 2 <= max_context <= limit:
            raise OptionError(f"Expected max_context from 2 to {limit} (this model's limit), found {max_context}.")
        self.max_context = max_context or limit
        if drafter is not None:
            drafter.attach(target)
        self.exactness = exactness.probe(target) if mode == "exact" else None
        self._decoder = self._make_decoder(profile)

    @property
    def allowed_depths(self) -> list[int]:
        """Drafts a round that drafter and mode allow, 0 always among them; what depth "auto" chooses from."""
        deepest = min(DEEPEST, self.drafter.max_depth) if self.drafter else 0
        return [d for d in range(deepest + 1) if self.exactness is None or d in self.exactness.depths]

    def _make_decoder(self, profile: tuple[Path, str] | None) -> Decoder:
        drafter, exact, allowed = self.drafter, self.exactness, self.allowed_depths
        if exact is not None and drafter and not exact.possible:
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
        return load_chat(self, Path(file))

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
        if self.exactness is not None and not self.exactness.possible:
            return "Not drafting: no way was found to verify drafts bit for bit here."
        return self._decoder.policy.reason

    def stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        seed: int | None = None,
        logprobs: int = 0,
        raw: bool = False,
        ignore_end: bool = False,
        logits_processors: Sequence[LogitsProcessor] = (),
        on_prefill: PrefillProgress | None = None,
        session: Session | None = None,
    ) -> Generator[Event, None, None]:
        """Events of a reply as they come; the last one carries the Result.

        seed: the same seed gives the same reply; without one every reply is another (temperature 0 needs none).
        logprobs: 0 = none, n = that of every token and of the n likeliest of its place. raw: continue a string as it
        stands, without the chat template. ignore_end: go on past ending tokens (for timing). logits_processors:
        Python functions in mlx-lm's convention, (tokens so far [T], logits [1, V]) -> logits [1, V]; they run on
        every row, and rounds are then read one by one. on_prefill(done, total) is called after every chunk.
        session: keeps the K/V of this prompt and reply; what the next prompt has in common with them is not run again.
        Raises PromptError and OptionError before anything runs.
        """
        if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
            raise OptionError(f"Expected max_tokens of at least 1, found {max_tokens}.")
        most = min(MOST_LOGPROBS, self.target.info.vocab_size)
        if not 0 <= logprobs <= most:
            raise OptionError(f"Expected logprobs from 0 to {most}, found {logprobs}.")
        if seed is not None and not 0 <= seed < 2**64:
            raise OptionError(f"Expected a seed from 0 to 2^64 - 1, found {seed}.")
        stop = [stop] if isinstance(stop, str) else list(stop)
        if any(stop) and self.tokenizer is None:
            raise OptionError("Expected no stop strings, found some; this checkpoint has no tokenizer to compare with.")
        ids = self._checked(prompt_ids(prompt, self.tokenizer, raw))
        asked = Asked(
            ids=ids,
            budget=min(max_tokens, self.max_context - len(ids)),
            sampling=self._checked_sampling(sampling),
            seed=secrets.randbits(63) if seed is None else seed,
            logprobs=logprobs,
            processors=tuple(logits_processors),
            on_prefill=on_prefill,
            session=session,
        )
        policy = self._decoder.policy
        if seed is not None and asked.sampling.temperature and isinstance(policy, DepthController):
            policy = FixedDepth(max(depth for depth in policy.allowed if depth <= SEEDED_DEPTH))
        return self._events(asked, policy, stop, frozenset() if ignore_end else self.end_tokens)

    def _checked_sampling(self, sampling: Sampling | None) -> Sampling:
        resolved = (sampling or Sampling()).over(self.defaults)
        vocabulary = self.target.info.vocab_size
        if wrong := [token for token in resolved.logit_bias or {} if not 0 <= token < vocabulary]:
            raise OptionError(f"Expected logit_bias for token ids from 0 to {vocabulary - 1}, found {wrong[0]}.")
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
        self, asked: Asked, policy: DepthPolicy, stop: list[str], ends: Collection[int]
    ) -> Generator[Event, None, None]:
        stats = Stats(prompt_tokens=len(asked.ids), mode=self.mode)
        mx.reset_peak_memory()
        text, stops = [], StopStrings(stop)
        detokenizer = self.tokenizer.stream() if self.tokenizer else None
        tokens: list[int] = []
        logprobs: list[float] = []
        top: list[dict[int, float]] = []
        finish, began = "length", time.perf_counter()
        with contextlib.closing(self._decoder.decode(asked, stats, policy)) as runs:
            for run in runs:
                stats.decode_seconds = time.perf_counter() - began - stats.prefill_seconds
                end = next((i for i, token in enumerate(run.tokens) if token in ends), None)
                fresh, fresh_logprobs, fresh_top = run.tokens[:end], (run.logprobs or [])[:end], (run.top or [])[:end]
                tokens, logprobs, top = tokens + fresh, logprobs + fresh_logprobs, top + fresh_top
                stats.tokens = len(tokens)
                shown = ""
                if detokenizer:
                    for token in fresh:
                        detokenizer.add_token(token)
                    shown = stops.feed(detokenizer.last_segment)
                text.append(shown)
                if fresh or shown:
                    yield Event(shown, fresh, None, fresh_logprobs or None, fresh_top or None)
                if end is not None or stops.hit:
                    finish = "stop"
                    break
        last = ""
        if detokenizer:
            detokenizer.finalize()
            last = stops.feed(detokenizer.last_segment) + stops.flush()
            text.append(last)
        stats.peak_memory_bytes = mx.get_peak_memory()
        if isinstance(policy, DepthController):
            policy.save()
        wanted = asked.logprobs > 0
        result = Result("".join(text), tokens, logprobs if wanted else None, finish, stats, top if wanted else None)
        yield Event(last, [], result)


def _checked_depth(depth: int | str, drafter: Drafter | None) -> int | str:
    """Drafts per round or "auto"; without a drafter 0."""
    deepest = DEEPEST if drafter is None else drafter.max_depth
    if depth != "auto" and (isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth <= deepest):
        raise OptionError(f"Expected depth 'auto' or 0 to {deepest}, found {depth!r}.")
    return 0 if drafter is None else depth
