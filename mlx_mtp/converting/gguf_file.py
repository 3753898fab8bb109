"""A GGUF file: its keys and tensors, read defensively. Layout: github.com/ggml-org/ggml/blob/master/docs/gguf.md.

The header is read here because gguf's own reader trusts it: a damaged count makes it loop for hours, and it takes
fifteen seconds for the 262,144 words of Gemma. That library turns blocks that MLX does not have into numbers, and is
only needed for those.

Invariant: whatever is wrong with a file comes out as one CheckpointError that names it.
"""

from __future__ import annotations

import math
import mmap
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_mtp.checkpoints.checkpoint import GGUF_MAGIC
from mlx_mtp.errors import UnsupportedModel, explaining, lacking

Array = np.ndarray[Any, Any]
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8",
           12: "<f8"}  # fmt: skip
STRING, ARRAY = 8, 9
MOST_DIMENSIONS = 4
PIECE = 1 << 25  # numbers of a tensor that are unpacked at once
# Block types that need no library: name, numbers in a block, bytes of a block.
KINDS = {0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
         7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 30: ("BF16", 1, 2)}  # fmt: skip


@dataclass(frozen=True)
class BlockTensor:
    """A tensor in its blocks. shape: as in NumPy, rows first; the file has it the other way round."""

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray[Any, np.dtype[np.uint8]]  # [..., rows, bytes of a row], mapped

    def floats(self) -> Array:
        """Its numbers: float32 as gguf computes them, float16 where it holds those."""
        if self.kind in ("F32", "F16"):
            return self.data.view("<f4" if self.kind == "F32" else "<f2").reshape(self.shape)
        if self.kind == "BF16":
            return (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        library = _library()
        return library.dequantize(self.data, library.GGMLQuantizationType[self.kind]).reshape(self.shape)

    def pieces(self) -> Iterator[BlockTensor]:
        """Its rows, of all its matrices, some at a time: unpacked, a table of a large vocabulary takes many GB."""
        data, width = self.data.reshape(-1, self.data.shape[-1]), self.shape[-1]
        step = max(1, PIECE // width)
        for at in range(0, len(data), step):
            part = data[at : at + step]
            yield BlockTensor(self.kind, (len(part), width), part)

    def halves(self) -> tuple[BlockTensor, BlockTensor]:
        """The first and the second half of the rows of each of its matrices; nothing is read."""
        *outer, rows, width = self.shape
        data, half = self.data.reshape(*outer, rows, -1), rows // 2
        parts = data[..., :half, :], data[..., half:, :]
        first, second = (BlockTensor(self.kind, (*outer, part.shape[-2], width), part) for part in parts)
        return first, second


def _library() -> Any:
    try:
        import gguf
    except ImportError:
        what = "This GGUF has blocks of a type that MLX does not have: reading them"
        raise UnsupportedModel(lacking(what, "gguf", "gguf")) from None
    return gguf


class GGUFFile:
    """An opened file. keys: values by name, arrays as NumPy arrays or lists of strings.

    Raises CheckpointError for a file that is no whole GGUF, UnsupportedModel for block types nobody reads.
    """

    def __init__(self, path: Path) -> None:
        # Damage can be anything: no byte at all, text that is none, sizes beyond all memory, ...
        with (
            explaining(f"{path} cannot be read", "check the file and its rights", OSError),
            explaining(f"{path} is no whole GGUF file", "download it again", ValueError, OverflowError, MemoryError),
            path.open("rb") as stream,
        ):
            self._data, self._at = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), 0
            self.path = path
            self.keys, self.tensors = self._contents()

    def _contents(self) -> tuple[dict[str, Any], dict[str, BlockTensor]]:
        """Goes through the header once; ValueError where it leads outside."""
        if self._numbers("u1", 4).tobytes() != GGUF_MAGIC:
            raise ValueError("it does not begin with 'GGUF'")
        if (version := self._whole("<u4")) not in (2, 3):
            other = "big-endian numbers" if version & 0xFFFF == 0 else f"version {version}"
            raise UnsupportedModel(f"{self.path} is a GGUF of {other}, and only versions 2 and 3 in little-endian are "
                                   "read here; convert it anew with today's llama.cpp.")  # fmt: skip
        tensors, keys = self._whole(), self._whole()
        found = dict((self._text(), self._value(self._whole("<u4"))) for _ in self._counted(keys, 12))
        infos = [self._info() for _ in self._counted(tensors, 24)]
        alignment = found.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise ValueError(f"an alignment of {reprlib.repr(alignment)}")
        start = -(-self._at // alignment) * alignment
        stored = {name: self._tensor(name, shape, kind, start + offset) for name, shape, kind, offset in infos}
        if len(found) != keys or len(stored) != tensors:
            raise ValueError("a name stands in it twice")
        return found, stored

    def _counted(self, count: int, least: int) -> range:
        """`count` times, where each takes at least so many bytes."""
        if count > (len(self._data) - self._at) // least:
            raise ValueError(f"{count} entries for {len(self._data)} bytes")
        return range(count)

    def _numbers(self, dtype: str, count: int) -> Array:
        found = np.frombuffer(self._data, dtype, count, self._at)  # ValueError where the file ends before them
        self._at += found.nbytes
        return found

    def _whole(self, dtype: str = "<u8") -> int:
        return int(self._numbers(dtype, 1)[0])

    def _text(self) -> str:
        return self._numbers("u1", self._whole()).tobytes().decode()

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind in SCALARS:
            return self._numbers(SCALARS[kind], 1)[0].item()
        inner, count = (self._whole("<u4"), self._whole()) if kind == ARRAY else (kind, 0)
        if inner == STRING:
            return [self._text() for _ in self._counted(count, 8)]
        if inner not in SCALARS:
            raise ValueError(f"a value of type {inner}")
        return self._numbers(SCALARS[inner], count)

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self._text(), self._whole("<u4")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"'{name}' has {dimensions} dimensions")
        sizes = [self._whole() for _ in range(dimensions)]
        return name, tuple(reversed(sizes)), self._whole("<u4"), self._whole()

    def _tensor(self, name: str, shape: tuple[int, ...], number: int, start: int) -> BlockTensor:
        kind, block, size = KINDS.get(number) or self._other_kind(name, number)
        *rows, width = shape
        if 0 in shape or width % block:
            raise ValueError(f"'{name}' of {kind} has rows of {width} numbers")
        length = width // block * size
        if start + math.prod(rows) * length > len(self._data):
            raise ValueError(f"it ends before '{name}' does")
        data = np.frombuffer(self._data, np.uint8, math.prod(rows) * length, start)
        return BlockTensor(kind, shape, data.reshape(-1, length))

    def _other_kind(self, name: str, number: int) -> tuple[str, int, int]:
        """Name, numbers and bytes of blocks that the library reads."""
        library, kinds = _library(), (ValueError, KeyError, NotImplementedError)
        what = f"{self.path}: '{name}' is stored in blocks of type {number}, which the package gguf cannot read"
        advice = "use a file in Q4_K_M, Q8_0 or another common type"
        with explaining(what, advice, *kinds, raised=UnsupportedModel):
            kind = library.GGMLQuantizationType(number)
            block, size = library.GGML_QUANT_SIZES[kind]
            library.dequantize(np.zeros((1, size), np.uint8), kind)
        return kind.name, block, size
