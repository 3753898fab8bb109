"""Drafters to be trained: a fresh one of any family for any target, what it is trained for, and how it is written.

A new family adds a Family here beside its file in drafters/.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.checkpoints.atomic import replacing_or_refused
from mlx_mtp.checkpoints.checkpoint import Checkpoint, named_parameters, write_checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.drafters.assistant import MODEL_TYPES as ASSISTANTS
from mlx_mtp.drafters.assistant import ORDERING, AssistantConfig, AssistantModel, reordered
from mlx_mtp.drafters.layers import MOST_LAYERS, LayersModel, layer_inputs, with_shortlist
from mlx_mtp.drafters.parallel import ParallelModel
from mlx_mtp.drafters.sequential import MOST_MODULES, SequentialModel
from mlx_mtp.errors import OptionError
from mlx_mtp.generation import checks
from mlx_mtp.generation.cache import FULL, SLIDING
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.training.chats import Chats
from mlx_mtp.training.objective import (
    assistant_loss,
    joint_parallel_loss,
    joint_sequential_loss,
    parallel_loss,
    sequential_loss,
)

HEAD_DIM = 64
SIZES = (8, 1 << 16)
LIMITS = {"drafts": (1, 8), "modules": (1, MOST_MODULES), "width": SIZES, "inner": SIZES, "shortlist": (0, 1 << 20)}
NORM_START = 0.4
DEEP = 12  # layers from which on a target's middle ones are read
# Widths of the released assistants: 256 for targets up to 2,560 wide, 1,024 beyond; ours for very small ones.
ASSISTANT_WIDTHS = ((512, 192), (2560, 256), (1 << 30, 1024))


@dataclass(frozen=True, kw_only=True)
class DrafterShape:
    """What is chosen of a fresh drafter.

    drafts: K, for how many it is trained (parallel heads: how many there are beside the target's own). modules: of the
    sequential family; beyond them the last is used again. width: hidden size of an assistant. inner: hidden size of
    the feed-forward layers. None = by the target's size. shortlist: tokens that heads of the sequential and parallel
    families propose (drafters/layers.py), 0 = all; all too where the vocabulary has fewer than twice as many.
    aux_layers: of the target, whose inputs the sequential family reads beside its last state; None = by the target.
    """

    family: str = "assistant"
    drafts: int = 3
    modules: int = 1
    width: int | None = None
    inner: int | None = None
    shortlist: int = 8192
    aux_layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        checks.one_of("family", self.family, FAMILIES)
        for layer in self.aux_layers or ():
            checks.whole("aux_layers", layer, 0, MOST_LAYERS - 1)
        for name, (least, most) in LIMITS.items():
            if vars(self)[name] is not None:
                checks.whole(name, vars(self)[name], least, most)
        if idle := [name for name in SIZED - FAMILIES[self.family].sized if vars(self)[name] != vars(type(self))[name]]:
            raise OptionError(f"A drafter of the family {self.family} has no {sorted(idle)[0]}; leave the option out.")


SIZED = frozenset(field.name for field in fields(DrafterShape)) - {"family", "drafts"}


@dataclass(frozen=True)
class Family:
    """One family on the training side.

    sized: what of a shape it has, beside the drafts. describe: config.json of a fresh drafter, given the length of the
    sequences it will see. build: its parameters. objective: loss on a frozen target, given drafts, decay and shortlist.
    joint: loss together with the target, None where there is none.
    """

    sized: Set[str]
    describe: Callable[[DrafterShape, Target, int], dict[str, Any]]
    build: Callable[[Mapping[str, Any]], nn.Module]
    objective: Callable[..., Any]
    joint: Callable[[int], Callable[..., Any]] | None


def describe_assistant(shape: DrafterShape, target: Target, length: int) -> dict[str, Any]:
    """One layer, a full one where the target has any; dense tied head, published form.

    One where the released ones have four: beside the embedded target the cost of a draft step is its number of
    operations; on two cores a step of one full layer takes 0.8 ms, of a sliding and a full one 1.2 ms.
    """
    info = target.info
    if not info.readable:
        raise OptionError(
            "An assistant reads the K/V of a Gemma 4 target, and this target is of another kind; "
            "train the family parallel or sequential."
        )
    width = shape.width or next(size for most, size in ASSISTANT_WIDTHS if info.hidden_size <= most)
    kind = FULL if FULL in info.readable else SLIDING
    kept = info.readable.get(SLIDING, info.readable[kind]), info.readable.get(FULL, info.readable[kind])
    rope: Mapping[str, Any] = target.config.rope_parameters  # type: ignore[attr-defined]
    text = {
        "model_type": "gemma4_text", "vocab_size": info.vocab_size, "hidden_size": width,
        "intermediate_size": shape.inner or 4 * width, "num_hidden_layers": 1, "layer_types": [kind],
        "num_attention_heads": max(min(4, info.attention_heads), kept[0].heads, kept[1].heads),
        "num_key_value_heads": kept[0].heads, "num_global_key_value_heads": kept[1].heads,
        "head_dim": kept[0].head_dim, "global_head_dim": kept[1].head_dim, "sliding_window": info.window,
        "max_position_embeddings": info.max_context, "num_kv_shared_layers": 1, "use_double_wide_mlp": False,
        "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "attention_k_eq_v": False,
        "enable_moe_block": False, "final_logit_softcapping": None, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "tie_word_embeddings": True,
        "rope_parameters": rope, "use_bidirectional_attention": None,
    }  # fmt: skip
    return {
        "model_type": "gemma4_assistant", "architectures": ["Gemma4AssistantForCausalLM"], "text_config": text,
        "backbone_hidden_size": info.hidden_size, "use_ordered_embeddings": False, "num_centroids": 16,
        "centroid_intermediate_top_k": 4, "tie_word_embeddings": True, "reads_last": length, **_ids_of(target),
    }  # fmt: skip


def describe_sequential(shape: DrafterShape, target: Target, length: int) -> dict[str, Any]:
    """Of a target with many layers it reads two in the middle as well (EAGLE-3, arXiv 2503.01840, section 3.1)."""
    there = len(layer_inputs(target))
    aux = shape.aux_layers
    if aux is None:
        aux = [there // 3, 2 * there // 3] if there >= DEEP else []
    if aux and max(aux) >= there:
        raise OptionError(f"The target gives the inputs of {there} layers, counted from 0; there is no {max(aux)}.")
    read = {"aux_layers": list(aux)} if aux else {}
    return _layered(shape, target, model_type="sequential_modules", modules=shape.modules, **read)


def _ids_of(target: Target) -> dict[str, int]:
    """Special tokens, for programs that look for them in a drafter's config.json."""
    config = Checkpoint.open(target.path).config if target.path else {}
    found = {name: config.get(f"{name}_token_id") for name in ("pad", "bos", "eos")}
    first = {name: value[0] if isinstance(value, list) and value else value for name, value in found.items()}
    return {f"{name}_token_id": value for name, value in first.items() if isinstance(value, int)}


def _layered(shape: DrafterShape, target: Target, **own: Any) -> dict[str, Any]:
    """config.json of a drafter of llama layers of the target's width, with a quarter of its heads for K/V.

    The shortlist only where the vocabulary has twice as many tokens.
    """
    width, vocabulary = target.info.hidden_size, target.info.vocab_size
    heads = max(1, width // HEAD_DIM)
    block = {
        "model_type": "llama", "hidden_size": width, "intermediate_size": shape.inner or 2 * width,
        "num_attention_heads": heads, "num_key_value_heads": heads // 4 if heads % 4 == 0 else 1,
        "head_dim": min(HEAD_DIM, width), "num_hidden_layers": 1, "rms_norm_eps": 1e-6, "vocab_size": vocabulary,
        "rope_theta": 10000.0, "tie_word_embeddings": True, "max_position_embeddings": target.info.max_context,
    }  # fmt: skip
    listed = {"shortlist": shape.shortlist} if 0 < 2 * shape.shortlist <= vocabulary else {}
    return {**own, "hidden_size": width, "vocab_size": vocabulary, "block": block, **listed}


FAMILIES: dict[str, Family] = {
    "assistant": Family(
        {"width", "inner"}, describe_assistant, lambda config: AssistantModel(AssistantConfig.from_dict(config)),
        assistant_loss, None,
    ),
    "parallel": Family(
        {"inner", "shortlist"},  # on the finished target's states
        lambda shape, target, length: _layered(
            shape, target, model_type="parallel_heads", heads=shape.drafts, reads="hidden"
        ),
        ParallelModel.of, parallel_loss, lambda drafts: joint_parallel_loss(),
    ),
    "sequential": Family(
        {"modules", "inner", "shortlist", "aux_layers"}, describe_sequential, SequentialModel.of, sequential_loss,
        joint_sequential_loss,
    ),
}  # fmt: skip
QUANTISED = ("quantization", "quantization_config")
MODEL_TYPES = dict.fromkeys(ASSISTANTS, "assistant") | {
    "parallel_heads": "parallel", "sequential_modules": "sequential"
}  # fmt: skip


def family_of(config: Mapping[str, Any], name: str) -> str:
    """The family of a drafter's config.json; OptionError where none can be trained."""
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise OptionError(f"{name}: a drafter of model_type '{model_type}' cannot be trained here.")
    return MODEL_TYPES[model_type]


def fresh(shape: DrafterShape, target: Target, length: int) -> tuple[dict[str, Any], nn.Module]:
    """config.json and random parameters of a drafter for sequences of `length`."""
    family = FAMILIES[shape.family]
    config = family.describe(shape, target, length)
    return config, _trainable(family.build(config))


def started(folder: str | Path, shape: DrafterShape, target: Target) -> tuple[dict[str, Any], nn.Module]:
    """config.json and float32 parameters of a drafter to go on training, a quantised one restored.

    OptionError where it is of another family or has another number of heads, IncompatibleDrafter where it does not
    fit the target.
    """
    from mlx_lm.utils import dequantize_model

    checkpoint = Checkpoint.open(folder)
    if (found := family_of(checkpoint.config, str(folder))) != shape.family:
        raise OptionError(f"The drafter at '{folder}' is of the family {found} and not {shape.family}.")
    if (heads := checkpoint.config.get("heads", shape.drafts)) != shape.drafts:
        raise OptionError(f"The drafter at '{folder}' has {heads} heads; train it for {heads} drafts.")
    drafter: Any = load_drafter(checkpoint)
    drafter.attach(target)
    module: nn.Module = dequantize_model(drafter.model)
    module.set_dtype(mx.float32)
    config = {key: value for key, value in with_shortlist(checkpoint)[0].items() if key not in QUANTISED}
    return config, _trainable(module)


def _trainable(module: nn.Module) -> nn.Module:
    """The same module with what is not learned frozen: which block of the vocabulary a centroid stands for."""
    if isinstance(module, AssistantModel) and module.config.centroids:
        module.masked_embedding.freeze()
    return module


def prepared(module: nn.Module, chats: Chats) -> nn.Module:
    """A fresh drafter, its shortlist what is written most, and its last norms a share of the size of the states that
    the head is used to: a head that is sure of nothing yet learns faster."""
    if isinstance(module, LayersModel):
        for part in module.parts:
            part.norm.weight = NORM_START * mx.array(chats.size[: module.config.hidden_size])
        if module.config.shortlist:
            module.shortlist = mx.array(chats.frequent(module.config.shortlist, module.config.vocab_size))
    return module


def write_drafter(folder: Path, config: Mapping[str, Any], module: nn.Module) -> None:
    """A drafter's checkpoint in the layout that the engine and, for assistants, other programs read.

    What is in `folder` is replaced at once or not at all. CheckpointError where the disk does not take it, or a weight
    is not finite.
    """
    weights = named_parameters(module)
    if isinstance(module, AssistantModel) and module.config.centroids:
        weights = reordered(weights, mx.argsort(weights[ORDERING]))  # the published one
    with replacing_or_refused(folder, "free some disk space and go on") as fresh:
        write_checkpoint(fresh, config, weights)
