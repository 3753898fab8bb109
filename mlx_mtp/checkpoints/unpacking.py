"""Quantised weights on a CPU: computed with as the same numbers in float32, where those fit in memory.

MLX's products with packed weights are several times slower there than with float32 (SmolLM2-135M on two cores: 410
against 99 ms a token). On a GPU packed weights are the faster ones and stay packed.
"""

from __future__ import annotations

import logging

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear
from mlx_lm.utils import dequantize_model

from mlx_mtp.checkpoints import memory

log = logging.getLogger(__name__)

SHARE = 0.5  # of the memory, what float32 may take: the machine has other things to hold


def unpack(module: nn.Module, name: str = "") -> None:
    """Replaces quantised layers by plain ones of the same values in float32, lazily, on a CPU and where they fit.

    Not for MLX's 4-bit floats, whose embeddings MLX reads as bfloat16, so that the model would compute other numbers.
    name: for a line of the log; none for "".
    """
    if not memory.on_cpu():
        return
    packed = [each for _, each in module.named_modules()
              if isinstance(each, (nn.QuantizedLinear, nn.QuantizedEmbedding, QuantizedSwitchLinear))]  # fmt: skip
    size, there = sum(each.weight.size * 32 // each.bits * 4 for each in packed), memory.available_bytes()
    if {each.mode for each in packed} == {"affine"} and size <= SHARE * there:
        module.set_dtype(mx.float32)  # scales and offsets, so that nothing is rounded
        dequantize_model(module)
        module.set_dtype(mx.float32)
        said = f": {name} is computed with the same values in float32 ({memory.readable(size)})."
    else:
        said = (f", and those of {name} stay as they are: float32 would take {memory.readable(size)} of the "
                f"{memory.readable(there)} here, or change them. Expect a few tokens a second.")  # fmt: skip
    if name and packed:
        log.warning("Quantised weights are slow on a CPU%s", said)
