"""Target families. Each file registers itself here, and nothing else lists them; another distribution names its loaders
as entry points of the group `mlx_mtp.targets`.

A family is one function `load(checkpoint) -> Target` for some values of config.json's `model_type`.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.registry import Registry
from mlx_mtp.generation.interfaces import Target

registry: Registry[Target] = Registry("target", __name__, __path__, "mlx_mtp.targets")
# The loaded model of a checkpoint; UnsupportedModel where no family knows its model_type.
load_target = registry.load


# Output heads that keep a row a token.
WITH_ROWS = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)


def rows_of(module: Any, tokens: mx.array) -> Any:
    """The same linear layer or table [V, ...] with the rows of `tokens` [N] alone; quantised rows stay as they are."""
    cut = copy.copy(module)
    for name, array in module.items():
        if isinstance(array, mx.array) and array.ndim and name != "global_scale":
            cut[name] = array[tokens]
    mx.eval(cut.parameters())  # only the thread that made a lazy array can compute it
    return cut
