"""A GGUF file as a checkpoint folder in Hugging Face's layout, which mlx-lm loads too: llama, qwen2, qwen3, gemma3.

Weights: blocks of Q4_0, Q4_1 and Q8_0 become MLX's affine groups of 32 without any rounding, since all three are
scale * q + offset; so one folder may hold 4 bits, 8 bits and plain layers. Other blocks are turned into numbers by the
library gguf and stored in half precision: float16 beside such groups, whose scales are float16 (MLX computes in float32
where the two meet), else bfloat16. Plain numbers keep their value: a type that would round them is not used.

Layout, as llama.cpp's convert_hf_to_gguf.py writes it: rows of q and k of llama are in the order in which neighbouring
numbers turn together (as in Meta's files), gemma3's norms hold weight + 1, a missing `output` is the embedding.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import _get_classes

from mlx_mtp.checkpoints.checkpoint import Number, check_shapes, number, write_json, write_tensors
from mlx_mtp.converting.gguf_file import Array, BlockTensor, GGUFFile
from mlx_mtp.converting.meta import halves
from mlx_mtp.converting.tokenizers import StatedTokenizer
from mlx_mtp.errors import CheckpointError, UnsupportedModel
from mlx_mtp.targets.generic import MAX_COUNT, MAX_SIZE

ELSE = "use the checkpoint in Hugging Face's layout"  # what to do about what is not known
GROUP = 32
BITS = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}  # block types that MLX has
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
OUTER = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
         "output.weight": "lm_head.weight"}  # fmt: skip
INNER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
}  # fmt: skip
INNER_OF_GEMMA3 = INNER | {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1's and later way of slowing down slow rotations; a file holds what comes of it, without these numbers.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# Keys of an architecture that are read here, or that change nothing about what is computed.
READ = ("context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "expert_count",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned")  # fmt: skip
READ_OF_GEMMA3 = (*READ, "attention.sliding_window", "rope.freq_base_swa")
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
            "penalty_repeat": "repetition_penalty"}  # fmt: skip


def bring_in(source: Path, folder: Path) -> None:
    """Writes a GGUF as a checkpoint into a folder that exists; UnsupportedModel for what is not known here,
    CheckpointError for a file that is damaged or lacks something."""
    file = GGUFFile(source)
    model = _Model(file)
    tokenizer = StatedTokenizer(source, file.keys)
    ids = {"bos_token_id": tokenizer.id_of("bos_token_id"), "eos_token_id": tokenizer.stop_tokens}
    tokenizer.write(folder, model.config["vocab_size"], model.config["max_position_embeddings"])
    stated = {f"general.sampling.{theirs}": ours for theirs, ours in SAMPLING.items()}
    sampling = {ours: file.keys[key] for key, ours in stated.items() if key in file.keys}
    drawn = {"do_sample": True} if sampling.get("temperature") else {}
    write_json(folder / "generation_config.json", ids | drawn | sampling)
    write_tensors(folder, model.config | ids, model.arrays())


class _Model:
    """The tensors of a file under their new names, and the config.json that goes with them."""

    def __init__(self, file: GGUFFile) -> None:
        self._path, name = file.path, file.keys.get("general.architecture")
        if name not in ARCHITECTURES:
            raise UnsupportedModel(f"{file.path} holds a model of architecture {reprlib.repr(name)}, and those known "
                                   f"here are {', '.join(ARCHITECTURES)}; {ELSE}.")  # fmt: skip
        if (parts := file.keys.get("split.count", 1)) != 1:
            raise UnsupportedModel(f"{file.path} is one of {parts} parts of a model; join them with llama.cpp's "
                                   "llama-gguf-split --merge first.")  # fmt: skip
        self._architecture, self._prefix = name, f"{name}."
        self._keys = {key: _same_for_all(value) for key, value in file.keys.items() if key.startswith(self._prefix)}
        known = {self._prefix + key for key in (READ_OF_GEMMA3 if name == "gemma3" else READ)}
        if unknown := sorted(self._keys.keys() - known):
            raise self._unknown(f"what '{unknown[0]:.90}' asks of the model")
        self._factors = file.tensors.get(ROPE_FACTORS)
        self._tensors = {self._name(each): tensor for each, tensor in file.tensors.items() if each != ROPE_FACTORS}
        kinds = {tensor.kind for tensor in self._tensors.values()}
        self._half = mx.float16 if kinds & {*BITS, "F16"} else mx.bfloat16
        self.config = self._config() | {"torch_dtype": str(self._half).removeprefix("mlx.core.")}
        of_tensors = ((name.removesuffix(".weight"), _bits(tensor)) for name, tensor in self._tensors.items())
        if groups := {name: bits for name, bits in of_tensors if bits}:
            usual = min(groups.values())
            self.config["quantization"] = self.config["quantization_config"] = {
                "group_size": GROUP, "bits": usual, "mode": "affine",
                **{name: {"group_size": GROUP, "bits": bits} for name, bits in groups.items() if bits != usual},
            }  # fmt: skip
        # The tensors must be those of the model that mlx-lm builds from the config.
        model_class, args_class = _get_classes(self.config)
        module: nn.Module = model_class(args_class.from_dict(self.config))
        module.sanitize(dict.fromkeys(self._tensors))  # gemma3_text drops its own head there where it is tied
        check_shapes(module, {name: tensor.shape for name, tensor in self._tensors.items()}, str(file.path))

    def arrays(self) -> Iterator[tuple[str, mx.array]]:
        heads = {"q_proj": self.config["num_attention_heads"], "k_proj": self.config["num_key_value_heads"]}
        for name, tensor in self._tensors.items():
            stem, _, kind = name.rpartition(".")
            turned = heads.get(stem.rpartition(".")[2]) if self._architecture == "llama" else None
            found = _groups(tensor) if _bits(tensor) else {kind: self._plain(name, tensor)}
            for part, array in found.items():
                yield f"{stem}.{part}", halves(array, turned) if turned else array

    def _plain(self, name: str, tensor: BlockTensor) -> mx.array:
        """Its numbers in half precision, or in their own type where that would round what the file holds unrounded."""
        floats = tensor.floats()
        if self._architecture == "gemma3" and name.endswith("norm.weight"):
            floats = floats.astype(np.float32) - 1.0
        array = mx.array(floats)
        short = array.astype(self._half)
        rounded = tensor.kind in ("F32", "F16", "BF16") and not mx.array_equal(short.astype(mx.float32), array).item()
        return array if rounded else short

    def _name(self, name: str) -> str:
        if name in OUTER:
            return OUTER[name]
        found, inner = LAYER.fullmatch(name), INNER_OF_GEMMA3 if self._architecture == "gemma3" else INNER
        if not found or found[2] not in inner:
            raise self._unknown(f"a tensor '{name:.80}', which no {self._architecture} model has,")
        return f"model.layers.{found[1]}.{inner[found[2]]}.{found[3]}"

    def _config(self) -> dict[str, Any]:
        gemma = self._architecture == "gemma3"
        width = self._number("embedding_length", int, 1, MAX_SIZE)
        heads = self._number("attention.head_count", int, 1, MAX_COUNT)
        shared = self._number("attention.head_count_kv", int, 1, heads, heads)
        layers = self._number("block_count", int, 1, MAX_COUNT)
        size = self._number("attention.key_length", int, 2, MAX_SIZE, max(width // heads, 2))
        if heads % shared or size % 2:
            raise CheckpointError(f"{self._path}: {heads} heads of {size} numbers, {shared} of them for keys, "
                                  "do not divide; download the file again.")  # fmt: skip
        for name in ("attention.value_length", "rope.dimension_count"):
            if self._number(name, int, 1, MAX_SIZE, size) != size:
                raise self._unknown(f"'{self._prefix}{name}' that is not {size}, the size of a head,")
        if self._number("expert_count", int, 0, MAX_COUNT, 0):
            raise self._unknown("a mixture of experts")
        if (embedding := self._tensors.get("model.embed_tokens.weight")) is None:
            raise CheckpointError(f"{self._path} lacks the tensor 'token_embd.weight'; download it again.")
        base = self._number("rope.freq_base", float, 1.0, 1e12, 10_000.0 if self._architecture == "llama" else None)
        eps = self._number("attention.layer_norm_rms_epsilon", float, 0.0, 1.0)
        return {
            "architectures": [f"{self._architecture.capitalize()}ForCausalLM"],
            "model_type": "gemma3_text" if gemma else self._architecture,
            "hidden_size": width,
            "intermediate_size": self._number("feed_forward_length", int, 1, MAX_SIZE),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": shared,
            "head_dim": size,
            "rms_norm_eps": float(str(np.float32(eps))),  # 1e-05, not 9.999999747378752e-06
            "rope_theta": base,
            "rope_scaling": self._rope_scaling(base, size),
            "max_position_embeddings": self._number("context_length", int, 1, 2**31 - 1),
            "vocab_size": embedding.shape[0],
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            **(self._gemma3(layers, width, heads, size) if gemma else
               {"hidden_act": "silu", "attention_bias": False}),
        }  # fmt: skip

    def _gemma3(self, layers: int, width: int, heads: int, size: int) -> dict[str, Any]:
        """What is Gemma 3's alone. The file leaves out every sixth layer's being full, and how 27B scales its queries:
        llama.cpp knows both by heart."""
        return {
            "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": self._number("attention.sliding_window", int, 1, 2**31 - 1),
            "sliding_window_pattern": 6,
            "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
            "rope_local_base_freq": self._number("rope.freq_base_swa", float, 1.0, 1e12, 10_000.0),
            "query_pre_attn_scalar": width // heads if layers == 62 else size,
        }

    def _rope_scaling(self, base: float, size: int) -> dict[str, Any] | None:
        kind = self._keys.get(f"{self._prefix}rope.scaling.type", "none")
        if self._factors is None and kind == "none":
            return None
        if self._factors is None and kind == "linear":
            return {"rope_type": "linear", "factor": self._number("rope.scaling.factor", float, 1.0, 1e6)}
        if self._factors is not None and kind == "none" and self._factors.shape == (size // 2,):
            found = self._factors.floats()
            slowest = float(found.max())
            if np.allclose(found, _llama3_factors(base, size, slowest), rtol=1e-4):
                return {"rope_type": "llama3", "factor": slowest, **LLAMA3_ROPE}
        raise self._unknown(f"its way of scaling the rotary embedding ({reprlib.repr(kind)})")

    def _number(self, key: str, kind: type[Number], low: Number, high: Number, default: Number | None = None) -> Number:
        return number(self._keys, self._prefix + key, kind, low, high, default, str(self._path))

    def _unknown(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._path}: {what} is not known here; {ELSE}.")


def _same_for_all(value: Any) -> Any:
    """A key's value; of a list with one value a layer the one that all have."""
    return value[0].item() if isinstance(value, np.ndarray) and len(np.unique(value)) == 1 else value


def _bits(tensor: BlockTensor) -> int | None:
    """Bits of the groups that hold the same numbers as its blocks; None where there are none."""
    return BITS.get(tensor.kind) if len(tensor.shape) == 2 else None


def _groups(tensor: BlockTensor) -> dict[str, mx.array]:
    """MLX's groups of 32 (packed uint32, scales and offsets float16); each number is the block's own.

    A block: its scale, for Q4_1 an offset (float16), then 32 numbers: bytes, or halves of bytes, the lower halves
    first. MLX packs upwards from the lowest bits.
    """
    rows = len(tensor.data)
    head, factor = {"Q8_0": (2, -128), "Q4_0": (2, -8), "Q4_1": (4, None)}[tensor.kind]
    block = tensor.data.reshape(rows, -1, head + (32 if tensor.kind == "Q8_0" else 16))
    halves_of_head = np.ascontiguousarray(block[..., :head]).view("<f2")
    scale, numbers = halves_of_head[..., 0], block[..., head:]
    if tensor.kind == "Q8_0":
        packed = (numbers ^ 0x80).reshape(rows, -1)  # int8 q as q + 128
    else:
        numbers = np.concatenate([numbers & 15, numbers >> 4], axis=-1).reshape(rows, -1)
        packed = numbers[:, 0::2] | numbers[:, 1::2] << 4
    offset = halves_of_head[..., 1] if factor is None else scale * np.float16(factor)
    return {"weight": mx.array(np.ascontiguousarray(packed).view("<u4")), "scales": mx.array(scale),
            "biases": mx.array(offset)}  # fmt: skip


def _llama3_factors(base: float, size: int, factor: float) -> Array:
    """By what each rotation of Llama 3 is slowed down [size / 2]: by 1 where it is fast, by `factor` where slow."""
    low, high, context = LLAMA3_ROPE.values()
    turns = context / (2 * np.pi * base ** (np.arange(0, size, 2) / size))
    part = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - part) / factor + part))
