"""PyTorch's `.pth` files without PyTorch: a zip of one pickle, which names the tensors, and one entry per storage.

What it does: reads the pickle with an unpickler that knows six harmless names and refuses every other, so that a
file cannot run code; gives tensors that read themselves, one at a time, from their place in the file. What it does
not do: files older than PyTorch 1.6 (no zip), or anything but a flat dictionary of dense tensors.

Invariant: no tensor is handed out whose bytes are not all inside its own storage entry.

Format: torch.save's zip archive, `<name>/data.pkl` and `<name>/data/<key>`, entries stored and not compressed.
"""

from __future__ import annotations

import math
import pickle
import reprlib
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import mlx.core as mx
import numpy as np

from mlx_mtp.errors import CheckpointError

# A state dict's pickle takes some 200 bytes a tensor; no model has so many.
MAX_PICKLE_BYTES = 64_000_000
LOCAL_HEADER_BYTES = 30
# NumPy has no bfloat16: its bits are read as whole numbers.
STORAGES: dict[str, tuple[np.dtype[Any], mx.Dtype]] = {
    "FloatStorage": (np.dtype("<f4"), mx.float32),
    "HalfStorage": (np.dtype("<f2"), mx.float16),
    "BFloat16Storage": (np.dtype("<u2"), mx.bfloat16),
    "DoubleStorage": (np.dtype("<f8"), mx.float32),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `shape`, and where its bytes are. float64 is read as float32."""

    file: Path
    start: int  # bytes from the beginning of the file
    kind: str  # a key of STORAGES
    shape: tuple[int, ...]

    def read(self) -> mx.array:
        """The tensor, alone in memory; CheckpointError where the file has become unreadable."""
        stored, dtype = STORAGES[self.kind]
        try:
            numbers = np.fromfile(self.file, stored, math.prod(self.shape), offset=self.start)
        except OSError as error:
            raise _unreadable(self.file, error.strerror or "an error") from error
        if numbers.size != math.prod(self.shape):
            raise _unreadable(self.file, "fewer bytes than before")
        array = mx.array(numbers.astype(np.float32) if stored.itemsize == 8 else numbers).reshape(self.shape)
        return array.view(dtype) if dtype == mx.bfloat16 else array


@dataclass(frozen=True)
class _Kind:
    """What the pickle calls torch.FloatStorage and the like. No class, so that the pickle cannot call it."""

    name: str


@dataclass(frozen=True)
class _Storage:
    kind: str
    start: int
    items: int


def read_pth(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict under their names; nothing but the pickle is read yet.

    Raises CheckpointError where the file is no such zip, cut short, or holds anything but dense tensors.
    """
    try:
        with file.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            found = _Unpickler(file, stream, archive).load()
    except (zipfile.BadZipFile, struct.error, EOFError) as error:
        raise _unreadable(file, f"none ({error})") from error
    except OSError as error:
        raise _unreadable(file, error.strerror or "an error") from error
    except CheckpointError:
        raise
    # A pickle can be wrong in every way there is, and raises whatever the first wrong opcode leads to.
    except Exception as error:
        raise _unreadable(file, f"a pickle that is not one of tensors ({type(error).__name__}: {error})") from error
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        raise _unreadable(file, f"a {type(found).__name__}")
    if odd := [name for name, value in found.items() if not isinstance(value, StoredTensor)]:
        raise _unreadable(file, f"something that is no tensor as {reprlib.repr(odd[0])}")
    return dict(found)


def _unreadable(file: Path, found: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: expected a dictionary of tensors as torch.save writes it since PyTorch 1.6, found {found}; "
        "download it again."
    )


class _Unpickler(pickle.Unpickler):
    """Reads `data.pkl`. Every name but those below is refused before anything of that name is imported."""

    def __init__(self, file: Path, stream: IO[bytes], archive: zipfile.ZipFile) -> None:
        entries = {entry.filename: entry for entry in archive.infolist()}
        names = [name for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise _unreadable(file, "a zip without one data.pkl")
        self._file, self._stream, self._entries = file, stream, entries
        self._folder = names[0].removesuffix("data.pkl")
        byteorder = entries.get(self._folder + "byteorder")
        if byteorder and byteorder.file_size < 16 and archive.read(byteorder) == b"big":
            raise _unreadable(file, "numbers in big-endian order")
        if entries[names[0]].file_size > MAX_PICKLE_BYTES:
            raise _unreadable(file, f"a pickle of {entries[names[0]].file_size} bytes")
        super().__init__(archive.open(names[0]))

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a name of PyTorch's."""
        if module == "torch" and name in STORAGES:
            return _Kind(name)
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in known:
            raise _unreadable(self._file, f"a pickle that asks for {reprlib.repr(f'{module}.{name}')}, which no "
                                          "tensor needs and which was not run")  # fmt: skip
        return known[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage: ("storage", kind, key, device, items)."""
        word, kind, key, _, items = pid
        if word != "storage" or not isinstance(kind, _Kind) or not isinstance(key, str) or type(items) is not int:
            raise ValueError(f"storage {reprlib.repr(pid)}")
        entry = self._entries.get(f"{self._folder}data/{key}")
        if entry is None or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"storage {reprlib.repr(key)} is missing or compressed")
        self._stream.seek(entry.header_offset)
        header = self._stream.read(LOCAL_HEADER_BYTES)
        name, extra = struct.unpack_from("<HH", header, 26)
        start = entry.header_offset + LOCAL_HEADER_BYTES + name + extra
        size = STORAGES[kind.name][0].itemsize
        if not 0 <= items * size <= entry.file_size or start + entry.file_size > self._file.stat().st_size:
            raise ValueError(f"storage {reprlib.repr(key)} has {entry.file_size} bytes for {items} numbers")
        return _Storage(kind.name, start, items)

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> StoredTensor:
        if not isinstance(storage, _Storage) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
            raise ValueError("a tensor without storage")
        if not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)) or len(shape) != len(stride):
            raise ValueError(f"a tensor of shape {reprlib.repr(shape)}")
        dense = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if any(size > 1 and have != want for size, have, want in zip(shape, stride, dense, strict=True)):
            raise ValueError(f"a tensor of shape {shape} that is not stored row after row")
        if offset + math.prod(shape) > storage.items:
            raise ValueError(f"a tensor of shape {reprlib.repr(shape)} in {storage.items} numbers")
        size = STORAGES[storage.kind][0].itemsize
        return StoredTensor(self._file, storage.start + offset * size, storage.kind, shape)
