"""Quantises a checkpoint that the engine loads (mlx's affine form): targets by mlx-lm, drafters tensor by tensor.

What has no such form, like norms, stays as it is. Bits are the same for every layer, unless the model's class in
mlx-lm says otherwise.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import load_model, quantize_model, save_config, save_model

from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters, section, write_tensors
from mlx_mtp.converting.output import copy_companions
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters import registry as drafters
from mlx_mtp.errors import CheckpointError, OptionError, UnsupportedModel, explaining
from mlx_mtp.targets import generic

WHAT, BITS, GROUPS = ("auto", "quantise", "split"), (4, 8), (32, 64, 128)


def check_options(what: str, bits: int | None, group: int) -> None:
    """OptionError for what is not offered. bits: None quantises nothing."""
    for name, value, known in (("--what", what, WHAT), ("--bits", bits, BITS), ("--group-size", group, GROUPS)):
        if value is not None and value not in known:
            *first, last = map(str, known)
            raise OptionError(f"{name} is {value}, but must be {', '.join(first)} or {last}.")


def quantise(checkpoint: Checkpoint, folder: Path, bits: int, group: int) -> None:
    """Writes a checkpoint again with its matrices in `bits` bits and groups of `group` numbers."""
    model_type = checkpoint.config["model_type"]
    if section(checkpoint.config, "quantization") or any(name.endswith(".scales") for name, *_ in checkpoint.tensors()):
        raise CheckpointError(f"{checkpoint.path} is not in full precision but quantised already; "
                              "quantise the checkpoint it was made from.")  # fmt: skip
    if model_type in drafters.model_types:
        quantised = _drafter(checkpoint, folder, bits, group)
    elif generic.has_model(checkpoint.config):
        quantised = _target(checkpoint, folder, bits, group)
    else:
        raise UnsupportedModel(f"{checkpoint.path}: '{model_type}' is a model type neither of mlx-lm nor of a drafter "
                               "here; quantise another checkpoint.")  # fmt: skip
    if not quantised:
        raise OptionError(f"{checkpoint.path} has no matrix whose rows can be cut into groups of {group}; "
                          "use a smaller --group-size.")  # fmt: skip
    copy_companions(checkpoint.path, folder)


def _target(checkpoint: Checkpoint, folder: Path, bits: int, group: int) -> bool:
    """Through mlx-lm: load lazily, quantise, save shard by shard. Whether anything was quantised."""
    checkpoint.check_files()
    for names, high in ((generic.LAYERS, generic.MAX_COUNT), (("hidden_size",), generic.MAX_SIZE)):
        generic._size(checkpoint.config, names, 1, high)
    what = f"{checkpoint.path}: mlx-lm cannot quantise this {checkpoint.config['model_type']} model"
    advice = "the weights and config.json must be whole and belong together"
    # mlx-lm has no error class of its own, and prints as it goes.
    with explaining(what, advice, Exception), contextlib.redirect_stdout(io.StringIO()):
        model, config = load_model(checkpoint.path, lazy=True, get_model_classes=generic._classes)
        model, config = quantize_model(model, config, group, bits)
    if not any(name.endswith(".scales") for name in named_parameters(model)):
        return False
    save_model(folder, model, donate_model=True)
    save_config(config, folder / "config.json")
    return True


def _drafter(checkpoint: Checkpoint, folder: Path, bits: int, group: int) -> bool:
    """Layers are told by the loaded drafter, tensors taken from the files: some families reorder them at load."""
    drafter: Any = load_drafter(checkpoint)  # every one with weights has a model
    layers = {
        f"{path}.weight"
        for path, layer in drafter.model.named_modules()
        if hasattr(layer, "to_quantized") and layer.weight.shape[-1] % group == 0
    }

    def quantised() -> Iterator[tuple[str, mx.array]]:
        for name, weight in checkpoint.weights().items():
            if name in layers:
                stem = name.removesuffix("weight")
                yield from zip((name, f"{stem}scales", f"{stem}biases"), mx.quantize(weight, group, bits), strict=True)
            else:
                yield name, weight

    settings = {"group_size": group, "bits": bits, "mode": "affine"}
    write_tensors(folder, {**checkpoint.config, "quantization": settings}, quantised())
    return bool(layers)
