"""From a name to an Engine: local folders, the hub, the embedded pair; which drafter belongs to which target.

Finds both models, refuses what does not fit before anything is downloaded or read, loads them, checks
that they belong together. The hub, the table of pairs and the reading of tensors are in checkpoints/.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp import assets
from mlx_mtp.backend import blas, threads
from mlx_mtp.checkpoints import hub, memory, pairs
from mlx_mtp.checkpoints.checkpoint import Checkpoint, on_read, read_json, section
from mlx_mtp.checkpoints.hub import Listing, OnProgress, Progress
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.lookup import Lookup, LookupFirst
from mlx_mtp.engine import MODES, Engine
from mlx_mtp.errors import CheckpointError, ModelNotFound, OptionError
from mlx_mtp.generation import checks
from mlx_mtp.generation.depth_profile import profile_path
from mlx_mtp.generation.interfaces import Drafter
from mlx_mtp.generation.types import Sampling
from mlx_mtp.targets import load_target
from mlx_mtp.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

EMBEDDED = Path(assets.__path__[0]) / "standard-library"
FAMILIES = ("assistant", "parallel", "sequential")  # drafters of the embedded model, by folder; the first is "auto"
LOOKUP_FIRST = "lookup+"  # in front of a drafter's name: the lookup overrules it where it has a long match

Place = Path | Listing  # where a model is, or what the hub will send of it


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

    model: a folder, a hub name, or None for the embedded model. drafter: a folder, a hub name, "auto" (the
    assistant made for this target, or none where none is known), "lookup" (what followed the same words before),
    "lookup+" in front of any other, or None / "none" for plain decoding; for the embedded model also "assistant",
    "parallel" or "sequential".
    mode: "fast" or "exact" (greedy output bit-equal with and without the drafter).
    depth: drafts per round, "auto" or 0..8. draft_head_bits: 4 or 8 stores a drafter's dense output head in so many
    bits, 0 leaves it as it is; "auto" = 4 on a GPU, 0 on a CPU, where quantised products are the slower ones. Only
    proposals change, never the answer.
    on_progress: hears how far downloads and reading are (hub.Progress), in the thread that loads.

    A model too large for this machine is refused (DoesNotFit) before it is downloaded or read; the environment
    variable MLX_MTP_IGNORE_MEMORY=1 loads it all the same. On Metal the weights stay resident (memory.Wired).
    Raises a subclass of MLXMTPError whose message says what to do.
    """
    if model is not None:
        model = checks.place("model", model)
    drafter = None if drafter is None else checks.place("drafter", drafter)
    checks.one_of("mode", mode, MODES)
    checks.function("on_progress", on_progress)
    _ensure_compile_works()
    if blas.name() == blas.TOO_LATE:
        log.warning("MLX was imported before mlx_mtp and is bound to its slow BLAS: import mlx_mtp first.")
    head_bits = _head_bits(draft_head_bits)
    target_place = EMBEDDED / "target" if model is None else _place(model)
    _check_folder(target_place)
    plan = _plan_drafter(model, target_place, drafter)
    for place in plan.places():
        _check_folder(place)
    if model is not None:
        plan = _checked_memory(model, target_place, plan)
    hub.check_disk([place for place in (target_place, *plan.places()) if isinstance(place, Listing)])
    checkpoint = Checkpoint.open(_folder(target_place, on_progress))
    others = _drafter_folders(plan, on_progress)
    with _telling(str(model or "the embedded model"), on_progress):
        target = load_target(checkpoint)
    with _telling("its drafter", on_progress):
        loaded = _load_drafter(plan, others)
    _quantise_head(loaded, head_bits, chosen=draft_head_bits != "auto")
    if loaded is None and plan.wanted:
        depth = "auto"  # that no drafter was found has been said; a depth for one is then without object
    generation, tokenizer = _generation_config(checkpoint), Tokenizer.load(checkpoint.path)
    engine = Engine(
        target,
        loaded,
        tokenizer,
        stop_tokens=_end_tokens(checkpoint, generation, tokenizer, target.info.vocab_size),
        depth=depth,
        mode=mode,
        max_context=max_context,
        defaults=_default_sampling(generation, checkpoint.path),
        profile=(profile_path(), _profile_key(checkpoint.path, drafter, loaded, mode, head_bits)),
    )
    memory.wired.add(engine, sum(memory.folder_bytes(each) for each in (checkpoint.path, *others)))
    return engine


def another_drafter(
    model: str | Path | None,
    drafter: str | Path,
    draft_head_bits: int | str = "auto",
    on_progress: OnProgress | None = None,
) -> Drafter | None:
    """A second drafter for a target that is loaded already, named as `load` takes it; None where none is known."""
    bits = _head_bits(draft_head_bits)
    plan = _drafter_plan(model, drafter)
    loaded = _load_drafter(plan, _drafter_folders(plan, on_progress))
    _quantise_head(loaded, bits, chosen=draft_head_bits != "auto")
    return loaded


def drafter_folder(model: str | Path | None, drafter: str | Path | None) -> Path | None:
    """Where the files of the drafter are that `load` takes under this name; None for one without files."""
    folders = _drafter_folders(_drafter_plan(model, drafter), None)
    return folders[0] if folders else None


def _drafter_plan(model: str | Path | None, drafter: str | Path | None) -> DrafterPlan:
    return _plan_drafter(model, EMBEDDED / "target" if model is None else _place(model), drafter)


def _head_bits(asked: int | str) -> int:
    if asked == "auto":
        return 4 if mx.default_device() == mx.Device(mx.gpu) else 0
    if isinstance(asked, bool) or asked not in (0, 4, 8):
        raise OptionError(f"draft_head_bits must be 'auto', 0, 4 or 8, not {checks.shown(asked)}.")
    return int(asked)


def _quantise_head(drafter: Drafter | None, bits: int, chosen: bool) -> None:
    """Stores the drafter's own output head in fewer bits; OptionError where somebody chose so and it has none."""
    if not bits:
        return
    done = drafter is not None and drafter.quantise_head(bits)
    if chosen and not done:
        what = "there is no drafter" if drafter is None else "this drafter has no dense head of its own"
        raise OptionError(f"draft_head_bits {bits} would change nothing: {what}; leave the option out.")


def _profile_key(path: Path, named: object, drafter: Drafter | None, mode: str, head_bits: int) -> str:
    """What a cost curve belongs to: device, MLX, target, drafter, mode and the draft head's bits."""
    info = mx.device_info()
    device = info.get("device_name") or info.get("architecture") or platform.machine()
    mlx_version = importlib.metadata.version("mlx")
    family = type(drafter).__name__
    parts = (device, os.cpu_count(), mlx_version, path, named, family, mode, head_bits)
    return " | ".join(map(str, parts))


def _ensure_compile_works() -> None:
    """Turns mx.compile off where it would fail: MLX's CPU backend builds fused kernels with g++ in a shared folder.

    Without any g++ MLX goes unfused by itself; a broken one, or a kernel folder of another user, raises (0.32.4).
    """
    if mx.default_device() == mx.Device(mx.cpu):
        try:
            mx.eval(mx.compile(lambda x: mx.exp(x) * 2.0 + 1.0)(mx.zeros((2,))))
        except RuntimeError:
            log.warning("MLX cannot compile kernels here (g++ or its folder in the temporary directory): slower.")
            mx.disable_compile()


def _place(name: str | Path) -> Place:
    """A folder as it is; of a hub name the folder in the cache, or what is to be downloaded."""
    folder = Path(os.path.expanduser(name))
    if os.path.exists(folder) or not hub.NAME.fullmatch(str(name)):
        return folder
    return hub.find(str(name))


def _check_folder(place: Place) -> None:
    """Tells of a wrong path before anything is downloaded or read."""
    if isinstance(place, Path):
        Checkpoint.open(place)


def _folder(place: Place, on_progress: OnProgress | None) -> Path:
    return hub.download(place, on_progress) if isinstance(place, Listing) else place


@contextmanager
def _telling(name: str, on_progress: OnProgress | None) -> Iterator[None]:
    """Within, reading weights is reported."""

    def tell(done: int, total: int) -> None:
        if on_progress is not None:
            on_progress(Progress("load", name, done, total))

    token = on_read.set(tell)
    try:
        yield
    finally:
        on_read.reset(token)


@dataclass(frozen=True)
class DrafterPlan:
    """Which drafter, before any is loaded. lookup: alone or in front of the one at `place`.

    chosen: the user named it, so that failing is better than going without. wanted: plain decoding was not asked for.
    """

    lookup: bool = False
    place: Place | None = None
    chosen: bool = True
    wanted: bool = True

    def places(self) -> list[Place]:
        """The place as a list, empty without one."""
        return [] if self.place is None else [self.place]


def _plan_drafter(model: str | Path | None, target: Place, drafter: str | Path | None) -> DrafterPlan:
    if drafter is None or drafter == "none":
        return DrafterPlan(wanted=False)
    if drafter == "lookup":
        return DrafterPlan(lookup=True)
    if isinstance(drafter, str) and drafter.startswith(LOOKUP_FIRST):
        name = drafter.removeprefix(LOOKUP_FIRST)
        if name in ("", "none") or name.startswith("lookup"):
            raise OptionError(f"drafter '{drafter}' names none after 'lookup+'; 'lookup' alone needs no other.")
        inner = _plan_drafter(model, target, name)
        return DrafterPlan(True, inner.place, inner.chosen)
    if model is None and drafter in ("auto", *FAMILIES):
        return DrafterPlan(place=_embedded_drafter(FAMILIES[0] if drafter == "auto" else str(drafter)))
    if drafter == "auto":
        return _known_drafter(model, target)
    if drafter in FAMILIES:
        raise OptionError(f"Expected a drafter's folder or hub name, 'auto', 'lookup' or 'none', found '{drafter}'.")
    return DrafterPlan(place=_place(drafter))


def _known_drafter(model: str | Path | None, target: Place) -> DrafterPlan:
    """The assistant beside a local target, or the table's for its name; plain decoding where none is to be had."""
    if isinstance(target, Path) and (found := pairs.beside(target)):
        return DrafterPlan(place=found)
    in_cache = pairs.hub_name_of(target) if isinstance(target, Path) else target.name
    name = pairs.assistant_of(str(model)) or (in_cache and pairs.assistant_of(in_cache))
    if not name:
        log.warning("No drafter is known for '%s': decoding plainly. Name one with --drafter.", model)
        return DrafterPlan()
    try:
        return DrafterPlan(place=_place(name), chosen=False)
    except ModelNotFound as error:
        log.warning("Decoding plainly, since the drafter could not be had: %s", error)
        return DrafterPlan()


def _checked_memory(model: str | Path, target: Place, plan: DrafterPlan) -> DrafterPlan:
    """The plan, without a drafter that nobody asked for where only the target fits; DoesNotFit where not even that."""
    available = memory.available_bytes()
    places = [target, *plan.places()]
    if memory.fits(sum(_weights(place, exact=False) for place in places), available):
        return plan
    alone, *more = (_weights(place, exact=True) for place in places)
    if more and not plan.chosen and memory.fits(alone, available) and not memory.fits(alone + sum(more), available):
        log.warning("Decoding plainly: '%s' fits in memory, but not with its drafter.", model)
        return DrafterPlan(plan.lookup)
    what = f"'{model}' with its drafter" if more else f"'{model}'"
    memory.check(alone + sum(more), what, pairs.instead(available, alone))
    return plan


def _weights(place: Place, exact: bool) -> int:
    return place.weight_bytes(exact) if isinstance(place, Listing) else memory.folder_bytes(place)


def _drafter_folders(plan: DrafterPlan, on_progress: OnProgress | None) -> list[Path]:
    """The drafter's folder, empty without one, and where one that nobody asked for by name cannot be downloaded."""
    try:
        return [_folder(place, on_progress) for place in plan.places()]
    except ModelNotFound as error:
        if plan.chosen:
            raise
        log.warning("Decoding plainly, since the drafter could not be had: %s", error)
        return []


def _load_drafter(plan: DrafterPlan, folders: Sequence[Path]) -> Drafter | None:
    inner = load_drafter(Checkpoint.open(folders[0])) if folders else None
    if not plan.lookup:
        return inner
    return Lookup() if inner is None else LookupFirst(inner)


def _embedded_drafter(family: str) -> Path:
    folder = EMBEDDED / family
    if not folder.is_dir():
        there = [f"'{name}'" for name in FAMILIES if (EMBEDDED / name).is_dir()]
        raise OptionError(
            f"Expected a drafter that comes with the embedded model ({' or '.join(there) or 'none does'}), found "
            f"'{family}', which this installation does not hold; name another one, a folder, 'lookup' or 'none'."
        )
    return folder


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.path / "generation_config.json"
    return read_json(file) if file.exists() else {}


def _default_sampling(generation: dict[str, Any], path: Path) -> Sampling:
    """The checkpoint's own sampling; greedy unless it says do_sample, as transformers reads the same file."""
    if not generation.get("do_sample"):
        return Sampling(temperature=0.0, repetition_penalty=generation.get("repetition_penalty"))
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    try:
        given = {name: generation[name] for name in names if generation.get(name) is not None}  # null = not given
        found: dict[str, Any] = {"temperature": 1.0} | given
        return Sampling(**found)
    except OptionError as error:
        raise CheckpointError(f"{path}/generation_config.json: {error}") from error


def _end_tokens(
    checkpoint: Checkpoint, generation: dict[str, Any], tokenizer: Tokenizer | None, vocabulary: int
) -> set[int]:
    """Ids that end a reply: of generation_config.json, config.json and the tokenizer with its template, together.

    Each of them is often incomplete. Ids outside the vocabulary can never come and are left out (-1 stands for none).
    """
    found = set(tokenizer.stop_tokens) if tokenizer else set()
    for source in (generation, checkpoint.config, section(checkpoint.config, "text_config")):
        given = source.get("eos_token_id")
        ids = given if isinstance(given, list) else [] if given is None else [given]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise CheckpointError(
                f"{checkpoint.path}: expected whole numbers as 'eos_token_id', found {reprlib.repr(given)}; "
                "use the files that belong to this checkpoint."
            )
        found |= set(ids)
    return {token for token in found if 0 <= token < vocabulary}
