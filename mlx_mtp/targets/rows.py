"""Rows of an output head: what a drafter whose head is cut to a shortlist of tokens needs of its target's."""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn

WITH_ROWS = (nn.Linear, nn.Embedding, nn.QuantizedLinear, nn.QuantizedEmbedding)


def rows_of(module: Any, tokens: mx.array) -> Any:
    """The same linear layer or table [V, ...] with the rows of `tokens` [N] alone; quantised rows stay as they are."""
    cut = copy.copy(module)
    for name, array in module.items():
        if isinstance(array, mx.array) and array.ndim and name != "global_scale":
            cut[name] = array[tokens]
    mx.eval(cut.parameters())  # only the thread that made a lazy array can compute it
    return cut
