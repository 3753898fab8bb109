"""Quantises a checkpoint that the engine loads: targets by mlx-lm, drafters tensor by tensor.

What it does: cuts rows into groups and stores every group in few bits (mlx's affine quantisation); what has no such
form, like norms, stays as it is. What it does not do: quantise what is quantised, or choose bits per layer, except as
the model class of mlx-lm does.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters, number, section
from mlx_mtp.converting.files import copy_companions, unwritten, write_model
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters import registry as drafters
from mlx_mtp.errors import CheckpointError, OptionError, UnsupportedModel, brief
from mlx_mtp.targets import generic

BITS, GROUPS = (4, 8), (32, 64, 128)


class _HasModel(Protocol):
    """What every drafter with weights has."""

    model: nn.Module


def check_options(bits: int, group: int) -> None:
    """OptionError for bits or groups that are not offered."""
    if bits not in BITS:
        raise OptionError(f"Expected --bits 4 or 8, found {bits}.")
    if group not in GROUPS:
        raise OptionError(f"Expected --group-size 32, 64 or 128, found {group}.")


def quantise(checkpoint: Checkpoint, folder: Path, bits: int, group: int) -> None:
    """Writes a checkpoint again with its matrices in `bits` bits and groups of `group` numbers.

    Raises UnsupportedModel for a model type that neither mlx-lm nor a drafter family knows, CheckpointError for a
    checkpoint that is quantised already, OptionError where no row can be cut into such groups.
    """
    model_type = checkpoint.config["model_type"]
    if section(checkpoint.config, "quantization") or any(n.endswith(".scales") for n in checkpoint.weights()):
        raise CheckpointError(
            f"{checkpoint.path}: expected weights in full precision, found quantised ones; "
            "quantise the checkpoint they were made from."
        )
    if drafters.knows(model_type):
        quantised = _drafter(checkpoint, folder, bits, group)
    elif generic.has_model(checkpoint.config):
        quantised = _target(checkpoint, folder, bits, group)
    else:
        raise UnsupportedModel(
            f"{checkpoint.path}: expected a model type of mlx-lm or of a drafter here, found '{model_type}'; "
            "quantise another checkpoint."
        )
    if not quantised:
        raise OptionError(
            f"Expected matrices in {checkpoint.path} whose rows can be cut into groups of {group}, found none; "
            "use a smaller --group-size."
        )
    copy_companions(checkpoint.path, folder)


def _target(checkpoint: Checkpoint, folder: Path, bits: int, group: int) -> bool:
    """Through mlx-lm: load lazily, quantise, save shard by shard. Whether anything was quantised."""
    checkpoint.check_files()
    where = str(checkpoint.path / "config.json")
    for names, high in ((generic.LAYERS, generic.MAX_COUNT), (("hidden_size",), generic.MAX_SIZE)):
        for name in names:
            if checkpoint.config.get(name) is not None and not isinstance(checkpoint.config[name], list):
                number(checkpoint.config, name, int, 1, high, where=where)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints as it goes
            model, config = load_model(checkpoint.path, lazy=True, get_model_classes=generic._classes)
            model, config = quantize_model(model, config, group, bits)
    except Exception as error:  # mlx-lm has no error class of its own
        raise CheckpointError(
            f"{checkpoint.path}: mlx-lm cannot quantise this {checkpoint.config['model_type']} model ({brief(error)}); "
            "the weights and config.json must be whole and belong together."
        ) from error
    if not any(name.endswith(".scales") for name in named_parameters(model)):
        return False
    try:
        save_model(folder, model, donate_model=True)
    except RuntimeError as error:
        raise unwritten(folder, error) from error
    save_config(config, folder / "config.json")
    return True


def _drafter(checkpoint: Checkpoint, folder: Path, bits: int, group: int) -> bool:
    """Layers are told by the loaded drafter, tensors taken from the files: some families reorder them at load."""
    model = cast(_HasModel, load_drafter(checkpoint)).model
    layers = {
        f"{path}.weight"
        for path, layer in model.named_modules()
        if hasattr(layer, "to_quantized") and layer.weight.shape[-1] % group == 0
    }
    settings = {"group_size": group, "bits": bits, "mode": "affine"}
    config = {**checkpoint.config, "quantization": settings}
    write_model(folder, config, _quantised(checkpoint.weights(), layers, settings))
    return bool(layers)


def _quantised(
    weights: Mapping[str, mx.array], layers: set[str], settings: Mapping[str, Any]
) -> Iterator[tuple[str, mx.array]]:
    for name, weight in weights.items():
        if name not in layers:
            yield name, weight
            continue
        path = name.removesuffix("weight")
        packed, scales, biases = mx.quantize(weight, settings["group_size"], settings["bits"])
        yield from ((name, packed), (f"{path}scales", scales), (f"{path}biases", biases))
