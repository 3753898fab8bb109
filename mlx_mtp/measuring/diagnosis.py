"""What decides the speed of a pair on this machine, measured: `mlx-mtp doctor`.

Speed-up = tokens a round / (verify(M) / verify(1) + depth * draft step / verify(1) + host), M = depth + 1.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlx_mtp.checkpoints.checkpoint import named_parameters
from mlx_mtp.drafters.lookup import LookupFirst
from mlx_mtp.engine import DEEPEST, Engine
from mlx_mtp.generation.cache import CAPACITY_STEP, capacity_for
from mlx_mtp.generation.depth import FixedDepth, best_depth, expected_tokens
from mlx_mtp.generation.exactness import Exactness, Probes
from mlx_mtp.generation.interfaces import Drafter, Target
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.generation.types import NEUTRAL, Sampling
from mlx_mtp.measuring import machine
from mlx_mtp.measuring.prompts import read_prompts
from mlx_mtp.measuring.timing import Passes, PieceTime, pipelined_rounds, rounds_alone

CONTEXT, SAMPLES = 200, 4
REPEATS, PIPELINED = 11, 33  # timed passes and rounds alone; timed rounds in the loop
# The depth whose rounds are timed for the cost of a draft step: deep enough to divide by, within every chip's reach.
TIMED_DEPTH = 4
ACCEPTANCES = (0.5, 0.7, 0.9)
PROBED_CAPACITIES = (CAPACITY_STEP, 1024, 3840)  # for which `doctor --mode exact` says how passes are exact


@dataclass(frozen=True)
class Costs:
    """Seconds of the pieces, after `context` tokens.

    verify: passes of 1, 2, ... DEEPEST + 1 tokens. plain, drafted: pipelined rounds without drafts and with
    `drafted_depth` of them. draft_step: what one draft adds beside its token of the pass; None without a drafter, as is
    `drafted`. build, submit: the host's part of a round (the drafted one, if there is one), see PieceTime. scatter: of
    the passes.
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

    def round(self, depth: int, padded: int | None = None) -> float:
        """Expected seconds of a pipelined round; padded: tokens every pass is padded to in exact mode."""
        step, rest = self.draft_step, self.drafted
        if not depth or step is None or rest is None:
            return self.plain
        # What it takes beside passes and drafts, acceptance and waiting, is measured at one depth.
        for sign, drafts in ((-1, self.drafted_depth), (1, depth)):
            rest += sign * (self.verify[max(drafts + 1, padded or 1) - 1] + drafts * step)
        return max(rest, self.plain)


def diagnose(engine: Engine, repeats: int = REPEATS) -> dict[str, Any]:
    """Measures the loaded pair on this machine.

    The JSON object of `mlx-mtp doctor --json`, without the advice; times in milliseconds, "rows" are tokens of a pass.
    exactness: with the room that short texts need; exactness_by_capacity: with more of it, in exact mode.
    depth_reason: how much the engine drafts after what it learned in earlier runs, and why.
    """
    here, prompt = machine.describe(), sample_prompt(engine)
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(0), engine.exactness)
    costs = measure(decoder, prompt, max(engine.allowed_depths), repeats)
    probes = engine.exactness or Probes(engine.target)
    exact, longest = probes.at(CAPACITY_STEP), capacity_for(engine.max_context) if engine.exactness else 0
    return {
        "machine": here,
        "mode": engine.mode,
        "pair": describe_pair(engine.target, engine.drafter),
        "context": costs.context,
        "verify": [
            {"rows": m, "milliseconds": 1e3 * t, "ratio": t / costs.verify[0], "exact": m in (1, *exact.equal_widths)}
            for m, t in enumerate(costs.verify, 1)
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
        "choices": choices(costs, engine.allowed_depths, exact.width if engine.exactness else None),
        "depth_reason": engine.depth_reason,
    }


def _exactness(found: Exactness) -> dict[str, Any]:
    return {**asdict(found), "possible": found.possible}


def measure(
    decoder: Decoder, prompt: list[int], deepest: int, repeats: int, pipelined: int = PIPELINED,
    sampling: Sampling = NEUTRAL, verify: Sequence[PieceTime] | None = None,
    middle: Callable[[Sequence[float]], float] = min,
) -> Costs:  # fmt: skip
    """Times the pieces of rounds; deepest: drafts a round may have at most, 0 = there is no drafter to time.

    sampling, middle: of the pipelined rounds. verify: the passes, where they are timed already.
    """
    passes = verify or Passes(decoder.target).alone(prompt, range(1, DEEPEST + 2), repeats)
    seconds = [one.device for one in passes]
    depth = min(TIMED_DEPTH, deepest)
    alone = rounds_alone(decoder, prompt, [0, depth] if depth else [0], repeats, sampling)
    # The first rounds after a prompt are the slowest: drafted ones begin, as in a reply; plain ones come after them, or
    # after others of their own, for of those a reply has many. Of a depth that is there twice the last time counts.
    wall = pipelined_rounds(decoder, prompt, [depth, 0], pipelined, sampling, middle)
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
    costs: Costs, allowed: Sequence[int], padded: int | None = None, acceptances: Sequence[float] = ACCEPTANCES
) -> list[dict[str, float]]:
    """What the depth control would do if every draft were accepted with this chance; speed_up: over plain decoding."""
    found, seconds = [], {depth: costs.round(depth, padded) for depth in allowed}
    for acceptance in acceptances:
        rates = [acceptance] * max(allowed)
        depth = best_depth(seconds.__getitem__, rates, allowed)
        tokens = expected_tokens(rates, depth)
        found.append({"acceptance": acceptance, "depth": depth, "tokens_per_round": tokens,
                      "speed_up": tokens * seconds[0] / seconds[depth]})  # fmt: skip
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
