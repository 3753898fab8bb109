"""Gemma 4 text model, all five shapes: E2B, E4B, 12B unified, 26B-A4B (mixture of experts) and 31B.

What it does: the forward pass over a cache with device-side lengths, and the map from the published, the
mlx-lm and the mlx-vlm checkpoint layouts to one set of names. What it does not do: images, audio, sampling.

Parameter names are those of the published checkpoints below `model.language_model.` (Hugging Face
`Gemma4ForConditionalGeneration`), except that experts are split in three as in MLX conversions.

Invariant: norms multiply by the plain weight (no 1 + w), attention scale is 1, logits are soft-capped.

Shapes: B batch, M rows of the pass, D hidden, H query heads, G K/V heads, d head size, L layers,
p width of the per-layer embedding, V vocabulary.
"""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_mtp.activations import gelu, tanh
from mlx_mtp.attention import attend
from mlx_mtp.cache import FULL, SLIDING, KVCache, LayerShape, NoCache
from mlx_mtp.checkpoint import (
    TOWERS,
    Checkpoint,
    compute_dtype,
    load_into,
    named_parameters,
    number,
    renamed,
    section,
)
from mlx_mtp.errors import CheckpointError, UnsupportedModel
from mlx_mtp.interfaces import States, TargetInfo
from mlx_mtp.targets import registry

log = logging.getLogger(__name__)

MODEL_TYPES = ("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")

# Bounds of sizes and of counts in a config.json: far above any model, low enough that no product leaves 31 bits.
MAX_SIZE, MAX_COUNT = 2**20, 2**10

DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


@dataclass(frozen=True, kw_only=True)
class Gemma4Config:
    """The fields of `text_config` that the text model uses, both published and newer form (`from_dict`)."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    layer_types: tuple[str, ...]
    head_dims: tuple[int, ...]
    kv_heads: tuple[int, ...]
    sliding_window: int
    max_position_embeddings: int
    rope_parameters: Mapping[str, Mapping[str, Any]]
    rms_norm_eps: float = 1e-6
    final_logit_softcapping: float | None = 30.0
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    attention_k_eq_v: bool = False
    num_kv_shared_layers: int = 0
    use_double_wide_mlp: bool = False
    enable_moe_block: bool = False
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0

    @property
    def first_shared(self) -> int:
        """Index of the first layer that reads another layer's K/V; L where none does."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    @property
    def storing_layers(self) -> dict[str, int]:
        """Per kind the layer whose K/V the reusing layers and an assistant read: the last one that stores any."""
        return {self.layer_types[i]: i for i in range(self.first_shared)}

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Gemma4Config:
        """Reads a config.json, top level or `text_config`.

        Raises UnsupportedModel for what this file does not implement, CheckpointError for a field that is missing,
        of an odd type, out of range or at odds with another.
        """
        text = section(config, "text_config") or config
        _refuse_unsupported(text)
        layers = number(text, "num_hidden_layers", int, 1, MAX_COUNT)
        shared = number(text, "num_kv_shared_layers", int, 0, layers - 1, 0)
        kinds = _kinds(text, layers, shared)
        head_dims, kv_heads = _heads(text, kinds)
        vocabulary = number(text, "vocab_size", int, 1, MAX_SIZE)
        mixture = bool(text.get("enable_moe_block"))
        experts = number(text, "num_experts", int, int(mixture), MAX_COUNT, 0)
        cap = text.get("final_logit_softcapping")
        return cls(
            vocab_size=vocabulary,
            hidden_size=number(text, "hidden_size", int, 1, MAX_SIZE),
            intermediate_size=number(text, "intermediate_size", int, 1, MAX_SIZE),
            num_hidden_layers=layers,
            num_attention_heads=number(text, "num_attention_heads", int, 1, MAX_COUNT),
            layer_types=tuple(kinds),
            head_dims=head_dims,
            kv_heads=kv_heads,
            sliding_window=number(text, "sliding_window", int, 1, MAX_SIZE, 512),
            max_position_embeddings=number(text, "max_position_embeddings", int, 2, 2**31 - 1, 131_072),
            rope_parameters=_rope(text),
            rms_norm_eps=number(text, "rms_norm_eps", float, 0.0, 1.0, 1e-6),
            final_logit_softcapping=number(text, "final_logit_softcapping", float, 1e-3, 1e6) if cap else None,
            # Absent in re-saved unified configs, which never have per-layer embeddings: 0, not the class default.
            hidden_size_per_layer_input=number(text, "hidden_size_per_layer_input", int, 0, MAX_SIZE, 0),
            vocab_size_per_layer_input=number(text, "vocab_size_per_layer_input", int, 0, MAX_SIZE, 0) or vocabulary,
            attention_k_eq_v=bool(text.get("attention_k_eq_v")),
            num_kv_shared_layers=shared,
            use_double_wide_mlp=bool(text.get("use_double_wide_mlp")),
            enable_moe_block=mixture,
            num_experts=experts,
            top_k_experts=number(text, "top_k_experts", int, int(mixture), experts, 0),
            moe_intermediate_size=number(text, "moe_intermediate_size", int, int(mixture), MAX_SIZE, 0),
        )


def _kinds(text: Mapping[str, Any], layers: int, shared: int) -> list[str]:
    """The kind of every layer; one that reuses K/V needs a layer of its kind before it that stores them."""
    found = text.get("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(layers)]
    if not isinstance(found, list) or len(found) != layers or any(kind not in (FULL, SLIDING) for kind in found):
        raise CheckpointError(
            f"config.json: expected {layers} entries '{FULL}' or '{SLIDING}' in 'layer_types', found "
            f"{reprlib.repr(found)}; use the config.json that belongs to this checkpoint."
        )
    kinds = [*found[:-1], FULL]  # as the reference implementation forces it
    if missing := set(kinds) - set(kinds[: layers - shared]):
        raise CheckpointError(
            f"config.json: expected a {missing.pop()} layer among the first {layers - shared}, which the "
            f"{shared} layers behind them could read, found none; use the config.json that belongs to this checkpoint."
        )
    return kinds


def _heads(text: Mapping[str, Any], kinds: list[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Head size and K/V heads of every layer, from `per_layer_config` (newer) or the `global_*` fields (published)."""
    heads = number(text, "num_attention_heads", int, 1, MAX_COUNT)
    head_dim = number(text, "head_dim", int, 2, MAX_SIZE, 256)
    kv_heads = number(text, "num_key_value_heads", int, 1, heads, heads)
    overrides = _by_layer(section(text, "per_layer_config"))
    # The newer form may say null for "no layer differs"; it never has the published form's field.
    if text.get("per_layer_config") is None and ("global_head_dim" in text or "per_layer_config" not in text):
        full = {"head_dim": number(text, "global_head_dim", int, 2, MAX_SIZE, 512)}
        if text.get("attention_k_eq_v"):
            full["num_key_value_heads"] = number(text, "num_global_key_value_heads", int, 1, heads, kv_heads)
        overrides = {i: full for i, kind in enumerate(kinds) if kind == FULL}
    layers = [overrides.get(i, {}) for i in range(len(kinds))]
    head_dims = tuple(number(layer, "head_dim", int, 2, MAX_SIZE, head_dim) for layer in layers)
    kv_counts = tuple(number(layer, "num_key_value_heads", int, 1, heads, kv_heads) for layer in layers)
    if any(size % 2 for size in head_dims) or any(heads % count for count in kv_counts):
        raise CheckpointError(
            f"config.json: expected even head sizes and K/V heads that divide the {heads} attention heads, found "
            f"sizes {sorted(set(head_dims))} and K/V heads {sorted(set(kv_counts))}; "
            "use the config.json that belongs to this checkpoint."
        )
    return head_dims, kv_counts


def _by_layer(given: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Overrides by layer; transformers pads the numbers with zeros to one width ("05"), others do not."""
    if odd := [key for key in given if not key.isdecimal()]:
        raise CheckpointError(
            f"config.json: expected layer numbers as the names in 'per_layer_config', found {reprlib.repr(odd[0])}; "
            "use the config.json that belongs to this checkpoint."
        )
    return {int(key): section(given, key) for key in given}


def _rope(text: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The rotary parameters of both kinds of layers, checked."""
    given = section(text, "rope_parameters")
    ropes = {kind: section(given, kind) or DEFAULT_ROPE[kind] for kind in (FULL, SLIDING)}
    return {kind: rope | {
        "rope_theta": number(rope, "rope_theta", float, 1e-3, 1e15),
        "partial_rotary_factor": number(rope, "partial_rotary_factor", float, 0.0, 1.0, 1.0),
        "factor": number(rope, "factor", float, 1e-3, 1e6, 1.0),
    } for kind, rope in ropes.items()}  # fmt: skip


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    activation = text.get("hidden_activation", "gelu_pytorch_tanh")
    checks = {
        f"hidden_activation {reprlib.repr(activation)}": activation != "gelu_pytorch_tanh",
        "attention_bias": bool(text.get("attention_bias")),
        "use_bidirectional_attention 'all'": text.get("use_bidirectional_attention") == "all",
        "an untied output head": text.get("tie_word_embeddings") is False,
    }
    ropes = section(text, "rope_parameters")
    for kind in ropes:
        rope_type = section(ropes, kind).get("rope_type", "default")
        checks[f"rope_type {reprlib.repr(rope_type)} in {kind}"] = rope_type not in ("default", "proportional")
    for name, present in checks.items():
        if present:
            raise UnsupportedModel(
                f"config.json asks for {name}, which no released Gemma 4 text model uses and which is not "
                "implemented; use a Gemma 4 checkpoint without it."
            )


class Norm(nn.Module):
    """RMS norm in float32 with a plain weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = mx.ones((size,))
        self.eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self.eps)


def _rotation(config: Gemma4Config, layer: int) -> mx.array:
    """Wave lengths [d/2] for mx.fast.rope; infinite = not rotated.

    'proportional' rotates only the first `partial_rotary_factor` of the pairs, with exponents divided by the
    whole head size, and divides the angles by `factor`.
    """
    rope, size = config.rope_parameters[config.layer_types[layer]], config.head_dims[layer]
    proportional = rope.get("rope_type") == "proportional"
    share = rope["partial_rotary_factor"] if proportional else 1.0
    rotated = int(share * size // 2)
    lengths = [rope["rope_theta"] ** (2 * j / size) * rope["factor"] for j in range(rotated)]
    return mx.array(lengths + [float("inf")] * (size // 2 - rotated), dtype=mx.float32)


class Attention(nn.Module):
    """Grouped-query attention with normed q, k and v. Layers that reuse K/V have no k, v of their own."""

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        width, self.head_dim = config.hidden_size, config.head_dims[layer]
        self.heads, self.kv_heads = config.num_attention_heads, config.kv_heads[layer]
        self.kind = config.layer_types[layer]
        self.stores = layer < config.first_shared
        self.eps = config.rms_norm_eps
        self._wave_lengths = _rotation(config, layer)
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.q_norm = Norm(self.head_dim, self.eps)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        if self.stores:
            self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
            self.k_norm = Norm(self.head_dim, self.eps)
            # K = V layers share the projection, not the tensors: v is the raw projection, before k's norm and rotation.
            self.shares_projection = config.attention_k_eq_v and self.kind == FULL
            if not self.shares_projection:
                self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)

    def rotate(self, x: mx.array, offset: mx.array) -> mx.array:
        """Rotary positions offset, offset + 1, ... for x [B, heads, M, d]."""
        return mx.fast.rope(
            x, self.head_dim, traditional=False, base=None, scale=1.0, offset=offset, freqs=self._wave_lengths
        )

    def keys_values(self, x: mx.array, offset: mx.array) -> tuple[mx.array, mx.array]:
        """New K/V rows [B, G, M, d] for x [B, M, D]."""
        shape = (*x.shape[:2], self.kv_heads, self.head_dim)
        raw = self.k_proj(x).reshape(shape)
        values = raw if self.shares_projection else self.v_proj(x).reshape(shape)
        keys = self.rotate(self.k_norm(raw).transpose(0, 2, 1, 3), offset)
        return keys, mx.fast.rms_norm(values, None, self.eps).transpose(0, 2, 1, 3)

    def __call__(
        self, x: mx.array, offset: mx.array, keys: mx.array, values: mx.array, mask: mx.array
    ) -> mx.array:
        """x [B, M, D] at positions offset.. against K/V [B, G, S, d] under mask [B, 1, M, S] -> [B, M, D]."""
        batch, rows, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(batch, rows, self.heads, self.head_dim))
        queries = self.rotate(queries.transpose(0, 2, 1, 3), offset)
        out = attend(queries, keys, values, mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, rows, -1))


class GatedMLP(nn.Module):
    """down(gelu(gate(x)) * up(x)), tanh form of gelu."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(gelu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Chooses experts: softmax over the best k, then a learned scale per expert (so weights need not sum to 1)."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.proj = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = mx.ones((config.hidden_size,))
        self.per_expert_scale = mx.ones((config.num_experts,))
        self.chosen, self.eps, self.root = config.top_k_experts, config.rms_norm_eps, config.hidden_size**-0.5

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """x [B, M, D] -> expert ids [B, M, k] and weights [B, M, k]."""
        scores = self.proj(mx.fast.rms_norm(x, None, self.eps) * self.scale * self.root)
        experts = mx.argpartition(-scores, kth=self.chosen - 1, axis=-1)[..., : self.chosen]
        weights = mx.softmax(mx.take_along_axis(scores, experts, axis=-1), axis=-1, precise=True)
        return experts, weights * self.per_expert_scale[experts]


class GatedGelu(nn.Module):
    """The experts' activation, in SwitchGLU's argument order."""

    def __call__(self, x: mx.array, gate: mx.array) -> mx.array:
        return gelu(gate) * x


class Experts(nn.Module):
    """Weighted sum of the chosen experts."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.switch_glu = SwitchGLU(
            config.hidden_size, config.moe_intermediate_size, config.num_experts, activation=GatedGelu()
        )

    def __call__(self, x: mx.array, experts: mx.array, weights: mx.array) -> mx.array:
        return (self.switch_glu(x, experts) * weights[..., None]).sum(axis=-2)


class Layer(nn.Module):
    """One block. Everything that is added to the residual is normed before and after ("sandwich")."""

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        wide = config.use_double_wide_mlp and layer >= config.first_shared
        self.self_attn = Attention(config, layer)
        self.mlp = GatedMLP(width, config.intermediate_size * (2 if wide else 1))
        self.input_layernorm = Norm(width, eps)
        self.post_attention_layernorm = Norm(width, eps)
        self.pre_feedforward_layernorm = Norm(width, eps)
        self.post_feedforward_layernorm = Norm(width, eps)
        self.layer_scalar = mx.ones((1,))
        self.mixture = config.enable_moe_block
        if self.mixture:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = Norm(width, eps)
            self.post_feedforward_layernorm_2 = Norm(width, eps)
            self.pre_feedforward_layernorm_2 = Norm(width, eps)
        if config.hidden_size_per_layer_input:
            inner = config.hidden_size_per_layer_input
            self.per_layer_input_gate = nn.Linear(width, inner, bias=False)
            self.per_layer_projection = nn.Linear(inner, width, bias=False)
            self.post_per_layer_input_norm = Norm(width, eps)

    def feed_forward(self, x: mx.array) -> mx.array:
        """The dense branch, plus the experts' where there are any; both read the same residual x [B, M, D]."""
        dense = self.mlp(self.pre_feedforward_layernorm(x))
        if not self.mixture:
            return self.post_feedforward_layernorm(dense)
        chosen = self.experts(self.pre_feedforward_layernorm_2(x), *self.router(x))
        return self.post_feedforward_layernorm(
            self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(chosen)
        )

    def __call__(
        self,
        x: mx.array,
        offset: mx.array,
        keys: mx.array,
        values: mx.array,
        mask: mx.array,
        normed: mx.array | None = None,
        per_layer: mx.array | None = None,
    ) -> mx.array:
        """x [B, M, D] -> [B, M, D]; `normed` is input_layernorm(x) where the caller has it, `per_layer` [B, M, p]."""
        normed = self.input_layernorm(x) if normed is None else normed
        x = x + self.post_attention_layernorm(self.self_attn(normed, offset, keys, values, mask))
        x = x + self.feed_forward(x)
        if per_layer is not None:
            gated = gelu(self.per_layer_input_gate(x)) * per_layer
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar


class Gemma4Model(nn.Module):
    """Embedding, layers, final norm and tied head, as one parameter tree."""

    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = [Layer(config, i) for i in range(config.num_hidden_layers)]
        self.norm = Norm(width, eps)
        if inner := config.hidden_size_per_layer_input:
            every_layer = config.num_hidden_layers * inner
            self.embed_tokens_per_layer = nn.Embedding(config.vocab_size_per_layer_input, every_layer)
            self.per_layer_model_projection = nn.Linear(width, every_layer, bias=False)
            self.per_layer_projection_norm = Norm(inner, eps)

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [B, M] -> scaled embedding [B, M, D]."""
        return self.embed_tokens(tokens) * self.config.hidden_size**0.5

    def per_layer_inputs(self, tokens: mx.array, embedded: mx.array) -> mx.array | None:
        """The per-layer embedding [B, M, L, p]: a table look-up and a projection of the context, averaged in power."""
        if not (inner := self.config.hidden_size_per_layer_input):
            return None
        shape = (*tokens.shape, self.config.num_hidden_layers, inner)
        looked_up = (self.embed_tokens_per_layer(tokens) * inner**0.5).reshape(shape)
        projected = (self.per_layer_model_projection(embedded) * self.config.hidden_size**-0.5).reshape(shape)
        return (self.per_layer_projection_norm(projected) + looked_up) * 2.0**-0.5

    def __call__(
        self, tokens: mx.array, cache: KVCache | NoCache, keep: int | None = None
    ) -> tuple[mx.array, dict[str, tuple[mx.array, mx.array]]]:
        """Tokens [B, M] behind the cache's length -> hidden after the final norm [B, keep, D], and K/V per kind."""
        states, working = self.run(tokens, cache, keep)
        return states.hidden, working

    def run(
        self, tokens: mx.array, cache: KVCache | NoCache, keep: int | None = None
    ) -> tuple[States, dict[str, tuple[mx.array, mx.array]]]:
        """Tokens [B, M] behind the cache's length -> the states of the last `keep` rows, and K/V per kind.

        keep: how many of the last rows the caller needs (None = all). The layers that store no K/V run on those
        rows only, and not at all for 0: in E2B that is 20 of 35 layers of a prefill (gemma4.md, 1.6).
        """
        config, rows = self.config, tokens.shape[1]
        step = cache.begin(rows)
        x = self.embed(tokens)
        per_layer = self.per_layer_inputs(tokens, x)
        working: dict[str, tuple[mx.array, mx.array]] = {}
        keep = rows if keep is None else min(keep, rows)
        trunk = x
        for i, layer in enumerate(self.layers):
            if i == config.first_shared and keep < rows:
                if keep == 0:
                    break
                x, step = x[:, -keep:], step.last(keep)
                per_layer = None if per_layer is None else per_layer[:, -keep:]
            kind, normed = config.layer_types[i], layer.input_layernorm(x)
            if i < config.first_shared:
                working[kind] = cache.update(i, *layer.self_attn.keys_values(normed, step.offset), step)
            inputs = None if per_layer is None else per_layer[:, :, i]
            trunk, x = x, layer(x, step.offset, *working[kind], step.masks[kind], normed, inputs)
        return States(self.norm(x[:, x.shape[1] - keep :]), trunk[:, trunk.shape[1] - keep :]), working

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden after the final norm [B, M, D] -> float32 logits [B, M, V], soft-capped."""
        return self.capped(self.embed_tokens.as_linear(hidden))

    def capped(self, products: mx.array) -> mx.array:
        """Products of hidden and table [..., V] -> float32 logits, soft-capped where the config says so."""
        logits = products.astype(mx.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else tanh(logits / cap) * cap


class Gemma4Target:
    """A loaded Gemma 4 as the engine sees it (interfaces.Target)."""

    def __init__(self, model: Gemma4Model, dtype: mx.Dtype, path: Path | None = None) -> None:
        config = model.config
        self.path = path
        self.model = model
        self.config = config
        self.dtype = dtype
        storing = range(config.first_shared)
        self.shapes = [LayerShape(config.layer_types[i], config.kv_heads[i], config.head_dims[i]) for i in storing]
        self.info = TargetInfo(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            max_context=config.max_position_embeddings,
            window=config.sliding_window,
            readable={kind: self.shapes[i] for kind, i in config.storing_layers.items()},
            storing_layers=config.storing_layers,
            attention_heads=config.num_attention_heads,
        )

    def modules(self) -> list[nn.Module]:
        """The model."""
        return [self.model]

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """An empty cache for `capacity` positions."""
        return KVCache(self.shapes, self.config.sliding_window, capacity, self.dtype, batch)

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [B, M] -> the embedding a drafter reads, [B, M, D]."""
        return self.model.embed(tokens)

    def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
        """Runs tokens [B, M] behind the cache's length and writes their K/V; does not move the length."""
        states, _ = self.model.run(tokens, cache, keep)
        return states

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden [B, M, D] -> float32 logits [B, M, V]."""
        return self.model.head(hidden)

    def logits(self, tokens: mx.array) -> mx.array:
        """Logits of every position without a cache: int [B, M] -> float32 [B, M, V]."""
        hidden, _ = self.model(tokens, NoCache(self.config.sliding_window, tokens.shape[0]))
        return self.model.head(hidden)


def parameter_name(key: str) -> str | None:
    """A checkpoint's key in any known layout -> our parameter name; None for what text does not need.

    Known: `model.language_model.*` and `model.*` (published), `language_model.model.*` (mlx-lm, mlx-vlm).
    """
    name = re.sub(r"^(model\.language_model\.|language_model\.model\.|language_model\.|model\.)", "", key)
    unused = ("rotary_emb", "v_norm", "input_max", "input_min", "output_max", "output_min", "lm_head")
    if name.startswith(TOWERS) or any(part in name for part in unused):
        return None
    return name


def adapt_weights(model: Gemma4Model, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Weights under our names -> weights as the model holds them: fused experts split, unused K/V dropped."""
    first_shared, adapted = model.config.first_shared, {}
    for name, value in weights.items():
        found = re.match(r"layers\.(\d+)\.self_attn\.(k_proj|v_proj|k_norm)\.", name)
        if found and int(found[1]) >= first_shared:
            continue  # published checkpoints carry projections for the reusing layers; nothing ever reads them
        if name.endswith(".experts.gate_up_proj") and value.ndim == 3 and value.shape[-2] % 2 == 0:
            base = name.removesuffix("gate_up_proj") + "switch_glu."
            adapted[base + "gate_proj.weight"], adapted[base + "up_proj.weight"] = mx.split(value, 2, axis=-2)
        elif name.endswith(".experts.down_proj"):
            adapted[name.removesuffix("down_proj") + "switch_glu.down_proj.weight"] = value
        else:
            adapted[name] = value
    return adapted


@registry.register(*MODEL_TYPES)
def load(checkpoint: Checkpoint) -> Gemma4Target:
    """A Gemma 4 target from a published, an mlx-lm or an mlx-vlm checkpoint, quantised or not."""
    model = Gemma4Model(Gemma4Config.from_dict(checkpoint.config))
    stored = checkpoint.weights()
    weights, skipped = renamed(stored, parameter_name)
    if towers := {part for key in stored for part in TOWERS if part in key}:
        log.warning("Text only: skipped %d tensors of %s.", skipped, ", ".join(sorted(towers)))
    dtype = compute_dtype(weights)
    load_into(model, adapt_weights(model, weights), dtype, checkpoint.path)
    return Gemma4Target(model, dtype, checkpoint.path)


def published_weights(model: Gemma4Model) -> dict[str, mx.array]:
    """The model's parameters under the names of the published `Gemma4ForConditionalGeneration` layout."""
    stored: dict[str, mx.array] = {}
    parameters = named_parameters(model)
    for name, value in parameters.items():
        if ".switch_glu.up_proj." in name:
            continue
        if ".switch_glu.gate_proj." in name:
            value = mx.concatenate([value, parameters[name.replace("gate_proj", "up_proj")]], axis=-2)
            name = name.replace("switch_glu.gate_proj.weight", "gate_up_proj")
        stored["model.language_model." + name.replace("switch_glu.down_proj.weight", "down_proj")] = value
    return stored
