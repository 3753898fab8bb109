"""Checkpoints of other projects as they are published, small and random, and what their own code makes of them.

Meta's multi-token Llama (neighbouring numbers turn together), whose forward pass is here in NumPy, float64;
DeepSeek-V3's module (latent attention, experts) and MiMo's (biases, [state, embedding]), under the original names.
"""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from references import DecoderLayer, below, in_halves, rms

Arrays = dict[str, np.ndarray]
EPS, THETA = 1e-5, 10_000.0

# .pth


def dumped(value: Any) -> bytes:
    """The opcodes that push a plain value."""
    return pickle.dumps(value, 2)[2:-1]


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def tensor_opcodes(key: str, kind: str, shape: tuple[int, ...], items: int, offset: int = 0) -> bytes:
    """How torch.save writes a dense tensor."""
    stride = tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    storage = b"(" + dumped("storage") + named("torch", kind) + dumped(key) + dumped("cpu") + dumped(items) + b"tQ"
    hooks = named("collections", "OrderedDict") + b")R"
    arguments = storage + dumped(offset) + dumped(shape) + dumped(stride) + b"\x89" + hooks
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tR"


def state_dict_opcodes(values: dict[str, bytes]) -> bytes:
    return b"\x80\x02}(" + b"".join(dumped(name) + value for name, value in values.items()) + b"u."


def write_zip(
    file: Path, pickled: bytes, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED,
    byteorder: bytes = b"little",
) -> None:  # fmt: skip
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("consolidated/data.pkl", pickled)
        archive.writestr("consolidated/byteorder", byteorder)
        for key, content in storages.items():
            archive.writestr(f"consolidated/data/{key}", content)
        archive.writestr("consolidated/version", b"3\n")


def write_pth(file: Path, arrays: Arrays, kind: str = "FloatStorage") -> None:
    """What torch.save writes for a state dict, without torch."""
    storages, values = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        storages[str(i)] = stored(array, kind)
        values[name] = tensor_opcodes(str(i), kind, array.shape, array.size)
    write_zip(file, state_dict_opcodes(values), storages)


def stored(array: np.ndarray, kind: str) -> bytes:
    if kind == "BFloat16Storage":
        return (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return array.astype({"FloatStorage": "<f4", "HalfStorage": "<f2", "DoubleStorage": "<f8"}[kind]).tobytes()


# safetensors, with the types MLX does not write


def write_safetensors(file: Path, arrays: Arrays) -> None:
    """float arrays as F32, bytes as F8_E4M3."""
    header, content, at = {}, io.BytesIO(), 0
    for name, array in arrays.items():
        raw = array.tobytes() if array.dtype == np.uint8 else array.astype("<f4").tobytes()
        kind = "F8_E4M3" if array.dtype == np.uint8 else "F32"
        header[name] = {"dtype": kind, "shape": list(array.shape), "data_offsets": [at, at + len(raw)]}
        content.write(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content.getvalue())


def from_fp8(numbers: np.ndarray) -> np.ndarray:
    """E4M3: sign, four bits of exponent (bias 7), three of mantissa."""
    sign, exponent, mantissa = numbers >> 7, (numbers >> 3 & 15).astype(int), (numbers & 7) / 8
    size = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7))
    return np.where(sign == 1, -size, size)


def write_folder(folder: Path, config: dict[str, Any], arrays: Arrays) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "model.safetensors", arrays)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def drawn(shapes: dict[str, tuple[int, ...]], seed: int = 3) -> Arrays:
    """Random weights that make the output depend on everything; float32 values, so that files hold them exactly."""
    random = np.random.default_rng(seed)

    def weight(shape: tuple[int, ...]) -> np.ndarray:
        normal = random.normal(size=shape)
        return (1 + 0.2 * normal if len(shape) == 1 else 1.3 * normal * shape[-1] ** -0.5).astype(np.float32)

    return {name: weight(shape) for name, shape in shapes.items()}


# Meta

META_PARAMS = {
    "dim": 32, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "multiple_of": 8, "norm_eps": EPS, "vocab_size": -1,
    "n_future_tokens": 3,
}  # fmt: skip
META_VOCABULARY = 350


def meta_arrays(params: dict[str, Any] = META_PARAMS, vocabulary: int = META_VOCABULARY) -> Arrays:
    width, heads, keys = params["dim"], params["n_heads"], params.get("n_kv_heads") or params["n_heads"]
    shared, inner = width // heads * keys, 48
    extra = params["n_future_tokens"] - 1
    layer = {
        "attention.wq": (width, width), "attention.wk": (shared, width), "attention.wv": (shared, width),
        "attention.wo": (width, width), "feed_forward.w1": (inner, width), "feed_forward.w2": (width, inner),
        "feed_forward.w3": (inner, width), "attention_norm": (width,), "ffn_norm": (width,),
    }  # fmt: skip
    shapes = dict.fromkeys(("tok_embeddings.weight", "output.weight"), (vocabulary, width)) | {"norm.weight": (width,)}
    places = [f"layers.{i}" for i in range(params["n_layers"] - extra)] + [f"extra_heads.{i}" for i in range(extra)]
    return drawn(shapes | {f"{place}.{name}.weight": shape for place in places for name, shape in layer.items()})


def meta_folder(folder: Path, arrays: Arrays, kind: str = "FloatStorage", **params: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_pth(folder / "consolidated.pth", arrays, kind)
    (folder / "params.json").write_text(json.dumps({**META_PARAMS, **params}))
    return folder


META_NAMES = {
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    **{f"attention.w{n}": f"self_attn.{n}_proj" for n in "qkvo"}, "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip


def meta_logits(arrays: Arrays, params: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """The release's forward(return_all_heads=True): [heads, T, V]."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}
    size, theta = params["dim"] // params["n_heads"], params.get("rope_theta", THETA)

    def block(place: str, x: np.ndarray) -> np.ndarray:
        stems = {name.removesuffix(".weight"): array for name, array in below(w, place + ".").items()}
        own = {f"{META_NAMES[stem]}.weight": array for stem, array in stems.items()}
        own |= {name: in_halves(own[name], size) for name in (f"self_attn.{n}_proj.weight" for n in "qk")}
        return DecoderLayer(own, size, params["norm_eps"], theta ** (np.arange(0, size, 2) / size)).over(x)

    extra = params["n_future_tokens"] - 1
    layers = params["n_layers"] - extra
    trunk = w["tok_embeddings.weight"][tokens]
    for i in range(layers - 1):
        trunk = block(f"layers.{i}", trunk)
    heads = [block(place, trunk) for place in (f"layers.{layers - 1}", *(f"extra_heads.{i}" for i in range(extra)))]
    return np.stack([rms(x, w["norm.weight"], params["norm_eps"]) @ w["output.weight"].T for x in heads])


# DeepSeek-V3

DEEPSEEK = {
    "model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 4, "routed_scaling_factor": 1.5,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 8,
    "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "n_group": 1, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_layer_freq": 1, "first_k_dense_replace": 1, "max_position_embeddings": 256,
    "rms_norm_eps": EPS, "rope_theta": THETA, "attention_bias": False, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def deepseek_arrays(config: dict[str, Any] = DEEPSEEK) -> Arrays:
    width, heads, vocabulary = config["hidden_size"], config["num_attention_heads"], config["vocab_size"]
    rank, turning, plain = config["kv_lora_rank"], config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    value, inner, shared = config["v_head_dim"], config["moe_intermediate_size"], config["n_shared_experts"]

    def mlp(prefix: str, size: int) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.gate_proj.weight": (size, width), f"{prefix}.up_proj.weight": (size, width),
                f"{prefix}.down_proj.weight": (width, size)}  # fmt: skip

    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,),
        "lm_head.weight": (vocabulary, width),
    }  # fmt: skip
    modules, layers = config["num_nextn_predict_layers"], config["num_hidden_layers"]
    for i in range(layers + modules):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
            "self_attn.q_a_proj.weight": (config["q_lora_rank"], width),
            "self_attn.q_a_layernorm.weight": (config["q_lora_rank"],),
            "self_attn.q_b_proj.weight": (heads * (plain + turning), config["q_lora_rank"]),
            "self_attn.kv_a_proj_with_mqa.weight": (rank + turning, width),
            "self_attn.kv_a_layernorm.weight": (rank,),
            "self_attn.kv_b_proj.weight": (heads * (plain + value), rank),
            "self_attn.o_proj.weight": (width, heads * value),
        }  # fmt: skip
        if i < config["first_k_dense_replace"]:
            layer |= mlp("mlp", config["intermediate_size"])
        else:
            layer |= mlp("mlp.shared_experts", inner * shared)
            layer |= {"mlp.gate.weight": (config["n_routed_experts"], width),
                      "mlp.gate.e_score_correction_bias": (config["n_routed_experts"],)}  # fmt: skip
            for e in range(config["n_routed_experts"]):
                layer |= mlp(f"mlp.experts.{e}", inner)
        if i >= layers:
            layer |= {"enorm.weight": (width,), "hnorm.weight": (width,), "eh_proj.weight": (width, 2 * width),
                      "shared_head.norm.weight": (width,)}  # fmt: skip
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    arrays = drawn(shapes)
    for k in range(modules):
        arrays[f"model.layers.{layers + k}.embed_tokens.weight"] = arrays["model.embed_tokens.weight"]
        arrays[f"model.layers.{layers + k}.shared_head.head.weight"] = arrays["lm_head.weight"]
    return arrays


# MiMo

MIMO = {
    "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": EPS, "rope_theta": THETA, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def mimo_arrays(config: dict[str, Any] = MIMO) -> Arrays:
    width, vocabulary, inner = config["hidden_size"], config["vocab_size"], config["intermediate_size"]
    shared = width // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = {
        "input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (width, width), "self_attn.q_proj.bias": (width,),
        "self_attn.k_proj.weight": (shared, width), "self_attn.k_proj.bias": (shared,),
        "self_attn.v_proj.weight": (shared, width), "self_attn.v_proj.bias": (shared,),
        "self_attn.o_proj.weight": (width, width), "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width), "mlp.down_proj.weight": (width, inner),
    }  # fmt: skip
    norms = (f"{name}_layernorm.weight" for name in ("token", "hidden", "final"))
    module = dict.fromkeys(norms, (width,)) | {"input_proj.weight": (width, 2 * width)}
    shapes = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,),
              "lm_head.weight": (vocabulary, width)}  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    for k in range(config["num_nextn_predict_layers"]):
        shapes |= {f"model.mtp_layers.{k}.{name}": shape for name, shape in {**layer, **module}.items()}
    return drawn(shapes)
