"""Which engines take part in a bench, made from their names; and, for those that cannot, one sentence each.

    stock              mlx-lm's own plain loop on the same weights: the 1.00
    plain              this engine without drafts
    mtp                this engine with the drafter of the pair
    lookup, assistant, parallel, sequential, lookup+auto, FOLDER, HUB NAME    with that drafter
    mlx-vlm            mlx-vlm's MTP with the pair's assistant, at the deepest of the fixed depths

A drafter runs at every one of the asked depths, or at one: NAME@3, NAME@auto. All arms of this engine share one copy
of the target; each other engine holds its own, and is left out where memory does not suffice.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from mlx_mtp.checkpoints import memory
from mlx_mtp.drafters.lookup import Lookup
from mlx_mtp.engine import Engine
from mlx_mtp.errors import MLXMTPError, OptionError, brief
from mlx_mtp.generation.interfaces import Drafter
from mlx_mtp.generation.types import NEUTRAL, Sampling
from mlx_mtp.loading import another_drafter, drafter_folder
from mlx_mtp.measuring.diagnosis import family_of
from mlx_mtp.measuring.turns import Arm, Job, engine_arm, mlx_lm_arm, mlx_vlm_arm

STOCK, PLAIN, MTP, LOOKUP, VLM = "stock", "plain", "mtp", "lookup", "mlx-vlm"
DEFAULT_ARMS = (STOCK, PLAIN, MTP, "lookup@auto", VLM)
DEFAULT_DEPTHS: tuple[int | str, ...] = (2, 4, "auto")
# What Google recommends for Gemma, for a checkpoint whose own configuration is greedy.
GEMMA = Sampling(temperature=1.0, top_k=64, top_p=0.95)


LONGEST_REST, HIGHEST_SEED = 3600.0, 2**62
TRIED_TOKENS = 4  # of another engine, before it may take part


class Load(Protocol):
    """`mlx_mtp.load`, or the command line's with bars."""

    def __call__(self, model: str | None, drafter: str, *, depth: str, mode: str, max_context: int | None) -> Engine:
        """The loaded pair."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a bench is asked for. Raises OptionError for a value out of its range.

    depths: of every arm with a drafter; None = the usual ones, as far as the drafter goes. max_tokens: of every timed
    run. tokens_for_acceptance: most of a reply whose acceptance is counted. repeats: timed runs of a prompt and an
    arm. cool_down: seconds before every turn of the arms. seed: of the first prompt.
    samplings: None = greedy, and the checkpoint's own.
    """

    model: str | None = None
    drafter: str = "auto"
    arms: tuple[str, ...] = DEFAULT_ARMS
    depths: tuple[int | str, ...] | None = None
    mode: str = "fast"
    max_tokens: int = 64
    tokens_for_acceptance: int = 128
    repeats: int = 6  # an even number: as many turns begin with the first arm as with the last
    cool_down: float = 0.5
    seed: int = 0
    max_context: int | None = None
    samplings: tuple[Sampling, ...] | None = None

    def __post_init__(self) -> None:
        least = {"max_tokens": 8, "tokens_for_acceptance": 8, "repeats": 1, "cool_down": 0, "seed": 0}
        for name, low in least.items():
            if not getattr(self, name) >= low:
                raise OptionError(f"Expected {name} of at least {low}, found {getattr(self, name)}; raise it.")
        for name, high in (("cool_down", LONGEST_REST), ("seed", HIGHEST_SEED)):
            if not getattr(self, name) <= high:  # NaN is neither
                raise OptionError(f"Expected {name} of at most {high}, found {getattr(self, name)}; lower it.")
        if not self.arms:
            raise OptionError(f"Expected at least one arm, found none; name some of {', '.join(DEFAULT_ARMS)}.")


@dataclass(frozen=True, kw_only=True)
class BenchArm:
    """One contender. engine, drafter, depth: None for other engines; drafter None and depth 0 for `plain`.

    drafter: its name without the depth.
    """

    name: str
    run: Arm
    engine: Engine | None = None
    drafter: str | None = None
    depth: int | str | None = None


@dataclass
class Lineup:
    """All contenders by name, the loaded pair, and why some are missing."""

    engine: Engine
    arms: dict[str, BenchArm] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def drafters(self) -> dict[str, Engine]:
        """One engine for every drafter that takes part."""
        return {arm.drafter: arm.engine for arm in self.arms.values() if arm.drafter and arm.engine}

    def samplings(self, plan: Plan) -> list[Sampling]:
        """Resolved: as asked, else greedy and the checkpoint's own."""
        if plan.samplings is not None:
            return [sampling.over(self.engine.defaults) for sampling in plan.samplings]
        own = self.engine.defaults
        own = own if own.temperature else GEMMA.over(own)
        return [Sampling(temperature=0.0).over(NEUTRAL), own]


def sampling_name(sampling: Sampling) -> str:
    """'T = 0', or 'T = 1, top-k 64, top-p 0.95'; all that is not switched off."""
    shown = [f"T = {sampling.temperature or 0:g}"]
    for name, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
        value = getattr(sampling, name)
        if value is not None and value != off and (sampling.temperature or name == "repetition_penalty"):
            shown.append(f"{name.replace('_', '-' if name != 'repetition_penalty' else ' ')} {value:g}")
    return ", ".join(shown)


def line_up(plan: Plan, load: Load) -> Lineup:
    """Loads the pair and makes every arm; raises OptionError for an arm nobody knows."""
    engine = load(plan.model, plan.drafter, depth="0", mode=plan.mode, max_context=plan.max_context)
    lineup = Lineup(engine)
    made: dict[str, Drafter | None] = {MTP: engine.drafter, LOOKUP: Lookup()}
    for name in dict.fromkeys(plan.arms):
        if name == STOCK:
            _other_engine(lineup, STOCK, lambda: mlx_lm_arm(_folder(lineup)))
        elif name == PLAIN:
            plain = _engine(lineup, None, 0)
            lineup.arms[PLAIN] = BenchArm(name=PLAIN, run=engine_arm(plain), engine=plain, depth=0)
        elif parted(name)[0] == VLM:
            _mlx_vlm(lineup, plan, parted(name)[1])
        else:
            _drafting(lineup, plan, name, made)
    if not lineup.arms:
        raise OptionError(f"Expected an arm that can run here, found none: {' '.join(lineup.left_out)}")
    return lineup


def parted(name: str) -> tuple[str, int | str | None]:
    """'lookup@auto' -> ('lookup', 'auto'); without a depth None."""
    found = re.fullmatch(r"(.+)@(auto|\d+)", name)
    if not found:
        return name, None
    return found[1], found[2] if found[2] == "auto" else int(found[2])


def _drafting(lineup: Lineup, plan: Plan, name: str, made: dict[str, Drafter | None]) -> None:
    """This engine with one drafter, at one depth or at all that were asked for."""
    called, depth = parted(name)
    if called not in made:
        try:
            made[called] = another_drafter(plan.model, called)
        except MLXMTPError as error:
            raise OptionError(
                f"Expected arms of {', '.join((STOCK, PLAIN, MTP, LOOKUP, VLM))} or a drafter's name, found '{called}' "
                f"that cannot be loaded: {error}"
            ) from error
    drafter = made[called]
    if drafter is None:
        lineup.left_out.append(f"{name} is left out: no drafter is loaded.")
        return
    for each in _depths(plan, depth, drafter):
        full = f"{called}@{each}"
        engine = _engine(lineup, drafter, each)
        if isinstance(each, int) and each not in engine.allowed_depths:
            most = max(depth for depth in engine.allowed_depths if depth <= each)
            lineup.left_out.append(f"{full} drafts {most} a round: more cannot be verified bit for bit here.")
        lineup.arms[full] = BenchArm(name=full, run=engine_arm(engine), engine=engine, drafter=called, depth=each)


def _depths(plan: Plan, depth: int | str | None, drafter: Drafter) -> Sequence[int | str]:
    if depth is not None:
        return [depth]
    if plan.depths is not None:
        return plan.depths
    usual = [each if each == "auto" else min(int(each), drafter.max_depth) for each in DEFAULT_DEPTHS]
    return list(dict.fromkeys(usual))


def _engine(lineup: Lineup, drafter: Drafter | None, depth: int | str) -> Engine:
    """Another engine around the same target; nothing is remembered from earlier runs."""
    first = lineup.engine
    return Engine(
        first.target, drafter, first.tokenizer, stop_tokens=first.stop_tokens, depth=depth, mode=first.mode,
        max_context=first.max_context, defaults=first.defaults,
    )  # fmt: skip


def _folder(lineup: Lineup) -> Path:
    path = lineup.engine.target.path
    if path is None:
        raise OptionError("the target has no folder that another engine could load")
    return Path(path)


def _mlx_vlm(lineup: Lineup, plan: Plan, asked: int | str | None) -> None:
    engine = lineup.engine
    if engine.drafter is None or family_of(engine.drafter) != "assistant":
        lineup.left_out.append(f"{VLM} is left out: it drafts with a Gemma 4 assistant, and none is loaded.")
        return
    if any((sampling.repetition_penalty or 1.0) != 1.0 for sampling in lineup.samplings(plan)):
        lineup.left_out.append(f"{VLM} is left out: it drops penalties while it drafts.")
        return
    if asked == "auto" or asked == 0:
        raise OptionError(f"Expected {VLM} at a depth of 1 or more, found {VLM}@{asked}; name one, like {VLM}@4.")
    fixed = [depth for depth in _depths(plan, asked, engine.drafter) if isinstance(depth, int) and depth]
    depth = max(fixed, default=min(4, engine.drafter.max_depth))
    assistant = drafter_folder(plan.model, plan.drafter)
    _other_engine(lineup, f"{VLM}@{depth}", lambda: mlx_vlm_arm(_folder(lineup), assistant, depth))


def _other_engine(lineup: Lineup, name: str, make: Callable[[], Arm]) -> None:
    """An arm with a copy of the weights of its own; a sentence in its place where that cannot be had."""
    others = sum(arm.engine is None for arm in lineup.arms.values())
    try:
        if not memory.fits(memory.folder_bytes(_folder(lineup)) * (2 + others)):
            lineup.left_out.append(f"{name} is left out: another copy of the weights does not fit in memory.")
            return
        run = make()
        # A pair that it cannot run is noticed now, and not when others have been timed for minutes.
        run(Job(list(range(2, 10)), TRIED_TOKENS, NEUTRAL))
        lineup.arms[name] = BenchArm(name=name, run=run)
        memory.wired.add(run, memory.folder_bytes(_folder(lineup)))  # as resident as this engine's own copy
    except ImportError as error:
        package = VLM if name.startswith(VLM) else "mlx-lm"
        lineup.left_out.append(f"{name} is left out: {package} is not installed ({error}).")
    except Exception as error:  # another project's loader may raise anything
        lineup.left_out.append(f"{name} is left out: it could not run this pair ({brief(error)}).")
