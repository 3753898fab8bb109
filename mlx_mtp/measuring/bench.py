"""The bench itself: every prompt, under every sampling, through every configuration; and what was measured so far.

For each prompt: acceptance is counted on a reply that ends where it ends, untimed; then the configurations are timed in
fair turns, a fixed number of tokens each. What was recorded stays recorded, whenever the run is interrupted.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

from mlx_mtp.errors import PromptError
from mlx_mtp.generation.types import Stats
from mlx_mtp.measuring import machine
from mlx_mtp.measuring.configurations import Lineup, sampling_name
from mlx_mtp.measuring.engines import Decode, DecodeJob, TimedRun
from mlx_mtp.measuring.machine import EnergyMeter
from mlx_mtp.measuring.prompts import BenchPrompt
from mlx_mtp.measuring.turns import fair_turns

BETWEEN_SAMPLINGS = 1_000_003  # seeds
IDLE_SECONDS = 2.0
TRIED_TOKENS = 8  # of the reply that tells how long all will take


@dataclass
class Measured:
    """One prompt under one sampling, by configuration: replies that ended by themselves, and runs in their turns."""

    prompt: BenchPrompt
    job: DecodeJob
    replies: dict[str, Stats] = field(default_factory=dict)
    runs: dict[str, list[TimedRun]] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        """Turns that every configuration finished."""
        return min(map(len, self.runs.values()), default=0)


class Bench:
    """A planned run. results: by sampling's name, what was measured so far. machine: as it was before."""

    def __init__(self, lineup: Lineup, prompts: Sequence[BenchPrompt], meter: EnergyMeter | None) -> None:
        self.lineup, self.plan, self.meter = lineup, lineup.plan, meter
        self.results: dict[str, list[Measured]] = {}
        self.notes = list(lineup.notes)
        self.idle_watts: float | None = None
        self.started = time.time()
        self.machine: dict[str, Any] = machine.describe() | {
            "power_source": machine.power_source(), "python": platform.python_version(), "load_average": lineup.load,
        }  # fmt: skip
        engine = lineup.engine
        self.prompts = [prompt for prompt in prompts if prompt.fits(engine.tokenizer)]
        if not self.prompts:
            raise PromptError("This checkpoint has no chat template, and all prompts are chats; name others.")
        if left := len(prompts) - len(self.prompts):
            self.notes.append(f"Without a chat template {left} of {len(prompts)} prompts are left out.")
        # All of them before the first run, so that a prompt that cannot be asked costs no time.
        self._ids = [prompt.ids(engine.tokenizer) for prompt in self.prompts]
        most = engine.max_context - max(self.plan.max_tokens, self.plan.tokens_for_acceptance)
        for prompt, ids in zip(self.prompts, self._ids, strict=True):
            if len(ids) > most:
                raise PromptError(
                    f"{prompt.where}: the prompt has {len(ids)} tokens, and the context has room for at most {most} "
                    "tokens beside the reply; leave it out or raise --max-context."
                )

    @property
    def steps(self) -> int:
        """Things to do in all, about equally long."""
        each = self.lineup.configurations.values()
        count = sum(one.drafter is not None for one in each) + len(each) * self.plan.repeats
        return count * len(self.prompts) * len(self.lineup.samplings())

    def expected_seconds(self) -> float:
        """About how long `run` will take, by a short reply of the first configuration to a prompt of middle length."""
        plan, each = self.plan, list(self.lineup.configurations.values())
        ids = sorted(self._ids, key=len)[len(self._ids) // 2]
        each[0].decode(DecodeJob(ids, TRIED_TOKENS))  # compiles
        tried = each[0].decode(DecodeJob(ids, TRIED_TOKENS))
        # Of a prompt: replies for acceptance, and timed ones with those that warm the others up.
        replies = sum(one.drafter is not None for one in each)
        timed = len(each) * (plan.repeats + 1) - replies
        read = (replies + timed) * sum(map(len, self._ids)) * tried.first_seconds / len(ids)
        written = (replies * plan.tokens_for_acceptance + timed * plan.max_tokens) * tried.seconds_per_token
        rests = plan.repeats * plan.cool_down
        return len(self.lineup.samplings()) * (read + len(self._ids) * (written + rests))

    def run(self) -> Iterator[None]:
        """Measures everything; yields after every step."""
        if self.meter:
            _, joules = self.meter.of(lambda: time.sleep(IDLE_SECONDS))
            self.idle_watts = None if joules is None else joules / IDLE_SECONDS
        for at, sampling in enumerate(self.lineup.samplings()):
            done = self.results.setdefault(sampling_name(sampling), [])
            for i, (prompt, ids) in enumerate(zip(self.prompts, self._ids, strict=True)):
                seed = self.plan.seed + at * BETWEEN_SAMPLINGS + i
                done.append(Measured(prompt, DecodeJob(ids, self.plan.max_tokens, sampling, seed)))
                yield from self._measure(done[-1])

    def _measure(self, measured: Measured) -> Iterator[None]:
        job, configurations = measured.job, self.lineup.configurations
        for name, one in configurations.items():
            if one.engine is not None and one.drafter is not None:
                measured.replies[name] = one.engine.generate(
                    job.prompt, max_tokens=self.plan.tokens_for_acceptance, sampling=job.sampling,
                    seed=None if one.depth == "auto" else job.seed,  # a seed would fix the depth
                ).stats  # fmt: skip
                yield
        measured.runs = {name: [] for name in configurations}
        for name, one in configurations.items():
            if name not in measured.replies:  # those are warm
                self._timed(one.decode, job)
        for turn, name in fair_turns(configurations, self.plan.repeats, self.plan.cool_down):
            measured.runs[name].append(self._timed(configurations[name].decode, job.of_turn(turn)))
            yield

    def _timed(self, decode: Decode, job: DecodeJob) -> TimedRun:
        """A run with what it takes of memory and, where a meter is there, of energy."""
        held = mx.get_active_memory()
        run, joules = self.meter.of(lambda: decode(job)) if self.meter else (decode(job), None)
        return replace(run, joules=joules, held_bytes=held)
