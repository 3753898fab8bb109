"""Parallel heads (Gloeckle et al. 2024, arXiv 2404.19737, section 2): n heads on one trunk, one unembedding.

From the trunk's state at one position, head i (one transformer layer and a norm of its own) proposes the token i + 1
places further on; the first head is the target itself. All drafts of a round come from one state, so none of them knows
another. Trunk and unembedding are the target's.

Checkpoint: config.json with model_type "parallel_heads", `heads` (drafts, n - 1), `reads` ("trunk" = the residual
stream before the target's last layer, as in the paper; "hidden" = after its final norm, for heads on a finished
target) and `block` (an mlx-lm config of one layer); tensors `heads.<i>.layer.*`, `heads.<i>.norm.weight`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.checkpoint import Checkpoint, compute_dtype, load_into, number
from mlx_mtp.drafters import registry
from mlx_mtp.drafters.layers import ChainedRows, LayersConfig, OwnLayers, build_layers, check_sizes
from mlx_mtp.drafters.shortlist import DraftHead, add_shortlist, with_shortlist
from mlx_mtp.errors import IncompatibleDrafter
from mlx_mtp.generation.cache import CAPACITY_STEP, KVCache
from mlx_mtp.generation.interfaces import Drafter, Memory, SampleDraft, States, Target

MOST_HEADS = 16
READS = ("trunk", "hidden")


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(LayersConfig):
    """A drafter's config.json."""

    heads: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ParallelConfig:
        """Reads config.json; CheckpointError where a field is missing or makes no sense."""
        return cls(heads=number(config, "heads", int, 1, MOST_HEADS), **cls.fields(config, READS))


class Head(nn.Module):
    """One transformer layer, and the norm in front of the unembedding."""

    def __init__(self, config: ParallelConfig) -> None:
        super().__init__()
        (self.layer,) = build_layers(config.block, 1, config.hidden_size)
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)


class ParallelModel(nn.Module):
    """The parameters of the heads."""

    def __init__(self, config: ParallelConfig) -> None:
        super().__init__()
        self.config = config
        self.heads = [Head(config) for _ in range(config.heads)]
        add_shortlist(self, config.shortlist)

    def __call__(self, states: mx.array) -> list[mx.array]:
        """Whole sequences of trunk states [B, T, D] -> per head [B, T, D], ready for the unembedding."""
        passes = [(head, ChainedRows(states.shape[1])) for head in self.heads]
        return [head.norm(head.layer(states, rows.mask, rows)) for head, rows in passes]

    def read(self, states: States) -> mx.array:
        """What the heads branch off from, [B, M, D]; IncompatibleDrafter where the target has none to give."""
        found = states.trunk if self.config.reads == "trunk" else states.hidden
        if found is None:
            raise IncompatibleDrafter(
                "These parallel heads do not fit the target: they read the state in front of its last layer, and this "
                "target gives none; use heads that read 'hidden'."
            )
        return found


class Parallel(Drafter):
    """Loaded heads as the loop sees them (interfaces.Drafter).

    Row r of every head's K/V is the state of the row before: it is known when the token after r is drafted.
    """

    reads_prompt = True
    reads_states = True

    def __init__(self, model: ParallelModel, dtype: mx.Dtype, name: str = "parallel heads") -> None:
        self.model, self.name = model, name
        self.max_depth = model.config.heads
        self._dtype = dtype
        layers = [head.layer for head in model.heads]
        self._own = OwnLayers(layers, model.config.hidden_size, dtype, [1] * len(layers))
        self._head: DraftHead | None = None

    def attach(self, target: Target) -> None:
        """Raises IncompatibleDrafter unless the sizes are the target's and it gives the states the heads read."""
        check_sizes(self.name, self.model.config.hidden_size, self.model.config.vocab_size, target)
        token = mx.zeros((1, 1), dtype=mx.int32)
        self.model.read(target.forward(token, target.new_cache(CAPACITY_STEP)))  # lazy: nothing is run
        self._head = DraftHead(target, self.model.get("shortlist"))

    def modules(self) -> list[nn.Module]:
        """The heads."""
        return [self.model]

    def start(self, batch: int, capacity: int) -> Memory:
        """Empty K/V, and no state before the first row."""
        state = mx.zeros((batch, 1, self.model.config.hidden_size), dtype=self._dtype)
        return {"layers": self._own.start(batch, capacity), "state": state}

    def grow(self, memory: Memory, capacity: int) -> Memory:
        """More rows."""
        return {**memory, "layers": self._own.grow(memory["layers"], capacity)}

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        """Drafts [B, K] of the first K heads: one pass of the unembedding over all of them."""
        assert self._head is not None, "attach() comes first"
        own = self._own.open(memory["layers"])
        rows = [head.norm(self._own.run(i, memory["state"], own)) for i, head in enumerate(self.model.heads[:depth])]
        drafts = self._head.each(mx.concatenate(rows, axis=1).astype(hidden.dtype), sample)
        return mx.concatenate(drafts, axis=1), {**memory, "layers": own.arrays}

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        """Writes every head's K/V for M rows; only those are computed, for nobody asks for the layers' results."""
        reads = self.model.read(states).astype(self._dtype)
        before = mx.concatenate([memory["state"], reads[:, :-1]], axis=1)
        own = self._own.open(memory["layers"])
        for i in range(len(self.model.heads)):
            self._own.run(i, before, own)
        own.advance(accepted + 1)
        state = mx.take_along_axis(reads, accepted[:, None, None], axis=1)
        return {**memory, "layers": own.arrays, "state": state}

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        """Fewer rows, and the state of the last of them."""
        assert states is not None, "this family reads states"
        return {"layers": self._own.rewind(memory["layers"], length),
                "state": self.model.read(states)[:, -1:].astype(self._dtype)}  # fmt: skip


@registry.register("parallel_heads")
def load(checkpoint: Checkpoint) -> Parallel:
    """Heads from a checkpoint of ours, trained here or brought in by `mlx-mtp convert`."""
    config, weights = with_shortlist(checkpoint)
    model = ParallelModel(ParallelConfig.from_dict(config))
    dtype = compute_dtype(weights)
    load_into(model, weights, dtype, checkpoint)
    return Parallel(model, dtype, str(checkpoint.path))
