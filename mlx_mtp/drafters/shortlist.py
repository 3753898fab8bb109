"""The shortlist of a drafter: the tokens that it proposes, where it does not propose all of the vocabulary.

An unembedding of the whole vocabulary is most of what a small draft step costs. A drafter that is trained on a
shortlist has the rows of the target's head for those tokens alone. Nothing else changes: what is drawn from the
drafter's distribution on the shortlist is a distribution on the vocabulary, and acceptance works with any.

Checkpoint: config.json with `shortlist` (N) and the tensor `shortlist`, int32 [N], ids in rising order; or a file
shortlist.npy with the ids beside them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.errors import CheckpointError
from mlx_mtp.generation.interfaces import SampleDraft, Target

NAME, FILE = "shortlist", "shortlist.npy"


class DraftHead:
    """The target's head as a drafter uses it: on a shortlist [N], or on the whole vocabulary."""

    def __init__(self, target: Target, shortlist: mx.array | None) -> None:
        self.tokens = shortlist
        self.logits = target.head if shortlist is None else target.head_on(shortlist)

    def __call__(self, hidden: mx.array, sample: SampleDraft) -> mx.array:
        """A draft [B, 1] from what is ready for the head, [B, 1, D]."""
        return self._pick(self.logits(hidden), sample)

    def each(self, hidden: mx.array, sample: SampleDraft) -> list[mx.array]:
        """A draft [B, 1] from every row of [B, K, D], by one pass of the head."""
        logits = self.logits(hidden)
        return [self._pick(logits[:, i : i + 1], sample) for i in range(hidden.shape[1])]

    def _pick(self, logits: mx.array, sample: SampleDraft) -> mx.array:
        return sample(logits, None if self.tokens is None else mx.broadcast_to(self.tokens, logits.shape))


def add_shortlist(module: nn.Module, count: int) -> None:
    """Room for a shortlist of `count` ids among a drafter's tensors, which nothing learns; none for 0."""
    if count:
        module[NAME] = mx.arange(count, dtype=mx.int32)
        module.freeze(recurse=False, keys=[NAME])


def with_shortlist(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """config.json and weights of a drafter, its shortlist in both, however it is kept.

    CheckpointError for one that does not hold ids of the vocabulary in rising order.
    """
    config, weights = dict(checkpoint.config), checkpoint.weights()
    file = checkpoint.path / FILE
    if NAME not in config and file.exists():
        try:
            weights[NAME] = mx.array(np.load(file).astype(np.int32))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file}: no list of token ids ({error}); download it again.") from error
        config[NAME] = weights[NAME].size
    if NAME in weights:
        ids, size = np.array(weights[NAME]), config.get("vocab_size")
        rising = ids.ndim == 1 and ids.size and np.issubdtype(ids.dtype, np.integer) and bool((np.diff(ids) > 0).all())
        if not rising or not isinstance(size, int) or not 0 <= ids[0] <= ids[-1] < size:
            raise CheckpointError(
                f"{checkpoint.path}: expected as 'shortlist' token ids below the vocabulary's {size}, each above the "
                "one before, found something else; download the drafter again."
            )
    return config, weights
