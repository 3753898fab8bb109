"""Meta's multi-token checkpoints (facebook/multi-token-prediction, arXiv 2404.19737): `.pth` files and params.json.

What it does: writes the target as a Llama checkpoint in Hugging Face's layout and the further heads as a drafter of
ours ("parallel_heads"). What it does not do: Llama 3's scaled rotary embedding, or its tokenizer.

Layout of the release: `layers.<i>` are the trunk and, last, the head of the next token, which is why other programs
read them as an ordinary Llama; `extra_heads.<i>` are one layer each for the tokens further on. n_layers of params.json
counts them all. Every head reads what the trunk leaves in front of the last of `layers`, and all share `norm` and
`output`. So the drafter reads "trunk", and the norm of each of its heads is a copy.

Rotary embedding: Meta turns neighbouring numbers of a head together, Hugging Face's layout the number i of the first
half with the number i of the second; the rows of wq and wk are put in that order, so that the same pairs meet.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.checkpoint import number, read_json, visible
from mlx_mtp.converting.files import write_model
from mlx_mtp.converting.llama_tokenizer import write_tokenizer
from mlx_mtp.converting.pth import STORAGES, StoredTensor, read_pth
from mlx_mtp.drafters.parallel import MOST_HEADS
from mlx_mtp.errors import CheckpointError, UnsupportedModel

log = logging.getLogger(__name__)

PARAMS = "params.json"
MAX_SIZE, MAX_COUNT = 2**24, 2**10
TRAINED_CONTEXT = 4096  # of the release and of Llama 2; params.json does not say
IGNORED = re.compile(r"rope\.freqs$")
LAYER = re.compile(r"(layers|extra_heads)\.(\d+)\.(.+)$")
# Meta's name of a layer's tensor: Hugging Face's, and the axis along which model-parallel files cut it (None: not).
NAMES: dict[str, tuple[str, int | None]] = {
    "attention.wq.weight": ("self_attn.q_proj.weight", 0),
    "attention.wk.weight": ("self_attn.k_proj.weight", 0),
    "attention.wv.weight": ("self_attn.v_proj.weight", 0),
    "attention.wo.weight": ("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": ("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": ("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": ("mlp.up_proj.weight", 0),
    "attention_norm.weight": ("input_layernorm.weight", None),
    "ffn_norm.weight": ("post_attention_layernorm.weight", None),
}
OUTER = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def files_of(folder: Path) -> list[Path]:
    """The weight files, in order; empty where a folder is not of this layout."""
    return visible(folder.glob("consolidated*.pth")) if (folder / PARAMS).is_file() else []


@dataclass(frozen=True)
class _Parts:
    """One tensor, cut along `axis` over the files of model-parallel training (one file: one part)."""

    parts: tuple[StoredTensor, ...]
    axis: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.parts[0].shape
        if self.axis is None or len(self.parts) == 1:
            return first
        whole = sum(part.shape[self.axis] for part in self.parts)
        return (*first[: self.axis], whole, *first[self.axis + 1 :])

    def read(self) -> mx.array:
        if self.axis is None:
            return self.parts[0].read()
        return mx.concatenate([part.read() for part in self.parts], axis=self.axis)


@dataclass(frozen=True)
class MetaModel:
    """A checkpoint's sizes and its tensors under Meta's names; nothing is read yet."""

    folder: Path
    tensors: Mapping[str, _Parts]
    width: int
    heads: int
    kv_heads: int
    norm_eps: float
    rope_theta: float
    context: int
    layers: int  # trunk and first head
    extra_heads: int

    @classmethod
    def open(cls, folder: Path) -> MetaModel:
        """Raises CheckpointError where params.json and the tensors do not belong together."""
        params, where = read_json(folder / PARAMS), str(folder / PARAMS)
        if params.get("use_scaled_rope"):
            raise UnsupportedModel(f"{where}: expected Llama 2's rotary embedding, found Llama 3's scaled one; "
                                   "use the checkpoint in Hugging Face's layout.")  # fmt: skip
        width = number(params, "dim", int, 1, MAX_SIZE, where=where)
        heads = number(params, "n_heads", int, 1, MAX_COUNT, where=where)
        tensors = _tensors(files_of(folder), width)
        layers, extra = (_count(folder, tensors, word) for word in ("layers", "extra_heads"))
        future = number(params, "n_future_tokens", int, 1, MOST_HEADS + 1, extra + 1, where=where)
        total = number(params, "n_layers", int, 1, MAX_COUNT, layers + extra, where=where)
        if (future, total) != (extra + 1, layers + extra):
            raise CheckpointError(
                f"{where}: expected {total} layers of which {future - 1} are extra heads, found {layers} layers and "
                f"{extra} extra heads in the .pth; both must belong together."
            )
        model = cls(
            folder=folder, tensors=tensors, width=width, heads=heads,
            kv_heads=number(params, "n_kv_heads", int, 1, heads, heads, where=where),
            norm_eps=number(params, "norm_eps", float, 0.0, 1.0, 1e-5, where=where),
            rope_theta=number(params, "rope_theta", float, 1.0, 1e12, 10_000.0, where=where),
            context=number(params, "max_seq_len", int, 1, 2**31 - 1, TRAINED_CONTEXT, where=where),
            layers=layers, extra_heads=extra,
        )  # fmt: skip
        model._check()
        return model

    def _check(self) -> None:
        """CheckpointError unless every tensor has the shape that params.json asks for."""
        size, width = self.width // self.heads, self.width
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise CheckpointError(
                f"{self.folder / PARAMS}: expected a width that the heads divide into even parts, found {self.width} "
                f"with {self.heads} heads and {self.kv_heads} for keys; use the params.json of this checkpoint."
            )
        inner, vocabulary, shared = self._inner(), self.vocabulary, self.kv_heads * size
        layer = dict(zip(NAMES, (
            (width, width), (shared, width), (shared, width), (width, width),
            (inner, width), (width, inner), (inner, width), (width,), (width,),
        ), strict=True))  # fmt: skip
        wanted: dict[str, tuple[int, ...]] = {
            "tok_embeddings.weight": (vocabulary, width), "norm.weight": (width,), "output.weight": (vocabulary, width),
        }  # fmt: skip
        for word, count in (("layers", self.layers), ("extra_heads", self.extra_heads)):
            wanted |= {f"{word}.{i}.{name}": shape for i in range(count) for name, shape in layer.items()}
        for name in sorted(wanted.keys() ^ self.tensors.keys()):
            what = "lacks" if name in wanted else "has beside those of a Llama"
            raise CheckpointError(f"{self.folder}: the .pth {what} the tensor '{name}'; "
                                  "use a checkpoint of facebook/multi-token-prediction.")  # fmt: skip
        for name, shape in wanted.items():
            if self.tensors[name].shape != shape:
                raise CheckpointError(
                    f"{self.folder}: expected '{name}' of shape {list(shape)} as params.json says, found "
                    f"{list(self.tensors[name].shape)}; both must belong together."
                )

    @property
    def vocabulary(self) -> int:
        """Rows of the unembedding; params.json says -1 where the tokenizer decides."""
        return self.tensors["output.weight"].shape[0] if "output.weight" in self.tensors else 0

    def _inner(self) -> int:
        first = self.tensors.get("layers.0.feed_forward.w1.weight")
        return first.shape[0] if first else 0

    def config(self) -> dict[str, Any]:
        """config.json of the target, of Hugging Face's Llama."""
        dtype = STORAGES[self.tensors["output.weight"].parts[0].kind][1]
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self._inner(),
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.width // self.heads,
            "hidden_act": "silu",
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.context,
            "vocab_size": self.vocabulary,
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": False,
            "torch_dtype": str(dtype).removeprefix("mlx.core."),
        }

    def target(self) -> Iterator[tuple[str, mx.array]]:
        """The target's tensors under Hugging Face's names, read one by one."""
        for name, new in OUTER.items():
            yield new, self.tensors[name].read()
        for i in range(self.layers):
            yield from self._layer(f"layers.{i}.", f"model.layers.{i}.")

    def drafter(self) -> Iterator[tuple[str, mx.array]]:
        """The extra heads' tensors under ours."""
        for i in range(self.extra_heads):
            yield from self._layer(f"extra_heads.{i}.", f"heads.{i}.layer.")
            yield f"heads.{i}.norm.weight", self.tensors["norm.weight"].read()

    def drafter_config(self) -> dict[str, Any]:
        """config.json of the drafter."""
        block = {**self.config(), "num_hidden_layers": 1}
        return {
            "model_type": "parallel_heads", "heads": self.extra_heads, "reads": "trunk", "hidden_size": self.width,
            "vocab_size": self.vocabulary, "block": block,
        }  # fmt: skip

    def _layer(self, old: str, new: str) -> Iterator[tuple[str, mx.array]]:
        for name, (renamed, _) in NAMES.items():
            array = self.tensors[old + name].read()
            if name == "attention.wq.weight":
                array = halves(array, self.heads)
            elif name == "attention.wk.weight":
                array = halves(array, self.kv_heads)
            yield new + renamed, array


def halves(rows: mx.array, heads: int) -> mx.array:
    """Rows [heads * d, D] whose neighbours 2i, 2i + 1 turn together -> the same with i and i + d/2 turning together."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _tensors(files: list[Path], width: int) -> dict[str, _Parts]:
    """All files' tensors put together; CheckpointError where a file lacks what another has."""
    found = [read_pth(file) for file in files]
    for file, tensors in zip(files, found, strict=True):
        for name in sorted(tensors.keys() ^ found[0].keys()):
            raise CheckpointError(f"Expected the same tensors in {files[0].name} and {file.name}, found '{name}' in "
                                  "one of them only; download both again.")  # fmt: skip
    whole: dict[str, _Parts] = {}
    for name in found[0]:
        if IGNORED.search(name):
            continue
        parts, inner = tuple(tensors[name] for tensors in found), LAYER.match(name)
        axis = NAMES.get(inner[3], ("", None))[1] if inner else 0 if name == "output.weight" else None
        if name == "tok_embeddings.weight":  # Llama 2 cut the width, Llama 3 the vocabulary
            axis = 0 if parts[0].shape[1:] == (width,) else 1
        if axis is not None and any(len(part.shape) != 2 for part in parts):
            raise CheckpointError(f"{files[0]}: expected '{name}' to have two axes, found {list(parts[0].shape)}; "
                                  "use a checkpoint of facebook/multi-token-prediction.")  # fmt: skip
        whole[name] = _Parts(parts, axis)
    return whole


def _count(folder: Path, tensors: Mapping[str, _Parts], word: str) -> int:
    """How many layers or extra heads there are; CheckpointError where one is missing in between."""
    numbers = {int(found[2]) for name in tensors if (found := LAYER.match(name)) and found[1] == word}
    if numbers != set(range(len(numbers))) or (word == "layers" and not numbers):
        raise CheckpointError(
            f"{folder}: expected {word}.0, {word}.1, ... in the .pth, found the numbers {sorted(numbers)[:8]}; "
            "use a checkpoint of facebook/multi-token-prediction."
        )
    return len(numbers)


def tokenizer_of(folder: Path) -> Path | None:
    """tokenizer.model beside the weights, or one folder up, where the release has it."""
    files = (folder / "tokenizer.model", folder.resolve().parent / "tokenizer.model")
    return next((file for file in files if file.is_file()), None)


def bring_in(folder: Path, out: Path) -> list[str]:
    """Writes out/target, and out/parallel where there are extra heads; the names of what was written."""
    model = MetaModel.open(folder)
    config, tokenizer = model.config(), tokenizer_of(folder)
    if tokenizer:
        config |= write_tokenizer(tokenizer, out / "target", model.vocabulary, model.context)
    else:
        log.warning("No tokenizer.model in '%s' or above it: the target will take token ids only.", folder)
    write_model(out / "target", config, model.target())
    if not model.extra_heads:
        return ["target"]
    write_model(out / "parallel", model.drafter_config(), model.drafter())
    return ["target", "parallel"]
