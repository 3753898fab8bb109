"""Losses: next token for a target, and an assistant unrolled over its own states on a frozen target.

Shapes: B batch, T positions, K unrolled draft steps, D hidden, V vocabulary. A batch holds T + 1 (target) or
T + 1 + K tokens (assistant). `progress`: see trainer.Loss; these losses are the same from first step to last.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.cache import NoCache
from mlx_mtp.drafters.assistant import AssistantModel
from mlx_mtp.targets.gemma4 import Gemma4Model


def next_token_loss(
    model: Gemma4Model, batch: mx.array, progress: mx.array | None = None
) -> tuple[mx.array, mx.array]:
    """Mean cross-entropy of tokens 1.. given those before; batch [B, T + 1]. Second result: share predicted right."""
    tokens, labels = batch[:, :-1], batch[:, 1:]
    hidden, _ = model(tokens, NoCache(model.config.sliding_window, tokens.shape[0]))
    logits = model.head(hidden)
    loss = nn.losses.cross_entropy(logits, labels, reduction="mean")
    right = (mx.argmax(mx.stop_gradient(logits), axis=-1) == labels).mean()
    return loss, right[None]


def assistant_loss(
    target: Gemma4Model, steps: int, decay: float = 0.8
) -> Callable[..., tuple[mx.array, mx.array]]:
    """Loss of an assistant on a frozen target, for batches [B, T + 1 + K] with K = steps.

    The drafter's row at position t reads the target's K/V up to t, as in decoding (convention B: query position
    t, P = t + 1). Its step j gets the embedding of x_(t+1+j) and is asked for the target's own law of x_(t+2+j):
    cross-entropy against the target's distribution, step j weighted by decay^j because draft j only counts when
    all before it were accepted. From the second step on the state is the drafter's own, as in decoding.

    Second result [K]: share of rows whose best token is the target's, per step.
    """

    def loss(
        drafter: AssistantModel, batch: mx.array, progress: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        batch_size, rows = batch.shape[0], batch.shape[1] - 1 - steps
        tokens = batch[:, : rows + steps]
        hidden, shared = target(tokens, NoCache(target.config.sliding_window, batch_size))
        hidden = mx.stop_gradient(hidden)
        view = NoCache(target.config.sliding_window, batch_size).begin(rows)
        keys_values = {
            kind: (mx.stop_gradient(keys[:, :, :rows]), mx.stop_gradient(values[:, :, :rows]))
            for kind, (keys, values) in shared.items()
        }
        logits = target.head(hidden)
        state, total, right = hidden[:, :rows], mx.array(0.0), []
        for j in range(steps):
            embedded = target.embed(batch[:, j + 1 : j + 1 + rows])
            inner, state = drafter.step(mx.stop_gradient(embedded), state, view.offset, keys_values, view.masks)
            _, proposed = drafter.candidates(inner)
            wanted = logits[:, j + 1 : j + 1 + rows]
            law = mx.softmax(wanted, axis=-1)
            cross = mx.logsumexp(proposed, axis=-1) - (law * proposed).sum(axis=-1)
            total = total + decay**j * cross.mean()
            right.append((mx.argmax(proposed, axis=-1) == mx.argmax(wanted, axis=-1)).mean())
        return total / sum(decay**j for j in range(steps)), mx.stack(right)

    return loss
