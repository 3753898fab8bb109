"""What a generation is asked for and what it returns: Sampling, Stats, Result, Event."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from mlx_mtp.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen. temperature 0 = greedy, the only value this version implements."""

    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.temperature != 0.0:
            raise OptionError(
                f"Expected temperature 0 (greedy), found {self.temperature}; sampling is not implemented yet."
            )


@dataclass
class Stats:
    """Counts and times of one generation. Rates are per second, memory in bytes.

    rounds: target forwards after prefill, a surplus one that a stop made useless included.
    accepted: drafts that stood, before the token that the target adds to each round.
    host_syncs: blocking reads of device values after prefill, counted where they happen.
    prefill_seconds ends when the first token is there; decode_seconds runs from there to the last.
    """

    prompt_tokens: int = 0
    tokens: int = 0
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    drafted_by_position: list[int] = field(default_factory=list)
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

    def count(self, depth: int, accepted: int) -> None:
        """Books one round whose outcome was read."""
        for counts, upto in ((self.drafted_by_position, depth), (self.accepted_by_position, accepted)):
            counts.extend([0] * (depth - len(counts)))
            for position in range(upto):
                counts[position] += 1
        self.drafted += depth
        self.accepted += accepted

    def as_dict(self) -> dict[str, Any]:
        """Every figure under its public name, ready for JSON."""
        derived = {
            "tokens_per_round": self.tokens_per_round,
            "decode_tokens_per_second": self.decode_tokens_per_second,
        }
        return asdict(self) | derived


@dataclass(frozen=True)
class Result:
    """A finished generation. tokens: generated ids, without prompt and without the ending token."""

    text: str
    tokens: list[int]
    logprobs: list[float] | None
    finish_reason: str
    stats: Stats

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of `mlx-mtp generate --json`."""
        return {
            "text": self.text,
            "tokens": self.tokens,
            "logprobs": self.logprobs,
            "finish_reason": self.finish_reason,
            "stats": self.stats.as_dict(),
        }


@dataclass(frozen=True)
class Event:
    """A piece of a running generation: the new text and tokens; `result` only on the last one."""

    text: str
    tokens: list[int]
    result: Result | None = None
