"""Parity with transformers on models it has just made: other seeds, depths, patterns, heads and windows each time.

The committed golden arrays, with assistants, fix one model per variant. transformers computes in float32 with
eager attention; the checkpoint is what its own save_pretrained writes. Needs the extra `peers` (make peers).
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from greedy import in_passes, random_sizes

from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.targets import load_target

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

TOLERANCE = 1e-3
S, F = "sliding_attention", "full_attention"
VOCABULARY = 160
ROTATION = {
    S: {"rope_type": "default", "rope_theta": 10000.0},
    F: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "max_position_embeddings": 1024,
    "rope_parameters": ROTATION, "final_logit_softcapping": 30.0, "pad_token_id": 0, "eos_token_id": 1,
    "bos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
NO_LAYER_INPUTS: dict[str, Any] = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
K_EQUALS_V: dict[str, Any] = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS: dict[str, Any] = {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 12}
LAYER_INPUTS: dict[str, Any] = {
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "use_double_wide_mlp": True,
}  # fmt: skip
# name: unified or not, layers, window, seed, and what the variant adds.
CASES: dict[str, tuple[bool, list[str], int, int, dict[str, Any]]] = {
    "layer inputs, window 4": (False, [S, S, S, S, F, S, S, F], 4, 1, {
        **LAYER_INPUTS, "num_key_value_heads": 1, "num_kv_shared_layers": 3}),
    "layer inputs, window 64, 8 heads": (False, [S, F, S, F, S, F], 64, 2, {
        **LAYER_INPUTS, "num_attention_heads": 8, "num_kv_shared_layers": 2}),
    "K = V, window 16": (False, [S, S, F, S, S, F], 16, 3, {**NO_LAYER_INPUTS, **K_EQUALS_V}),
    "experts, window 5": (False, [S, F, S, S, F], 5, 4, {**NO_LAYER_INPUTS, **K_EQUALS_V, **EXPERTS}),
    "unified, window 33": (True, [S, S, S, S, S, F], 33, 5, K_EQUALS_V),
}  # fmt: skip
def randomise(model: Any, seed: int) -> Any:
    """Weights so large that attention, gates and the head all matter; norms and scales away from one."""
    chance = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=chance)
            if "norm" in name or name.endswith("scale"):
                weight.copy_(1.0 + 0.2 * noise)
            elif "embed_tokens" in name:
                weight.copy_(0.5 * noise)
            else:
                weight.copy_(0.8 * noise / weight.shape[-1] ** 0.5)  # larger ones make float32 itself chaotic
        for name, buffer in sorted(model.named_buffers()):
            if name.endswith("layer_scalar"):
                buffer.copy_(0.8 + 0.1 * torch.randn(buffer.shape, generator=chance))
            elif name.endswith("token_ordering"):
                buffer.copy_(torch.randperm(buffer.numel(), generator=chance))
    model.tie_weights()
    return model.eval().float()


@pytest.mark.parametrize("case", CASES)
def test_logits_whole_by_token_and_in_chunks(case: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    unified, kinds, window, seed, extra = CASES[case]
    name = "Gemma4Unified" if unified else "Gemma4"
    options = {**COMMON, "layer_types": kinds, "num_hidden_layers": len(kinds), "sliding_window": window, **extra}
    text = getattr(transformers, name + "TextConfig")(**options)
    config = getattr(transformers, name + "Config")(text_config=text, vision_config=None, audio_config=None)
    model = getattr(transformers, name + "ForConditionalGeneration")(config)
    model.set_attn_implementation("eager")
    randomise(model, seed).save_pretrained(tmp_path)
    tokens = np.random.default_rng(seed).integers(3, VOCABULARY, (1, min(3 * window, 120)))
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(tokens), use_cache=False).logits.numpy()
    assert 2 < np.abs(expected).max() < 30 and expected.std() > 0.5  # worth comparing
    target = load_target(Checkpoint.open(tmp_path))
    assert np.abs(np.array(target.logits(mx.array(tokens))) - expected).max() < TOLERANCE
    for sizes in (random_sizes(tokens.shape[1], 3, 40), [1] * tokens.shape[1]):
        assert np.abs(np.array(in_passes(target, mx.array(tokens), sizes)[0]) - expected).max() < TOLERANCE
