"""Parallel heads (Gloeckle et al. 2024, arXiv 2404.19737, section 2): n heads on one trunk, one unembedding.

From the trunk's state at one position, head i (one transformer layer and a norm of its own) proposes the token i + 1
places further on; the first head is the target itself. All drafts of a round come from one state, so none of them knows
another. Trunk and unembedding are the target's.

Checkpoint: config.json with model_type "parallel_heads", `heads` (drafts, n - 1), `reads` ("trunk" = the residual
stream before the target's last layer, as in the paper; "hidden" = after its final norm, for heads on a finished
target) and `block` (an mlx-lm config of one layer); tensors `heads.<i>.layer.*`, `heads.<i>.norm.weight`.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.drafters import registry
from mlx_mtp.drafters.layers import ChainedRows, LayersConfig, LayersDrafter, LayersModel, build_layer
from mlx_mtp.generation.cache import KVCache
from mlx_mtp.generation.interfaces import Memory, SampleDraft, States

MOST_HEADS = 16


class Head(nn.Module):
    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        self.layer = build_layer(config.block, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class ParallelModel(LayersModel):
    part, named, counted, states = Head, "heads", ("heads", MOST_HEADS), ("trunk", "hidden")

    def __call__(self, states: mx.array, start: mx.array | None = None) -> list[mx.array]:
        """Whole sequences of trunk states [B, T, D] -> per head [B, T, D], ready for the unembedding.

        start [B, T]: as in ChainedRows.
        """
        passes = [(head, ChainedRows(states.shape[1], start)) for head in self.heads]
        return [head.norm(head.layer(states, rows.mask, rows)) for head, rows in passes]

    @property
    def aux_layers(self) -> tuple[int, ...]:
        return (-1,) if self.config.reads == "trunk" else ()

    def read(self, states: States) -> mx.array:
        """What the heads branch off from, [B, M, D]."""
        return states.aux[0] if self.config.reads == "trunk" else states.hidden


class Parallel(LayersDrafter):
    """Loaded heads. Row r of every head's K/V is the state of the row before: it is known when the token after r is
    drafted."""

    name, model_class = "parallel heads", ParallelModel

    def __init__(self, model: ParallelModel, dtype: mx.Dtype, name: str | None = None) -> None:
        super().__init__(model, dtype, name)
        self.max_depth = model.config.count

    def start(self, batch: int, capacity: int) -> Memory:
        return {**super().start(batch, capacity), "state": self.no_state(batch)}

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        own = self.opened(memory)
        rows = [head.norm(self.run(i, memory["state"], own)) for i, head in enumerate(self.model.heads[:depth])]
        drafts = self.sampled(mx.concatenate(rows, axis=1).astype(hidden.dtype), sample)
        return drafts, {**memory, "layers": own.arrays}

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        reads = self.model.read(states).astype(self._dtype)
        before = mx.concatenate([memory["state"], reads[:, :-1]], axis=1)
        own = self.opened(memory)
        for i in range(len(self.model.heads)):
            self.run(i, before, own)  # writes K/V; only those are computed, for nobody asks for the results
        own.advance(accepted + 1)
        return {"layers": own.arrays, "state": mx.take_along_axis(reads, accepted[:, None, None], axis=1)}

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        assert states is not None, "this family reads states"
        state = self.model.read(states)[:, -1:].astype(self._dtype)
        return {"layers": self.rewound(memory, length), "state": state}


registry.register("parallel_heads")(Parallel.load)
