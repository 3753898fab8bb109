"""Python functions over logits in mlx-lm's convention: every row of a pass, with the tokens before it, goes through."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp.generation.request import LogitsProcessor


class Processors:
    """The functions of one request, and all its tokens on the device: a buffer that is written in place and doubles."""

    def __init__(self, functions: Sequence[LogitsProcessor], ids: Sequence[int]) -> None:
        self._functions = functions
        self._buffer, self._length = mx.zeros((2 * len(ids) + 64,), dtype=mx.int32), 0
        self.add(ids)

    def add(self, tokens: Sequence[int]) -> None:
        """More tokens of prompt or reply."""
        self._write(mx.array(list(tokens), dtype=mx.int32))
        self._length += len(tokens)

    def __call__(self, drafts: mx.array | None, logits: mx.array) -> mx.array:
        """Logits [1, M, V] of the rows after all tokens so far and 0, 1, ... of the drafts [1, K]."""
        if drafts is not None:
            self._write(drafts[0])
        rows = []
        for i in range(logits.shape[1]):
            row, tokens = logits[:, i], self._buffer[: self._length + i]
            for function in self._functions:
                row = function(tokens, row)
            rows.append(row)
        return mx.stack(rows, axis=1).astype(mx.float32)

    def _write(self, tokens: mx.array) -> None:
        if (missing := self._length + tokens.size - self._buffer.size) > 0:
            self._buffer = mx.pad(self._buffer, (0, max(missing, self._buffer.size)))
        at = mx.array([self._length], dtype=mx.int32)
        self._buffer = mx.slice_update(self._buffer, tokens, at, axes=(0,))
