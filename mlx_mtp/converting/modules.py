"""MTP modules inside a target's checkpoint (DeepSeek-V3's layout, and MiMo's): split off as a drafter of ours.

What it does: finds the modules by the names of their tensors, brings their transformer layer into mlx-lm's form by
mlx-lm's own `sanitize`, and writes them as "sequential_modules". What it does not do: change a module's numbers, or
take one whose embedding or unembedding is not the target's.

Layouts, N = num_hidden_layers:
    DeepSeek V3, GLM 4.5 and their like: `model.layers.<N + k>.{enorm,hnorm,eh_proj,shared_head.norm}` and a layer's
    own tensors; `embed_tokens` and `shared_head.head` are copies of the target's.
    MiMo: `model.mtp_layers.<k>.{token_layernorm,hidden_layernorm,input_proj,final_layernorm}` and a layer's own
    tensors. input_proj reads [state, embedding], as vLLM's and SGLang's mimo_mtp.py say; ours [embedding, state].

The state that a module reads is DeepSeek's target's behind its final norm (vLLM, SGLang) and MiMo's in front of it
(vLLM, also Xiaomi's branch; SGLang gives it the other); for that the drafter keeps one over the weight of the norm.
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

from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters, number
from mlx_mtp.converting.files import copy_companions, write_model
from mlx_mtp.drafters.layers import build_layers
from mlx_mtp.drafters.sequential import MOST_MODULES
from mlx_mtp.errors import CheckpointError, UnsupportedModel, brief

MAX_SIZE, MAX_COUNT = 2**24, 2**10
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
                    raise CheckpointError(
                        f"{checkpoint.path}: expected the {wanted} modules that '{COUNT}' of config.json counts, "
                        f"found those numbered {sorted(of)}; the weights and config.json must belong together."
                    )
                return cls(checkpoint, layout, tuple(of[k] for k in range(wanted)), rest)
        return None

    def drafter(self) -> Iterator[tuple[str, mx.array]]:
        """The drafter's tensors under our names, lazy."""
        block = self.block()
        if self.layout.reads == "residual":
            if NORM not in self.rest:
                raise CheckpointError(f"{self.checkpoint.path}: expected '{NORM}', found none; download it again.")
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
            raise CheckpointError(
                f"{self.checkpoint.path}: expected '{missing[0]}' in module {k}, found none; download it again."
            )
        for name, original in self.layout.copies.items():
            theirs = self.rest.get(original)
            if original == UNEMBEDDING and theirs is None:
                theirs = self.rest.get(EMBEDDING)
            if name in found and theirs is not None and not mx.array_equal(found[name], theirs).item():
                raise UnsupportedModel(
                    f"{self.checkpoint.path}: expected '{name}' of module {k} to be a copy of the target's "
                    f"'{original}', found other numbers; a module with one of its own is not implemented."
                )

    def block(self) -> dict[str, Any]:
        """The mlx-lm config of one layer of the modules: an ordinary one behind the dense ones."""
        config = {name: value for name, value in self.checkpoint.config.items() if name not in NOT_OF_A_LAYER}
        config["num_hidden_layers"] = 1
        if "first_k_dense_replace" in config:
            config["first_k_dense_replace"] = 0
        return config

    def _in_mlx_form(self, k: int, found: Mapping[str, mx.array], block: dict[str, Any]) -> dict[str, mx.array]:
        """A module's tensors as mlx-lm keeps them: experts stacked, fp8 and attention unpacked by its `sanitize`.

        UnsupportedModel where what comes out is not one layer of that architecture.
        """
        prefix = "model.layers.0."
        named = {prefix + name: weight for name, weight in found.items() if name not in self.layout.copies}
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                model_class, args_class = _get_classes(block)
            model = model_class(args_class.from_dict(block))
            clean = model.sanitize(named) if hasattr(model_class, "sanitize") else named
            (layer,) = build_layers(block, 1, self.width)
        except (Exception, SystemExit) as error:  # another project's code on any checkpoint
            raise UnsupportedModel(
                f"{self.checkpoint.path}: mlx-lm cannot bring module {k} of this {block['model_type']} model into its "
                f"form ({brief(error)}); use a checkpoint as it was published."
            ) from error
        clean = {name.removeprefix(prefix): weight for name, weight in clean.items()}
        wanted = {name: weight.shape for name, weight in named_parameters(layer).items()}
        have = {name: weight.shape for name, weight in clean.items() if name not in self.layout.names}
        for name in sorted(wanted.keys() | have.keys()):
            if wanted.get(name) != have.get(name):
                raise UnsupportedModel(
                    f"{self.checkpoint.path}: expected '{name}' of module {k} as in mlx-lm's layer, "
                    f"{_shape(wanted.get(name))}, found {_shape(have.get(name))}; use a checkpoint as it was published."
                )
        return clean

    @property
    def width(self) -> int:
        """Numbers in a state."""
        where = str(self.checkpoint.path / "config.json")
        return number(self.checkpoint.config, "hidden_size", int, 1, MAX_SIZE, where=where)

    def config(self) -> dict[str, Any]:
        """config.json of the drafter."""
        where = str(self.checkpoint.path / "config.json")
        vocabulary = number(self.checkpoint.config, "vocab_size", int, 2, MAX_SIZE, where=where)
        return {
            "model_type": "sequential_modules", "modules": len(self.of), "reads": self.layout.reads,
            "hidden_size": self.width, "vocab_size": vocabulary, "block": self.block(),
        }  # fmt: skip


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"shape {list(shape)}"


def split(modules: Modules, folder: Path) -> None:
    """Writes the modules as a drafter."""
    write_model(folder, modules.config(), modules.drafter())


def without(modules: Modules, folder: Path) -> None:
    """Writes the target as it is, without its modules."""
    config = {**modules.checkpoint.config, COUNT: 0}
    write_model(folder, config, iter(modules.rest.items()))
    copy_companions(modules.checkpoint.path, folder)
