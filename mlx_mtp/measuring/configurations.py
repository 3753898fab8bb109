"""Which configurations take part in a bench, made from their names; and, for those that cannot, one sentence each.

    stock              mlx-lm's own plain loop on the same weights: the 1.00
    plain              this engine without drafts
    mtp                this engine with the drafter of the pair
    lookup, assistant, parallel, sequential, lookup+auto, FOLDER, HUB NAME    with that drafter
    mlx-vlm            mlx-vlm's MTP with the pair's assistant, at the deepest of the fixed depths

A drafter runs at every one of the asked depths, or at one: NAME@3, NAME@auto. All configurations of this engine share
one copy of the target; each other engine holds its own, and is left out where memory does not suffice.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_mtp.checkpoints import memory
from mlx_mtp.drafters.lookup import Lookup
from mlx_mtp.engine import Engine
from mlx_mtp.errors import MLXMTPError, OptionError, brief
from mlx_mtp.generation.interfaces import Drafter
from mlx_mtp.generation.types import NEUTRAL, Sampling
from mlx_mtp.loading import another_drafter
from mlx_mtp.measuring.diagnosis import family_name
from mlx_mtp.measuring.engines import Decode, DecodeJob, with_engine, with_mlx_lm, with_mlx_vlm

STOCK, PLAIN, MTP, LOOKUP, VLM = "stock", "plain", "mtp", "lookup", "mlx-vlm"
DEFAULT_NAMES = (STOCK, PLAIN, MTP, "lookup@auto", VLM)
DEFAULT_DEPTHS: tuple[int | str, ...] = (2, 4, "auto")
# What Google recommends for Gemma, for a checkpoint whose own configuration is greedy.
GEMMA = Sampling(temperature=1.0, top_k=64, top_p=0.95)
LIMITS = {"max_tokens": (8, 2**31), "tokens_for_acceptance": (8, 2**31), "repeats": (1, 2**31),
          "cool_down": (0, 3600.0), "seed": (0, 2**62)}  # fmt: skip
# Where more of the cores than this were busy before anything was loaded, figures are rough.
BUSY = 0.25
TRIED_TOKENS = 4  # of another engine, before it may take part


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a bench is asked for. Raises OptionError for a value out of its range.

    names: of the configurations. depths: of every one with a drafter; None = the usual ones, as far as the drafter
    goes. max_tokens: of every timed run. tokens_for_acceptance: most of a reply whose acceptance is counted. repeats:
    timed runs of a prompt and a configuration. cool_down: seconds before every turn. seed: of the first prompt.
    samplings: None = greedy, and the checkpoint's own.
    """

    model: str | None = None
    drafter: str = "auto"
    names: tuple[str, ...] = DEFAULT_NAMES
    depths: tuple[int | str, ...] | None = None
    mode: str = "fast"
    max_tokens: int = 64
    tokens_for_acceptance: int = 128
    repeats: int = 6  # an even number: as many turns begin with the first configuration as with the last
    cool_down: float = 0.5
    seed: int = 0
    max_context: int | None = None
    samplings: tuple[Sampling, ...] | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            if not low <= getattr(self, name) <= high:  # NaN is neither
                raise OptionError(f"{name} must be {low} to {high}, not {getattr(self, name)}.")
        if not self.names:
            raise OptionError(f"--arms names no configuration; take some of {', '.join(DEFAULT_NAMES)}.")


@dataclass(frozen=True, kw_only=True)
class Configuration:
    """One contender. engine, drafter (without depth), depth: None for other engines; `plain`: no drafter, depth 0."""

    name: str
    decode: Decode
    engine: Engine | None = None
    drafter: str | None = None
    depth: int | str | None = None


def sampling_name(sampling: Sampling) -> str:
    """'T = 0', or 'T = 1, top-k 64, top-p 0.95'; all that is not switched off."""
    shown = [f"T = {sampling.temperature or 0:g}"]
    filters = {"top-k": (sampling.top_k, 0), "top-p": (sampling.top_p, 1), "min-p": (sampling.min_p, 0)}
    penalty = {"repetition penalty": (sampling.repetition_penalty, 1)}
    for name, (value, off) in (penalty if not sampling.temperature else filters | penalty).items():
        if value not in (None, off):
            shown.append(f"{name} {value:g}")
    return ", ".join(shown)


def name_and_depth(name: str) -> tuple[str, int | str | None]:
    """'lookup@auto' -> ('lookup', 'auto'); without a depth None."""
    found = re.fullmatch(r"(.+)@(auto|\d+)", name)
    if not found:
        return name, None
    return found[1], found[2] if found[2] == "auto" else int(found[2])


@dataclass
class Lineup:
    """All configurations by name, the loaded pair, and what must be said: why some are missing, say."""

    plan: Plan
    engine: Engine
    load: float = 0.0
    configurations: dict[str, Configuration] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def samplings(self) -> list[Sampling]:
        """Resolved: as asked, else greedy and the checkpoint's own."""
        own = self.engine.defaults
        if self.plan.samplings is not None:
            return [sampling.over(own) for sampling in self.plan.samplings]
        return [Sampling(temperature=0.0).over(NEUTRAL), own if own.temperature else GEMMA.over(own)]

    def depths(self, asked: int | str | None, drafter: Drafter) -> Sequence[int | str]:
        """At which a configuration runs; asked: by its name."""
        if asked is not None:
            return [asked]
        if self.plan.depths is not None:
            return self.plan.depths
        usual = [each if each == "auto" else min(int(each), drafter.max_depth) for each in DEFAULT_DEPTHS]
        return list(dict.fromkeys(usual))

    def add_own(self, name: str, drafter: Drafter | None, called: str | None, depth: int | str) -> None:
        """This engine around the same target; nothing is remembered from earlier runs."""
        first = self.engine
        engine = Engine(
            first.target, drafter, first.tokenizer, stop_tokens=first.stop_tokens, depth=depth, mode=first.mode,
            max_context=first.max_context, defaults=first.defaults,
        )  # fmt: skip
        if isinstance(depth, int) and depth not in engine.allowed_depths:
            most = max(allowed for allowed in engine.allowed_depths if allowed <= depth)
            self.notes.append(f"{name} drafts {most} a round: more cannot be verified bit for bit here.")
        self.configurations[name] = Configuration(
            name=name, decode=with_engine(engine), engine=engine, drafter=called, depth=depth
        )

    def add_drafting(self, name: str, made: dict[str, Drafter | None]) -> None:
        """This engine with one drafter, at one depth or at all that were asked for; made: drafters by their names."""
        called, asked = name_and_depth(name)
        if called not in made:
            try:
                made[called] = another_drafter(self.plan.model, called)
            except MLXMTPError as error:
                raise OptionError(
                    f"'{called}' of --arms is none of {', '.join((STOCK, PLAIN, MTP, LOOKUP, VLM))} and could not be "
                    f"loaded as a drafter: {error}"
                ) from error
        drafter = made[called]
        if drafter is None:
            return self.leave_out(name, "no drafter is loaded")
        for depth in self.depths(asked, drafter):
            self.add_own(f"{called}@{depth}", drafter, called, depth)

    def add_mlx_vlm(self, asked: int | str | None) -> None:
        """mlx-vlm with the assistant of the pair."""
        drafter = self.engine.drafter
        if drafter is None or family_name(drafter) != "assistant":
            return self.leave_out(VLM, "it drafts with a Gemma 4 assistant, and none is loaded")
        if any((sampling.repetition_penalty or 1.0) != 1.0 for sampling in self.samplings()):
            return self.leave_out(VLM, "it drops penalties while it drafts")
        if asked in ("auto", 0):
            raise OptionError(f"{VLM} drafts a fixed number of tokens, so {VLM}@{asked} is none; take {VLM}@4.")
        fixed = [depth for depth in self.depths(asked, drafter) if isinstance(depth, int) and depth]
        depth = max(fixed, default=min(4, drafter.max_depth))
        return self.add_other(f"{VLM}@{depth}", lambda folder: with_mlx_vlm(folder, Path(drafter.name), depth))

    def add_other(self, name: str, make: Callable[[Path], Decode]) -> None:
        """Another engine with a copy of the weights of its own; a sentence in its place where that cannot be had."""
        folder = self.engine.target.path
        assert folder is not None, "it was loaded from one"
        size, others = memory.folder_bytes(folder), sum(one.engine is None for one in self.configurations.values())
        if not memory.fits(size * (2 + others)):
            return self.leave_out(name, "another copy of the weights does not fit in memory")
        try:
            decode = make(folder)
            # A pair that it cannot run is noticed now, and not when others have been timed for minutes.
            decode(DecodeJob(list(range(2, 10)), TRIED_TOKENS))
        except ImportError as error:
            return self.leave_out(name, f"it is not installed ({error})")
        except Exception as error:  # another project's loader may raise anything
            return self.leave_out(name, f"it could not run this pair ({brief(error)})")
        self.configurations[name] = Configuration(name=name, decode=decode)
        return memory.keep_resident(decode, size)  # as resident as this engine's own copy

    def leave_out(self, name: str, why: str) -> None:
        self.notes.append(f"{name} is left out: {why}.")


def line_up(plan: Plan, load: Callable[..., Engine]) -> Lineup:
    """Loads the pair (load: as `mlx_mtp.load`) and makes every configuration; OptionError for a name nobody knows."""
    busy, cores = os.getloadavg()[0], os.cpu_count() or 1
    engine = load(plan.model, plan.drafter, depth="0", mode=plan.mode, max_context=plan.max_context)
    lineup = Lineup(plan, engine, busy)
    if busy > BUSY * cores:
        lineup.notes.append(f"The machine was not idle when this began (load average {busy:.1f} on {cores} cores): "
                            "take every figure as rough.")  # fmt: skip
    made: dict[str, Drafter | None] = {MTP: engine.drafter, LOOKUP: Lookup()}
    for name in dict.fromkeys(plan.names):
        if name == STOCK:
            lineup.add_other(STOCK, with_mlx_lm)
        elif name == PLAIN:
            lineup.add_own(PLAIN, None, None, 0)
        elif name_and_depth(name)[0] == VLM:
            lineup.add_mlx_vlm(name_and_depth(name)[1])
        else:
            lineup.add_drafting(name, made)
    if not lineup.configurations:
        raise OptionError(f"None of the configurations can run here. {' '.join(lineup.notes)}")
    return lineup
