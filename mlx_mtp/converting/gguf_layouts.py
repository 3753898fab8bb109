"""What a GGUF calls the tensors and sizes of a model, as config.json and names of Hugging Face's layout.

One class an architecture; a file that asks for anything a class does not know is refused. Facts: llama.cpp's
convert_hf_to_gguf.py and what it loads; the names of Gemma 4 in the library gguf (MODEL_ARCH.GEMMA4).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mlx_mtp.checkpoints.checkpoint import Number, number
from mlx_mtp.converting.gguf_file import Array, BlockTensor, GGUFFile
from mlx_mtp.errors import CheckpointError, UnsupportedModel
from mlx_mtp.generation.cache import FULL, SLIDING
from mlx_mtp.targets.generic import MAX_COUNT, MAX_SIZE

ELSE = "use the checkpoint in Hugging Face's layout"  # what to do about what is not known
LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias|scale)")
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3.1's and later way of slowing down slow rotations; a file holds what comes of it, without these numbers.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
STILL = 1e29  # a rotation that is slowed down by so much is none; files say 1e30


class Layout:
    """llama, qwen2 and qwen3, and what the others share with them.

    read: keys of the architecture that are read here, or that change nothing about what is computed. outer, inner:
    names of tensors, of a layer's without what is in front. turned: rows of q and k are in the order in which
    neighbouring numbers turn together (as in Meta's files). norm: what a norm's numbers hold beside the weight.
    float16: whether plain numbers may be stored in it.
    """

    read: tuple[str, ...] = (
        "context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size", "expert_count",
        "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
        "attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count", "rope.scaling.type",
        "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
    )  # fmt: skip
    outer = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
             "output.weight": "lm_head.weight"}  # fmt: skip
    inner = {
        "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
        "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    }  # fmt: skip
    turned, norm, float16 = False, 0.0, True

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self._path, self._architecture, self._prefix = file.path, architecture, f"{architecture}."
        self._keys = {key: _same_for_all(value) for key, value in file.keys.items() if key.startswith(self._prefix)}
        if unknown := sorted(self._keys.keys() - {self._prefix + key for key in self.read}):
            raise self._unknown(f"what '{unknown[0]:.90}' asks of the model")
        self._stored = dict(file.tensors)
        self._factors = self._stored.pop(ROPE_FACTORS, None)

    def tensors(self) -> dict[str, BlockTensor]:
        """Under their new names."""
        return {name: tensor for each, stored in self._stored.items() for name, tensor in self._named(each, stored)}

    def config(self) -> dict[str, Any]:
        """config.json, without what the weights' types say."""
        width, heads, size = self._sizes()
        shared = self._number("attention.head_count_kv", int, 1, heads, heads)
        if heads % shared or size % 2:
            raise CheckpointError(f"{self._path}: {heads} heads of {size} numbers, {shared} of them for keys, "
                                  "do not divide; download the file again.")  # fmt: skip
        self._must_be(size, "attention.value_length", "rope.dimension_count")
        if self._number("expert_count", int, 0, MAX_COUNT, 0):
            raise self._unknown("a mixture of experts")
        base = self._number("rope.freq_base", float, 1.0, 1e12, 10_000.0 if self._architecture == "llama" else None)
        return self._common(width, heads) | {
            "model_type": self._architecture, "num_key_value_heads": shared, "head_dim": size, "rope_theta": base,
            "intermediate_size": self._number("feed_forward_length", int, 1, MAX_SIZE),
            "rope_scaling": self._rope_scaling(base, size), "tie_word_embeddings": "output.weight" not in self._stored,
            "hidden_act": "silu", "attention_bias": False,
        }  # fmt: skip

    def _sizes(self) -> tuple[int, int, int]:
        """The width, the heads of the queries, and the size of one."""
        width = self._number("embedding_length", int, 1, MAX_SIZE)
        heads = self._number("attention.head_count", int, 1, MAX_COUNT)
        return width, heads, self._number("attention.key_length", int, 2, MAX_SIZE, max(width // heads, 2))

    def _common(self, width: int, heads: int) -> dict[str, Any]:
        eps = self._number("attention.layer_norm_rms_epsilon", float, 0.0, 1.0)
        return {
            "architectures": [f"{self._architecture.capitalize()}ForCausalLM"], "hidden_size": width,
            "num_hidden_layers": self._number("block_count", int, 1, MAX_COUNT), "num_attention_heads": heads,
            "rms_norm_eps": float(str(np.float32(eps))),  # 1e-05, not 9.999999747378752e-06
            "max_position_embeddings": self._number("context_length", int, 1, 2**31 - 1),
            "vocab_size": self._rows("token_embd.weight"),
        }  # fmt: skip

    def _rope_scaling(self, base: float, size: int) -> dict[str, Any] | None:
        kind = self._keys.get(f"{self._prefix}rope.scaling.type", "none")
        if self._factors is None and kind == "none":
            return None
        if self._factors is None and kind == "linear":
            return {"rope_type": "linear", "factor": self._number("rope.scaling.factor", float, 1.0, 1e6)}
        if self._factors is not None and kind == "none" and self._factors.shape == (size // 2,):
            found = self._factors.floats()
            slowest = float(found.max())
            if np.allclose(found, llama3_factors(base, size, slowest), rtol=1e-4):
                return {"rope_type": "llama3", "factor": slowest, **LLAMA3_ROPE}
        raise self._unknown(f"its way of scaling the rotary embedding ({reprlib.repr(kind)})")

    def _named(self, name: str, tensor: BlockTensor) -> Iterator[tuple[str, BlockTensor]]:
        """One tensor of the file as those that it becomes."""
        if name in self.outer:
            yield self.outer[name], tensor
            return
        found = LAYER.fullmatch(name)
        if not found or found[2] not in self.inner or found[3] == "scale":
            raise self._unknown(f"a tensor '{name:.80}', which no {self._architecture} model has,")
        yield f"model.layers.{found[1]}.{self.inner[found[2]]}.{found[3]}", tensor

    def _rows(self, name: str) -> int:
        if (found := self._stored.get(name)) is None:
            raise CheckpointError(f"{self._path} lacks the tensor '{name}'; download it again.")
        return found.shape[0]

    def _must_be(self, size: int, *keys: str) -> None:
        """UnsupportedModel where a key says anything but the size of a head."""
        for key in keys:
            if self._number(key, int, 1, MAX_SIZE, size) != size:
                raise self._unknown(f"'{self._prefix}{key}' that is not {size}, the size of a head,")

    def _number(self, key: str, kind: type[Number], low: Number, high: Number, default: Number | None = None) -> Number:
        return number(self._keys, self._prefix + key, kind, low, high, default, str(self._path))

    def _unknown(self, what: str) -> UnsupportedModel:
        return UnsupportedModel(f"{self._path}: {what} is not known here; {ELSE}.")


class Llama(Layout):
    turned = True


class Gemma3(Layout):
    read = (*Layout.read, "attention.sliding_window", "rope.freq_base_swa")
    inner = Layout.inner | {
        "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    }  # fmt: skip
    norm = 1.0

    def config(self) -> dict[str, Any]:
        """The file leaves out every sixth layer's being full, and how 27B scales its queries: llama.cpp knows both by
        heart."""
        config = super().config()
        layers, width, heads = (config[name] for name in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
        del config["hidden_act"], config["attention_bias"]
        return config | {
            "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh",
            "sliding_window": self._number("attention.sliding_window", int, 1, 2**31 - 1), "sliding_window_pattern": 6,
            "layer_types": [SLIDING if (i + 1) % 6 else FULL for i in range(layers)],
            "rope_local_base_freq": self._number("rope.freq_base_swa", float, 1.0, 1e12, 10_000.0),
            "query_pre_attn_scalar": width // heads if layers == 62 else config["head_dim"],
        }  # fmt: skip


class Gemma4(Layout):
    """All shapes of it. Keys without "swa" are those of the full layers; a list has one value a layer.

    Full layers without a v of their own take the raw k for it. What a layer that reuses K/V has of its own is written
    all the same, as in the published checkpoints, and left out here. Plain numbers stay bfloat16, as some that Gemma
    computes are too large for float16.
    """

    read = (
        *Gemma3.read, "attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa",
        "attention.sliding_window_pattern", "attention.shared_kv_layers", "embedding_length_per_layer_input",
        "final_logit_softcapping", "expert_used_count", "expert_feed_forward_length",
    )  # fmt: skip
    outer = {
        "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
        "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
        "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
        "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
    }  # fmt: skip
    inner = Gemma3.inner | {
        "inp_gate": "per_layer_input_gate", "proj": "per_layer_projection", "post_norm": "post_per_layer_input_norm",
        "post_ffw_norm_1": "post_feedforward_layernorm_1", "post_ffw_norm_2": "post_feedforward_layernorm_2",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2", "ffn_gate_inp": "router.proj",
        "ffn_down_exps": "experts.switch_glu.down_proj",
    }  # fmt: skip
    # Tensors whose new names do not end in 'weight'.
    single = {"layer_output_scale.weight": "layer_scalar", "ffn_gate_inp.scale": "router.scale",
              "ffn_down_exps.scale": "router.per_expert_scale"}  # fmt: skip
    reused = ("attn_k", "attn_v", "attn_k_norm")
    float16 = False

    @property
    def _first_reusing(self) -> int:
        """The first of the layers at the end that reuse the K/V of others."""
        layers = self._number("block_count", int, 1, MAX_COUNT)
        return layers - self._number("attention.shared_kv_layers", int, 0, layers - 1, 0)

    def config(self) -> dict[str, Any]:
        width, heads, size = self._sizes()
        small = self._number("attention.key_length_swa", int, 2, MAX_SIZE)
        self._must_be(size, "attention.value_length", "rope.dimension_count")
        self._must_be(small, "attention.value_length_swa", "rope.dimension_count_swa")
        config = self._common(width, heads)
        layers, first = config["num_hidden_layers"], self._first_reusing
        slides = self._by_layer("attention.sliding_window_pattern", layers)
        inner = self._by_layer("feed_forward_length", layers)
        wide = inner[-1] != inner[0]
        if slides[-1] or inner != [inner[0] * (2 if wide and i >= first else 1) for i in range(layers)]:
            raise self._unknown("its order of layers")
        own = [f"blk.{i}.attn_v.weight" in self._stored for i in range(first) if not slides[i]]
        experts = self._number("expert_count", int, 0, MAX_COUNT, 0)
        per_layer = self._number("embedding_length_per_layer_input", int, 0, MAX_SIZE, 0)
        return config | self._heads(heads, slides, not any(own)) | {
            "model_type": "gemma4_text", "head_dim": small, "global_head_dim": size,
            "num_kv_shared_layers": layers - first, "intermediate_size": inner[0], "use_double_wide_mlp": wide,
            "layer_types": [SLIDING if slid else FULL for slid in slides], "rope_parameters": self._rope(size),
            "sliding_window": self._number("attention.sliding_window", int, 1, MAX_SIZE),
            "final_logit_softcapping": self._number("final_logit_softcapping", float, 1e-3, 1e6),
            "hidden_size_per_layer_input": per_layer, "hidden_activation": "gelu_pytorch_tanh",
            "vocab_size_per_layer_input": self._rows("per_layer_token_embd.weight") if per_layer else 0,
            "tie_word_embeddings": True, "enable_moe_block": experts > 0, "num_experts": experts or None,
            "top_k_experts": self._number("expert_used_count", int, 1, experts) if experts else None,
            "moe_intermediate_size":
                self._number("expert_feed_forward_length", int, 1, MAX_SIZE) if experts else None,
        }  # fmt: skip

    def _heads(self, heads: int, slides: list[int], as_keys: bool) -> dict[str, Any]:
        """Heads for K/V of both kinds of layers. as_keys: whether full layers take k for v."""
        counts = self._by_layer("attention.head_count_kv", len(slides))
        kinds = [{count for count, slid in zip(counts, slides, strict=True) if bool(slid) == kind}
                 for kind in (True, False)]  # fmt: skip
        small, full = (min(found, default=0) for found in kinds)
        small = small or full
        if any(len(found) > 1 for found in kinds) or not (as_keys or small == full):
            raise self._unknown("what its layers differ in of heads for K/V")
        if min(small, full) < 1 or heads % small or heads % full:
            raise CheckpointError(f"{self._path}: {heads} heads, {small} and {full} of them for keys, do not divide; "
                                  "download the file again.")  # fmt: skip
        return {"num_key_value_heads": small, "num_global_key_value_heads": full, "attention_k_eq_v": as_keys}

    def _by_layer(self, key: str, layers: int) -> list[int]:
        found = self._keys.get(self._prefix + key)
        values: list[Any] = found.tolist() if isinstance(found, np.ndarray) else [found] * layers
        if len(values) != layers or not all(isinstance(value, int) and 0 <= value <= MAX_SIZE for value in values):
            raise CheckpointError(f"{self._path}: expected as '{self._prefix}{key}' a number for each of {layers} "
                                  f"layers, found {reprlib.repr(found)}; download it again.")  # fmt: skip
        return values

    def _rope(self, size: int) -> dict[str, Any]:
        """Full layers turn only the first of their pairs: the others are slowed down to a standstill."""
        base = self._number("rope.freq_base", float, 1.0, 1e12)
        small = self._number("rope.freq_base_swa", float, 1.0, 1e12)
        factors = np.zeros(0) if self._factors is None else self._factors.floats()
        turning = int((factors == 1.0).sum())
        odd = factors.shape != (size // 2,) or (factors[:turning] != 1.0).any() or (factors[turning:] < STILL).any()
        if odd or self._keys.get(f"{self._prefix}rope.scaling.type", "none") != "none":
            raise self._unknown("its way of scaling the rotary embedding")
        return {
            SLIDING: {"rope_type": "default", "rope_theta": small},
            FULL: {"rope_type": "proportional", "rope_theta": base, "partial_rotary_factor": 2 * turning / size},
        }

    def _named(self, name: str, tensor: BlockTensor) -> Iterator[tuple[str, BlockTensor]]:
        found = LAYER.fullmatch(name)
        if not found:
            yield from super()._named(name, tensor)
            return
        layer, end = f"model.layers.{found[1]}.", f"{found[2]}.{found[3]}"
        if end in self.single:
            yield layer + self.single[end], tensor
        elif end == "ffn_gate_up_exps.weight":
            parts = "gate_proj", "up_proj"
            yield from zip((f"{layer}experts.switch_glu.{part}.weight" for part in parts), tensor.halves(), strict=True)
        elif not (found[2] in self.reused and int(found[1]) >= self._first_reusing):
            yield from super()._named(name, tensor)


ARCHITECTURES: dict[str, type[Layout]] = {
    "llama": Llama, "qwen2": Layout, "qwen3": Layout, "gemma3": Gemma3, "gemma4": Gemma4
}  # fmt: skip


def layout_of(file: GGUFFile) -> Layout:
    """UnsupportedModel for an architecture that is not known here, or one of several parts of a model."""
    name = file.keys.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedModel(f"{file.path} holds a model of architecture {reprlib.repr(name)}, and those known "
                               f"here are {', '.join(ARCHITECTURES)}; {ELSE}.")  # fmt: skip
    if (parts := file.keys.get("split.count", 1)) != 1:
        raise UnsupportedModel(f"{file.path} is one of {parts} parts of a model; join them with llama.cpp's "
                               "llama-gguf-split --merge first.")  # fmt: skip
    return ARCHITECTURES[name](file, name)


def _same_for_all(value: Any) -> Any:
    """A key's value; of a list with one value a layer the one that all have."""
    return value[0].item() if isinstance(value, np.ndarray) and len(np.unique(value)) == 1 else value


def llama3_factors(base: float, size: int, factor: float) -> Array:
    """By what each rotation of Llama 3 is slowed down [size / 2]: by 1 where it is fast, by `factor` where slow."""
    low, high, context = LLAMA3_ROPE.values()
    turns = context / (2 * np.pi * base ** (np.arange(0, size, 2) / size))
    part = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return np.asarray(1 / ((1 - part) / factor + part))
