"""PyTorch's files read without PyTorch: every number, and nothing that is no number."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from layouts import meta_arrays, meta_folder, state_dict_opcodes, tensor_opcodes, write_pth, write_zip

import mlx_mtp
from mlx_mtp.converting import convert
from mlx_mtp.converting.pth import read_pth


@pytest.mark.parametrize(("kind", "dtype"), [("BFloat16Storage", mx.bfloat16), ("HalfStorage", mx.float16),
                                             ("DoubleStorage", mx.float32)])  # fmt: skip
def test_numbers_keep_their_type(kind: str, dtype: mx.Dtype, tmp_path: Path) -> None:
    arrays = meta_arrays()
    write_pth(tmp_path / "some.pth", arrays, kind)
    for name, stored in read_pth(tmp_path / "some.pth").items():
        expected = arrays[name]
        if kind == "BFloat16Storage":  # cut off, not rounded, in what the test writes
            expected = (expected.view(np.uint32) & 0xFFFF0000).view(np.float32)
        elif kind == "HalfStorage":
            expected = expected.astype(np.float16).astype(np.float32)
        found = stored.read()
        assert found.dtype == dtype and found.shape == stored.shape
        assert np.array_equal(np.array(found.astype(mx.float32)), expected)


@pytest.mark.peers
def test_reads_what_torch_writes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    arrays = meta_arrays()
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    # One that does not begin where its storage does.
    tensors["norm.weight"] = torch.from_numpy(np.concatenate([arrays["norm.weight"]] * 2))[32:]
    folder = meta_folder(tmp_path, arrays)
    torch.save({name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}, folder / "consolidated.pth")
    found = read_pth(folder / "consolidated.pth")
    assert found.keys() == arrays.keys()
    for name, tensor in tensors.items():
        rounded = tensor.to(torch.bfloat16).to(torch.float32).numpy()
        assert np.array_equal(np.array(found[name].read().astype(mx.float32)), rounded)
    torch.save(tensors, folder / "consolidated.pth")
    for name, stored in read_pth(folder / "consolidated.pth").items():
        assert np.array_equal(np.array(stored.read()), tensors[name].numpy())


def test_tensors_may_share_a_storage(tmp_path: Path) -> None:
    numbers = np.arange(12, dtype=np.float32)
    values = {
        "all": tensor_opcodes("0", "FloatStorage", (3, 4), 12),
        "last": tensor_opcodes("0", "FloatStorage", (2, 2), 12, 8),
        "none": tensor_opcodes("0", "FloatStorage", (0, 4), 12),
    }
    write_zip(tmp_path / "some.pth", state_dict_opcodes(values), {"0": numbers.tobytes()})
    found = {name: np.array(stored.read()) for name, stored in read_pth(tmp_path / "some.pth").items()}
    assert np.array_equal(found["all"], numbers.reshape(3, 4))
    assert np.array_equal(found["last"], numbers[8:].reshape(2, 2)) and found["none"].shape == (0, 4)


class Attack:
    """Unpickled by pickle itself, this writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


EIGHT = {"0": bytes(8 * 4)}


def one(*tensor: object) -> bytes:
    return state_dict_opcodes({"norm.weight": tensor_opcodes("0", *tensor)})  # type: ignore[arg-type]


WHOLE = one("FloatStorage", (8,), 8)
# What the file holds, or the arguments of `write_zip`.
BAD: dict[str, bytes | tuple[object, ...]] = {
    "no zip": b"not a zip" * 50, "empty": b"",
    "compressed": (WHOLE, EIGHT, zipfile.ZIP_DEFLATED),
    "storage missing": (WHOLE, {}), "storage too short": (WHOLE, {"0": bytes(9)}),
    "tensor too long": (one("FloatStorage", (3, 3), 8), EIGHT),
    "tensor before its storage": (one("FloatStorage", (2,), 8, -4), EIGHT),
    "odd type": (one("ComplexFloatStorage", (2,), 8), EIGHT),
    "no dictionary": (pickle.dumps([1, 2], 2), {}), "no tensors": (pickle.dumps({"model": {}}, 2), {}),
    "half a pickle": (WHOLE[:60], EIGHT),
    # The stand-in for torch.FloatStorage must not be callable.
    "calls a type": (b"\x80\x02ctorch\nFloatStorage\n)R.", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", [*BAD, "cut short", "runs code"])
def test_a_bad_pth_is_one_sentence_and_runs_nothing(case: str, tmp_path: Path) -> None:
    source = meta_folder(tmp_path / "in", meta_arrays())
    file = source / "consolidated.pth"
    attack = pickle.dumps({"norm.weight": Attack(file.with_name("attacked"))}, 2)
    content = {**BAD, "cut short": file.read_bytes()[:200], "runs code": (attack, {})}[case]
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        write_zip(file, *content)
    with pytest.raises(mlx_mtp.CheckpointError, match="consolidated.pth") as caught:
        convert(source, tmp_path / "out")
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["consolidated.pth", "in", "params.json"]


def test_numbers_in_the_other_byte_order_are_refused(tmp_path: Path) -> None:
    write_zip(tmp_path / "some.pth", WHOLE, EIGHT)
    assert read_pth(tmp_path / "some.pth")["norm.weight"].shape == (8,)
    write_zip(tmp_path / "some.pth", WHOLE, EIGHT, byteorder=b"big")
    with pytest.raises(mlx_mtp.CheckpointError, match="big-endian"):
        read_pth(tmp_path / "some.pth")
