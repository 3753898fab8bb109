"""Checkpoints as others write them: mlx-lm's and mlx-vlm's converters, shards, towers, half precision.

The reference is the converter's own model, loaded by its own loader from the folder it wrote. The models are tiny
and random, with sizes that every quantisation's groups divide.
"""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_mtp  # isort: skip  (before MLX: on Linux it brings the fast BLAS)

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import GOLDEN
from families import lively

from mlx_mtp.chat.saved import fingerprint
from mlx_mtp.checkpoints import checkpoint, memory
from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters, write_tensors
from mlx_mtp.drafters import load_drafter
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.targets import load_target
from mlx_mtp.targets.gemma4 import Gemma4Model, published_weights
from mlx_mtp.targets.gemma4_config import DEFAULT_ROPE, Gemma4Config

TOLERANCE = 1e-3
TOKENS = np.random.default_rng(0).integers(3, 128, (1, 30))
S, F = "sliding_attention", "full_attention"
COMMON: dict[str, Any] = {
    "model_type": "gemma4_text", "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "global_head_dim": 64, "sliding_window": 8,
    "max_position_embeddings": 256, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh", "tie_word_embeddings": True, "rope_parameters": DEFAULT_ROPE,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "layer inputs": {
        "layer_types": [S, F, S, F], "num_hidden_layers": 4, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 128, "attention_k_eq_v": False},
    "experts": {
        "layer_types": [S, S, F], "num_hidden_layers": 3, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0,
        "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 64},
}  # fmt: skip
QUANTISED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "affine 4": {"quantize": True, "q_bits": 4, "q_group_size": 64},
    "affine 8": {"quantize": True, "q_bits": 8, "q_group_size": 32},
    "mxfp4": {"quantize": True, "q_mode": "mxfp4", "q_bits": 4, "q_group_size": 32},
    "nvfp4": {"quantize": True, "q_mode": "nvfp4", "q_bits": 4, "q_group_size": 16},
    "mixed": {"quantize": True, "q_bits": 4, "q_group_size": 64, "quant_predicate": lambda path, module: mixed(path)},
}  # fmt: skip


def mixed(path: str) -> bool | dict[str, int]:
    """Some layers plain, some in 8 bits, the others as the command says."""
    return {"group_size": 32, "bits": 8} if "mlp" in path else "o_proj" not in path


def write(folder: Path, variant: str, dtype: mx.Dtype = mx.float32) -> Path:
    """A random checkpoint in the published layout, with a tokenizer for converters that insist on one."""
    text = {**COMMON, **VARIANTS[variant]}
    config = {"model_type": "gemma4", "text_config": text, "vocab_size": 128, "vision_config": None,
              "audio_config": None}  # fmt: skip
    model = lively(Gemma4Model(Gemma4Config.from_dict(config)), seed=len(variant))
    write_tensors(folder, config, ((k, w.astype(dtype)) for k, w in published_weights(model).items()))
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EMBEDDED / "target" / name, folder)
    return folder


def our_logits(folder: Path) -> np.ndarray:
    return np.array(load_target(Checkpoint.open(folder)).logits(mx.array(TOKENS)))


def compare(found: np.ndarray, expected: np.ndarray) -> None:
    assert expected.std() > 0.3  # worth comparing
    assert np.abs(found - expected).max() < TOLERANCE


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return write(tmp_path / "published", "layer inputs")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("variant", "how"), [
    *(("layer inputs", how) for how in QUANTISED), *(("experts", how) for how in ("as it is", "affine 4", "mxfp4")),
])  # fmt: skip
def test_converted_by_mlx_lm(tmp_path: Path, variant: str, how: str) -> None:
    from mlx_lm import convert
    from mlx_lm.utils import load_model

    published = write(tmp_path / "published", variant)
    convert(str(published), str(tmp_path / "converted"), dtype="float32", **QUANTISED[how])
    reference, config = load_model(tmp_path / "converted")
    assert ("quantization" in config) == bool(QUANTISED[how])
    compare(our_logits(tmp_path / "converted"), np.array(reference(mx.array(TOKENS)).astype(mx.float32)))
    if how == "affine 4":  # a quantised checkpoint also decodes, with its own drafts verified
        engine = mlx_mtp.load(tmp_path / "converted", drafter="lookup", depth=3)
        plain = mlx_mtp.load(tmp_path / "converted", drafter=None)
        found, expected = (
            each.generate(TOKENS[0].tolist(), max_tokens=12, ignore_end=True).tokens for each in (engine, plain)
        )
        assert found == expected


@pytest.mark.parametrize(("centroid", "mode"), [(False, {"bits": 4, "group_size": 32}),
                                                (True, {"bits": 8, "group_size": 64})])  # fmt: skip
def test_a_quantised_assistant(tmp_path: Path, centroid: bool, mode: dict[str, int]) -> None:
    """Its scores are those of its own weights restored by mx.dequantize and stored plainly."""
    plain = load_drafter(Checkpoint.open(EMBEDDED / "assistant")).model
    config = json.loads((EMBEDDED / "assistant" / "config.json").read_text())
    weights = named_parameters(plain)
    if centroid:
        config |= {"use_ordered_embeddings": True, "num_centroids": 64, "centroid_intermediate_top_k": 8}
        weights["masked_embedding.centroids.weight"] = mx.random.normal((64, 192), key=mx.random.key(1))
        weights["masked_embedding.token_ordering"] = mx.random.permutation(4096, key=mx.random.key(2))
    stored: dict[str, dict[str, mx.array]] = {"quantised": {}, "restored": {}}
    for name, weight in weights.items():
        parts = [weight]
        if weight.ndim == 2 and weight.shape[-1] % 64 == 0 and "centroids" not in name:
            parts = mx.quantize(weight, **mode)
            weight = mx.dequantize(*parts, **mode)
        names = (name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases"))
        stored["quantised"] |= dict(zip(names, parts, strict=False))
        stored["restored"][name] = weight
    found = []
    for form, tensors in stored.items():
        extra = {"quantization": mode} if form == "quantised" else {}
        write_tensors(tmp_path / form, config | extra, tensors.items())
        model = load_drafter(Checkpoint.open(tmp_path / form)).model
        assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding) == (form == "quantised")
        tokens, logits = model.candidates(mx.random.normal((1, 2, 192), key=mx.random.key(3)))
        found.append([np.array(part) for part in (tokens, logits) if part is not None])
    for one, other in zip(*found, strict=True):
        assert np.abs(one - other).max() < 1e-3


def test_shards_equal_the_single_file(published: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, found = our_logits(published), Checkpoint.open(published)
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", sum(size for *_, size in found.tensors()) // 2)
    write_tensors(published.with_name("shards"), found.config, found.weights().items())
    assert np.array_equal(our_logits(published.with_name("shards")), whole)
    (published.with_name("shards") / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(mlx_mtp.CheckpointError, match="model-00002-of-00003"):
        our_logits(published.with_name("shards"))


def renamed_by(change: Callable[[str], str], folder: Path, more: dict[str, mx.array] | None = None) -> None:
    weights = {change(k): w for k, w in dict(mx.load(str(folder / "model.safetensors"))).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights | (more or {}))


def test_towers_are_skipped_with_one_notice(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = our_logits(published)
    assert not caplog.records
    names = ("vision_tower.encoder.layers.0.x.weight", "audio_tower.layers.0.x.weight", "embed_vision.x.weight")
    renamed_by(lambda k: k, published, {f"model.{name}": mx.zeros((3, 3)) for name in names})
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(our_logits(published), expected)
    (notice,) = caplog.records
    assert "3 tensors" in notice.getMessage() and "vision" in notice.getMessage()


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.", "language_model."])
def test_layouts_of_names(published: Path, prefix: str) -> None:
    expected = our_logits(published)
    renamed_by(lambda k: k.replace("model.language_model.", prefix), published)
    assert np.array_equal(our_logits(published), expected)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_on_disk(tmp_path: Path, dtype: mx.Dtype) -> None:
    """On a CPU the maths is float32: the logits are those of the rounded weights stored as float32."""
    halves = write(tmp_path / "halves", "layer inputs", dtype)
    rounded = {k: w.astype(mx.float32) for k, w in dict(mx.load(str(halves / "model.safetensors"))).items()}
    found = our_logits(halves)
    mx.save_safetensors(str(halves / "model.safetensors"), rounded)
    assert np.abs(found - our_logits(halves)).max() < (TOLERANCE if mx.default_device() == mx.Device(mx.cpu) else 0.5)


def test_what_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, in the half precision that there is; where there are both kinds, in float32."""
    one, other, whole = (mx.zeros(1, dtype) for dtype in (mx.bfloat16, mx.float16, mx.float32))
    for device, expected in ((mx.Device(mx.gpu), [mx.bfloat16, mx.float16, mx.float32, mx.float32]),
                             (mx.Device(mx.cpu), [mx.float32] * 4)):  # fmt: skip
        monkeypatch.setattr(mx, "default_device", lambda device=device: device)
        for found, dtype in zip(([one, whole], [other, other], [one, one, other], [whole]), expected, strict=True):
            assert checkpoint.compute_dtype(dict(enumerate(found))) == dtype


@pytest.mark.parametrize("variant", ["ple", "keqv", "moe", "unified"])
def test_both_forms_of_the_config(variant: str) -> None:
    """Both forms describe the same shapes, also when sliding and full layers have the same ones."""
    text = json.loads((GOLDEN / variant / "target" / "config.json").read_text())["text_config"]
    full = next(iter(text["per_layer_config"].values()))
    shape = {"global_head_dim": full["head_dim"], "num_global_key_value_heads": full.get("num_key_value_heads")}
    for head_dim, sizes in ((text["head_dim"], {text["head_dim"], 16}), (16, {16})):
        newer = text | {"head_dim": head_dim}
        older = {k: v for k, v in newer.items() if k != "per_layer_config"} | shape
        one, other = (Gemma4Config.from_dict({"model_type": "gemma4", "text_config": form}) for form in (newer, older))
        assert one == other and {layer.head_dim for layer in one.layers} == sizes


def test_zero_padded_layer_numbers(tmp_path: Path) -> None:
    """As transformers 5.23 names them where there are more than ten layers; null where no layer differs."""
    text = {**COMMON, **VARIANTS["layer inputs"], "layer_types": [S, F] * 6, "num_hidden_layers": 12}
    newer = {k: v for k, v in text.items() if k != "global_head_dim"}
    padded = newer | {"per_layer_config": {f"{i:02}": {"head_dim": 64} for i in range(1, 12, 2)}}
    assert Gemma4Config.from_dict(padded) == Gemma4Config.from_dict(text)
    layers = Gemma4Config.from_dict(newer | {"per_layer_config": None}).layers
    assert {layer.head_dim for layer in layers} == {32}
    with pytest.raises(mlx_mtp.CheckpointError, match="layer numbers"):
        Gemma4Config.from_dict(newer | {"per_layer_config": {"last": {"head_dim": 64}}})


# What other systems leave beside the files


def test_files_that_macos_leaves_on_foreign_disks(tmp_path: Path) -> None:
    """A `._name` beside every file, 4 KB that are of no format; and JSON with a byte order mark."""
    source = GOLDEN / "ple" / "target"
    folder, clean = shutil.copytree(source, tmp_path / "target"), Checkpoint.open(source)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    for file in list(folder.iterdir()):
        file.with_name(f"._{file.name}").write_bytes(b"\0\x05\x16\x07" + bytes(4092))
        if file.suffix == ".json":
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    Checkpoint.open(folder).check_files()
    assert np.array_equal(our_logits(folder), our_logits(source)) and mlx_mtp.load(folder, drafter=None)
    copy = shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("._*"))
    assert fingerprint(copy) == fingerprint(folder)
    assert memory.folder_bytes(folder) == memory.held_bytes(clean.tensors()) > 0
    assert checkpoint.lacking(copy) == checkpoint.lacking(folder) == []
