"""The shape of a Gemma 4 text model: its config.json, read and checked, in every form that is about.

The published form, the newer one of transformers and those of MLX conversions become one Gemma4Config; what the model
does not implement is refused.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlx_mtp.checkpoints.checkpoint import misfit, number, section
from mlx_mtp.errors import UnsupportedModel
from mlx_mtp.generation.cache import FULL, SLIDING, LayerShape

# Bounds of sizes and of counts in a config.json: far above any model, low enough that no product leaves 31 bits.
MAX_SIZE, MAX_COUNT = 2**20, 2**10

DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10_000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0},
}


@dataclass(frozen=True, kw_only=True)
class Gemma4Config:
    """What the text model uses of `text_config`, in its published and its newer form.

    layers: K/V of each, also of those that store none. first_shared: index of the first layer that reads another
    layer's K/V; L where none does.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerShape, ...]
    first_shared: int
    num_attention_heads: int
    sliding_window: int
    max_position_embeddings: int
    rope_parameters: Mapping[str, Mapping[str, Any]]
    rms_norm_eps: float
    final_logit_softcapping: float | None
    hidden_size_per_layer_input: int
    vocab_size_per_layer_input: int
    attention_k_eq_v: bool
    use_double_wide_mlp: bool
    enable_moe_block: bool
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Gemma4Config:
        """Reads a config.json, top level or `text_config`.

        Raises UnsupportedModel for what this file does not implement, CheckpointError for a field that is missing,
        of an odd type, out of range or at odds with another.
        """
        text = section(config, "text_config") or config
        _refuse_unsupported(text)
        count = number(text, "num_hidden_layers", int, 1, MAX_COUNT)
        shared = number(text, "num_kv_shared_layers", int, 0, count - 1, 0)
        vocabulary = number(text, "vocab_size", int, 1, MAX_SIZE)
        mixture = bool(text.get("enable_moe_block"))
        experts = number(text, "num_experts", int, int(mixture), MAX_COUNT, 0)
        cap = text.get("final_logit_softcapping")
        return cls(
            vocab_size=vocabulary,
            hidden_size=number(text, "hidden_size", int, 1, MAX_SIZE),
            intermediate_size=number(text, "intermediate_size", int, 1, MAX_SIZE),
            layers=_layers(text, _kinds(text, count, shared)),
            first_shared=count - shared,
            num_attention_heads=number(text, "num_attention_heads", int, 1, MAX_COUNT),
            sliding_window=number(text, "sliding_window", int, 1, MAX_SIZE, 512),
            max_position_embeddings=number(text, "max_position_embeddings", int, 2, 2**31 - 1, 131_072),
            rope_parameters=_rope(text),
            rms_norm_eps=number(text, "rms_norm_eps", float, 1e-30, 1.0, 1e-6),
            final_logit_softcapping=number(text, "final_logit_softcapping", float, 1e-3, 1e6) if cap else None,
            hidden_size_per_layer_input=number(text, "hidden_size_per_layer_input", int, 0, MAX_SIZE, 0),
            vocab_size_per_layer_input=number(text, "vocab_size_per_layer_input", int, 0, MAX_SIZE, 0) or vocabulary,
            attention_k_eq_v=bool(text.get("attention_k_eq_v")),
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
        raise misfit(f"{layers} entries '{FULL}' or '{SLIDING}' in 'layer_types'", reprlib.repr(found))
    kinds = [*found[:-1], FULL]  # as the reference implementation forces it
    if missing := set(kinds) - set(kinds[: layers - shared]):
        raise misfit(f"a {missing.pop()} layer among the first {layers - shared}, which the {shared} layers after them "
                     "could read", "none")  # fmt: skip
    return kinds


def _layers(text: Mapping[str, Any], kinds: list[str]) -> tuple[LayerShape, ...]:
    """K/V heads and head size of every layer, from `per_layer_config` (newer) or the `global_*` fields (published)."""
    heads = number(text, "num_attention_heads", int, 1, MAX_COUNT)
    head_dim = number(text, "head_dim", int, 2, MAX_SIZE, 256)
    kv_heads = number(text, "num_key_value_heads", int, 1, heads, heads)
    given = section(text, "per_layer_config")
    if odd := [key for key in given if not key.isdecimal()]:
        raise misfit("layer numbers as the names in 'per_layer_config'", reprlib.repr(odd[0]))
    # By layer; transformers pads the numbers with zeros to one width ("05"), others do not.
    overrides = {int(key): section(given, key) for key in given}
    # The newer form may say null for "no layer differs"; it never has the published form's field.
    if text.get("per_layer_config") is None and ("global_head_dim" in text or "per_layer_config" not in text):
        full = {"head_dim": number(text, "global_head_dim", int, 2, MAX_SIZE, 512)}
        if text.get("attention_k_eq_v"):
            full["num_key_value_heads"] = number(text, "num_global_key_value_heads", int, 1, heads, kv_heads)
        overrides = {i: full for i, kind in enumerate(kinds) if kind == FULL}
    own = [overrides.get(i, {}) for i in range(len(kinds))]
    head_dims = [number(layer, "head_dim", int, 2, MAX_SIZE, head_dim) for layer in own]
    kv_counts = [number(layer, "num_key_value_heads", int, 1, heads, kv_heads) for layer in own]
    if any(size % 2 for size in head_dims) or any(heads % count for count in kv_counts):
        raise misfit(f"even head sizes and K/V heads that divide the {heads} attention heads",
                     f"sizes {sorted(set(head_dims))} and K/V heads {sorted(set(kv_counts))}")  # fmt: skip
    return tuple(map(LayerShape, kinds, kv_counts, head_dims))


def _rope(text: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    given = section(text, "rope_parameters")
    ropes = {kind: section(given, kind) or DEFAULT_ROPE[kind] for kind in (FULL, SLIDING)}
    return {kind: rope | {
        "rope_theta": number(rope, "rope_theta", float, 1e-3, 1e15),
        "partial_rotary_factor": number(rope, "partial_rotary_factor", float, 0.0, 1.0, 1.0),
        "factor": number(rope, "factor", float, 1e-3, 1e6, 1.0),
    } for kind, rope in ropes.items()}  # fmt: skip


def _refuse_unsupported(text: Mapping[str, Any]) -> None:
    activation, ropes = text.get("hidden_activation", "gelu_pytorch_tanh"), section(text, "rope_parameters")
    rope_types = {kind: section(ropes, kind).get("rope_type", "default") for kind in ropes}
    checks = {
        f"hidden_activation {reprlib.repr(activation)}": activation != "gelu_pytorch_tanh",
        "attention_bias": bool(text.get("attention_bias")),
        "use_bidirectional_attention 'all'": text.get("use_bidirectional_attention") == "all",
        "an untied output head": text.get("tie_word_embeddings") is False,
    } | {
        f"rope_type {reprlib.repr(found)} in {kind}": found not in ("default", "proportional")
        for kind, found in rope_types.items()
    }
    if asked := next((name for name, present in checks.items() if present), None):
        raise UnsupportedModel(
            f"config.json asks for {asked}, which no released Gemma 4 text model uses and which is not implemented; "
            "use a Gemma 4 checkpoint without it."
        )
