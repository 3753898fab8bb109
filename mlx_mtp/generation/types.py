"""What a generation is asked for and what it returns: Sampling, Stats, Result, Event."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any

from mlx_mtp.errors import OptionError
from mlx_mtp.generation import checks
from mlx_mtp.text.channels import ToolCall


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. None = the checkpoint's own default (generation_config.json), else greedy and all off.

    Raises OptionError for a value out of range.

    Attributes:
        temperature: 0 = greedy.
        top_k: 0 = off.
        top_p: 1 = off.
        min_p: 0 = off.
        repetition_penalty: 1 = off; counts the prompt too.
        presence_penalty: 0 = off; counts what was generated.
        frequency_penalty: 0 = off; counts what was generated.
        logit_bias: Token id -> what is added to its logit; -inf bans it.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None:
                value = checks.whole(name, value, 0) if name == "top_k" else checks.number(name, value, low, high)
                object.__setattr__(self, name, value)
        if self.top_p == 0:
            raise OptionError("top_p must be above 0; 1 switches it off, and temperature 0 takes the best token.")
        if self.logit_bias is not None:
            object.__setattr__(self, "logit_bias", checks.bias(self.logit_bias))

    def over(self, defaults: Sampling) -> Sampling:
        """This, with `defaults` where it has None."""
        return replace(defaults, **{name: value for name, value in vars(self).items() if value is not None})


# A repetition penalty far from 1 takes logits out of float32's range.
RANGES = {
    "temperature": (0.0, 100.0), "top_k": (0, checks.LARGEST), "top_p": (0.0, 1.0), "min_p": (0.0, 1.0),
    "repetition_penalty": (0.01, 100.0), "presence_penalty": (-100.0, 100.0), "frequency_penalty": (-100.0, 100.0),
}  # fmt: skip
NEUTRAL = Sampling(
    temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
    frequency_penalty=0.0, logit_bias={},
)  # fmt: skip


@dataclass
class Stats:
    """Counts and times of one generation. Rates are per second, memory in bytes.

    At each position accepted <= verified <= drafted. Every round gives its accepted drafts and, unless it was cut, one
    token of the target: tokens <= 1 + accepted + rounds.

    Attributes:
        prompt_tokens: Tokens of the prompt.
        prefilled_tokens: Those of them that were run; in a conversation the rest is there already.
        tokens: Tokens of the reply.
        rounds: Forward passes of the target after prefill, a surplus one that a stop made useless included.
        drafted: Drafts of the rounds that were read.
        accepted: Those of them that are in the reply; what a stop or the budget cut off was not accepted.
        drafted_by_position: `drafted` for the first draft of a round, the second, ...
        verified_by_position: Drafts in whose place the reply has a token, the draft itself or the target's; accepted
            over verified is conditional acceptance.
        accepted_by_position: `accepted`, by position.
        depth_counts: Drafts a round -> how many rounds had so many.
        prefill_seconds: From the start until the first token is there.
        decode_seconds: From the first token to the last.
        host_syncs: Blocking reads of device values after prefill, counted where they happen.
        head_passes: Passes through the target's output head.
        peak_memory_bytes: The most that MLX held at once.
        mode: "fast" or "exact".
    """

    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
    verified_by_position: list[int] = field(default_factory=list)
    accepted_by_position: list[int] = field(default_factory=list)
    depth_counts: dict[int, int] = field(default_factory=dict)
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    host_syncs: int = 0
    head_passes: int = 0
    peak_memory_bytes: int = 0
    mode: str = "fast"

    @property
    def tokens_per_round(self) -> float:
        """Tokens emitted per target forward after prefill; the first token is the prefill's."""
        return (self.tokens - 1) / self.rounds if self.rounds and self.tokens > 1 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """(N - 1) / (t_N - t_1)."""
        return (self.tokens - 1) / self.decode_seconds if self.decode_seconds and self.tokens > 1 else 0.0

    def submitted(self, depth: int) -> None:
        """Records that a round of `depth` drafts was started."""
        self.rounds += 1
        self.head_passes += 1
        self.depth_counts[depth] = self.depth_counts.get(depth, 0) + 1

    def count(self, rounds: Iterable[tuple[int, int]], tokens: int) -> None:
        """Records a reply of so many tokens; rounds: drafted and accepted of each, in order, before any cut."""
        self.tokens, left = tokens, max(0, tokens - 1)  # the first token is the prefill's
        for drafted, accepted in rounds:
            kept = min(accepted + 1, left)
            left -= kept
            verified, accepted = min(drafted, kept), min(accepted, kept)
            for counts, upto in (
                (self.drafted_by_position, drafted), (self.verified_by_position, verified),
                (self.accepted_by_position, accepted),
            ):  # fmt: skip
                counts.extend([0] * (drafted - len(counts)))
                for position in range(upto):
                    counts[position] += 1
            self.drafted += drafted
            self.accepted += accepted

    def as_dict(self) -> dict[str, Any]:
        """Every figure under its public name, ready for JSON."""
        derived = "tokens_per_round", "decode_tokens_per_second"
        return asdict(self) | {name: getattr(self, name) for name in derived}


def acceptance(stats: Iterable[Stats]) -> list[float]:
    """Share of the drafts at each position that were accepted once those before them were, of all of these."""
    verified, accepted = total(stats, "verified_by_position", "accepted_by_position")
    return [count / offered for count, offered in zip(accepted, verified, strict=True) if offered]


def total(stats: Iterable[Stats], *names: str) -> list[list[int]]:
    """Counts by position, added up."""
    found = list(stats)
    return [[sum(column) for column in zip_longest(*(getattr(one, name) for one in found), fillvalue=0)]
            for name in names]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A finished generation; `str(result)` is its text.

    Attributes:
        text: What was written, up to a stop string.
        tokens: Its ids, without the prompt and without the stop token.
        logprobs: One a token, the natural logarithm under the target's distribution after penalties and bias, before
            temperature and filters; None unless asked for.
        finish_reason: "stop" or "length".
        stats: Counts and times.
        top_logprobs: The likeliest tokens of each place, {token id: logprob}.
        stop_token: The one that ended the reply, or None.
        stop_string: The same; both are None where the length ended it.
    """

    text: str
    tokens: list[int]
    logprobs: list[float] | None
    finish_reason: str
    stats: Stats
    top_logprobs: list[dict[int, float]] | None = None
    stop_token: int | None = None
    stop_string: str | None = None

    def __str__(self) -> str:
        return self.text

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of `mlx-mtp generate --json`; top_logprobs only where logprobs were asked for."""
        found = {
            "text": self.text, "tokens": self.tokens, "logprobs": self.logprobs, "finish_reason": self.finish_reason,
            "stats": self.stats.as_dict(),
        }  # fmt: skip
        return found if self.top_logprobs is None else found | {"top_logprobs": self.top_logprobs}


@dataclass(frozen=True)
class Event:
    """A piece of a running generation: the new text and tokens. With `raw` and without a chat template all is answer.

    Attributes:
        text: As the model wrote it; in a chat, the answer alone.
        tokens: Its ids.
        result: On the last event only.
        logprobs: Of these tokens, where they were asked for.
        top_logprobs: The likeliest tokens of each place, where they were asked for.
        thinking: What of the text is thought.
        content: What of it is answer.
        calls: Calls of tools that are finished with it.
    """

    text: str
    tokens: list[int]
    result: Result | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[dict[int, float]] | None = None
    thinking: str = ""
    content: str = ""
    calls: list[ToolCall] = field(default_factory=list)
