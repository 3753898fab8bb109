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
from mlx.utils import tree_flatten
from mlx_lm.models import mimo
from references import DecoderLayer, below, in_halves, rms

Arrays, Shapes = dict[str, np.ndarray], dict[str, tuple[int, ...]]
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


def drawn(shapes: Shapes, seed: int = 3) -> Arrays:
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


def deepseek_arrays() -> Arrays:
    """A layer without and one with experts, and a module, which is such a layer too."""
    width, vocabulary, experts = (DEEPSEEK[key] for key in ("hidden_size", "vocab_size", "n_routed_experts"))

    def mlp(name: str, inner: int) -> Shapes:
        return {f"{name}.gate_proj": (inner, width), f"{name}.up_proj": (inner, width),
                f"{name}.down_proj": (width, inner)}  # fmt: skip

    block: Shapes = {
        "input_layernorm": (width,), "post_attention_layernorm": (width,), "self_attn.q_a_proj": (24, width),
        "self_attn.q_a_layernorm": (24,), "self_attn.q_b_proj": (4 * 16, 24),
        "self_attn.kv_a_proj_with_mqa": (16 + 8, width), "self_attn.kv_a_layernorm": (16,),
        "self_attn.kv_b_proj": (4 * 20, 16), "self_attn.o_proj": (width, 4 * 12),
    }  # fmt: skip
    mixture = block | mlp("mlp.shared_experts", 16) | {"mlp.gate": (experts, width)}
    for e in range(experts):
        mixture |= mlp(f"mlp.experts.{e}", 16)
    module = mixture | {"enorm": (width,), "hnorm": (width,), "eh_proj": (width, 2 * width),
                        "shared_head.norm": (width,)}  # fmt: skip
    shapes: Shapes = dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (vocabulary, width))
    shapes |= {"model.norm.weight": (width,)}
    for i, layer in enumerate((block | mlp("mlp", 48), mixture, module)):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
        shapes |= {f"model.layers.{i}.mlp.gate.e_score_correction_bias": (experts,)} if i else {}
    arrays = drawn(shapes)
    return arrays | {"model.layers.2.embed_tokens.weight": arrays["model.embed_tokens.weight"],
                     "model.layers.2.shared_head.head.weight": arrays["lm_head.weight"]}  # fmt: skip


# MiMo

MIMO = {
    "model_type": "mimo", "architectures": ["MiMoForCausalLM"], "vocab_size": 96, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": EPS, "rope_theta": THETA, "max_position_embeddings": 256, "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
}  # fmt: skip


def mimo_arrays() -> Arrays:
    """mlx-lm's own names, and a module: a layer with a projection in front and three norms."""
    model = mimo.Model(mimo.ModelArgs.from_dict(MIMO))
    shapes: Shapes = {name: weight.shape for name, weight in tree_flatten(model.parameters())}
    width, layer = MIMO["hidden_size"], "model.layers.0."
    module = {name.removeprefix(layer): shape for name, shape in shapes.items() if name.startswith(layer)}
    module |= {"input_proj.weight": (width, 2 * width)}
    module |= {f"{name}_layernorm.weight": (width,) for name in ("token", "hidden", "final")}
    return drawn(shapes | {f"model.mtp_layers.0.{name}": shape for name, shape in module.items()})
