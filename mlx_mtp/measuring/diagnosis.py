"""What decides the speed of a pair on this machine, measured: `mlx-mtp doctor`.

Speed-up = tokens a round / (verify(M) / verify(1) + depth * draft step / verify(1) + host), M = depth + 1.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_mtp.checkpoints.checkpoint import named_parameters
from mlx_mtp.drafters.assistant import Assistant, Convention
from mlx_mtp.drafters.lookup import LookupFirst
from mlx_mtp.engine import DEEPEST, Engine
from mlx_mtp.generation.cache import CAPACITY_STEP, capacity_for
from mlx_mtp.generation.depth import FixedDepth, best_depth, expected_tokens
from mlx_mtp.generation.exactness import Exactness, Probes
from mlx_mtp.generation.interfaces import Drafter, Target
from mlx_mtp.generation.loop import Decoder, GenerationRequest
from mlx_mtp.generation.sampling import DraftSampler
from mlx_mtp.generation.types import NEUTRAL, Sampling
from mlx_mtp.measuring import machine
from mlx_mtp.measuring.prompts import read_prompts
from mlx_mtp.measuring.timing import WARM, Passes, PieceTime, pipelined_rounds, rounds_alone

WIDEST_TIMED = 8  # tokens of the widest pass in the curve
CONTEXT, SAMPLES = 200, 4
# The depth whose rounds are timed for the cost of a draft step: deep enough to divide by, within every chip's reach.
TIMED_DEPTH = 4
ACCEPTANCES = (0.5, 0.7, 0.9)
PROBED_CAPACITIES = (CAPACITY_STEP, 1024, 3840)  # for which `doctor --mode exact` says how passes are exact
COMPARED_TOKENS = 48  # of each reply on which the two conventions are compared
DEVIATIONS = 2.0  # of the standard kind, from which on two conventions differ by more than noise

@dataclass
class Curve:
    """Seconds of a round by depth, as measured: straight lines between and beyond, and more drafts take no less."""

    seconds: dict[int, float]

    def __post_init__(self) -> None:
        depths = sorted(self.seconds)
        self.seconds = dict(zip(depths, accumulate((self.seconds[depth] for depth in depths), max), strict=True))

    def at(self, depth: int) -> float:
        """Expected seconds of a round of this depth."""
        known = sorted(self.seconds)
        below = max((d for d in known[:-1] if d <= depth), default=known[0])
        above = next((d for d in known if d > below), below)
        slope = (self.seconds[above] - self.seconds[below]) / max(1, above - below)
        return self.seconds[below] + slope * (depth - below)


@dataclass(frozen=True)
class Effort:
    """How often pieces are timed: `repeats` times, two at least, after `warm` that do not count.

    pipelined: how often rounds in the loop are, in each of `turns` turns of both depths. middle: which of their times
    counts; the fastest, for whatever else runs only ever makes a round slower.
    """

    repeats: int = 11
    warm: int = WARM
    pipelined: int = 11
    turns: int = 3
    middle: Callable[[Sequence[float]], float] = min


USUAL = Effort()


@dataclass(frozen=True)
class Costs:
    """Seconds of the pieces, after `context` tokens.

    verify: passes of 1, 2, ... tokens. plain, drafted: pipelined rounds without drafts and with `drafted_depth` of
    them. draft_step: what one draft adds beside its token of the pass; None without a drafter, as is `drafted`.
    build, submit: the host's part of a round (the drafted one, if there is one), see PieceTime. scatter: of the passes.
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

    def curve(self, padded: int | None = None) -> Curve:
        """Seconds of a round by depth; padded: tokens every pass is padded to in exact mode."""
        if self.drafted is None or self.draft_step is None:
            return Curve({0: self.plain})

        def passes(depth: int) -> float:
            return self.verify[max(depth + 1, padded or 1) - 1] + depth * (self.draft_step or 0.0)

        # What a pipelined round takes beside passes and drafts, acceptance and waiting, is measured at one depth.
        rest = self.drafted - passes(self.drafted_depth)
        return Curve({0: self.plain} | {depth: passes(depth) + rest for depth in range(1, len(self.verify))})


def diagnose(
    engine: Engine, effort: Effort = USUAL, on_step: Callable[[str], None] = lambda step: None
) -> dict[str, Any]:
    """Measures the loaded pair on this machine; on_step is told in a few words what comes next.

    The JSON object of `mlx-mtp doctor --json`, without the advice; times in milliseconds, "rows" are tokens of a pass.
    exactness: with the room that short texts need; exactness_by_capacity: with more of it, in exact mode.
    convention: None unless the drafter is an assistant and text can be tokenised. depth_reason: how much the engine
    drafts after what it learned in earlier runs, and why.
    """
    on_step("asking the machine")
    here, prompt = machine.describe(), sample_prompt(engine)
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(0), engine.exactness)
    on_step("timing passes and rounds")
    costs = measure(decoder, prompt, max(engine.allowed_depths), effort)
    on_step("comparing passes bit for bit")
    probes = engine.exactness or Probes(engine.target)
    exact, longest = probes.at(CAPACITY_STEP), capacity_for(engine.max_context) if engine.exactness else 0
    passes = zip(range(1, WIDEST_TIMED + 1), costs.verify, strict=True)
    return {
        "machine": here,
        "mode": engine.mode,
        "pair": describe_pair(engine.target, engine.drafter),
        "context": costs.context,
        "verify": [
            {"rows": m, "milliseconds": 1e3 * t, "ratio": t / costs.verify[0], "exact": m in (1, *exact.equal_widths)}
            for m, t in passes
        ],
        "plain_round_milliseconds": 1e3 * costs.plain,
        "drafted_depth": costs.drafted_depth,
        "drafted_round_milliseconds": None if costs.drafted is None else 1e3 * costs.drafted,
        "draft_step_milliseconds": None if costs.draft_step is None else 1e3 * costs.draft_step,
        "host_build_milliseconds": 1e3 * costs.build,
        "host_submit_milliseconds": 1e3 * costs.submit,
        "scatter": costs.scatter,
        "exactness": _exactness(exact),
        "exactness_by_capacity": [
            {"capacity": size, **_exactness(probes.at(size))} for size in PROBED_CAPACITIES if size <= longest
        ],
        "choices": choices(costs.curve(exact.width if engine.exactness else None), engine.allowed_depths),
        "convention": _convention(engine, decoder, on_step),
        "depth_reason": engine.depth_reason,
    }


def _exactness(found: Exactness) -> dict[str, Any]:
    return {**asdict(found), "possible": found.possible}


def measure(
    decoder: Decoder, prompt: list[int], deepest: int, effort: Effort, sampling: Sampling = NEUTRAL,
    verify: Sequence[PieceTime] | None = None,
) -> Costs:  # fmt: skip
    """Times the pieces of rounds; deepest: drafts a round may have at most, 0 = there is no drafter to time.

    sampling: of the rounds. verify: the passes, where they are timed already.
    """
    repeats, warm, middle = effort.repeats, effort.warm, effort.middle
    passes = verify or Passes(decoder.target).alone(prompt, range(1, WIDEST_TIMED + 1), repeats, warm)
    seconds = [one.device for one in passes]
    depth = min(TIMED_DEPTH, deepest)
    depths = [0, depth] if depth else [0]
    alone = rounds_alone(decoder, prompt, depths, repeats, sampling, warm)
    # The first rounds after a prompt are the slowest: drafted ones begin, as in a reply; plain ones come after them, or
    # after others of their own, for of those a reply has many. Of a depth that is there twice the last time counts.
    walls = [pipelined_rounds(decoder, prompt, [depth, 0], effort.pipelined, sampling, middle)
             for _ in range(effort.turns)]  # fmt: skip
    wall = {d: middle([turn[d] for turn in walls]) for d in depths}
    step = None
    if depth:
        width = (decoder.exact and decoder.exact.at(CAPACITY_STEP).width) or 1
        longer = seconds[max(depth + 1, width) - 1] - seconds[width - 1]
        step = max(0.0, (alone[1].device - alone[0].device - longer) / depth)
    return Costs(
        context=len(prompt), verify=tuple(seconds), plain=wall[0], drafted_depth=depth,
        drafted=wall[depth] if depth else None, draft_step=step, build=alone[-1].build, submit=alone[-1].submit,
        scatter=statistics.median(one.scatter for one in passes),
    )  # fmt: skip


def choices(
    curve: Curve, allowed: Sequence[int], acceptances: Sequence[float] = ACCEPTANCES
) -> list[dict[str, float]]:
    """What the depth control would do if every draft were accepted with this chance; speed_up: over plain decoding."""
    found = []
    for acceptance in acceptances:
        rates = [acceptance] * max(allowed)
        depth = best_depth(curve.at, rates, allowed)
        tokens = expected_tokens(rates, depth)
        found.append({"acceptance": acceptance, "depth": depth, "tokens_per_round": tokens,
                      "speed_up": tokens * curve.at(0) / curve.at(depth)})  # fmt: skip
    return found


def describe_pair(target: Target, drafter: Drafter | None) -> dict[str, Any]:
    """What is loaded: the JSON object "pair".

    bytes: weights as they lie in memory (on a CPU half precision is widened). mixture: whether the target has routed
    experts. family: of the drafter, None without one. quantisation: see `_quantisation`.
    """
    modules, drafting = target.modules(), drafter.modules() if drafter else []
    parts = (part for module in modules for part in module.modules())
    return {
        "path": None if target.path is None else str(target.path),
        "bytes": _bytes(modules),
        "quantisation": _quantisation(modules),
        "mixture": any(isinstance(part, (SwitchLinear, QuantizedSwitchLinear)) for part in parts),
        "family": family_name(drafter) if drafter else None,
        "drafter_bytes": _bytes(drafting),
        "drafter_quantisation": _quantisation(drafting),
        "max_depth": min(DEEPEST, drafter.max_depth) if drafter else 0,
    }


def family_name(drafter: Drafter) -> str:
    """'assistant', 'parallel', 'sequential', 'lookup', or 'lookup+' one of them."""
    if isinstance(drafter, LookupFirst):
        return "lookup+" + family_name(drafter.drafter)
    return type(drafter).__name__.lower()


def _bytes(modules: Iterable[nn.Module]) -> int:
    return sum(array.nbytes for module in modules for array in named_parameters(module).values())


def _quantisation(modules: Iterable[nn.Module]) -> list[dict[str, Any]]:
    """How the quantised layers are stored, most bytes first (scales included)."""
    found: dict[tuple[int, int, str], int] = {}
    for part in (part for module in modules for part in module.modules()):
        if "scales" in part:  # every quantised layer of MLX and mlx-lm holds them, with these three beside them
            key = (part.bits, part.group_size, part.mode)
            found[key] = found.get(key, 0) + _bytes([part])
    kinds = sorted(found.items(), key=lambda item: -item[1])
    return [{"bits": bits, "group_size": group, "mode": mode, "bytes": size} for (bits, group, mode), size in kinds]


def sample_texts(engine: Engine) -> list[list[int]]:
    """Some of the built-in prompts, as far as this checkpoint can be asked; none without a tokenizer."""
    tokenizer, asked = engine.tokenizer, read_prompts(per_category=1)[:SAMPLES]
    return [prompt.ids(tokenizer) for prompt in asked if prompt.fits(tokenizer)] if tokenizer else []


def sample_prompt(engine: Engine) -> list[int]:
    """About CONTEXT tokens of text to measure after, or made-up ids where there is no tokenizer."""
    info = engine.target.info
    length = min(CONTEXT, info.max_context // 2)
    ids = [token for text in sample_texts(engine) for token in text]
    ids = ids or [(31 * i + 5) % info.vocab_size for i in range(length)]
    return (ids * (1 + length // len(ids)))[:length]


def _convention(engine: Engine, decoder: Decoder, on_step: Callable[[str], None]) -> dict[str, Any] | None:
    drafter = engine.drafter.drafter if isinstance(engine.drafter, LookupFirst) else engine.drafter
    if not isinstance(drafter, Assistant) or engine.tokenizer is None:
        return None
    on_step("comparing positions of the assistant's query")
    return compare_conventions(decoder, drafter, sample_texts(engine), engine.stop_tokens, COMPARED_TOKENS)


def compare_conventions(
    decoder: Decoder, assistant: Assistant, prompts: Iterable[list[int]], stop: Collection[int], tokens: int
) -> dict[str, Any]:
    """First drafts under both conventions against the target's own next token, all along its greedy replies.

    tokens: places compared. share_a, share_b: of the first drafts that were right. only_a, only_b: places where one
    alone was. used: the convention that the drafter is run with. better: None where the difference may be chance.
    """
    drafters = [Assistant(assistant.model, assistant.name, convention) for convention in Convention]
    for drafter in drafters:
        drafter.attach(decoder.target)
    right: list[tuple[bool, bool]] = []
    for ids in prompts:
        state = decoder.prefill(GenerationRequest(ids=ids, budget=tokens + 2), tokens + 2)
        token = decoder.rounds.first(state).tokens[0, 0].item()
        for _ in range(tokens):
            if token in stop:
                break
            sample = DraftSampler(state.spec, state.arrays, state.history, mx.random.split(state.key, 1))
            drafts = [one.draft({}, state.token, state.hidden, state.cache, 1, sample)[0] for one in drafters]
            # Evaluated before the round is submitted: a buffer they still held would be copied, not updated.
            mx.eval(drafts)
            token = decoder.rounds.submit(state, 0).tokens[0, 0].item()
            a, b = (draft[0, 0].item() == token for draft in drafts)
            right.append((a, b))
    only_a, only_b, both = (right.count(case) for case in ((True, False), (False, True), (True, True)))
    # A split by chance alone is so lopsided less than once in twenty times.
    lopsided = abs(only_a - only_b) > DEVIATIONS * math.sqrt(only_a + only_b)
    better = None if not lopsided else "A" if only_a > only_b else "B"
    count = max(1, len(right))
    return {"tokens": len(right), "share_a": (only_a + both) / count, "share_b": (only_b + both) / count,
            "only_a": only_a, "only_b": only_b, "used": assistant.convention.value, "better": better}  # fmt: skip
