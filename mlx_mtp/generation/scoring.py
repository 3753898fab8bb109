"""What the target thinks of a text that is there already: the logprob of every token given those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx

from mlx_mtp.backend import threads
from mlx_mtp.generation.cache import capacity_for
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.generation.round import token_logprobs

ROWS = 64  # of one pass: with a vocabulary of 262,144 the logits of a row take 1 MB

# A token's logprob, and the likeliest tokens of its place, {token id: logprob}.
Score = tuple[float, dict[int, float]]


@threads.device_work
def scores(target: Target, ids: Sequence[int], most: int, check: Callable[[], object]) -> list[Score]:
    """Of every token but the first, natural logarithms, with `most` >= 1 alternatives.

    check: called after every pass; what it raises ends the work.
    """
    cache, found = target.new_cache(capacity_for(len(ids))), list[Score]()
    for start in range(0, len(ids) - 1, ROWS):
        rows, following = ids[start : start + ROWS], ids[start + 1 : start + ROWS + 1]
        hidden = target.forward(mx.array([rows], dtype=mx.int32), cache).hidden[:, : len(following)]
        cache.advance(len(rows))
        of_tokens, (tokens, values) = token_logprobs(target.head(hidden), mx.array([following]), most)
        mx.eval(of_tokens, tokens, values, cache.arrays)
        threads.pause()
        best = zip(tokens[0].tolist(), values[0].tolist(), strict=True)
        found += [(one, dict(zip(*row, strict=True)))
                  for one, row in zip(of_tokens[0].tolist(), best, strict=True)]  # fmt: skip
        check()
    return found
