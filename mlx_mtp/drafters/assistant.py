"""Gemma 4 assistant: four small layers that read the target's K/V, embedding and hidden state (gemma4.md, section 2).

One draft step: project [target embedding of the token, state], run the layers over the target's K/V, sample a token,
project back to the next state. There is no cache of its own, and nothing is kept between rounds.

Invariant: it reads only rows below the committed length, so a rejected draft is never seen again.

The position of the query is disputed between engines (gemma4.md, 2.4): `Convention`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.checkpoint import Checkpoint, compute_dtype, load_into, misfit, number, section
from mlx_mtp.drafters import registry
from mlx_mtp.drafters.layers import require_equal
from mlx_mtp.errors import CheckpointError, IncompatibleDrafter
from mlx_mtp.generation.cache import FULL, SLIDING, KVCache
from mlx_mtp.generation.interfaces import Drafter, Memory, SampleDraft, Target
from mlx_mtp.targets.gemma4 import Gemma4Model
from mlx_mtp.targets.gemma4_config import MAX_SIZE, Gemma4Config

TABLE = "model.embed_tokens."
MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
ORDERING = "masked_embedding.token_ordering"

# K/V per kind [B, G, S, d], and who may be seen per kind: bool [B, 1, M, S].
SharedKV = Mapping[str, tuple[mx.array, mx.array]]
Masks = Mapping[str, mx.array]


class Convention(enum.IntEnum):
    """How far in front of P, the committed length, the drafter's query is; held for all steps of a round.

    A: position P, and one key more than the window (transformers, LiteRT-LM, OpenVINO).
    B: position P - 1 and exactly the window (vLLM, SGLang, mlx-vlm). What our own training uses; the default.
    """

    A = 0
    B = 1


@dataclass(frozen=True, kw_only=True)
class AssistantConfig:
    """A drafter's config.json: the layers as a Gemma 4 text config, and what surrounds them.

    reads_last: newest rows of a full layer's K/V that a draft step reads, None for all of them. A field of ours, for
    drafters trained on short sequences: beyond their length more rows cost time and teach nothing.
    """

    text: Gemma4Config
    backbone_hidden_size: int
    centroids: int  # 0 = dense tied head
    chosen_centroids: int
    reads_last: int | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> AssistantConfig:
        """Reads config.json; CheckpointError where a field is missing or contradicts another."""
        text = Gemma4Config.from_dict({**section(config, "text_config"), "num_kv_shared_layers": 0})
        # Every layer reads the target's K/V.
        text = replace(text, first_shared=0, hidden_size_per_layer_input=0)
        centroids, chosen = 0, 32
        if config.get("use_ordered_embeddings"):
            centroids = number(config, "num_centroids", int, 1, text.vocab_size, 2048)
            chosen = number(config, "centroid_intermediate_top_k", int, 1, centroids, 32)
        if centroids and text.vocab_size % centroids:
            raise misfit(f"a vocabulary that the {centroids} centroids divide", f"{text.vocab_size} tokens")
        last = number(config, "reads_last", int, 1, MAX_SIZE) if config.get("reads_last") is not None else None
        backbone = number(config, "backbone_hidden_size", int, 1, MAX_SIZE)
        return cls(
            text=text, backbone_hidden_size=backbone, centroids=centroids, chosen_centroids=chosen, reads_last=last
        )


class MaskedEmbedding(nn.Module):
    """Centroid head: which blocks of the vocabulary are worth scoring.

    `token_ordering` [V] maps a slot (centroid * block + j) to its token id. The head's table is kept in slot order
    (load() reorders it once, from the published order of tokens), so that a centroid is one contiguous block.
    """

    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        self.centroids = nn.Linear(config.text.hidden_size, config.centroids, bias=False)
        self.token_ordering = mx.arange(config.text.vocab_size, dtype=mx.int32)


class AssistantModel(nn.Module):
    def __init__(self, config: AssistantConfig) -> None:
        super().__init__()
        self.config = config
        inner, outer = config.text.hidden_size, config.backbone_hidden_size
        self.pre_projection = nn.Linear(2 * outer, inner, bias=False)
        self.post_projection = nn.Linear(inner, outer, bias=False)
        self.model = Gemma4Model(config.text)  # layers, final norm and head table
        if config.centroids:
            self.masked_embedding = MaskedEmbedding(config)

    def step(
        self, embedded: mx.array, state: mx.array, offset: mx.array, shared: SharedKV, masks: Masks
    ) -> tuple[mx.array, mx.array]:
        """One draft step for M independent rows.

        embedded [B, M, D] is the target's scaled embedding of the tokens, state [B, M, D] the target's hidden state
        (first step) or the last step's second result. Returns the normed hidden [B, M, Dd] and the next state.
        """
        x = self.pre_projection(mx.concatenate([embedded, state], axis=-1))
        for shape, layer in zip(self.config.text.layers, self.model.layers, strict=True):
            x = layer(x, offset, *shared[shape.kind], masks[shape.kind])
        hidden = self.model.norm(x)
        return hidden, self.post_projection(hidden)

    def candidates(self, hidden: mx.array) -> tuple[mx.array | None, mx.array]:
        """Scored tokens for hidden [B, M, Dd]: ids [B, M, N] (None = the whole vocabulary in order) and logits."""
        table = self.model.embed_tokens
        if not self.config.centroids:
            return None, table.as_linear(hidden).astype(mx.float32)
        count, chosen = self.config.centroids, self.config.chosen_centroids
        scores = self.masked_embedding.centroids(hidden)
        blocks = mx.argpartition(-scores, kth=chosen - 1, axis=-1)[..., :chosen]
        rows = hidden[..., None, None, :]
        weight = table.weight.reshape(count, -1, table.weight.shape[-1])
        if isinstance(table, nn.QuantizedEmbedding):
            scales = table.scales.reshape(count, -1, table.scales.shape[-1])
            biases = table.get("biases")
            biases = None if biases is None else biases.reshape(scales.shape)
            logits = mx.gather_qmm(
                rows, weight, scales, biases, rhs_indices=blocks,
                group_size=table.group_size, bits=table.bits, mode=table.mode,
            )  # fmt: skip
        else:
            logits = mx.gather_mm(rows, weight.swapaxes(-1, -2), rhs_indices=blocks)
        tokens = self.masked_embedding.token_ordering.reshape(count, -1)[blocks]
        shape = (*hidden.shape[:2], -1)
        return tokens.reshape(shape), logits.reshape(shape).astype(mx.float32)


class Assistant(Drafter):
    model: AssistantModel
    _target: Target  # from attach() on

    def __init__(self, model: AssistantModel, name: str = "assistant", convention: Convention = Convention.B) -> None:
        self.model, self.name, self.convention = model, name, convention

    def attach(self, target: Target) -> None:
        config, text, info = self.model.config, self.model.config.text, target.info
        pairs: list[tuple[str, object, object]] = [
            ("vocabulary", text.vocab_size, info.vocab_size),
            ("hidden size", config.backbone_hidden_size, info.hidden_size),
            ("sliding window", text.sliding_window, info.window),
        ]
        for i, own in enumerate(text.layers):
            if (shape := info.readable.get(own.kind)) is None:
                there = f"stores only {', '.join(sorted(info.readable))}" if info.readable else "gives none to read"
                raise IncompatibleDrafter(
                    f"{self.name} does not fit the target: its layer {i} reads the K/V of a {own.kind} layer, and the "
                    f"target {there}; use the drafter made for this target."
                )
            pairs += [(f"head size of {own.kind} layers", own.head_dim, shape.head_dim),
                      (f"K/V heads of {own.kind} layers", own.heads, shape.heads)]  # fmt: skip
        require_equal(self.name, *pairs)
        self._target = target

    def quantise_head(self, bits: int) -> bool:
        """The dense head, if its rows can be cut into groups and it is not quantised yet; a centroid head is cheap.

        With 262,144 tokens the dense head is most of what a draft step reads (gemma4.md, section 2).
        """
        table, width = self.model.model.embed_tokens, self.model.config.text.hidden_size
        group = next((size for size in (64, 32) if width % size == 0), None)
        if type(table) is not nn.Embedding or self.model.config.centroids or not group:
            return False
        quantised = table.to_quantized(group, bits)
        mx.eval(quantised.parameters())  # only the thread that made a lazy array can compute it
        self.model.model.embed_tokens = quantised
        return True

    def view(self, cache: KVCache) -> tuple[mx.array, SharedKV, Masks]:
        """Query position [B], the target's K/V per kind, and which of it may be seen; the same for a whole round."""
        info, length = self._target.info, cache.length
        shared = {k: (cache.keys[i], cache.values[i]) for k, i in info.storing_layers.items()}
        spans = {FULL: None, SLIDING: self.model.config.text.sliding_window + 1 - self.convention}
        masks = {kind: cache.visible(kind, length - 1, spans[kind]) for kind in shared}
        last = self.model.config.reads_last
        if last is not None and FULL in shared and last < cache.capacity:
            keys, values, masks[FULL] = cache.recent(info.storing_layers[FULL], last)
            shared[FULL] = keys, values
        return length - self.convention.value, shared, masks

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        position, shared, masks = self.view(cache)
        drafts, state = [], hidden
        for _ in range(depth):
            inner, state = self.model.step(self._target.embed(token), state, position, shared, masks)
            scored, logits = self.model.candidates(inner)
            token = sample(logits, scored)
            drafts.append(token)
        return mx.concatenate(drafts, axis=1), memory


def reordered(weights: dict[str, mx.array], order: mx.array) -> dict[str, mx.array]:
    """The rows of the head's table in another order [V]; quantised rows move like plain ones.

    A table of another length stays as it is, for load_into to refuse: indexing would hide it.
    """
    return {
        name: value[order] if name.startswith(TABLE) and value.shape[:1] == order.shape else value
        for name, value in weights.items()
    }


@registry.register(*MODEL_TYPES)
def load(checkpoint: Checkpoint) -> Assistant:
    model = AssistantModel(AssistantConfig.from_dict(checkpoint.config))
    weights = {k: w for k, w in checkpoint.weights().items() if not k.startswith("lm_head")}
    if model.config.centroids:
        vocabulary = model.config.text.vocab_size
        ordering = weights.get(ORDERING, mx.zeros((0,)))
        if ordering.shape != (vocabulary,) or mx.any((ordering < 0) | (ordering >= vocabulary)).item():
            raise CheckpointError(
                f"{checkpoint.path}: expected '{ORDERING}' with one token id for each of the {vocabulary} slots, "
                "found none such; download the drafter again."
            )
        ordering = ordering.astype(mx.int32)
        weights = reordered(weights, ordering) | {ORDERING: ordering}
    load_into(model, weights, compute_dtype(weights), checkpoint)
    return Assistant(model, str(checkpoint.path))
