"""Meta's multi-token checkpoints (facebook/multi-token-prediction, arXiv 2404.19737): a `.pth` file and params.json.

The target becomes a Llama checkpoint in Hugging Face's layout, the further heads a drafter of ours ("parallel_heads").

Layout of the release: `layers.<i>` are the trunk and, last, the head of the next token, which is why other programs
read them as an ordinary Llama; `extra_heads.<i>` are one layer each for the tokens further on. n_layers of params.json
counts them all. Every head reads what the trunk leaves before the last of `layers`, and all share `norm` and
`output`. So the drafter reads "trunk", and the norm of each of its heads is a copy.

Rotary embedding: Meta turns neighbouring numbers of a head together, Hugging Face's layout the number i of the first
half with the number i of the second; the rows of wq and wk are put in that order, so that the same pairs meet.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from mlx_mtp.checkpoints.checkpoint import check_shapes, number, read_json, visible, write_tensors
from mlx_mtp.converting.pth import STORAGES, StoredTensor, read_pth
from mlx_mtp.converting.tokenizers import write_llama
from mlx_mtp.drafters.parallel import MOST_HEADS, ParallelModel
from mlx_mtp.errors import CheckpointError, UnsupportedModel
from mlx_mtp.targets.generic import MAX_COUNT, MAX_SIZE

log = logging.getLogger(__name__)

PARAMS = "params.json"
TRAINED_CONTEXT = 4096  # of the release and of Llama 2; params.json does not say
LAYER = re.compile(r"(layers|extra_heads)\.(\d+)\.(.+)$")
PLACES = {"layers": "model.layers.{}.", "extra_heads": "heads.{}.layer."}
NAMES = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "feed_forward.w1.weight": "mlp.gate_proj.weight",
    "feed_forward.w2.weight": "mlp.down_proj.weight",
    "feed_forward.w3.weight": "mlp.up_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def files_of(folder: Path) -> list[Path]:
    """The weight files; empty where a folder is not of this layout."""
    return visible(folder.glob("consolidated*.pth")) if (folder / PARAMS).is_file() else []


def bring_in(folder: Path, out: Path) -> list[str]:
    """Writes out/target, and out/parallel where there are extra heads; the names of what was written."""
    file, *more = files_of(folder)
    if more:
        raise UnsupportedModel(f"{folder} holds weights cut into {1 + len(more)} files; join them into one first.")
    target = {_name(name): tensor for name, tensor in read_pth(file).items() if not name.endswith("rope.freqs")}
    drafter = {name: target.pop(name) for name in list(target) if name.startswith("heads.")}
    layers = len({name.split(".")[2] for name in target if name.startswith("model.layers.")})
    extra = len({name.split(".")[1] for name in drafter})
    config = _config(folder / PARAMS, target, layers, extra)
    _check(llama.Model(llama.ModelArgs.from_dict(config)), target, folder)
    # The release has the tokenizer one folder up.
    tokenizers = [place / "tokenizer.model" for place in (folder, folder.resolve().parent)]
    if tokenizer := next((file for file in tokenizers if file.is_file()), None):
        config |= write_llama(tokenizer, out / "target", config["vocab_size"], config["max_position_embeddings"])
    else:
        log.warning("No tokenizer.model in '%s' or above it: the target will take token ids only.", folder)
    write_tensors(out / "target", config, _arrays(target, config))
    if not extra:
        return ["target"]
    drafter |= {f"heads.{i}.norm.weight": target["model.norm.weight"] for i in range(extra)}
    drafter_config = {
        "model_type": "parallel_heads", "heads": extra, "reads": "trunk", "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"], "block": {**config, "num_hidden_layers": 1},
    }  # fmt: skip
    _check(ParallelModel.of(drafter_config), drafter, folder)
    write_tensors(out / "parallel", drafter_config, _arrays(drafter, config))
    return ["target", "parallel"]


def _arrays(stored: Mapping[str, StoredTensor], config: Mapping[str, Any]) -> Iterator[tuple[str, mx.array]]:
    """Tensors, read one by one, in Hugging Face's order of rows. config: of the target, for its heads."""
    counts = {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}
    for name, tensor in stored.items():
        count = next((count for part, count in counts.items() if part in name), None)
        yield name, halves(tensor.read(), config[count]) if count else tensor.read()


def _name(name: str) -> str:
    """A tensor's new name; what is not known keeps its own, for the check to name it."""
    if found := LAYER.match(name):
        return PLACES[found[1]].format(found[2]) + NAMES.get(found[3], found[3])
    return NAMES.get(name, name)


def _config(file: Path, target: Mapping[str, StoredTensor], layers: int, extra: int) -> dict[str, Any]:
    """The target's config.json: params.json's numbers, and those that only the tensors tell."""
    params, where = read_json(file), str(file)
    if params.get("use_scaled_rope"):
        raise UnsupportedModel(f"{where} asks for Llama 3's scaled rotary embedding, which is not implemented here; "
                               "use the checkpoint in Hugging Face's layout.")  # fmt: skip
    for name in ("lm_head.weight", "model.layers.0.mlp.gate_proj.weight"):
        if name not in target:
            raise CheckpointError(f"The .pth beside {where} lacks {name}; use one of facebook/multi-token-prediction.")
    width = number(params, "dim", int, 1, MAX_SIZE, where=where)
    heads = number(params, "n_heads", int, 1, MAX_COUNT, where=where)
    shared = number(params, "n_kv_heads", int, 1, heads, heads, where=where)
    future = number(params, "n_future_tokens", int, 1, MOST_HEADS + 1, extra + 1, where=where)
    total = number(params, "n_layers", int, 1, MAX_COUNT, layers + extra, where=where)
    if (future, total) != (extra + 1, layers + extra):
        raise CheckpointError(f"{where} counts {total} layers of which {future - 1} are extra heads, but the .pth has "
                              f"{layers} layers and {extra} extra heads; both must belong together.")  # fmt: skip
    if width % (2 * heads) or heads % shared:
        raise CheckpointError(f"{where}: {heads} heads do not divide a width of {width} into even parts, or {shared} "
                              "heads for keys do not divide them; use the params.json of this checkpoint.")  # fmt: skip
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": target["model.layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": shared,
        "head_dim": width // heads,
        "hidden_act": "silu",
        "rms_norm_eps": number(params, "norm_eps", float, 0.0, 1.0, 1e-5, where=where),
        "rope_theta": number(params, "rope_theta", float, 1.0, 1e12, 10_000.0, where=where),
        "max_position_embeddings": number(params, "max_seq_len", int, 1, 2**31 - 1, TRAINED_CONTEXT, where=where),
        "vocab_size": target["lm_head.weight"].shape[0],  # params.json says -1 where the tokenizer decides
        "tie_word_embeddings": False,
        "torch_dtype": str(STORAGES[target["lm_head.weight"].kind][1]).removeprefix("mlx.core."),
    }


def _check(module: nn.Module, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    check_shapes(module, {name: tensor.shape for name, tensor in stored.items()}, f"{folder}: the .pth")


def halves(rows: mx.array, heads: int) -> mx.array:
    """Rows [heads * d, D] whose neighbours 2i, 2i + 1 turn together -> the same with i and i + d/2 turning together."""
    return rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
