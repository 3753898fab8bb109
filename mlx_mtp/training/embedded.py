"""The shape of the embedded target: a miniature of Gemma 4 E2B, trained on Python's standard library.

What it does: its config.json, and the names of its tokenizer's files. What it does not do: train (pipeline.py).
"""

from __future__ import annotations

from typing import Any

from mlx_mtp.generation.cache import FULL, SLIDING
from mlx_mtp.targets.gemma4_config import DEFAULT_ROPE

WINDOW = 128
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
IDS = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
TURN_END = 5  # <turn|>


def text_config(vocabulary: int) -> dict[str, Any]:
    """Per-layer embeddings, shared K/V, double-wide MLP, one K/V head, 2 sliding + 1 full: E2B in small."""
    kinds = [SLIDING, SLIDING, FULL] * 2
    return {
        "model_type": "gemma4_text", "vocab_size": vocabulary, "hidden_size": 320, "intermediate_size": 768,
        "num_hidden_layers": len(kinds), "layer_types": kinds, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 64, "global_head_dim": 128, "num_global_key_value_heads": None, "sliding_window": WINDOW,
        "max_position_embeddings": 8192, "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": vocabulary, "attention_k_eq_v": False,
        "enable_moe_block": False, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
        "rope_parameters": DEFAULT_ROPE, "use_bidirectional_attention": None, **IDS,
    }  # fmt: skip


def target_config(vocabulary: int) -> dict[str, Any]:
    """config.json of the target, published form, so that mlx-lm and transformers load it too."""
    return {
        "model_type": "gemma4", "architectures": ["Gemma4ForConditionalGeneration"], "vocab_size": vocabulary,
        "text_config": text_config(vocabulary), "vision_config": None, "audio_config": None,
        "tie_word_embeddings": True, **IDS, "eos_token_id": [IDS["eos_token_id"], TURN_END],
    }  # fmt: skip
