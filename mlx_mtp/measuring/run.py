"""The bench itself: every prompt, under every sampling, through every arm; and whatever was measured so far.

For each prompt: acceptance is counted on a reply that ends where it ends, untimed; then the arms are timed in turns
A B B A, a fixed number of tokens each, endings ignored. What was recorded stays recorded, whenever the run is
interrupted; report.py makes figures of it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_mtp.engine import Engine
from mlx_mtp.errors import PromptError
from mlx_mtp.generation.types import Sampling, Stats
from mlx_mtp.measuring.arms import BenchArm, Lineup, Plan, sampling_name
from mlx_mtp.measuring.energy import EnergyMeter
from mlx_mtp.measuring.prompts import BenchPrompt
from mlx_mtp.measuring.turns import Arm, Job, Timing, take_turns

log = logging.getLogger(__name__)

BETWEEN_SAMPLINGS = 1_000_003  # seeds


@dataclass
class Measured:
    """One prompt under one sampling.

    replies: statistics of replies that ended by themselves, by arm. timings: by arm, in the order of the turns.
    """

    prompt: BenchPrompt
    job: Job
    replies: dict[str, Stats] = field(default_factory=dict)
    timings: dict[str, list[Timing]] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        """Turns that every arm finished."""
        return min((len(runs) for runs in self.timings.values()), default=0)


@dataclass
class Bench:
    """A planned run. results: by sampling's name, what was measured so far."""

    plan: Plan
    lineup: Lineup
    prompts: Sequence[BenchPrompt]
    meter: EnergyMeter | None = None
    results: dict[str, list[Measured]] = field(default_factory=dict)
    idle_watts: float | None = None

    def __post_init__(self) -> None:
        engine = self.lineup.engine
        room = max(self.plan.max_tokens, self.plan.tokens_for_acceptance)
        asked = [prompt for prompt in self.prompts if prompt.fits(engine.tokenizer)]
        if not asked:
            raise PromptError("Expected prompts that this checkpoint takes, found messages only and no chat template.")
        if len(asked) < len(self.prompts):
            count = len(self.prompts) - len(asked)
            self.lineup.left_out.append(f"Without a chat template {count} of {len(self.prompts)} prompts are left out.")
        self.prompts = asked
        # All of them before the first run, so that a prompt that cannot be asked costs no time.
        self._ids = [prompt.ids(engine.tokenizer) for prompt in self.prompts]
        for prompt, ids in zip(self.prompts, self._ids, strict=True):
            if len(ids) + room > engine.max_context:
                raise PromptError(
                    f"{prompt.where}: expected a prompt of at most {engine.max_context - room} tokens beside {room} "
                    f"new ones, found {len(ids)}; leave it out or raise --max-context."
                )
        self._samplings = self.lineup.samplings(self.plan)

    @property
    def steps(self) -> int:
        """Things to do in all, about equally long."""
        arms = self.lineup.arms.values()
        each = sum(arm.drafter is not None for arm in arms) + len(arms) * self.plan.repeats
        return each * len(self.prompts) * len(self._samplings)

    def run(self) -> Iterator[str]:
        """Measures everything; yields after every step what it was."""
        if self.meter:
            self.idle_watts = _idle_watts(self.meter)
        for measured, what in self._each():
            yield from self._replies(measured, what)
            yield from self._turns(measured, what)

    def _each(self) -> Iterator[tuple[Measured, str]]:
        for at, sampling in enumerate(self._samplings):
            name = sampling_name(sampling)
            done = self.results.setdefault(name, [])
            for i, (prompt, ids) in enumerate(zip(self.prompts, self._ids, strict=True)):
                seed = self.plan.seed + at * BETWEEN_SAMPLINGS + i
                done.append(Measured(prompt, Job(ids, self.plan.max_tokens, sampling, seed)))
                yield done[-1], f"{prompt.category}, {name}"

    def _replies(self, measured: Measured, what: str) -> Iterator[str]:
        for arm in self.lineup.arms.values():
            if arm.engine is not None and arm.drafter is not None:
                measured.replies[arm.name] = _reply(arm.engine, measured.job, self.plan.tokens_for_acceptance)
                yield what

    def _turns(self, measured: Measured, what: str) -> Iterator[str]:
        arms = {name: self._watched(arm) for name, arm in self.lineup.arms.items()}
        measured.timings = {name: [] for name in arms}
        for name, arm in arms.items():
            if name not in measured.replies:  # those are warm
                arm(measured.job)
        pause = partial(time.sleep, self.plan.cool_down)
        for name, timing in take_turns(arms, measured.job, self.plan.repeats, warm=False, pause=pause):
            measured.timings[name].append(timing)
            yield what

    def _watched(self, arm: BenchArm) -> Arm:
        """The arm with what it takes of memory and, where a meter is there, of energy."""
        meter = self.meter

        def run(job: Job) -> Timing:
            held = mx.get_active_memory()
            timing, joules = meter.of(lambda: arm.run(job)) if meter else (arm.run(job), None)
            return replace(timing, joules=joules, held_bytes=held)

        return run


def _reply(engine: Engine, job: Job, tokens: int) -> Stats:
    """A reply that ends where the model ends it. Depth "auto" gets no seed: that would fix the depth."""
    options: dict[str, Any] = {} if engine.depth == "auto" else {"seed": job.seed}
    sampling: Sampling = job.sampling
    return engine.generate(job.prompt, max_tokens=tokens, sampling=sampling, **options).stats


def _idle_watts(meter: EnergyMeter, seconds: float = 2.0) -> float | None:
    _, joules = meter.of(lambda: time.sleep(seconds))
    return None if joules is None else joules / seconds
