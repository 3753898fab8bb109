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
import numpy as np

from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.errors import CheckpointError

NAME, FILE = "shortlist", "shortlist.npy"


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
