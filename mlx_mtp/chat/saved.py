"""A conversation on disk: its messages and its K/V, for the same model only.

Format: safetensors; the metadata field "mlx_mtp" is JSON with `format`, `version`, `target`, `drafter` (fingerprints),
`mode`, `messages`, `thinking`, `capacity`, `newest` and `digest`, the SHA-256 of all that and of the tensors. These are
`ids` int32 [T], `keys.<i>` and `values.<i>` [1, G, T, d] (committed positions of full layers, whole rings of sliding
ones), and `memory.<path>`, the leaves of the drafter's memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_mtp.backend import threads
from mlx_mtp.checkpoints.atomic import write_state
from mlx_mtp.checkpoints.checkpoint import header_of, visible
from mlx_mtp.errors import CheckpointError
from mlx_mtp.generation.cache import FULL, SLACK, capacity_for
from mlx_mtp.generation.prefix import Lease, Session
from mlx_mtp.version import __version__

if TYPE_CHECKING:
    from mlx_mtp.chat.conversation import Chat
    from mlx_mtp.engine import Engine

FORMAT = 2
SAMPLE = 1 << 16  # bytes of every weight file that a fingerprint reads at its start, middle and end
WEIGHTS = 64  # values of every tensor of a drafter that its fingerprint reads at the start and at the end
SUFFIX = ".safetensors"
START = b'{"__metadata__":{"mlx_mtp":"{\\"format\\": '  # of the header, after its length
ROLES = ("system", "user", "assistant")
ELSEWHERE = "free some disk space, or choose another path"


def fingerprint(folder: Path | None) -> str:
    """What a checkpoint is known by: its config, its tokenizer, the sizes and samples of its weights."""
    digest = hashlib.sha256()
    if folder is not None:
        for file in visible(folder.iterdir()):
            if file.suffix not in (".json", ".safetensors", ".model", ".jinja") or not file.is_file():
                continue
            size = file.stat().st_size
            digest.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                for start in (0, size // 2, max(0, size - SAMPLE)):
                    stream.seek(start)
                    digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:32]


def drafter_fingerprint(engine: Engine) -> str:
    """What the drafter's memory belongs to: its family, its name, its weights; families without memory are all alike.

    Weights are told apart by the sizes and the first and last values of every tensor.
    """
    drafter = engine.drafter
    if drafter is None or not drafter.reads_prompt:
        return "none"
    ends = {}
    for i, module in enumerate(drafter.modules()):
        for path, tensor in dict(tree_flatten(module.parameters())).items():
            flat = tensor.reshape(-1)
            ends[f"{i}.{path} {tensor.shape}"] = mx.concatenate([flat[:WEIGHTS], flat[-WEIGHTS:]])
    return f"{type(drafter).__name__} {drafter.name} {_digest({}, ends)[:32]}"


@threads.device_work
def save_chat(chat: Chat, file: Path) -> Path:
    """Writes the conversation and returns its file's name, which ends in .safetensors.

    CheckpointError where the disk does not take it, or where another kind of file has that name; it is untouched then.
    """
    file = _named(file)
    if os.path.exists(file) and not _is_ours(file):
        raise CheckpointError(f"{file} is no saved conversation and is not replaced; choose another name.")
    engine, session = chat.engine, chat.session
    about: dict[str, Any] = {
        "format": FORMAT, "messages": chat.messages, "thinking": chat.thinking,
        "target": fingerprint(engine.target.path), **_layout(engine),
    }  # fmt: skip
    tensors = {"ids": mx.array(session.ids, dtype=mx.int32)}
    if session.lease is not None:
        about |= {"capacity": session.lease.cache.capacity, "newest": session.lease.cache.newest}
        tensors |= _rows(session.lease, len(session.ids))
    about["digest"] = _digest(about, tensors)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{file}: its folder could not be made ({error}); {ELSEWHERE}.") from error
    write_state(file, tensors, about, ELSEWHERE)
    return file


def _named(file: Path) -> Path:
    """The file a conversation of this name is in; CheckpointError for what can be no file's name."""
    if not file.name or "\0" in str(file):
        raise CheckpointError(f"'{file}' is no file's name; write one, like session.")
    return file if file.suffix == SUFFIX else file.with_name(file.name + SUFFIX)


def _is_ours(file: Path) -> bool:
    """Whether a file may be replaced: whatever is damaged in it, it was written as a conversation."""
    try:
        with file.open("rb") as stream:
            return START in stream.read(8 + len(START))
    except OSError:
        return False


def _layout(engine: Engine) -> dict[str, str]:
    """What K/V on disk belong to besides the target; with anything else they are computed anew."""
    return {"version": __version__, "drafter": drafter_fingerprint(engine), "mode": engine.mode}


def _digest(about: Mapping[str, Any], tensors: Mapping[str, mx.array]) -> str:
    """SHA-256 of the metadata and of every tensor's name, kind and bytes."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        content = np.array(mx.view(tensor.reshape(-1), mx.uint8)).tobytes() if tensor.size else b""
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode() + content)
    return digest.hexdigest()


def _rows(lease: Lease, length: int) -> dict[str, mx.array]:
    """K/V without positions that were not committed, and the drafter's memory."""
    found = {f"memory.{path}": leaf for path, leaf in dict(tree_flatten(lease.memory)).items()}
    for i, shape in enumerate(lease.cache.shapes):
        for name, buffers in (("keys", lease.cache.keys), ("values", lease.cache.values)):
            found[f"{name}.{i}"] = buffers[i][:, :, :length] if shape.kind == FULL else buffers[i]
    return found


@threads.device_work
def load_chat(engine: Engine, file: Path) -> tuple[list[dict[str, Any]], bool, Session]:
    """Messages, thinking and K/V of a file; CheckpointError where it is another model's, damaged, or no conversation.

    With another drafter, mode or version of mlx_mtp than it was saved with, the K/V are computed anew when the
    conversation goes on.
    """
    if not os.path.isfile(file):  # unlike Path.is_file it answers for every string
        file = _named(file)
    tensors, about = _read(file)
    if about["target"] != fingerprint(engine.target.path):
        raise CheckpointError(
            f"{file}: this conversation was with another model, other weights or another tokenizer; load the model it "
            "was saved with."
        )
    session = Session()
    if "capacity" in about and all(about.get(name) == mine for name, mine in _layout(engine).items()):
        ids = np.array(tensors.pop("ids")).tolist()
        session.fill(engine.pair, _lease(engine, tensors, about, ids, file), ids)
    return about["messages"], about["thinking"], session


def _read(file: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and metadata of a sound file."""
    if not os.path.isfile(file):
        raise CheckpointError(f"There is no saved conversation at '{file}'; check the path.")
    header_of(file)
    try:
        loaded: Any = mx.load(str(file), return_metadata=True)
        tensors, metadata = loaded
        about = json.loads(metadata["mlx_mtp"])
        mx.eval(tensors)
        sound = about.pop("digest") == _digest(about, tensors)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(file, "was not saved by this program") from error
    if not sound:
        raise _damaged(file, "was changed or damaged")
    ids = tensors.get("ids", mx.array(0))
    if about.get("format") != FORMAT or ids.dtype != mx.int32 or ids.ndim != 1:
        raise _damaged(file, f"is not of format {FORMAT}")
    thinking, messages = about.get("thinking"), about.get("messages")
    if not (isinstance(thinking, bool) and isinstance(messages, list) and all(map(_is_message, messages))):
        raise _damaged(file, "holds no conversation")
    return tensors, about


def _is_message(one: Any) -> bool:
    return isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str)


def _damaged(file: Path, found: str) -> CheckpointError:
    return CheckpointError(f"{file} {found}; use a conversation that 'save' has written.")


def _lease(
    engine: Engine, tensors: dict[str, mx.array], about: dict[str, Any], ids: list[int], file: Path
) -> Lease:
    """Buffers of this engine's own layout, with the file's K/V in them; CheckpointError where those do not fit."""
    info, capacity, newest = engine.target.info, about["capacity"], about.get("newest")
    most = capacity_for(info.max_context + 2 * SLACK)
    if not type(capacity) is type(newest) is int or not 0 < len(ids) <= min(newest + 1, info.max_context) or (
        not newest < capacity <= most
    ):
        raise _damaged(file, f"has {len(ids)} tokens in room for {capacity}, which this model cannot have written")
    cache = engine.target.new_cache(capacity)
    lease, cache.newest = Lease(cache, engine.drafter.start(1, capacity) if engine.drafter else {}), newest
    wanted, found = ({name: (t.shape, t.dtype) for name, t in each.items()}
                     for each in (_rows(lease, len(ids)), tensors))  # fmt: skip
    if wanted != found:
        raise _damaged(file, "has K/V of other shapes than this model's")
    for name, buffers in (("keys", cache.keys), ("values", cache.values)):
        for i, buffer in enumerate(buffers):
            rows = tensors[f"{name}.{i}"]
            buffer[:, :, : rows.shape[2]] = rows
    cache.length = mx.array([len(ids)], dtype=mx.int32)
    lease.memory = tree_map_with_path(lambda path, _: tensors[f"memory.{path}"], lease.memory)
    return lease
