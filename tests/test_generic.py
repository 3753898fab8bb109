"""Models of mlx-lm over our cache against mlx-lm itself: whole, in chunks, after rollbacks, through the engine."""

import json
import random
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import _get_classes, load_model
from test_engine import same_or_tie

import mlx_mtp
from mlx_mtp.cache import FULL, SLIDING
from mlx_mtp.checkpoint import Checkpoint
from mlx_mtp.targets import load_target
from mlx_mtp.targets.generic import GenericTarget

TOLERANCE = 2e-4
VOCABULARY, WINDOW, LENGTH = 96, 8, 60

BASE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4,
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
REQUIRED = ("llama", "qwen3", "deepseek_v3", "mimo", "gemma3_text", "llama-sliding")


def written(folder: Path, config: dict[str, Any], bits: int | None = None) -> Path:
    """A checkpoint with random weights, lively enough that greedy decoding does not stand still."""
    folder.mkdir(parents=True, exist_ok=True)
    classes = _get_classes(config)
    model = classes[0](classes[1].from_dict(config))
    mx.random.seed(7)

    def lively(name: str, weight: mx.array) -> mx.array:
        if weight.ndim == 1:
            return weight + 0.1 * mx.random.normal(weight.shape)
        return mx.random.normal(weight.shape) * (1.0 if "embed_tokens" in name else weight.shape[-1] ** -0.5)

    model.update(tree_map_with_path(lively, model.parameters()))
    if config["model_type"].startswith("gemma"):
        model.pop("lm_head", None)
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config = {**config, "quantization": {"group_size": 32, "bits": bits}}
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One tiny checkpoint per architecture."""
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


def in_passes(target: GenericTarget, tokens: mx.array, sizes: list[int], junk: int = 0) -> mx.array:
    """Logits of every token, `sizes` committed a pass, each pass with `junk` rows behind it that are rejected."""
    cache, found, start = target.new_cache(256, tokens.shape[0]), [], 0
    for size in sizes:
        rejected = (tokens[:, start : start + 1] + 1 + mx.arange(junk)) % VOCABULARY
        if junk:
            target.forward(rejected, cache)  # wholly rejected
        rows = mx.concatenate([tokens[:, start : start + size], rejected], axis=1)
        found.append(target.head(target.forward(rows, cache).hidden)[:, :size])
        cache.advance(size)
        start += size
    return mx.concatenate(found, axis=1)


def random_sizes(seed: int, most: int) -> list[int]:
    rng, left, sizes = random.Random(seed), LENGTH, []
    while left:
        sizes.append(rng.randint(1, min(left, most)))
        left -= sizes[-1]
    return sizes


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_mlx_lm(name: str, folders: dict[str, Path]) -> None:
    """In one piece, token by token, in chunks below and above the slack, behind rejected rows; sliding ones wrap."""
    target, model = loaded(folders[name])
    tokens = tokens_of()
    expected = model(tokens)
    found = {
        "uncached": target.logits(tokens),
        "whole": in_passes(target, tokens, [LENGTH]),
        "single": in_passes(target, tokens, [1] * LENGTH),
        "chunks": in_passes(target, tokens, random_sizes(0, 9)),
        "long chunks": in_passes(target, tokens, random_sizes(1, 45)),
        "rejected": in_passes(target, tokens, random_sizes(2, 4), junk=5),
        "rejected singles": in_passes(target, tokens, [1] * LENGTH, junk=3),
    }
    apart = {way: difference(logits, expected) for way, logits in found.items()}
    print(name, apart)
    assert max(apart.values()) < TOLERANCE, apart


@pytest.mark.parametrize("name", REQUIRED)
def test_sequences_of_a_batch_roll_back_on_their_own(name: str, folders: dict[str, Path]) -> None:
    target, model = loaded(folders[name])
    tokens = tokens_of(24, batch=2)
    cache = target.new_cache(256, 2)
    target.forward(tokens[:, :20], cache)
    cache.advance(mx.array([20, 17]))
    rows = mx.stack([tokens[0, 20:23], tokens[1, 17:20]])
    found = target.head(target.forward(rows, cache).hidden)
    expected = model(tokens)
    assert difference(found, mx.stack([expected[0, 20:23], expected[1, 17:20]])) < TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_states(name: str, folders: dict[str, Path]) -> None:
    """The trunk's stream, run through the last layer and the norm by hand, is the hidden state; keep cuts rows."""
    target, model = loaded(folders[name])
    tokens = tokens_of(7)
    states = target.forward(tokens, target.new_cache(256))
    last, trunk = model.layers[-1], states.trunk
    assert difference(model.model.norm(last(trunk, mx.tril(mx.ones((7, 7), dtype=mx.bool_)))), states.hidden) < 1e-4
    for keep in (0, 1, 3, 7, 9):
        kept = target.forward(tokens, target.new_cache(256), keep)
        rows = min(keep, 7)
        assert kept.hidden.shape[1] == kept.trunk.shape[1] == rows
        assert not rows or difference(kept.hidden, states.hidden[:, -rows:]) < 1e-5
    scale = 32**0.5 if name.startswith("gemma") else 1.0
    assert difference(target.embed(tokens), model.model.embed_tokens(tokens) * scale) < 5e-2
    assert target.info.vocab_size == VOCABULARY and target.info.hidden_size == 32
    assert target.info.max_context == 512 and target.info.attention_heads == 4


def test_layers_as_the_model_keeps_them(folders: dict[str, Path]) -> None:
    sliding, _ = loaded(folders["llama-sliding"])
    assert [shape.kind for shape in sliding.shapes] == SLIDING_LAYERS and sliding.info.window == WINDOW
    latent, _ = loaded(folders["deepseek_v3"])
    assert {(s.kind, s.heads, s.head_dim, s.value_dim) for s in latent.shapes} == {(FULL, 1, 24, 8)}
    cache = latent.new_cache(256)
    cache.grow(512)
    assert cache.keys[0].shape == (1, 1, 512, 24) and cache.values[0].shape == (1, 1, 512, 8)
    gemma, _ = loaded(folders["gemma3_text"])
    assert [shape.kind for shape in gemma.shapes] == [SLIDING, SLIDING, FULL, SLIDING]


def greedy(model: nn.Module, ids: list[int], length: int) -> list[int]:
    """mlx-lm's own decoding over its own cache."""
    cache, rows, found = make_prompt_cache(model), mx.array([ids]), []
    for _ in range(length):
        found.append(mx.argmax(model(rows, cache=cache)[0, -1]).item())
        rows = mx.array([found[-1:]])
    return found


@pytest.mark.parametrize("name", REQUIRED)
def test_every_depth_equals_mlx_lm(name: str, folders: dict[str, Path]) -> None:
    _, model = loaded(folders[name])
    ids = tokens_of(10)[0].tolist() * 3
    expected = greedy(model, ids, 120)
    plain = mlx_mtp.load(folders[name], drafter=None)
    same_or_tie(plain, ids, expected, plain.generate(ids, max_tokens=120).tokens)
    for depth in (1, 3, 8):
        result = mlx_mtp.load(folders[name], drafter="lookup", depth=depth).generate(ids, max_tokens=120)
        same_or_tie(plain, ids, expected, result.tokens)
        assert result.stats.host_syncs <= result.stats.rounds + 2
