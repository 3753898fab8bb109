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
from mlx_mtp.drafters.layers import build_layer
from mlx_mtp.drafters.sequential import MOST_MODULES
from mlx_mtp.errors import CheckpointError, UnsupportedModel, explaining
from mlx_mtp.targets.generic import MAX_COUNT, MAX_SIZE

COUNT = "num_nextn_predict_layers"
# Of no use to a layer, or about the files it was in.
NOT_OF_A_LAYER = (COUNT, "quantization", "quantization_config", "auto_map", "torch_dtype", "dtype", "layer_types",
                  "transformers_version", "_name_or_path")  # fmt: skip
EMBEDDING, UNEMBEDDING, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
# What stands beside a module's layer, under our names.
NAMES = {
    "enorm.weight": "enorm.weight", "token_layernorm.weight": "enorm.weight",
    "hnorm.weight": "hnorm.weight", "hidden_layernorm.weight": "hnorm.weight",
    "eh_proj.weight": "eh_proj.weight", "input_proj.weight": "eh_proj.weight",
    "shared_head.norm.weight": "norm.weight", "final_layernorm.weight": "norm.weight",
}  # fmt: skip
COPIES = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": UNEMBEDDING}


@dataclass(frozen=True)
class Modules:
    """The modules of a checkpoint, still under its names. of[k] are the tensors of module k without its prefix."""

    checkpoint: Checkpoint
    mimo: bool
    of: Mapping[int, Mapping[str, mx.array]]
    rest: Mapping[str, mx.array]  # the target's tensors

    @classmethod
    def find(cls, checkpoint: Checkpoint) -> Modules | None:
        """None where a checkpoint holds no modules; CheckpointError where some of them are missing."""
        if not checkpoint.config.get(COUNT) or checkpoint.config.get("num_hidden_layers") is None:
            return None
        where = str(checkpoint.path / "config.json")
        layers = number(checkpoint.config, "num_hidden_layers", int, 1, MAX_COUNT, where=where)
        wanted = number(checkpoint.config, COUNT, int, 1, MOST_MODULES, where=where)
        rest = checkpoint.weights()
        mimo = any(name.startswith("model.mtp_layers.") for name in rest)
        folder, first = ("mtp_layers", 0) if mimo else ("layers", layers)
        of: dict[int, dict[str, mx.array]] = {}
        for name in list(rest):
            place = re.fullmatch(rf"model\.{folder}\.(\d+)\.(.+)", name)
            if place and int(place[1]) >= first:
                of.setdefault(int(place[1]) - first, {})[place[2]] = rest.pop(name)
        if of and sorted(of) != list(range(wanted)):
            raise CheckpointError(f"{checkpoint.path}: '{COUNT}' of config.json is {wanted}, but there are "
                                  f"the modules {sorted(of)}; both must belong together.")  # fmt: skip
        return cls(checkpoint, mimo, of, rest) if of else None

    def tensors(self, block: dict[str, Any]) -> Iterator[tuple[str, mx.array]]:
        """The drafter's tensors under our names, lazy. block: the config of one layer."""
        if self.mimo:
            if NORM not in self.rest:
                raise CheckpointError(f"{self.checkpoint.path} lacks '{NORM}'; download it again.")
            norm = self.rest[NORM].astype(mx.float32)
            yield "unnorm", mx.where(norm == 0, 0, 1 / norm)
        for k, found in sorted(self.of.items()):
            self._check(k, found)
            for name, weight in self._in_mlx_form(k, found, block).items():
                if name == "input_proj.weight":
                    state, embedding = mx.split(weight, 2, axis=1)
                    weight = mx.concatenate([embedding, state], axis=1)
                yield f"blocks.{k}." + NAMES.get(name, f"layer.{name}"), weight

    def _check(self, k: int, found: Mapping[str, mx.array]) -> None:
        """Nothing may be missing beside the layer, and copies must be copies."""
        if missing := sorted({*NAMES.values()} - {NAMES.get(name) for name in found}):
            raise CheckpointError(f"{self.checkpoint.path} lacks '{missing[0]}' in module {k}; download it again.")
        for name, original in COPIES.items():
            theirs = self.rest.get(original)
            if original == UNEMBEDDING and theirs is None:
                theirs = self.rest.get(EMBEDDING)
            if name in found and theirs is not None and not mx.array_equal(found[name], theirs).item():
                raise UnsupportedModel(f"{self.checkpoint.path}: '{name}' of module {k} is no copy of the target's "
                                       f"'{original}'; a module with one of its own is not implemented.")  # fmt: skip

    def _in_mlx_form(self, k: int, found: Mapping[str, mx.array], block: dict[str, Any]) -> dict[str, mx.array]:
        """A module's tensors as mlx-lm keeps them: experts stacked, fp8 and attention unpacked by its `sanitize`."""
        prefix, where = "model.layers.0.", f"{self.checkpoint.path}: module {k}"
        named = {prefix + name: weight for name, weight in found.items() if name not in COPIES}
        what = f"{where}, of a {block['model_type']} model, cannot be brought into mlx-lm's form"
        kinds = (Exception, SystemExit)  # another project's code on any checkpoint
        with explaining(what, "use a checkpoint as it was published", *kinds, raised=UnsupportedModel):
            with contextlib.redirect_stdout(io.StringIO()):
                model_class, args_class = _get_classes(block)
            model = model_class(args_class.from_dict(block))
            clean = model.sanitize(named) if hasattr(model_class, "sanitize") else named
            layer = build_layer(block, block["hidden_size"])
        clean = {name.removeprefix(prefix): weight for name, weight in clean.items()}
        own = {name: weight.shape for name, weight in clean.items() if name not in NAMES}
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
            "model_type": "sequential_modules", "modules": len(self.of), "reads": "residual" if self.mimo else "hidden",
            "hidden_size": width, "vocab_size": vocabulary, "block": block,
        }  # fmt: skip
        write_tensors(out / "sequential", drafter, self.tensors(block))
        if not with_target:
            return ["sequential"]
        write_tensors(out / "target", {**config, COUNT: 0}, self.rest.items())
        copy_companions(self.checkpoint.path, out / "target")
        return ["target", "sequential"]
