"""Damaged checkpoints of every family: each loads, or is refused in one sentence; and the next good one loads.

Damage is drawn with fixed seeds. While a damaged folder is read the process may not take more than a gigabyte.
"""

import contextlib
import json
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from families import chat_folder
from test_generic import BASE, CONFIGS, written
from test_malformed import Place, places, wrong_at

import mlx_mtp
from mlx_mtp.checkpoints import checkpoint
from mlx_mtp.checkpoints.checkpoint import Checkpoint, write_tensors
from mlx_mtp.loading import EMBEDDED

DRAFTERS = ("assistant", "centroid", "parallel", "sequential")
ROOM_BYTES = 2**30
PATIENCE = 300


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of Gemma 4's layout, whole and in shards, one of mlx-lm's, and drafters of every family."""
    place = chat_folder(tmp_path_factory.mktemp("models"))
    shutil.copytree(GOLDEN / "ple" / "assistant_centroid", place / "centroid", copy_function=shutil.copyfile)
    whole = Checkpoint.open(place / "target")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "SHARD_BYTES", sum(size for *_, size in whole.tensors()) // 2)
        write_tensors(place / "sharded", whole.config, whole.weights().items())
    written(place / "generic", BASE | CONFIGS["llama-tied"])
    shutil.copytree(place / "target", place / "pieces")
    for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
        shutil.copyfile(EMBEDDED / "target" / name, place / "pieces" / name)
    return place


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more than ROOM_BYTES of new memory, and no more than PATIENCE seconds."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + ROOM_BYTES, limits[1]))
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


Damage = dict[str, bytes]  # a file's name and what it holds instead


@pytest.fixture
def tried(models: Path, tmp_path: Path) -> Callable[[str, Damage], str]:
    """Loads a model with other files in it: the sentence that refuses it, "" where the damage is harmless."""

    def load(role: str, damage: Damage) -> str:
        folder = tmp_path / role
        if not folder.exists():
            shutil.copytree(models / role, folder)
        for name, content in damage.items():
            (folder / name).write_bytes(content)
        try:
            with bounded():
                loaded(models, role, folder)
        except mlx_mtp.MLXMTPError as error:
            sentence = str(error)
            assert sentence.endswith(".") and 30 < len(sentence) < 900 and "Traceback" not in sentence, sentence
            return sentence
        finally:
            for name in damage:
                if (models / role / name).exists():
                    shutil.copyfile(models / role / name, folder / name)
                else:
                    (folder / name).unlink()
        return ""

    return load


def loaded(models: Path, role: str, folder: Path) -> mlx_mtp.Engine:
    if role in DRAFTERS:
        return mlx_mtp.load(models / "target", drafter=folder, depth=2)
    return mlx_mtp.load(folder, drafter=None)


def flips(whole: bytes, count: int, end: int, seed: int) -> list[bytes]:
    """Copies with one byte changed, in front of `end`."""
    chance, found = np.random.default_rng(seed), []
    for place in chance.integers(0, end, count):
        changed = bytearray(whole)
        changed[place] ^= int(chance.integers(1, 256))
        found.append(bytes(changed))
    return found


def header_bytes(whole: bytes) -> int:
    return 8 + int(struct.unpack("<Q", whole[:8])[0])


# Bytes


@pytest.mark.parametrize("role", ["target", "generic", *DRAFTERS])
def test_bytes_of_weights(models: Path, tried: Any, role: str) -> None:
    whole = (models / role / "model.safetensors").read_bytes()
    header, chance = header_bytes(whole), np.random.default_rng(1)
    ends = [0, 1, 7, 8, 9, header - 1, header, *chance.integers(header, len(whole), 5).tolist()]
    cuts = [whole[:end] for end in ends]
    sizes = [struct.pack("<Q", size) + whole[8:] for size in (0, 2, header - 7, 10**8, 2**31, 2**63, 2**64 - 1)]
    others = [whole + b"\0", b"\0" * 1000, whole[8:], b"<html>" * 99]
    assert all(tried(role, {"model.safetensors": content}) for content in [*cuts, *sizes, *others])
    count = 0
    for content in flips(whole, 20, header, seed=2):
        said = tried(role, {"model.safetensors": content})
        assert said or json.loads(content[8:header]).keys() == json.loads(whole[8:header]).keys()
        count += bool(said)
    assert count > 12
    data = whole[header:]
    for content in flips(data, 5, len(data), seed=3):  # a number is another one: only an order of tokens can tell
        said = tried(role, {"model.safetensors": whole[:header] + content})
        assert said == "" or (role == "centroid" and "token_ordering" in said)
    assert loaded(models, role, models / role).generate([1, 2, 3], max_tokens=2, ignore_end=True).stats.tokens == 2


TEXTS = {"config.json": ("target", "generic", *DRAFTERS), "generation_config.json": ("target",),
         "model.safetensors.index.json": ("sharded",), "tokenizer.json": ("target", "pieces"),
         "tokenizer_config.json": ("target", "pieces"), "tokenizer.model": ("pieces",),
         "chat_template.jinja": ("pieces",)}  # fmt: skip


@pytest.mark.parametrize(("name", "role"), [(name, role) for name, roles in TEXTS.items() for role in roles])
def test_bytes_of_texts(models: Path, tried: Any, name: str, role: str) -> None:
    whole = (models / role / name).read_bytes()
    few = role == "pieces"  # whose tokenizer takes long to load
    for content in flips(whole, 3 if few else 10, len(whole), seed=4):
        tried(role, {name: content})
    for cut in np.linspace(0, len(whole) - 3, 2 if few else 5).astype(int).tolist():
        tried(role, {name: whole[:cut]})
    deep = b"[" * 100_000 + b"]" * 100_000
    odd = [whole.decode("utf-8", "replace").encode("utf-16"), b"\xff" + whole, whole[:-2] + b"\xe9" + whole[-2:],
           b"[" * 100_000, deep, b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, b"[]", b"7", b'"text"', b"null", b"NaN",
           whole[:-2] + b', "zzz": ' + deep + b"}", b'{"a": 1' + b"0" * 10_000 + b"}"]  # fmt: skip
    refusals = [bool(tried(role, {name: content})) for content in odd]
    if name in ("config.json", "generation_config.json", "model.safetensors.index.json"):
        assert refusals[:-1].count(False) == 0
    assert tried(role, {}) == ""


# Values

VALUES = ("nan", "inf", 1e308, -1, 0, 2**31, 2**63, 10**400, True, "8", "", None, [], {}, 1.5, [[]], [0] * 5, -0.5)


def changed_at(text: str, place: Place, value: Any) -> bytes:
    """A config.json with another value at one place."""
    return json.dumps(wrong_at(json.loads(text), place, value)).encode()


@pytest.mark.parametrize("role", ["target", "generic", *DRAFTERS])
def test_values_in_configs(models: Path, tried: Any, role: str) -> None:
    text, chance = (models / role / "config.json").read_text(), np.random.default_rng(5)
    fields = [place for place in places(json.loads(text)) if place and all(isinstance(key, str) for key in place)]
    every = [(place, value) for place in fields for value in VALUES]
    for i in chance.permutation(len(every))[:18]:
        place, value = every[i]
        tried(role, {"config.json": changed_at(text, place, float(value) if value in ("nan", "inf") else value)})
    assert tried(role, {}) == ""


@pytest.mark.parametrize(
    ("role", "where", "value"),
    [("target", ("text_config", "rope_parameters", "full_attention", "partial_rotary_factor"), None),
     ("sequential", ("block", "rms_norm_eps"), 0), ("target", ("audio_config",), 10**400)],
)  # fmt: skip
def test_values_that_went_wrong_once(models: Path, tried: Any, role: str, where: tuple[str, ...], value: Any) -> None:
    text = (models / role / "config.json").read_text()
    tried(role, {"config.json": changed_at(text, where, value)})


# Tensors

CHANGES: dict[str, Callable[[mx.array], mx.array]] = {
    "transposed": lambda tensor: tensor.T if tensor.shape != tensor.T.shape else tensor[:-1],
    "one row less": lambda tensor: tensor[:-1],
    "nothing": lambda tensor: mx.zeros((0,)),
    "a number": lambda tensor: mx.array(1.0),
    "one axis more": lambda tensor: tensor[None],
}


@pytest.mark.parametrize("role", ["target", "generic", *DRAFTERS])
def test_tensors_of_other_shapes(models: Path, tried: Any, tmp_path: Path, role: str) -> None:
    tensors = mx.load(str(models / role / "model.safetensors"))
    names = sorted(tensors)
    file = tmp_path / "changed.safetensors"

    def said(changed: dict[str, mx.array]) -> str:
        mx.save_safetensors(str(file), changed)
        return str(tried(role, {"model.safetensors": file.read_bytes()}))

    for i, change in enumerate(CHANGES.values()):
        name = names[i * 7 % len(names)]
        assert said(tensors | {name: change(tensors[name])})
    name = next(name for name in names if tensors[name].ndim == 2)
    assert said({other: tensors[other] for other in names if other != name})
    assert "surprise" in said(tensors | {"surprise.weight": mx.zeros((3,))})
    assert said({})
    stem = name.removesuffix(".weight")
    for scales in (mx.zeros((3, 3)), mx.zeros((0, 1)), mx.zeros((tensors[name].shape[0], 1)), mx.array(1.0)):
        assert said(tensors | {f"{stem}.scales": scales})
        assert said(tensors | {f"{stem}.scales": scales, f"{stem}.biases": scales})
        packed = tensors[name].astype(mx.uint32)
        assert said(tensors | {name: packed, f"{stem}.scales": scales, f"{stem}.biases": scales})


def test_headers_that_are_wrong(models: Path, tried: Any) -> None:
    """Lengths and digests may be right; offsets, shapes and types are not."""
    whole = (models / "target" / "model.safetensors").read_bytes()
    header, rest = json.loads(whole[8 : header_bytes(whole)]), whole[header_bytes(whole) :]
    name = next(key for key in header if key != "__metadata__")
    entry = header[name]
    odd: list[object] = [[], 7, "x", None, {}, header | {"__metadata__": 7, name: entry | {"shape": [1]}}]
    odd += [header | {name: bad} for bad in (7, [], {}, None, "x")]
    odd += [header | {name: entry | {"data_offsets": bad}} for bad in (7, [0], ["a", "b"], [-4, 0], [8, 0], [0, 1e9])]
    odd += [header | {name: entry | {"shape": bad}} for bad in (7, "x", [-1], [1.5], [None], [10**30], [])]
    odd += [header | {name: entry | {"dtype": bad}} for bad in (7, None, "F64", "X1", [])]
    for text in (json.dumps(bad).encode() for bad in odd):
        assert tried("target", {"model.safetensors": struct.pack("<Q", len(text)) + text + rest}), text[:99]


@pytest.mark.parametrize(
    "shards",
    [7, ["a"], *({"a": name} for name in ("", ".", "..", "/", "/dev/zero", "/dev/null", "a\0b", "x" * 300,
                                          "config.json", "model-00001-of-00009.safetensors", 7, None, [], {}))],
)  # fmt: skip
def test_an_index_that_names_no_shards(models: Path, tried: Any, shards: Any) -> None:
    index = json.loads((models / "sharded" / "model.safetensors.index.json").read_text())
    first = next(iter(index["weight_map"]))
    index["weight_map"] = index["weight_map"] | {first: shards["a"]} if isinstance(shards, dict) else shards
    assert tried("sharded", {"model.safetensors.index.json": json.dumps(index).encode()})
