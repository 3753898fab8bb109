"""Sequential modules (DeepSeek-V3, arXiv 2412.19437, section 2.2): each drafts one token further and feeds the next.

Module k takes the state of module k - 1 (the target for k = 1) at the row before and the embedding of the token at
this row, projects both to one vector, runs a transformer layer over K/V of its own, and proposes the next token through
the target's unembedding. Beyond the last module that one is used again, on its own state. Embedding and unembedding are
the target's.

Checkpoint: config.json with model_type "sequential_modules", `modules` (D), `block` (an mlx-lm config of one layer);
tensors `blocks.<k>.{enorm,hnorm,eh_proj,norm}.weight` and `blocks.<k>.layer.*`: DeepSeek's names with
`shared_head.norm` as `norm`. eh_proj reads [embedding, state] in this order, as DeepSeek's and vLLM's code does.
`reads` says which of the target's states the first module takes: "hidden" (the default: after its final norm) or
"residual" (in front of it, as MiMo's); for the latter `unnorm` [D] holds one over the weight of that norm. What is left
is the state over its size, and as the module's own norm takes the size out again that is all it needs.
`aux_layers`, where there are any, are layers of the target whose inputs the first module reads too (EAGLE-3, arXiv
2503.01840, section 3.1: the last state alone is made for the next token, those in the middle know more of the text).
Each goes through a norm, `aux_norms.<i>.weight`, and all of them through `aux_proj` [D, N D]; what comes out is added
to what eh_proj gives. On a module's own states there is nothing to add.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.drafters import registry
from mlx_mtp.drafters.layers import ChainedRows, LayersConfig, LayersDrafter, LayersModel, build_layer
from mlx_mtp.generation.cache import KVCache
from mlx_mtp.generation.interfaces import Memory, SampleDraft, States

MOST_MODULES = 8


class Module(nn.Module):
    """One MTP module: two norms, the projection of both inputs, a transformer layer, and the norm before the head."""

    def __init__(self, config: LayersConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.norm_eps
        self.enorm, self.hnorm, self.norm = (nn.RMSNorm(width, eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        self.layer = build_layer(config.block, width)

    def join(self, embedded: mx.array, state: mx.array) -> mx.array:
        """Embedding of the token [B, M, D] and state of the row before, [B, M, D] or as SequentialModel.read gives it
        -> what the layer reads [B, M, D]."""
        state, *aux = mx.split(state, state.shape[-1] // embedded.shape[-1], axis=-1)
        joined = self.eh_proj(mx.concatenate([self.enorm(embedded), self.hnorm(state)], axis=-1))
        return sum(aux, start=joined)


class SequentialModel(LayersModel):
    part, named, counted = Module, "blocks", ("modules", MOST_MODULES)
    states, default = ("hidden", "residual"), "hidden"

    def __init__(self, config: LayersConfig) -> None:
        super().__init__(config)
        width, count = config.hidden_size, len(config.aux_layers)
        if config.reads == "residual":
            self.unnorm = mx.ones(width)
        if count:
            self.aux_norms = [nn.RMSNorm(width, config.norm_eps) for _ in range(count)]
            self.aux_proj = nn.Linear(count * width, width, bias=False)

    def read(self, states: States) -> mx.array:
        """What the first module takes of the target's states: [B, M, D], with aux_layers [B, M, 2 D], whose second half
        is what they add."""
        hidden = states.hidden * self.unnorm if self.config.reads == "residual" else states.hidden
        if not self.aux_layers:
            return hidden
        # Normed in the target's type: its residual stream may be too large for half precision.
        normed = [norm(state) for norm, state in zip(self.aux_norms, states.aux, strict=True)]
        aux = self.aux_proj(mx.concatenate(normed, axis=-1).astype(hidden.dtype))
        return mx.concatenate([hidden, aux], axis=-1)

    def __call__(
        self, states: mx.array, embedded: mx.array, steps: int, start: mx.array | None = None
    ) -> list[mx.array]:
        """Whole sequences: what `read` gives of the target's states [B, T, ...], and the embeddings
        [B, T + steps - 1, D] of the tokens that begin one place further on -> per step [B, T, D], ready for the
        unembedding.

        Step s at place t reads embedding t + s, that of token t + s + 1, and asks for token t + s + 2 (equations 21
        to 23, k = s + 1). Steps beyond the last module are that module's, on its own states, as in decoding. start
        [B, T]: as in ChainedRows.
        """
        rows, last, found = states.shape[1], len(self.blocks) - 1, []
        stored = [ChainedRows(rows, start) for _ in self.blocks]
        for step in range(steps):
            k = min(step, last)
            joined = self.blocks[k].join(embedded[:, step : step + rows], states)
            states = self.blocks[k].layer(joined, stored[k].mask, stored[k])
            found.append(self.blocks[k].norm(states))
        return found


class Sequential(LayersDrafter):
    """Loaded modules. memory["states"][k] [B, 1, D] is what module k (0 = the target) left at the last true row."""

    name, model_class, chained = "sequential modules", SequentialModel, True

    def start(self, batch: int, capacity: int) -> Memory:
        own = self.no_state(batch)
        first = mx.concatenate([own, own], axis=-1) if self.aux_layers else own
        return {**super().start(batch, capacity), "states": [first, *[own] * (len(self.model.blocks) - 1)]}

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        """Step j of the chain is drafted by module j, and by the last one from there on.

        At every row the modules still to come run too: their K/V of this row is what they will look back at.
        """
        own, states, drafts = self.opened(memory), list(memory["states"]), []
        blocks, last = self.model.blocks, len(self.model.blocks) - 1
        for step in range(depth):
            embedded, active = self._target.embed(token).astype(self._dtype), min(step, last)
            found = {k: self.run(k, blocks[k].join(embedded, states[k]), own, step) for k in range(active, last + 1)}
            proposed = blocks[active].norm(found[active]).astype(hidden.dtype)
            token = self.sampled(proposed, sample)
            drafts.append(token)
            states[active + 1 :] = [found[k] for k in range(active, last)]
            states[min(active + 1, last)] = found[active]
        return mx.concatenate(drafts, axis=1), {**memory, "layers": own.arrays}

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        """Writes every module's K/V for M rows from true states and tokens, over what drafting guessed there."""
        own, embedded = self.opened(memory), self._target.embed(tokens).astype(self._dtype)
        reads, kept = self._read(states), []
        for k, state in enumerate(memory["states"]):
            kept.append(mx.take_along_axis(reads, accepted[:, None, None], axis=1))
            before = mx.concatenate([state, reads[:, :-1]], axis=1)
            reads = self.run(k, self.model.blocks[k].join(embedded, before), own)
        own.advance(accepted + 1)
        return {"layers": own.arrays, "states": kept}

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        """What later modules left at the last row is not known any more: they begin as in front of a text's first row,
        which costs a draft or two and never the answer."""
        assert states is not None, "this family reads states"
        unknown = [self.no_state(states.hidden.shape[0])] * (len(self.model.blocks) - 1)
        return {"layers": self.rewound(memory, length), "states": [self._read(states.last()), *unknown]}

    def _read(self, states: States) -> mx.array:
        return self.model.read(States(states.hidden.astype(self._dtype), states.aux))


registry.register("sequential_modules")(Sequential.load)
