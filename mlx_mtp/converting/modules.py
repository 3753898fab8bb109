"""MTP modules inside a target's checkpoint (DeepSeek-V3's layout, and MiMo's): split off as a drafter of ours.

Numbers stay as they are; a module whose embedding or unembedding is not the target's is refused.

Layouts, N = num_hidden_layers:
    DeepSeek V3, GLM 4.5 and their like: `model.layers.<N + k>.{enorm,hnorm,eh_proj,shared_head.norm}` and a layer's
    own tensors; `embed_tokens` and `shared_head.head` are copies of the target's.
    MiMo: `model.mtp_layers.<k>.{token_layernorm,hidden_layernorm,input_proj,final_layernorm}` and a layer's own
    tensors. input_proj reads [state, embedding], as vLLM's and SGLang's mimo_mtp.py say; ours [embedding, state].

The state that a module reads is DeepSeek's target's after its final norm (vLLM, SGLang) and MiMo's before it (vLLM,
also Xiaomi's branch; SGLang gives it the other); for that the drafter keeps one over the weight of the norm.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import _get_classes

from mlx_mtp.checkpoints.checkpoint import Checkpoint, check_shapes, number, write_tensors
from mlx_mtp.converting.output import copy_companions
from mlx_mtp.drafters.layers import build_layers
from mlx_mtp.drafters.sequential import MOST_MODULES
from mlx_mtp.errors import CheckpointError, UnsupportedModel, explaining
from mlx_mtp.targets.generic import MAX_COUNT, MAX_SIZE

COUNT = "num_nextn_predict_layers"
# Of no use to a layer, or about the files it was in.
NOT_OF_A_LAYER = (COUNT, "quantization", "quantization_config", "auto_map", "torch_dtype", "dtype", "layer_types",
                  "transformers_version", "_name_or_path")  # fmt: skip
EMBEDDING, UNEMBEDDING, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class _Layout:
    """Where a checkpoint keeps module k: in front of its names, what they are called here, which copy what.

    swapped: the projection reads [state, embedding]. reads: see drafters/sequential.py.
    """

    prefix: str
    names: Mapping[str, str]
    copies: Mapping[str, str]
    swapped: bool
    reads: str


DEEPSEEK = _Layout(
    prefix="model.layers.",
    names={
        "enorm.weight": "enorm.weight", "hnorm.weight": "hnorm.weight", "eh_proj.weight": "eh_proj.weight",
        "shared_head.norm.weight": "norm.weight",
    },
    copies={"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": UNEMBEDDING},
    swapped=False,
    reads="hidden",
)  # fmt: skip
MIMO = _Layout(
    prefix="model.mtp_layers.",
    names={
        "token_layernorm.weight": "enorm.weight", "hidden_layernorm.weight": "hnorm.weight",
        "input_proj.weight": "eh_proj.weight", "final_layernorm.weight": "norm.weight",
    },
    copies={},
    swapped=True,
    reads="residual",
)  # fmt: skip


@dataclass(frozen=True)
class Modules:
    """The modules of a checkpoint, still under its names. of[k] are the tensors of module k without its prefix."""

    checkpoint: Checkpoint
    layout: _Layout
    of: tuple[Mapping[str, mx.array], ...]
    rest: Mapping[str, mx.array]  # the target's tensors

    @classmethod
    def find(cls, checkpoint: Checkpoint) -> Modules | None:
        """None where a checkpoint holds no modules; CheckpointError where some of them are missing."""
        if not checkpoint.config.get(COUNT) or checkpoint.config.get("num_hidden_layers") is None:
            return None
        where = str(checkpoint.path / "config.json")
        layers = number(checkpoint.config, "num_hidden_layers", int, 1, MAX_COUNT, where=where)
        wanted = number(checkpoint.config, COUNT, int, 1, MOST_MODULES, where=where)
        weights = checkpoint.weights()
        for layout, first in ((DEEPSEEK, layers), (MIMO, 0)):
            pattern = re.compile(re.escape(layout.prefix) + r"(\d+)\.(.+)")
            of: dict[int, dict[str, mx.array]] = {}
            rest = {}
            for name, weight in weights.items():
                place = pattern.fullmatch(name)
                if place and int(place[1]) >= first:
                    of.setdefault(int(place[1]) - first, {})[place[2]] = weight
                else:
                    rest[name] = weight
            if of:
                if sorted(of) != list(range(wanted)):
                    raise CheckpointError(f"{checkpoint.path}: '{COUNT}' of config.json is {wanted}, but there are "
                                          f"the modules {sorted(of)}; both must belong together.")  # fmt: skip
                return cls(checkpoint, layout, tuple(of[k] for k in range(wanted)), rest)
        return None

    def tensors(self, block: dict[str, Any]) -> Iterator[tuple[str, mx.array]]:
        """The drafter's tensors under our names, lazy. block: the config of one layer."""
        if self.layout.reads == "residual":
            if NORM not in self.rest:
                raise CheckpointError(f"{self.checkpoint.path} lacks '{NORM}'; download it again.")
            norm = self.rest[NORM].astype(mx.float32)
            yield "unnorm", mx.where(norm == 0, 0, 1 / norm)
        for k, found in enumerate(self.of):
            self._check(k, found)
            for name, weight in self._in_mlx_form(k, found, block).items():
                new = self.layout.names.get(name)
                if new == "eh_proj.weight" and self.layout.swapped:
                    state, embedding = mx.split(weight, 2, axis=1)
                    weight = mx.concatenate([embedding, state], axis=1)
                yield f"blocks.{k}." + (new or f"layer.{name}"), weight

    def _check(self, k: int, found: Mapping[str, mx.array]) -> None:
        """Nothing may be missing beside the layer, and copies must be copies."""
        if missing := sorted(self.layout.names.keys() - found.keys()):
            raise CheckpointError(f"{self.checkpoint.path} lacks '{missing[0]}' in module {k}; download it again.")
        for name, original in self.layout.copies.items():
            theirs = self.rest.get(original)
            if original == UNEMBEDDING and theirs is None:
                theirs = self.rest.get(EMBEDDING)
            if name in found and theirs is not None and not mx.array_equal(found[name], theirs).item():
                raise UnsupportedModel(f"{self.checkpoint.path}: '{name}' of module {k} is no copy of the target's "
                                       f"'{original}'; a module with one of its own is not implemented.")  # fmt: skip

    def _in_mlx_form(self, k: int, found: Mapping[str, mx.array], block: dict[str, Any]) -> dict[str, mx.array]:
        """A module's tensors as mlx-lm keeps them: experts stacked, fp8 and attention unpacked by its `sanitize`."""
        prefix, where = "model.layers.0.", f"{self.checkpoint.path}: module {k}"
        named = {prefix + name: weight for name, weight in found.items() if name not in self.layout.copies}
        what = f"{where}, of a {block['model_type']} model, cannot be brought into mlx-lm's form"
        kinds = (Exception, SystemExit)  # another project's code on any checkpoint
        with explaining(what, "use a checkpoint as it was published", *kinds, raised=UnsupportedModel):
            with contextlib.redirect_stdout(io.StringIO()):
                model_class, args_class = _get_classes(block)
            model = model_class(args_class.from_dict(block))
            clean = model.sanitize(named) if hasattr(model_class, "sanitize") else named
            (layer,) = build_layers(block, 1, block["hidden_size"])
        clean = {name.removeprefix(prefix): weight for name, weight in clean.items()}
        own = {name: weight.shape for name, weight in clean.items() if name not in self.layout.names}
        check_shapes(layer, own, where)
        return clean

    def write(self, out: Path, with_target: bool) -> list[str]:
        """Writes out/sequential, the drafter, and out/target, the target as it is; the names of what was written."""
        config, where = self.checkpoint.config, str(self.checkpoint.path / "config.json")
        width = number(config, "hidden_size", int, 1, MAX_SIZE, where=where)
        vocabulary = number(config, "vocab_size", int, 2, MAX_SIZE, where=where)
        # One ordinary layer, as they are after the dense ones.
        block = {name: value for name, value in config.items() if name not in NOT_OF_A_LAYER} | {"num_hidden_layers": 1}
        if "first_k_dense_replace" in block:
            block["first_k_dense_replace"] = 0
        drafter = {
            "model_type": "sequential_modules", "modules": len(self.of), "reads": self.layout.reads,
            "hidden_size": width, "vocab_size": vocabulary, "block": block,
        }  # fmt: skip
        write_tensors(out / "sequential", drafter, self.tensors(block))
        if not with_target:
            return ["sequential"]
        write_tensors(out / "target", {**config, COUNT: 0}, self.rest.items())
        copy_companions(self.checkpoint.path, out / "target")
        return ["target", "sequential"]
