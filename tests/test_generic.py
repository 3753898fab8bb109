"""Models of mlx-lm over our cache against mlx-lm itself: whole, in chunks, after rollbacks."""

import json
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import GOLDEN, refusal
from greedy import in_passes, random_sizes
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.utils import _get_classes, load_model

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.targets import load_target
from mlx_mtp.targets.generic import GenericTarget

TOLERANCE = 1e-3
VOCABULARY, WINDOW, LENGTH = 96, 8, 60

BASE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5, "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1,
    "kv_lora_rank": 24, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "first_k_dense_replace": 1, "num_key_value_heads": 4,
}  # fmt: skip
SLIDING_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-sliding": {"model_type": "llama", "layer_types": SLIDING_LAYERS, "sliding_window": WINDOW},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "rope_theta": 1e4},
    "mimo": {"model_type": "mimo"},
    "deepseek_v3": {"model_type": "deepseek_v3", **LATENT},
    "gemma3_text": {"model_type": "gemma3_text", "head_dim": 8, "query_pre_attn_scalar": 8,
                    "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 3},
    "gemma2": {"model_type": "gemma2", "head_dim": 8, "query_pre_attn_scalar": 8},
}  # fmt: skip


def written(folder: Path, config: dict[str, Any], bits: int | None = None) -> Path:
    """A checkpoint with random weights, lively enough that greedy decoding does not stand still."""
    classes = _get_classes(config)
    model = classes[0](classes[1].from_dict(config))
    mx.random.seed(7)

    def lively(name: str, weight: mx.array) -> mx.array:
        if weight.ndim == 1:
            return weight + 0.1 * mx.random.normal(weight.shape)
        return mx.random.normal(weight.shape) * (1.0 if "embed_tokens" in name else weight.shape[-1] ** -0.5)

    model.update(tree_map_with_path(lively, model.parameters()))
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config = {**config, "quantization": {"group_size": 32, "bits": bits}}
    return families.written(folder, config, dict(tree_flatten(model.parameters())))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("generic")
    return {name: written(root / name, BASE | config) for name, config in CONFIGS.items()}


def loaded(folder: Path) -> tuple[GenericTarget, nn.Module]:
    """Our target, and mlx-lm's own model of the same files."""
    target = load_target(Checkpoint.open(folder))
    assert isinstance(target, GenericTarget)
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    return target, model


def tokens_of(length: int = LENGTH, batch: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(3).integers(0, VOCABULARY, (batch, length)))


def difference(found: mx.array, expected: mx.array) -> float:
    assert found.shape == expected.shape
    return mx.abs(found - expected).max().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_mlx_lm(name: str, folders: dict[str, Path]) -> None:
    """In one piece, token by token, in chunks below and above the slack, after rejected rows; sliding ones wrap."""
    target, model = loaded(folders[name])
    tokens = tokens_of()
    expected = model(tokens)
    found = {
        "uncached": target.logits(tokens),
        "whole": in_passes(target, tokens, [LENGTH])[0],
        "single": in_passes(target, tokens, [1] * LENGTH)[0],
        "long chunks": in_passes(target, tokens, random_sizes(LENGTH, 1, 45))[0],
        "rejected": in_passes(target, tokens, random_sizes(LENGTH, 2, 4), junk=5)[0],
    }
    apart = {way: difference(logits, expected) for way, logits in found.items()}
    print(name, apart)
    assert max(apart.values()) < TOLERANCE, apart


@pytest.mark.parametrize("name", CONFIGS)
def test_states(name: str, folders: dict[str, Path]) -> None:
    """The trunk's stream, run through the last layer and the norm by hand, is the hidden state; keep cuts rows."""
    target, model = loaded(folders[name])
    tokens = tokens_of(7)
    states = target.forward(tokens, target.new_cache(256))
    last, trunk = model.layers[-1], states.aux[-1]
    assert len(states.aux) == len(model.layers) and difference(states.aux[0], target.embed(tokens)) < 1e-4
    assert difference(model.model.norm(last(trunk, mx.tril(mx.ones((7, 7), dtype=mx.bool_)))), states.hidden) < 1e-3
    for keep in (0, 1, 3, 7, 9):
        kept = target.forward(tokens, target.new_cache(256), keep)
        rows = min(keep, 7)
        assert kept.hidden.shape[1] == kept.aux[0].shape[1] == kept.aux[-1].shape[1] == rows
        assert not rows or difference(kept.hidden, states.hidden[:, -rows:]) < 1e-4
    scale = 32**0.5 if name.startswith("gemma") else 1.0
    assert difference(target.embed(tokens), model.model.embed_tokens(tokens) * scale) < 5e-2
    assert target.info.vocab_size == VOCABULARY and target.info.hidden_size == 32
    assert target.info.max_context == 512 and target.info.attention_heads == 4


def test_multimodal_wrappers_and_half_precision(tmp_path: Path) -> None:
    """The trunk one level further down; weights of 16 bits are computed with in float32 on a CPU."""
    text = BASE | CONFIGS["gemma3_text"]
    folder = written(tmp_path / "wrapped", {"model_type": "gemma3", "text_config": text, "vocab_size": VOCABULARY})
    weights = mx.load(str(folder / "model.safetensors"))
    halves = {name: weight.astype(mx.bfloat16) for name, weight in weights.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), halves)
    target, model = loaded(folder)
    tokens = tokens_of()
    if mx.default_device() == mx.Device(mx.cpu):
        assert target.dtype == mx.float32
        assert difference(in_passes(target, tokens, random_sizes(LENGTH, 0, 9), junk=2)[0], model(tokens)) < TOLERANCE
    assert target.info.max_context == 512 and target.info.attention_heads == 4


def test_modules_for_drafting_are_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    """DeepSeek's layout keeps them after the last layer; a checkpoint that does not announce them is refused."""
    config = BASE | CONFIGS["deepseek_v3"]
    folder = written(tmp_path / "model", config)
    weights = mx.load(str(folder / "model.safetensors"))
    extra = {"model.layers.3.enorm.weight": mx.ones((32,)), "model.layers.3.eh_proj.weight": mx.ones((32, 64))}
    mx.save_safetensors(str(folder / "model.safetensors"), weights | extra)
    assert "enorm" in refused(folder, mlx_mtp.CheckpointError)
    edited(folder, num_nextn_predict_layers=1)
    tokens = tokens_of()
    expected = loaded(folders["deepseek_v3"])[1](tokens)
    assert difference(load_target(Checkpoint.open(folder)).logits(tokens), expected) < TOLERANCE


# Refusals


def refused(folder: Path, error: type[mlx_mtp.MLXMTPError]) -> str:
    """One sentence, with the folder's name."""
    message = refusal(lambda: mlx_mtp.load(folder, drafter=None), error)
    assert str(folder) in message
    return message


STATE = {"state_size": 8, "conv_kernel": 4, "use_bias": True, "use_conv_bias": True, "time_step_rank": 4,
         "intermediate_size": 48}  # fmt: skip


def test_models_that_cannot_be_rolled_back(tmp_path: Path) -> None:
    mamba = written(tmp_path / "mamba", BASE | STATE | {"model_type": "mamba"})
    message = refused(mamba, mlx_mtp.UnsupportedModel)
    assert "ArraysCache" in message and "cannot be taken back" in message and "mlx-lm" in message


def test_other_caches_are_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models import cache, llama

    for caches, words in (
        (lambda self: [cache.RotatingKVCache(8), cache.KVCache(), cache.RotatingKVCache(9)], "8 and 9"),
        (lambda self: [cache.RotatingKVCache(8, keep=4)] * 3, "never forgets the first 4"),
        (lambda self: [cache.QuantizedKVCache()] * 3, "QuantizedKVCache"),
        (lambda self: [cache.ChunkedKVCache(8)] * 3, "ChunkedKVCache"),
    ):
        monkeypatch.setattr(llama.Model, "make_cache", caches)
        assert words in refused(folders["llama"], mlx_mtp.UnsupportedModel)


def test_positions_read_on_the_host_are_refused(folders: dict[str, Path]) -> None:
    config = BASE | CONFIGS["llama"] | {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}
    folder = written(folders["llama"].parent / "dynamic", config)
    assert "does not run over the cache" in refused(folder, mlx_mtp.UnsupportedModel)


def test_unknown_types_name_both_ways(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", BASE | CONFIGS["llama"])
    for name in ("no-such-model", "base", "olmo", "a\nb"):
        (folder / "config.json").write_text(json.dumps({"model_type": name}))
        message = refused(folder, mlx_mtp.UnsupportedModel)
        assert "gemma4" in message and "mlx-lm" in message


def edited(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


FIELDS: list[dict[str, Any]] = [
    {"hidden_size": None}, {"hidden_size": 64}, {"hidden_size": "x"}, {"hidden_size": 10**12}, {"hidden_size": -1},
    {"num_hidden_layers": None}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4}, {"num_hidden_layers": 10**9},
    {"vocab_size": 97}, {"vocab_size": 0}, {"num_attention_heads": 0}, {"num_attention_heads": 3},
    {"num_attention_heads": "x"}, {"rms_norm_eps": None}, {"rms_norm_eps": "x"}, {"max_position_embeddings": "x"},
    {"rope_scaling": 7}, {"rope_scaling": {"rope_type": "yarn"}}, {"rope_theta": "x"}, {"layer_types": 7},
    {"layer_types": ["x"]}, {"layer_types": ["sliding_attention"] * 3}, {"layer_types": SLIDING_LAYERS},
    {"layer_types": SLIDING_LAYERS, "sliding_window": "x"}, {"quantization": 7}, {"quantization": {"bits": 4}},
    {"quantization_config": {"quant_method": "modelopt"}}, {"model_file": "code.py"}, {"text_config": 7},
]  # fmt: skip


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_config_fields(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = written(tmp_path / "model", BASE | CONFIGS["llama"])
    edited(folder, **fields)
    refused(folder, mlx_mtp.CheckpointError)


def test_weights_that_are_not_finite_or_named_otherwise(tmp_path: Path) -> None:
    folder = written(tmp_path / "model", BASE | CONFIGS["llama"])
    file = folder / "model.safetensors"
    weights = dict(mx.load(str(file))) | {"lm_head.weight": mx.full((VOCABULARY, 32), float("nan"))}
    mx.save_safetensors(str(file), weights)
    assert "finite" in refused(folder, mlx_mtp.CheckpointError)
    file.rename(folder / "weights.safetensors")
    assert "model" in refused(folder, mlx_mtp.CheckpointError)


def test_an_assistant_for_another_target_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(mlx_mtp.IncompatibleDrafter, match="gives none to read"):
        mlx_mtp.load(folders["llama"], drafter=GOLDEN / "ple" / "assistant_tied")
