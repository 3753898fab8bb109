"""A GGUF file as a checkpoint folder in Hugging Face's layout, which mlx-lm loads too (gguf_layouts.py).

Weights: blocks of Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 become MLX's affine groups of 32 without any rounding, since all are
scale * q + offset; so one folder may hold 4, 5 and 8 bits and plain layers. Other blocks are turned into numbers by the
library gguf and stored in half precision: float16 beside such groups, whose scales are float16 (MLX computes in float32
where the two meet), else bfloat16. Plain numbers keep their value: a type that would round them is not used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import _get_classes

from mlx_mtp.checkpoints.checkpoint import check_shapes, write_json, write_tensors
from mlx_mtp.converting.gguf_file import Array, BlockTensor, GGUFFile
from mlx_mtp.converting.gguf_layouts import layout_of
from mlx_mtp.converting.meta import halves
from mlx_mtp.converting.tokenizers import StatedTokenizer

HUB = "https://huggingface.co/"
GROUP = 32
# Block types that MLX has: bits, and the offset in scales; None where a block has one of its own.
BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 5, "Q5_1": 5, "Q8_0": 8}
OFFSETS = {"Q4_0": -8, "Q4_1": None, "Q5_0": -16, "Q5_1": None, "Q8_0": -128}
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
    made_from = str(file.keys.get("general.base_model.0.repo_url", ""))
    base = {"base_model": made_from.removeprefix(HUB)} if made_from.startswith(HUB) else {}  # its drafter fits as well
    write_tensors(folder, model.config | ids | base, model.arrays())


class _Model:
    """The tensors of a file under their new names, and the config.json that goes with them."""

    def __init__(self, file: GGUFFile) -> None:
        self._layout = layout_of(file)
        self._tensors, config = self._layout.tensors(), self._layout.config()
        kinds = {tensor.kind for tensor in self._tensors.values()}
        self._half = mx.float16 if self._layout.float16 and kinds & {*BITS, "F16"} else mx.bfloat16
        self.config = config | {"torch_dtype": str(self._half).removeprefix("mlx.core.")}
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
            turned = heads.get(stem.rpartition(".")[2]) if self._layout.turned else None
            if _bits(tensor):
                pieces = [_groups(piece) for piece in tensor.pieces()]
                found = {part: mx.concatenate([piece[part] for piece in pieces]) for part in pieces[0]}
            else:
                found = {kind: self._plain(name, tensor)}
            for part, array in found.items():
                array = array.reshape(*tensor.shape[:-1], -1)
                yield f"{stem}.{part}", halves(array, turned) if turned else array

    def _plain(self, name: str, tensor: BlockTensor) -> mx.array:
        """Its numbers in half precision, or in their own type where that would round what the file holds unrounded."""
        more = self._layout.norm if name.endswith("norm.weight") else 0.0
        numbers, short = tensor.kind in ("F32", "F16", "BF16"), []
        for array in _unpacked(tensor, more):
            short.append(array.astype(self._half))
            mx.eval(short)  # lets go of the numbers themselves, which take more room
            if numbers and not mx.array_equal(short[-1].astype(mx.float32), array).item():
                return mx.concatenate([*_unpacked(tensor, more)])
        return mx.concatenate(short)


def _unpacked(tensor: BlockTensor, more: float) -> Iterator[mx.array]:
    """Numbers of rows, piece by piece [rows, width], less what a norm has `more`."""
    for piece in tensor.pieces():
        array = mx.array(piece.floats())
        yield array.astype(mx.float32) - more if more else array


def _bits(tensor: BlockTensor) -> int | None:
    """Bits of the groups that hold the same numbers as its blocks; None where there are none."""
    return BITS.get(tensor.kind) if len(tensor.shape) > 1 else None


def _groups(tensor: BlockTensor) -> dict[str, mx.array]:
    """MLX's groups of 32 (packed uint32, scales and offsets float16); each number is the block's own.

    A block: its scale, for some an offset (float16), then 32 numbers: bytes, or halves of bytes, the lower halves
    first, in front of them their fifth bits. MLX packs upwards from the lowest bits.
    """
    rows, bits, factor = len(tensor.data), BITS[tensor.kind], OFFSETS[tensor.kind]
    head = 2 if factor else 4
    block = tensor.data.reshape(rows, -1, head + 4 * bits)
    halves_of_head = np.ascontiguousarray(block[..., :head]).view("<f2")
    scale, numbers = halves_of_head[..., 0], block[..., head:]
    packed: Array
    if bits == 8:
        packed = numbers ^ 0x80  # int8 q as q + 128
    else:
        fifth, low = numbers[..., :-16], numbers[..., -16:]
        numbers = np.concatenate([low & 15, low >> 4], axis=-1)
        if bits == 4:
            packed = numbers[..., 0::2] | numbers[..., 1::2] << 4
        else:
            numbers |= np.unpackbits(fifth, axis=-1, bitorder="little") << 4
            single = np.unpackbits(numbers[..., None], axis=-1, count=bits, bitorder="little")
            packed = np.packbits(single.reshape(*numbers.shape[:2], -1), axis=-1, bitorder="little")
    offset = halves_of_head[..., 1] if factor is None else scale * np.float16(factor)
    return {"weight": mx.array(np.ascontiguousarray(packed.reshape(rows, -1)).view("<u4")), "scales": mx.array(scale),
            "biases": mx.array(offset)}  # fmt: skip
