"""Gemma 4 text model, all five shapes: E2B, E4B, 12B unified, 26B-A4B (mixture of experts) and 31B.

Images and audio are not implemented. Parameter names are those of the published checkpoints below
`model.language_model.` (Hugging Face `Gemma4ForConditionalGeneration`), except that experts are split in three as in
MLX conversions.

Invariant: norms multiply by the plain weight (no 1 + w), attention scale is 1, logits are soft-capped.

Shapes: B batch, M rows of the pass, D hidden, H query heads, G K/V heads, d head size, L layers,
p width of the per-layer embedding, V vocabulary.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_mtp.backend import threads
from mlx_mtp.backend.activations import gelu, tanh
from mlx_mtp.backend.attention import attend
from mlx_mtp.checkpoints.checkpoint import TOWERS, Checkpoint, compute_dtype, load_into, named_parameters
from mlx_mtp.checkpoints.unpacking import unpack
from mlx_mtp.generation.cache import FULL, KVCache, NoCache
from mlx_mtp.generation.interfaces import States, Target, TargetInfo
from mlx_mtp.targets import registry, rows_of
from mlx_mtp.targets.gemma4_config import Gemma4Config

log = logging.getLogger(__name__)


def _rotation(rope: Mapping[str, Any], size: int) -> mx.array:
    """Wave lengths [d/2] for mx.fast.rope; infinite = not rotated.

    'proportional' rotates only the first `partial_rotary_factor` of the pairs, with exponents divided by the
    whole head size, and divides the angles by `factor`.
    """
    proportional = rope.get("rope_type") == "proportional"
    share = rope["partial_rotary_factor"] if proportional else 1.0
    rotated = int(share * size // 2)
    lengths = [rope["rope_theta"] ** (2 * j / size) * rope["factor"] for j in range(rotated)]
    return mx.array(lengths + [float("inf")] * (size // 2 - rotated), dtype=mx.float32)


class Attention(nn.Module):
    """Grouped-query attention with normed q, k and v. Layers that reuse K/V have no k, v of their own."""

    def __init__(self, config: Gemma4Config, layer: int) -> None:
        super().__init__()
        width, shape = config.hidden_size, config.layers[layer]
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, shape.heads, shape.head_dim
        self.eps = config.rms_norm_eps
        self._wave_lengths = _rotation(config.rope_parameters[shape.kind], self.head_dim)
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, self.eps)
        self.o_proj = nn.Linear(self.heads * self.head_dim, width, bias=False)
        if layer < config.first_shared:
            self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
            self.k_norm = nn.RMSNorm(self.head_dim, self.eps)
            # K = V layers share the projection, not the tensors: v is the raw projection, before k's norm and rotation.
            self.shares_projection = config.attention_k_eq_v and shape.kind == FULL
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

    def __call__(self, x: mx.array, offset: mx.array, keys: mx.array, values: mx.array, mask: mx.array) -> mx.array:
        """x [B, M, D] at positions offset.. against K/V [B, G, S, d] under mask [B, 1, M, S] -> [B, M, D]."""
        batch, rows, _ = x.shape
        queries = self.q_norm(self.q_proj(x).reshape(batch, rows, self.heads, self.head_dim))
        queries = self.rotate(queries.transpose(0, 2, 1, 3), offset)
        out = attend(queries, keys, values, mask)
        return self.o_proj(out.transpose(0, 2, 1, 3).reshape(batch, rows, -1))


class GatedMLP(nn.Module):
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


class Experts(nn.Module):
    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.moe_intermediate_size
        self.switch_glu = SwitchGLU(width, inner, config.num_experts, activation=lambda x, gate: gelu(gate) * x)

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
        self.input_layernorm = nn.RMSNorm(width, eps)
        self.post_attention_layernorm = nn.RMSNorm(width, eps)
        self.pre_feedforward_layernorm = nn.RMSNorm(width, eps)
        self.post_feedforward_layernorm = nn.RMSNorm(width, eps)
        self.layer_scalar = mx.ones((1,))
        self.mixture = config.enable_moe_block
        if self.mixture:
            self.router = Router(config)
            self.experts = Experts(config)
            self.post_feedforward_layernorm_1 = nn.RMSNorm(width, eps)
            self.post_feedforward_layernorm_2 = nn.RMSNorm(width, eps)
            self.pre_feedforward_layernorm_2 = nn.RMSNorm(width, eps)
        if config.hidden_size_per_layer_input:
            inner = config.hidden_size_per_layer_input
            self.per_layer_input_gate = nn.Linear(width, inner, bias=False)
            self.per_layer_projection = nn.Linear(inner, width, bias=False)
            self.post_per_layer_input_norm = nn.RMSNorm(width, eps)

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
        self, x: mx.array, offset: mx.array, keys: mx.array, values: mx.array, mask: mx.array,
        normed: mx.array | None = None, per_layer: mx.array | None = None,
    ) -> mx.array:  # fmt: skip
        """x [B, M, D] -> [B, M, D]; `normed` is input_layernorm(x) where the caller has it, `per_layer` [B, M, p]."""
        normed = self.input_layernorm(x) if normed is None else normed
        x = x + self.post_attention_layernorm(self.self_attn(normed, offset, keys, values, mask))
        x = x + self.feed_forward(x)
        if per_layer is not None:
            gated = gelu(self.per_layer_input_gate(x)) * per_layer
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gated))
        return x * self.layer_scalar


class Gemma4Model(nn.Module):
    def __init__(self, config: Gemma4Config) -> None:
        super().__init__()
        self.config = config
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = [Layer(config, i) for i in range(len(config.layers))]
        self.norm = nn.RMSNorm(width, eps)
        if inner := config.hidden_size_per_layer_input:
            every_layer = len(config.layers) * inner
            self.embed_tokens_per_layer = nn.Embedding(config.vocab_size_per_layer_input, every_layer)
            self.per_layer_model_projection = nn.Linear(width, every_layer, bias=False)
            self.per_layer_projection_norm = nn.RMSNorm(inner, eps)

    def embed(self, tokens: mx.array) -> mx.array:
        """Token ids [B, M] -> scaled embedding [B, M, D]."""
        return self.embed_tokens(tokens) * self.config.hidden_size**0.5

    def per_layer_inputs(self, tokens: mx.array, embedded: mx.array) -> mx.array | None:
        """The per-layer embedding [B, M, L, p]: a table look-up and a projection of the context, averaged in power."""
        if not (inner := self.config.hidden_size_per_layer_input):
            return None
        shape = (*tokens.shape, len(self.config.layers), inner)
        looked_up = (self.embed_tokens_per_layer(tokens) * inner**0.5).reshape(shape)
        projected = (self.per_layer_model_projection(embedded) * self.config.hidden_size**-0.5).reshape(shape)
        return (self.per_layer_projection_norm(projected) + looked_up) * 2.0**-0.5

    def __call__(self, tokens: mx.array, cache: KVCache | NoCache, keep: int | None = None) -> States:
        """Tokens [B, M] after the cache's length -> the states of the last `keep` rows (None = all).

        The layers that store no K/V run on those rows only, and not at all for 0: in E2B that is 20 of 35 layers of a
        prefill (gemma4.md, 1.6).
        """
        config, rows = self.config, tokens.shape[1]
        step = cache.plan(rows)
        x = self.embed(tokens)
        per_layer = self.per_layer_inputs(tokens, x)
        working: dict[str, tuple[mx.array, mx.array]] = {}
        keep = rows if keep is None else min(keep, rows)
        aux: list[mx.array] = []
        for i, layer in enumerate(self.layers):
            if i == config.first_shared and keep < rows:
                if keep == 0:
                    break
                x, step = x[:, -keep:], step.last(keep)
                per_layer = None if per_layer is None else per_layer[:, -keep:]
            kind, normed = config.layers[i].kind, layer.input_layernorm(x)
            if i < config.first_shared:
                working[kind] = cache.update(i, *layer.self_attn.keys_values(normed, step.offset), step)
            inputs = None if per_layer is None else per_layer[:, :, i]
            aux.append(x)
            x = layer(x, step.offset, *working[kind], step.masks[kind], normed, inputs)
        kept = States(x, tuple(aux)).last(keep)
        return States(self.norm(kept.hidden), kept.aux)

    def head(self, hidden: mx.array) -> mx.array:
        """Hidden after the final norm [B, M, D] -> float32 logits [B, M, V], soft-capped."""
        return self.capped(self.embed_tokens.as_linear(hidden))

    def capped(self, products: mx.array) -> mx.array:
        """Products of hidden and table [..., V] -> float32 logits, soft-capped where the config says so."""
        logits = products.astype(mx.float32)
        cap = self.config.final_logit_softcapping
        return logits if cap is None else tanh(logits / cap) * cap


class Gemma4Target(Target):
    model: Gemma4Model

    def __init__(self, model: Gemma4Model, dtype: mx.Dtype, path: Path | None = None) -> None:
        self.model, self.config, self.dtype, self.path = model, model.config, dtype, path
        config = model.config
        self.shapes = config.layers[: config.first_shared]
        # Per kind the layer whose K/V the reusing layers and an assistant read: the last one that stores any.
        storing = {shape.kind: i for i, shape in enumerate(self.shapes)}
        self.info = TargetInfo(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, max_context=config.max_position_embeddings,
            window=config.sliding_window, attention_heads=config.num_attention_heads,
            readable={kind: self.shapes[i] for kind, i in storing.items()}, storing_layers=storing,
        )  # fmt: skip

    def embed(self, tokens: mx.array) -> mx.array:
        return self.model.embed(tokens)

    def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
        return self.model(tokens, cache, keep)

    def head(self, hidden: mx.array) -> mx.array:
        return self.model.head(hidden)

    def head_on(self, tokens: mx.array) -> Callable[[mx.array], mx.array]:
        table = rows_of(self.model.embed_tokens, tokens)
        return lambda hidden: self.model.capped(table.as_linear(hidden))

    @threads.device_work
    def logits(self, tokens: mx.array) -> mx.array:
        return self.head(self.model(tokens, NoCache(self.info.window, tokens.shape[0])).hidden)


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


@registry.register("gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
def load(checkpoint: Checkpoint) -> Gemma4Target:
    model = Gemma4Model(Gemma4Config.from_dict(checkpoint.config))
    stored = checkpoint.weights()
    weights = {new: weight for key, weight in stored.items() if (new := parameter_name(key)) is not None}
    if towers := {part for key in stored for part in TOWERS if part in key}:
        log.warning("Text only: skipped %d tensors of %s.", len(stored) - len(weights), ", ".join(sorted(towers)))
    dtype = compute_dtype(weights)
    load_into(model, adapt_weights(model, weights), dtype, checkpoint)
    unpack(model, checkpoint.name)
    mx.eval(model.parameters())
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
