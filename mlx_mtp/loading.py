"""From a name to an Engine: local folders, the hub, the embedded pair; which drafter belongs to which target.

What it does: finds files, loads both models, checks that they fit. What it does not do: read tensors
(checkpoint.py) or know a family (targets/, drafters/).
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import reprlib
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp import assets, blas
from mlx_mtp.checkpoint import Checkpoint, read_json, section
from mlx_mtp.depth import cache_folder
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.lookup import Lookup, LookupFirst
from mlx_mtp.engine import Engine
from mlx_mtp.errors import CheckpointError, ModelNotFound, OptionError
from mlx_mtp.interfaces import Drafter
from mlx_mtp.results import Sampling
from mlx_mtp.targets import load_target
from mlx_mtp.tokens import Tokenizer

log = logging.getLogger(__name__)

EMBEDDED = Path(assets.__path__[0]) / "standard-library"
FAMILIES = ("assistant", "parallel", "sequential")  # drafters of the embedded model, by folder; the first is "auto"
LOOKUP_FIRST = "lookup+"  # in front of a drafter's name: the lookup overrules it where it has a long match
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]


def load(
    model: str | Path | None = None,
    *,
    drafter: str | Path | None = "auto",
    depth: int | str = "auto",
    mode: str = "fast",
    max_context: int | None = None,
    draft_head_bits: int | str = "auto",
) -> Engine:
    """Loads a target and its drafter.

    model: a folder, a hub name, or None for the embedded model. drafter: a folder, a hub name, "auto" (the
    assistant made for this target, or none where none is known), "lookup" (what followed the same words before),
    "lookup+" in front of any other, or None / "none" for plain decoding; for the embedded model also "assistant",
    "parallel" or "sequential".
    mode: "fast" or "exact" (greedy output bit-equal with and without the drafter).
    depth: drafts per round, "auto" or 0..8. draft_head_bits: 4 or 8 stores a drafter's dense output head in so many
    bits, 0 leaves it as it is; "auto" = 4 on a GPU, 0 on a CPU, where quantised products are the slower ones. Only
    proposals change, never the answer.

    Raises a subclass of MLXMTPError whose message says what to do.
    """
    _ensure_compile_works()
    if blas.name() == blas.TOO_LATE:
        log.warning("MLX was imported before mlx_mtp and is bound to its slow BLAS: import mlx_mtp first.")
    head_bits = _head_bits(draft_head_bits)
    checkpoint = Checkpoint.open(_target_folder(model))
    target = load_target(checkpoint)
    loaded = _load_drafter(model, checkpoint.path, drafter)
    if loaded is not None and head_bits:
        loaded.quantise_head(head_bits)
    generation = _generation_config(checkpoint)
    return Engine(
        target,
        loaded,
        Tokenizer.load(checkpoint.path),
        end_tokens=_end_tokens(checkpoint, generation),
        depth=depth,
        mode=mode,
        max_context=max_context,
        defaults=_default_sampling(generation, checkpoint.path),
        profile=(cache_folder() / "depth.json", _profile_key(checkpoint.path, drafter, loaded, mode, head_bits)),
    )


def _head_bits(asked: int | str) -> int:
    if asked == "auto":
        return 4 if mx.default_device() == mx.Device(mx.gpu) else 0
    if asked not in (0, 4, 8):
        raise OptionError(f"Expected draft_head_bits 'auto', 0, 4 or 8, found {asked!r}.")
    return int(asked)


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


def _target_folder(model: str | Path | None) -> Path:
    return EMBEDDED / "target" if model is None else _local_folder(model)


def _local_folder(name: str | Path) -> Path:
    """A folder as it is; a hub name downloaded (or found in the hub's local cache)."""
    folder = Path(os.path.expanduser(name))
    if os.path.exists(folder) or not HUB_NAME.fullmatch(str(name)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client raises its own, requests' and OS errors
        raise ModelNotFound(
            f"Expected a folder or a model on the Hugging Face hub at '{name}', found neither "
            f"({type(error).__name__}); check the name, the network and your access to the model."
        ) from error


def _load_drafter(model: str | Path | None, target_folder: Path, drafter: str | Path | None) -> Drafter | None:
    if drafter is None or drafter == "none":
        return None
    if drafter == "lookup":
        return Lookup()
    if isinstance(drafter, str) and drafter.startswith(LOOKUP_FIRST):
        inner = _load_drafter(model, target_folder, drafter.removeprefix(LOOKUP_FIRST))
        return LookupFirst(inner) if inner is not None else Lookup()
    if model is None and drafter in ("auto", *FAMILIES):
        return load_drafter(Checkpoint.open(_embedded_drafter(FAMILIES[0] if drafter == "auto" else str(drafter))))
    if drafter == "auto":
        found = _known_drafter(model, target_folder)
        if found is None:
            log.warning("No drafter is known for '%s': decoding plainly. Name one with --drafter.", model)
            return None
        drafter = found
    if drafter in FAMILIES:
        raise OptionError(f"Expected a drafter's folder or hub name, 'auto', 'lookup' or 'none', found '{drafter}'.")
    return load_drafter(Checkpoint.open(_local_folder(drafter)))


def _embedded_drafter(family: str) -> Path:
    folder = EMBEDDED / family
    if not folder.is_dir():
        there = [f"'{name}'" for name in FAMILIES if (EMBEDDED / name).is_dir()]
        raise OptionError(
            f"Expected a drafter that comes with the embedded model ({' or '.join(there) or 'none does'}), found "
            f"'{family}', which this installation does not hold; name another one, a folder, 'lookup' or 'none'."
        )
    return folder


def _known_drafter(model: str | Path | None, target_folder: Path) -> str | Path | None:
    """The assistant beside a local target, or google's on the hub; None where none is known."""
    for folder in (target_folder / "assistant", Path(f"{target_folder}-assistant"), target_folder.parent / "assistant"):
        if (folder / "config.json").is_file():
            return folder
    name = str(model)
    if re.fullmatch(r"google/gemma-4-[\w-]+-it", name, re.IGNORECASE):
        return name + "-assistant"
    return None


def _generation_config(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.path / "generation_config.json"
    return read_json(file) if file.exists() else {}


def _default_sampling(generation: dict[str, Any], path: Path) -> Sampling:
    """The checkpoint's own sampling; greedy unless it says do_sample, as transformers reads the same file."""
    if not generation.get("do_sample"):
        return Sampling(temperature=0.0, repetition_penalty=generation.get("repetition_penalty"))
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    try:
        found: dict[str, Any] = {"temperature": 1.0} | {name: generation[name] for name in names if name in generation}
        return Sampling(**found)
    except OptionError as error:
        raise CheckpointError(f"{path}/generation_config.json: {error}") from error


def _end_tokens(checkpoint: Checkpoint, generation: dict[str, Any]) -> set[int]:
    """Ids that end a reply, from generation_config.json, else from config.json."""
    for source in (generation, checkpoint.config, section(checkpoint.config, "text_config")):
        found = source.get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(isinstance(token, int) for token in ids):
                raise CheckpointError(
                    f"{checkpoint.path}: expected whole numbers as 'eos_token_id', found {reprlib.repr(found)}; "
                    "use the files that belong to this checkpoint."
                )
            return set(ids)
    return set()
