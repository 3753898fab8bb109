"""What decides the speed of a pair on this machine, measured: `mlx-mtp doctor` and benchmarks/verify_cost.py.

What it does: times the pieces of a round, each evaluated alone; asks how exact the target is here, which depth would
pay at which acceptance, and which query position an assistant was trained with. What it does not do: print, or say
what to do about it (advice.py).

Speed-up = tokens a round / (verify(M) / verify(1) + depth * draft step / verify(1) + host), M = depth + 1.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_mtp.checkpoints.checkpoint import named_parameters
from mlx_mtp.drafters.assistant import Assistant, Convention
from mlx_mtp.drafters.lookup import LookupFirst
from mlx_mtp.engine import DEEPEST, Engine
from mlx_mtp.generation.cache import CAPACITY_STEP, KVCache, capacity_for
from mlx_mtp.generation.depth import Curve, FixedDepth, best_depth, expected_tokens
from mlx_mtp.generation.exactness import Exactness, Probes
from mlx_mtp.generation.interfaces import Drafter, Target
from mlx_mtp.generation.loop import Decoder, GenerationRequest
from mlx_mtp.generation.sampling import DraftSampler
from mlx_mtp.generation.types import NEUTRAL, Sampling
from mlx_mtp.measuring import machine
from mlx_mtp.measuring.machine import Machine
from mlx_mtp.text.tokenizer import prompt_ids

ROWS = 8  # of the widest pass in the curve
CONTEXT = 200
# The depth whose rounds are timed for the cost of a draft step: deep enough to divide by, within every chip's reach.
TIMED_DEPTH = 4
ACCEPTANCES = (0.5, 0.7, 0.9)
PROBED_CAPACITIES = (CAPACITY_STEP, 1024, 3840)  # for which `doctor --mode exact` says how passes are exact
COMPARED_TOKENS = 48  # of each reply on which the two conventions are compared
# Two conventions differ by more than noise where so lopsided a split would come by chance less often than this.
SIGNIFICANT = 0.05

QUESTIONS = (
    "Write a Python function that reads a text file and returns its longest line. Explain how it works.",
    "What is the difference between a list and a tuple in Python? Give an example of each.",
    "Describe in one paragraph how a bicycle stays upright, and what a rider does to turn.",
    "Explain what `shutil.copytree` does and show how to leave some files out.",
)

Progress = Callable[[str], None]
Middle = Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Effort:
    """How often pieces are timed: `repeats` times, two at least, behind `warm` that do not count.

    pipelined: how often rounds in the loop are, in each of `turns` turns of both depths. middle: which of their times
    counts; the fastest, for whatever else runs only ever makes a round slower.
    """

    repeats: int = 11
    warm: int = 3
    pipelined: int = 11
    turns: int = 3
    middle: Middle = min


USUAL = Effort()


@dataclass(frozen=True)
class Timing:
    """Seconds of one computation, each a median.

    build: Python makes the graph. submit: MLX takes it; where its queue is full, the wait for the device is in it.
    device: from submitting to the last value. scatter: the middle half of the device's times spans this share of it.
    """

    build: float
    submit: float
    device: float
    scatter: float

    @classmethod
    def of(cls, times: Sequence[tuple[float, float, float]]) -> Timing:
        """From (build, submit, device) of each repeat, two at least."""
        builds, submits, devices = zip(*times, strict=True)
        low, middle, high = statistics.quantiles(devices, n=4)
        return cls(statistics.median(builds), statistics.median(submits), middle, (high - low) / middle)


def timed_in_turns(builds: Sequence[Callable[[], Any]], repeats: int, warm: int = USUAL.warm) -> list[Timing]:
    """Times computations that take turns, so that a machine that slows down slows all of them.

    A build returns the arrays that are to be computed.
    """
    times: list[list[tuple[float, float, float]]] = [[] for _ in builds]
    for _ in range(repeats + warm):
        for build, booked in zip(builds, times, strict=True):
            began = time.perf_counter()
            arrays = build()
            built = time.perf_counter()
            mx.async_eval(arrays)
            submitted = time.perf_counter()
            mx.eval(arrays)
            booked.append((built - began, submitted - built, time.perf_counter() - built))
    return [Timing.of(booked[warm:]) for booked in times]


class Passes:
    """Passes of the target, head and best tokens included; each is compiled once per width and size of the cache."""

    def __init__(self, target: Target) -> None:
        self._decoder = Decoder(target, None, FixedDepth(0))
        self._compiled: dict[int, Callable[..., tuple[mx.array, Any]]] = {}

    def alone(self, prompt: list[int], widths: Sequence[int], repeats: int, warm: int = USUAL.warm) -> list[Timing]:
        """Passes of so many rows behind a prompt, each evaluated alone."""
        request = self._decoder.prefill(GenerationRequest(ids=prompt, budget=1), max(widths))
        cache = request.cache
        verify = self._compiled.setdefault(cache.capacity, mx.compile(self._pass(cache.layout())))

        def of(width: int) -> Callable[[], Any]:
            tokens = mx.array([(prompt * width)[-width:]])

            def build() -> Any:
                best, cache.arrays = verify(tokens, cache.arrays)
                return best, cache.arrays

            return build

        return timed_in_turns([of(width) for width in widths], repeats, warm)

    def _pass(self, layout: KVCache) -> Callable[..., tuple[mx.array, Any]]:
        target = self._decoder.target

        def verify(tokens: mx.array, arrays: Any) -> tuple[mx.array, Any]:
            cache = layout.around(arrays)
            states = target.forward(tokens, cache)
            return mx.argmax(target.head(states.hidden), axis=-1), cache.arrays

        return verify


def rounds_alone(
    decoder: Decoder, prompt: list[int], depths: Sequence[int], repeats: int, sampling: Sampling = NEUTRAL,
    warm: int = USUAL.warm,
) -> list[Timing]:  # fmt: skip
    """Whole rounds of so many drafts behind a prompt, each evaluated before the next is built."""

    room = (repeats + warm) * sum(depth + 1 for depth in depths)
    request = decoder.prefill(GenerationRequest(ids=prompt, budget=room, sampling=sampling), room)
    decoder.rounds.first(request)

    def of(depth: int) -> Callable[[], Any]:
        def build() -> Any:
            output = decoder.rounds.build(request, depth)
            return output.tokens, request.tree

        return build

    return timed_in_turns([of(depth) for depth in depths], repeats, warm)


@dataclass(frozen=True)
class Costs:
    """Seconds of the pieces, behind `context` tokens.

    verify: passes of 1, 2, ... rows. plain, drafted: pipelined rounds without drafts and with `drafted_depth` of them.
    draft_step: what one draft adds beside its row of the pass; None without a drafter, as is `drafted`.
    build, submit: the host's part of a round (the drafted one, if there is one); see Timing. scatter: of the passes.
    """

    context: int
    verify: tuple[float, ...]
    plain: float
    drafted_depth: int
    drafted: float | None
    draft_step: float | None
    build: float
    submit: float
    scatter: float

    def ratio(self, rows: int) -> float:
        """A pass of so many rows over one of one row."""
        return self.verify[rows - 1] / self.verify[0]

    def curve(self, filled: int | None = None) -> Curve:
        """Seconds of a round by depth; filled: rows every pass is filled up to in exact mode."""
        if self.drafted is None or self.draft_step is None:
            return Curve({0: self.plain})

        def passes(depth: int) -> float:
            return self.verify[max(depth + 1, filled or 1) - 1] + depth * (self.draft_step or 0.0)

        # What a pipelined round takes beside passes and drafts, acceptance and waiting, is measured at one depth.
        rest = self.drafted - passes(self.drafted_depth)
        deeper = {depth: passes(depth) + rest for depth in range(1, len(self.verify))}
        return Curve({0: self.plain} | deeper)


@dataclass(frozen=True)
class Choice:
    """What the depth control would do if every draft stood with the chance `acceptance`.

    speed_up: predicted, over plain decoding in the same mode.
    """

    acceptance: float
    depth: int
    tokens_per_round: float
    speed_up: float


@dataclass(frozen=True)
class Quantisation:
    """Weights stored in `bits` bits: bytes of them, scales included."""

    bits: int
    group_size: int
    mode: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What is loaded. bytes: weights as they lie in memory (on a CPU half precision is widened).

    mixture: whether the target has routed experts. family: of the drafter, None without one.
    """

    path: str | None
    bytes: int
    quantisation: tuple[Quantisation, ...]
    mixture: bool
    family: str | None
    drafter_bytes: int
    drafter_quantisation: tuple[Quantisation, ...]
    max_depth: int


@dataclass(frozen=True)
class ConventionCheck:
    """Two conventions of an assistant's query on the same places of greedy replies.

    tokens: places compared. share_a, share_b: of the first drafts that were the target's next token. only_a, only_b:
    places where one alone was right. used: the convention that the drafter is run with.
    """

    tokens: int
    share_a: float
    share_b: float
    only_a: int
    only_b: int
    used: str

    @property
    def better(self) -> str | None:
        """'A' or 'B'; None where the difference may be chance."""
        if sign_test(self.only_a, self.only_b) >= SIGNIFICANT:
            return None
        return "A" if self.only_a > self.only_b else "B"


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Everything that was found. convention: None unless the drafter is an assistant and text can be tokenised.

    exactness: with the room that short texts need. by_capacity: with room for so many tokens; empty in fast mode.
    depth_reason: how much the engine drafts after what it learned in earlier runs, and why.
    """

    machine: Machine
    mode: str
    pair: Pair
    costs: Costs
    exactness: Exactness
    choices: tuple[Choice, ...]
    convention: ConventionCheck | None
    by_capacity: Mapping[int, Exactness] = field(default_factory=dict)
    depth_reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of `mlx-mtp doctor --json`, without the advice; times in milliseconds."""
        costs, equal = self.costs, self.exactness.equal_widths
        rows = enumerate(costs.verify, 1)
        check = self.convention
        return {
            "machine": asdict(self.machine),
            "mode": self.mode,
            "pair": asdict(self.pair),
            "context": costs.context,
            "verify": [
                {"rows": m, "milliseconds": 1e3 * t, "ratio": costs.ratio(m), "exact": m == 1 or m in equal}
                for m, t in rows
            ],
            "plain_round_milliseconds": 1e3 * costs.plain,
            "drafted_depth": costs.drafted_depth,
            "drafted_round_milliseconds": _milliseconds(costs.drafted),
            "draft_step_milliseconds": _milliseconds(costs.draft_step),
            "host_build_milliseconds": 1e3 * costs.build,
            "host_submit_milliseconds": 1e3 * costs.submit,
            "scatter": costs.scatter,
            "exactness": {**asdict(self.exactness), "possible": self.exactness.possible},
            "choices": [asdict(choice) for choice in self.choices],
            "convention": {**asdict(check), "better": check.better} if check else None,
            "depth_reason": self.depth_reason,
        }


def diagnose(engine: Engine, effort: Effort = USUAL, on_step: Progress = lambda step: None) -> Diagnosis:
    """Measures the loaded pair on this machine; on_step hears in a few words what comes next."""
    on_step("asking the machine")
    here, prompt = machine.describe(), sample_prompt(engine)
    allowed = engine.allowed_depths
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(0), engine.exactness)
    on_step("timing passes and rounds")
    costs = measure(decoder, prompt, max(allowed), effort)
    on_step("comparing widths bit for bit")
    probes = engine.exactness or Probes(engine.target)
    capacities = PROBED_CAPACITIES if engine.exactness else ()
    curve = costs.curve(probes.at(CAPACITY_STEP).width if engine.exactness else None)
    return Diagnosis(
        machine=here,
        mode=engine.mode,
        pair=describe_pair(engine.target, engine.drafter),
        costs=costs,
        exactness=probes.at(CAPACITY_STEP),
        choices=choices(curve, allowed),
        convention=_convention_check(engine, decoder, on_step),
        by_capacity={size: probes.at(size) for size in capacities if size <= capacity_for(engine.max_context)},
        depth_reason=engine.depth_reason,
    )


def measure(
    decoder: Decoder, prompt: list[int], deepest: int, effort: Effort = USUAL, sampling: Sampling = NEUTRAL,
    verify: Sequence[Timing] | None = None,
) -> Costs:  # fmt: skip
    """Times the pieces of rounds; deepest: drafts a round may have at most, 0 = there is no drafter to time.

    sampling: of the rounds. verify: the passes, where they are timed already.
    """
    repeats, warm, middle = effort.repeats, effort.warm, effort.middle
    passes = verify or Passes(decoder.target).alone(prompt, range(1, ROWS + 1), repeats, warm)
    seconds = [timing.device for timing in passes]
    depth = min(TIMED_DEPTH, deepest)
    depths = [0, depth] if depth else [0]
    alone = rounds_alone(decoder, prompt, depths, repeats, sampling, warm)
    # The first rounds behind a prompt are the slowest: drafted ones begin, as in a reply, plain ones come behind them,
    # or behind others of their own, for of those a reply has many.
    order = [depth, 0]
    walls = [decoder.seconds_by_depth(order, effort.pipelined, prompt, sampling, middle) for _ in range(effort.turns)]
    wall = {d: middle([turn[d] for turn in walls]) for d in depths}
    step = None
    if depth:
        width = (decoder.exact and decoder.exact.at(CAPACITY_STEP).width) or 1
        rows = seconds[max(depth + 1, width) - 1] - seconds[width - 1]
        step = max(0.0, (alone[1].device - alone[0].device - rows) / depth)
    return Costs(
        context=len(prompt), verify=tuple(seconds), plain=wall[0], drafted_depth=depth,
        drafted=wall[depth] if depth else None, draft_step=step, build=alone[-1].build, submit=alone[-1].submit,
        scatter=statistics.median(timing.scatter for timing in passes),
    )  # fmt: skip


def choices(curve: Curve, allowed: Sequence[int], acceptances: Sequence[float] = ACCEPTANCES) -> tuple[Choice, ...]:
    """What depth.py's control would choose on this curve."""
    found = []
    for acceptance in acceptances:
        shares = [acceptance] * max(allowed)
        depth = best_depth(curve.at, shares, allowed)
        tokens = expected_tokens(shares, depth)
        found.append(Choice(acceptance, depth, tokens, tokens * curve.at(0) / curve.at(depth)))
    return tuple(found)


def describe_pair(target: Target, drafter: Drafter | None) -> Pair:
    """Sizes and storage of what is loaded."""
    modules, drafting = target.modules(), drafter.modules() if drafter else []
    parts = (part for module in modules for part in module.modules())
    return Pair(
        path=None if target.path is None else str(target.path),
        bytes=_bytes(modules),
        quantisation=_quantisation(modules),
        mixture=any(isinstance(part, (SwitchLinear, QuantizedSwitchLinear)) for part in parts),
        family=family_of(drafter) if drafter else None,
        drafter_bytes=_bytes(drafting),
        drafter_quantisation=_quantisation(drafting),
        max_depth=min(DEEPEST, drafter.max_depth) if drafter else 0,
    )


def family_of(drafter: Drafter) -> str:
    """'assistant', 'parallel', 'sequential', 'lookup', or 'lookup+' one of them."""
    if isinstance(drafter, LookupFirst):
        return "lookup+" + family_of(drafter.drafter)
    return type(drafter).__name__.lower()


def sample_prompt(engine: Engine) -> list[int]:
    """Text of about CONTEXT tokens to measure behind, or made-up ids where there is no tokenizer."""
    info = engine.target.info
    length = min(CONTEXT, info.max_context // 2)
    ids = engine.tokenizer.encode("\n\n".join(QUESTIONS)) if engine.tokenizer else []
    ids = ids or [(31 * i + 5) % info.vocab_size for i in range(length)]
    return (ids * (1 + length // len(ids)))[:length]


def compare_conventions(
    decoder: Decoder, assistant: Assistant, prompts: Iterable[list[int]], ends: Collection[int] = (),
    tokens: int = COMPARED_TOKENS,
) -> ConventionCheck:  # fmt: skip
    """First drafts under both conventions against the target's own next token, all along its greedy replies."""
    arms = [Assistant(assistant.model, assistant.name, convention) for convention in (Convention.A, Convention.B)]
    for arm in arms:
        arm.attach(decoder.target)
    right: list[tuple[bool, bool]] = []
    for ids in prompts:
        request = decoder.prefill(GenerationRequest(ids=ids, budget=tokens + 2), tokens + 2)
        token = _first_token(decoder.rounds.first(request).tokens)
        for _ in range(tokens):
            if token in ends:
                break
            guesses = []
            for arm in arms:
                sample = DraftSampler(request.spec, request.arrays, request.history, mx.random.split(request.key, 1))
                guesses.append(arm.draft({}, request.token, request.hidden, request.cache, 1, sample)[0])
            # Evaluated before the round is submitted: a buffer they still held would be copied, not updated.
            mx.eval(guesses)
            token = _first_token(decoder.rounds.submit(request, 0).tokens)
            right.append((_first_token(guesses[0]) == token, _first_token(guesses[1]) == token))
    a, b = (sum(pair[i] for pair in right) for i in (0, 1))
    both, count = sum(all(pair) for pair in right), max(1, len(right))
    return ConventionCheck(len(right), a / count, b / count, a - both, b - both, assistant.convention.value)


def sign_test(one: int, other: int) -> float:
    """Chance of a split at least so lopsided if both sides were equally likely; two-sided."""
    count = one + other
    tail = sum(math.comb(count, i) for i in range(min(one, other) + 1))
    return min(1.0, 2.0 * tail / 2**count)


def _convention_check(engine: Engine, decoder: Decoder, on_step: Progress) -> ConventionCheck | None:
    assistant = _assistant_of(engine.drafter)
    if assistant is None or engine.tokenizer is None:
        return None
    on_step("comparing positions of the assistant's query")
    prompts = [prompt_ids(question, engine.tokenizer) for question in QUESTIONS]
    return compare_conventions(decoder, assistant, prompts, engine.stop_tokens)


def _assistant_of(drafter: Drafter | None) -> Assistant | None:
    if isinstance(drafter, LookupFirst):
        return _assistant_of(drafter.drafter)
    return drafter if isinstance(drafter, Assistant) else None


def _bytes(modules: Iterable[nn.Module]) -> int:
    return sum(array.nbytes for module in modules for array in named_parameters(module).values())


def _quantisation(modules: Iterable[nn.Module]) -> tuple[Quantisation, ...]:
    """How the quantised layers are stored, most bytes first."""
    found: dict[tuple[int, int, str], int] = {}
    for module in modules:
        for part in module.modules():
            if "scales" in part:  # every quantised layer of MLX and mlx-lm holds them, with these three beside them
                key = (part.bits, part.group_size, part.mode)
                found[key] = found.get(key, 0) + _bytes([part])
    return tuple(Quantisation(*key, size) for key, size in sorted(found.items(), key=lambda item: -item[1]))


def _first_token(tokens: mx.array) -> int:
    values: list[list[int]] = tokens.tolist()  # type: ignore[assignment]
    return values[0][0]


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds
