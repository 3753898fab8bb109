"""PyTorch's `.pth` files without PyTorch: a zip of one pickle, which names the tensors, and one entry per storage.

The pickle is read by an unpickler that knows a few harmless names and refuses every other, so that a file cannot run
code; tensors read themselves, one at a time. Files older than PyTorch 1.6 (no zip) and anything but a flat dictionary
of dense tensors are refused.

Format: torch.save's zip archive, `<name>/data.pkl` and `<name>/data/<key>`, entries stored and not compressed.
"""

from __future__ import annotations

import io
import math
import pickle
import reprlib
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import explaining

# NumPy has no bfloat16: its bits are read as whole numbers.
STORAGES: dict[str, tuple[np.dtype[Any], mx.Dtype]] = {
    "FloatStorage": (np.dtype("<f4"), mx.float32),
    "HalfStorage": (np.dtype("<f2"), mx.float16),
    "BFloat16Storage": (np.dtype("<u2"), mx.bfloat16),
    "DoubleStorage": (np.dtype("<f8"), mx.float32),
}

MAX_PICKLE_BYTES = 64 * 2**20  # names and shapes only; the numbers are elsewhere


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `shape`, and which numbers of which entry it is. float64 is read as float32."""

    file: Path
    entry: str
    offset: int  # numbers of the entry before the first
    kind: str  # a key of STORAGES
    shape: tuple[int, ...]

    def read(self) -> mx.array:
        """The tensor, alone in memory; CheckpointError where the file has become unreadable."""
        stored, dtype = STORAGES[self.kind]
        size = math.prod(self.shape)
        kinds = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)
        with (
            explaining(f"{self.file}: '{self.entry}' cannot be read", "download it again", *kinds),
            zipfile.ZipFile(self.file) as archive,
            archive.open(self.entry) as stream,
        ):
            stream.seek(self.offset * stored.itemsize)
            numbers = np.frombuffer(stream.read(size * stored.itemsize), stored, size)
        array = mx.array(numbers.astype(np.float32) if stored.itemsize == 8 else numbers).reshape(self.shape)
        return array.view(dtype) if dtype == mx.bfloat16 else array


def read_pth(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict under their names; nothing but the pickle is read yet."""
    what = f"{file}: expected a dictionary of tensors as torch.save writes it since PyTorch 1.6, found something else"
    # A pickle can be wrong in every way there is, and raises whatever the first wrong opcode leads to.
    with explaining(what, "download it again", Exception), zipfile.ZipFile(file) as archive:
        found = dict(_Unpickler(file, archive).load())
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, StoredTensor):
                raise ValueError(f"a {type(value).__name__} as {reprlib.repr(name)}")
    return found


class _Unpickler(pickle.Unpickler):
    """Reads `data.pkl`. Every name but those below is refused before anything of that name is imported."""

    def __init__(self, file: Path, archive: zipfile.ZipFile) -> None:
        entries = {entry.filename: entry for entry in archive.infolist()}
        names = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise ValueError("a zip without one data.pkl")
        self._file, self._entries = file, entries
        self._folder = names[0].removesuffix("data.pkl")
        byteorder = entries.get(self._folder + "byteorder")
        if byteorder and byteorder.file_size < 16 and archive.read(byteorder) == b"big":
            raise ValueError("numbers in big-endian order")
        if entries[names[0]].file_size > MAX_PICKLE_BYTES:  # it is read whole, and may be compressed
            raise ValueError(f"a pickle of {entries[names[0]].file_size} bytes")
        super().__init__(io.BytesIO(archive.read(names[0])))

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name of PyTorch's; for the type of a storage its name, which a pickle cannot call."""
        if module == "torch" and name in STORAGES:
            return name
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            asked = reprlib.repr(f"{module}.{name}")
            raise ValueError(f"a pickle that asks for {asked}, which no tensor needs and which was not run")
        return known[module, name]

    def persistent_load(self, pid: Any) -> StoredTensor:
        """All numbers of a storage: ("storage", kind, key, device, items)."""
        word, kind, key, _, items = pid
        if word != "storage" or kind not in STORAGES or not isinstance(key, str) or type(items) is not int:
            raise ValueError(f"storage {reprlib.repr(pid)}")
        entry = self._entries.get(f"{self._folder}data/{key}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {reprlib.repr(key)} is missing or compressed")
        if not 0 <= items * STORAGES[kind][0].itemsize <= entry.file_size:
            raise ValueError(f"storage {reprlib.repr(key)} has {entry.file_size} bytes for {items} numbers")
        return StoredTensor(self._file, entry.filename, 0, kind, (items,))

    def _tensor(self, storage: StoredTensor, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        # Whatever else a pickle hands in raises here too, and `read_pth` knows every error.
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)):
            raise ValueError(f"a tensor of shape {reprlib.repr(shape)}")
        dense = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if any(size > 1 and have != want for size, have, want in zip(shape, stride, dense, strict=True)):
            raise ValueError(f"a tensor of shape {shape} that is not stored row after row")
        if offset + math.prod(shape) > math.prod(storage.shape):
            raise ValueError(f"a tensor of shape {reprlib.repr(shape)} in {math.prod(storage.shape)} numbers")
        return replace(storage, offset=offset, shape=shape)
