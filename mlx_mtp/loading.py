"""From a name to an Engine, straight down: resolve both models, check them, fetch what is on the hub, read."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import os
import platform
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp import assets, drafters, targets
from mlx_mtp.backend import blas, threads
from mlx_mtp.checkpoints import hub, kept, memory, pairs
from mlx_mtp.checkpoints.checkpoint import Checkpoint, misfit, read_json, section, visible
from mlx_mtp.checkpoints.hub import Listing, OnProgress, Source
from mlx_mtp.checkpoints.packaged import model_of
from mlx_mtp.drafters.lookup import Lookup, LookupFirst
from mlx_mtp.engine import MODES, Engine
from mlx_mtp.errors import CheckpointError, IncompatibleDrafter, ModelNotFound, OptionError
from mlx_mtp.generation import checks
from mlx_mtp.generation.depth import ProfileFile
from mlx_mtp.generation.exactness import ProbeFile
from mlx_mtp.generation.interfaces import Drafter
from mlx_mtp.generation.types import Sampling
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.version import __version__

log = logging.getLogger(__name__)

ASSETS = Path(assets.__path__[0])
EMBEDDED = ASSETS / "standard-library"
# Folders of the drafters that come with the embedded model and with packaged ones; the first that is there is "auto".
FAMILIES = ("assistant", "sequential", "parallel")
LOOKUP_FIRST = "lookup+"  # in front of a drafter's name: the lookup overrules it where it has a long match


@threads.device_work
def load(
    model: str | Path | None = None,
    *,
    drafter: str | Path | None = "auto",
    depth: int | str = "auto",
    mode: str = "fast",
    max_context: int | None = None,
    draft_head_bits: int | str = "auto",
    on_progress: OnProgress | None = None,
) -> Engine:
    """Loads a target and its drafter, from the hub where they are not here yet.

    A model too large for this machine is refused (DoesNotFit) before it is downloaded or read; the environment
    variable MLX_MTP_IGNORE_MEMORY=1 loads it all the same. On Metal the weights stay resident.

    Args:
        model: A folder, a hub name, the name of a packaged model that was fetched ("smollm2"), or None for the
            embedded model.
        drafter: A folder, a hub name, "auto" (the drafter made for this target, or none where none is known),
            "lookup" (what followed the same words before), "lookup+" in front of any other, or None / "none" for
            plain decoding; for the embedded and packaged models also "assistant", "parallel" or "sequential", as far
            as they come with them.
        depth: Drafts per round, "auto" or 0..8.
        mode: "fast" or "exact" (greedy output bit-equal with and without the drafter).
        max_context: Most tokens of prompt and reply together; None = the model's own limit.
        draft_head_bits: 4 or 8 stores a drafter's dense output head in so many bits, 0 leaves it as it is; "auto" = 4
            on a GPU, 0 on a CPU, where quantised products are the slower ones. Only proposals change, never the
            distribution of the output.
        on_progress: Hears how far downloads and reading are, in the thread that loads.
    """
    if model is not None:
        model = checks.place("model", model)
    drafter = None if drafter is None else checks.place("drafter", drafter)
    checks.one_of("mode", mode, MODES)
    checks.function("on_progress", on_progress)
    head_bits = _head_bits(draft_head_bits)
    _look_at_mlx()
    source = _resolve(model)
    plan = _checked(model, source, _plan_drafter(model, source, drafter))
    checkpoint = source.fetch(on_progress)
    plan = plan.fetched(on_progress)
    checkpoint.on_read = hub.telling("load", str(model or "the embedded model"), on_progress)
    target = targets.load_target(checkpoint)
    loaded = _read_drafter(plan, draft_head_bits, on_progress)

    if loaded is None and drafter not in (None, "none"):
        depth = "auto"  # that no drafter was found has been said; a depth for one is then without object
    curve = _key(checkpoint.path, drafter, type(loaded).__name__, mode, head_bits)
    file, tokenizer = checkpoint.path / "generation_config.json", Tokenizer.load(checkpoint.path)
    generation = read_json(file) if file.exists() else {}
    engine = Engine(
        target, loaded, tokenizer, depth=depth, mode=mode, max_context=max_context,
        stop_tokens=_end_tokens(checkpoint, generation, tokenizer, target.info.vocab_size),
        defaults=_default_sampling(generation, checkpoint.path),
        profile=ProfileFile(kept.profiles_path(), curve),
        probes=ProbeFile(kept.probes_path(), _probes_key(checkpoint)),
    )  # fmt: skip
    memory.keep_resident(engine, sum(memory.held_bytes(each.tensors()) for each in (checkpoint, plan.source) if each))
    return engine


def another_drafter(model: str | Path | None, drafter: str | Path) -> Drafter | None:
    """A second drafter for a target that is loaded already, named as `load` takes it; None where none is known."""
    return _read_drafter(_plan_drafter(model, _resolve(model), drafter).fetched(None), "auto", None)


def drafters_in(place: Path | None) -> list[str]:
    """Families of the drafters that come with a model whose own are in this folder; the first is "auto"."""
    return [family for family in FAMILIES if place and (place / family / "config.json").is_file()]


# Resolve: what a name stands for


def _resolve(name: str | Path | None) -> Source:
    """A folder; of a hub name the copy in the cache, or what is to be downloaded; None = the embedded target."""
    if packaged := model_of(name):
        return Checkpoint.open(packaged.found())
    folder = EMBEDDED / "target" if name is None else Path(os.path.expanduser(name))
    if os.path.exists(folder) or not hub.NAME.fullmatch(str(name)):
        return Checkpoint.open(folder)
    return hub.find(str(name))


@dataclass(frozen=True)
class DrafterPlan:
    """Which drafter, before any is loaded. lookup: alone or in front of the one of `source`. chosen: the user named it,
    so that failing is better than going without."""

    lookup: bool = False
    source: Source | None = None
    chosen: bool = True

    def having(self, get: Callable[[], Source | None]) -> DrafterPlan:
        """With what `get` gives; without a drafter where that is not to be had and nobody asked for it by name."""
        try:
            return replace(self, source=get())
        except ModelNotFound as error:
            if self.chosen:
                raise
            log.warning("Decoding plainly, since the drafter could not be had: %s", error)
            return replace(self, source=None)

    def fetched(self, on_progress: OnProgress | None) -> DrafterPlan:
        return self.having(lambda: self.source and self.source.fetch(on_progress))


def _plan_drafter(model: str | Path | None, target: Source, drafter: str | Path | None) -> DrafterPlan:
    if drafter in (None, "none", "lookup"):
        return DrafterPlan(lookup=drafter == "lookup")
    if isinstance(drafter, str) and drafter.startswith(LOOKUP_FIRST):
        name = drafter.removeprefix(LOOKUP_FIRST)
        if name in ("", "none") or name.startswith("lookup"):
            raise OptionError(f"drafter '{drafter}' names none after 'lookup+'; 'lookup' alone needs no other.")
        return replace(_plan_drafter(model, target, name), lookup=True)
    packaged = model_of(model)
    place = EMBEDDED if model is None else ASSETS / packaged.name if packaged else None
    there = drafters_in(place)
    family = there[0] if drafter == "auto" and there else drafter
    if place and family in there:
        return DrafterPlan(source=Checkpoint.open(place / family))
    if drafter == "auto":
        return _known_drafter(model, target)
    if drafter in FAMILIES:
        which, whose = " or ".join(f"'{family}'" for family in there), f"'{model}'" if model else "the embedded model"
        raise OptionError(f"Expected a drafter that comes with {whose} ({which or 'none does'}), found '{drafter}'; "
                          "name another one, a folder, a hub name, 'auto', 'lookup' or 'none'.")  # fmt: skip
    return DrafterPlan(source=_resolve(drafter))


def _known_drafter(model: str | Path | None, target: Source) -> DrafterPlan:
    """The assistant beside a local target, or the table's for its name or that of the model it was made from; plain
    decoding where none is to be had."""
    if isinstance(target, Listing):
        names = [str(model), target.name]
    elif found := pairs.beside(target.path):
        return DrafterPlan(source=Checkpoint.open(found))
    else:
        names = [str(model), pairs.hub_name_of(target.path) or "", str(target.config.get("base_model", ""))]
    name = next(filter(None, map(pairs.assistant_of, names)), None)
    if not name:
        log.warning("No drafter is known for '%s': decoding plainly. Name one with --drafter.", model)
        return DrafterPlan()
    return DrafterPlan(chosen=False).having(lambda: _resolve(name))


# Check: before anything large is downloaded or read


def _checked(model: str | Path | None, target: Source, plan: DrafterPlan) -> DrafterPlan:
    """The plan, or one without a drafter that nobody asked for and that is not to be had or does not fit."""
    targets.registry.loader(target.config, target.name)
    plan = plan.having(lambda: plan.source and _supported(plan.source, target))
    if model is not None:
        plan = _fitting(model, target, plan)
    coming = [source for source in (target, plan.source) if source and source.bytes_to_come]
    hub.check_disk(" with ".join(f"'{each.name}'" for each in coming), sum(each.bytes_to_come for each in coming))
    return plan


def _fitting(model: str | Path, target: Source, plan: DrafterPlan) -> DrafterPlan:
    """The plan, without a drafter that nobody asked for where only the target fits; DoesNotFit where not even that."""
    alone, *more = (memory.held_bytes(source.tensors()) for source in (target, plan.source) if source)
    if memory.fits(alone + sum(more)):
        return plan
    if more and not plan.chosen and memory.fits(alone):
        log.warning("Decoding plainly: '%s' fits in memory, but not with its drafter.", model)
        return replace(plan, source=None)
    what = f"'{model}' with its drafter" if more else f"'{model}'"
    memory.refuse(alone + sum(more), what, pairs.instead(alone))
    return plan


def _supported(drafter: Source, target: Source) -> Source:
    drafters.registry.loader(drafter.config, drafter.name)
    reads = drafter.config.get("backbone_hidden_size", drafter.config.get("hidden_size"))
    size = (section(target.config, "text_config") or target.config).get("hidden_size")
    coming = target.bytes_to_come or drafter.bytes_to_come  # else the drafter itself says so, once it is read
    if coming and type(reads) is type(size) is int and reads != size:
        raise IncompatibleDrafter(
            f"The drafter {drafter.name} reads states of size {reads}, but the target {target.name} has hidden size "
            f"{size}; use a drafter that was made for this target."
        )
    return drafter


# Read


def _read_drafter(plan: DrafterPlan, head_bits: int | str, on_progress: OnProgress | None) -> Drafter | None:
    """The drafter of a plan whose files are here, its own output head in fewer bits; OptionError where it has none."""
    loaded: Drafter | None = None
    if isinstance(plan.source, Checkpoint):
        plan.source.on_read = hub.telling("load", "its drafter", on_progress)
        loaded = drafters.load_drafter(plan.source)
    if plan.lookup:
        loaded = Lookup() if loaded is None else LookupFirst(loaded)
    bits = _head_bits(head_bits)
    done = bits and loaded is not None and loaded.quantise_head(bits)
    if bits and not done and head_bits != "auto":
        what = "there is no drafter" if loaded is None else "this drafter has no dense head of its own"
        raise OptionError(f"draft_head_bits {bits} would change nothing: {what}; leave the option out.")
    return loaded


def _head_bits(asked: int | str) -> int:
    if asked == "auto":
        return 4 if mx.default_device() == mx.Device(mx.gpu) else 0
    if isinstance(asked, bool) or asked not in (0, 4, 8):
        raise OptionError(f"draft_head_bits must be 'auto', 0, 4 or 8, not {checks.shown(asked)}.")
    return int(asked)


def _key(*others: object) -> str:
    """Of what is kept from run to run: device, cores, MLX, and what else it depends on."""
    info = mx.device_info()
    device = info.get("device_name") or info.get("architecture") or platform.machine()
    return " | ".join(map(str, (device, os.cpu_count(), importlib.metadata.version("mlx"), *others)))


def _probes_key(checkpoint: Checkpoint) -> str:
    """What the bits of a pass belong to: machine, this program and its BLAS with its threads, and the weights, told by
    their files' sizes and times."""
    names = [f"{library}_NUM_THREADS" for library in ("OPENBLAS", "OMP", "MKL")]
    files = [(file.name, (about := file.stat()).st_size, about.st_mtime_ns)
             for file in visible(checkpoint.path.glob("*.*")) if file.suffix in (".json", ".safetensors")]  # fmt: skip
    program = mx.default_device(), __version__, blas.name(), [os.environ.get(name) for name in names]
    weights = hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    return _key(*program, checkpoint.path, weights)


def _look_at_mlx() -> None:
    """Warns of a slow BLAS, and turns mx.compile off where it would fail: on a CPU MLX builds fused kernels with g++ in
    a shared folder, and raises (0.32.4) where g++ is broken or the folder another user's."""
    if blas.name() == blas.TOO_LATE:
        log.warning("MLX was imported before mlx_mtp and is bound to its slow BLAS: import mlx_mtp first.")
    if mx.default_device() == mx.Device(mx.cpu):
        try:
            mx.eval(mx.compile(lambda x: mx.exp(x) * 2.0 + 1.0)(mx.zeros((2,))))
        except RuntimeError:
            log.warning("MLX cannot compile kernels here (g++ or its folder in the temporary directory): slower.")
            mx.disable_compile()


def _default_sampling(generation: dict[str, Any], path: Path) -> Sampling:
    """The checkpoint's own sampling; greedy unless it says do_sample, as transformers reads the same file."""
    drawn = bool(generation.get("do_sample"))
    names = ("repetition_penalty", *(("temperature", "top_k", "top_p", "min_p") if drawn else ()))
    given = {name: generation[name] for name in names if generation.get(name) is not None}  # null = not given
    try:
        return Sampling(**{"temperature": 1.0 if drawn else 0.0} | given)
    except OptionError as error:
        raise CheckpointError(f"{path}/generation_config.json: {error}") from error


def _end_tokens(
    checkpoint: Checkpoint, generation: dict[str, Any], tokenizer: Tokenizer | None, vocabulary: int
) -> set[int]:
    """Ids that end a reply: of generation_config.json, config.json and the tokenizer together, since each is often
    incomplete. Ids outside the vocabulary are left out (-1 stands for none)."""
    found = list(tokenizer.stop_tokens) if tokenizer else []
    for source in (generation, checkpoint.config, section(checkpoint.config, "text_config")):
        if (given := source.get("eos_token_id")) is not None:
            ids = given if isinstance(given, list) else [given]
            if any(type(token) is not int for token in ids):
                raise misfit("whole numbers as 'eos_token_id'", reprlib.repr(given), checkpoint.name)
            found += ids
    return {token for token in found if 0 <= token < vocabulary}
