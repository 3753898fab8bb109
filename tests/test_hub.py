"""The hub: downloads that break and go on, copies without network, refusals in one sentence, pairs, memory and disk."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import huggingface_hub
import pytest
from conftest import GOLDEN, Command
from hub_server import Hub
from huggingface_hub import constants, file_download
from servers import eventually

import mlx_mtp
from mlx_mtp import CheckpointError, DoesNotFit, OptionError, loading, targets
from mlx_mtp.checkpoints import checkpoint, download, hub, memory, pairs

TARGET, TIED = GOLDEN / "ple" / "target", GOLDEN / "ple" / "assistant_tied"
NAME, DRAFTER = "google/gemma-4-tiny-it", "google/gemma-4-tiny-it-assistant"
WEIGHTS = (TARGET / "model.safetensors").read_bytes()
MAIN = "from mlx_mtp.cli import app; app.main()"
CHUNK = 1000  # bytes that huggingface_hub hands on at once
CUT = 40 * CHUNK
RETRIES = 5  # of huggingface_hub, without a byte
PATIENCE = 300  # seconds; a backstop
IDS = [1, 2, 3]


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub with the tiny pair on it, and an empty cache; huggingface_hub's constants, which it reads at import."""
    with Hub() as server:
        server.add(NAME, TARGET)
        server.add(DRAFTER, TIED)
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "home" / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda _: None))  # between two attempts
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.setattr(download, "PAUSES", (0.0,) * 3)
        yield server
        huggingface_hub.close_session()


@pytest.fixture
def cache(online: Hub, tmp_path: Path) -> Path:
    """The cache's folder of the tiny target."""
    return tmp_path / "home" / "hub" / f"models--{NAME.replace('/', '--')}"


def fetched(name: str = NAME, on_progress: hub.OnProgress | None = None) -> Path:
    return hub.find(name).fetch(on_progress).path


def refusal(call: Callable[[], object], kind: type[mlx_mtp.MLXMTPError] = mlx_mtp.ModelNotFound) -> str:
    return conftest.refusal(call, kind)


def arrived(folder: Path, size: int) -> bool:
    """Whether the folder's part file comes to `size` bytes, and no more."""
    parts = lambda: sum(part.stat().st_size for part in folder.rglob("*.incomplete"))  # noqa: E731
    return eventually(lambda: parts() >= size) and parts() == size


def same_files(folder: Path, source: Path = TARGET) -> bool:
    return {f.name: f.read_bytes() for f in folder.iterdir()} == {f.name: f.read_bytes() for f in source.iterdir()}


# Downloads


def test_a_download_is_whole_and_stays(online: Hub, cache: Path) -> None:
    folder = fetched()
    assert same_files(folder) and folder == cache / "snapshots" / online.commit(NAME)
    assert (cache / "refs" / "main").read_text() == online.commit(NAME)
    assert Path(huggingface_hub.snapshot_download(NAME, local_files_only=True)) == folder  # other programs find it
    online.requests.clear()
    assert fetched() == folder
    assert [(r.method, r.path) for r in online.requests] == [("GET", f"/api/models/{NAME}")]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_break_in_mid_file_is_mended_in_the_same_run(online: Hub, ranges: bool) -> None:
    online.faults.breaks["model.safetensors"] = [CUT, 0, 0, 30 * CHUNK] if ranges else [CUT, CHUNK]
    online.faults.no_ranges = not ranges
    assert same_files(fetched())
    assert [r.start for r in online.gets("model")] == [0, CUT, *([CUT, CUT, CUT + 30 * CHUNK] if ranges else [CHUNK])]


def test_a_fault_of_the_hubs_own_is_waited_out_and_a_refusal_is_not(online: Hub, cache: Path) -> None:
    online.faults.breaks["model.safetensors"] = [CUT]
    online.faults.busy["model.safetensors"] = [503, 500]
    assert same_files(fetched())
    assert [r.start for r in online.gets("model")] == [0, 0, 0, CUT]
    for answers, requests in (([403, 403], 1), ([502] * 9, 4)):
        shutil.rmtree(cache)
        online.requests.clear()
        online.faults.busy["model.safetensors"] = answers
        assert f"({answers[0]})" in refusal(fetched) and len(online.gets("model")) == requests


def test_after_a_break_for_good_the_next_run_asks_only_for_the_rest(online: Hub, cache: Path) -> None:
    online.faults.breaks["model.safetensors"] = [CUT] + [0] * 50
    sentence = refusal(fetched)
    assert "network" in sentence and online.endpoint in sentence
    assert len(online.gets("model")) == 1 + RETRIES
    assert not hub.cached(NAME) and hub.started(NAME)
    listing = hub.find(NAME)
    assert isinstance(listing, hub.Listing)
    assert listing.bytes_to_come == len(WEIGHTS) - CUT
    online.faults.breaks.clear()
    online.requests.clear()
    assert same_files(fetched())
    assert [r.start for r in online.gets("model")] == [CUT]
    assert not list(cache.rglob("*.incomplete"))


def test_an_interrupt_keeps_what_has_come(online: Hub, cache: Path) -> None:
    online.faults.stall["model.safetensors"] = CUT

    def interrupt(at: hub.LoadProgress) -> None:
        if at.done >= CUT:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetched(on_progress=interrupt)
    assert arrived(cache, CUT) and hub.cached(NAME) is None


@pytest.mark.parametrize("left", [WEIGHTS[: CUT - 1] + b"\0", b"x" * len(WEIGHTS), WEIGHTS + b"x", b""])
def test_a_spoilt_rest_is_fetched_again(online: Hub, cache: Path, left: bytes) -> None:
    """A power cut leaves zeros at the end of a file, another program leaves anything."""
    part = cache / "blobs" / f"{hashlib.sha256(WEIGHTS).hexdigest()}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert same_files(fetched())
    assert online.gets("model")[-1].start == 0


def test_content_that_is_not_the_announced_one_never_gets_a_name(online: Hub, cache: Path) -> None:
    online.faults.other_content.add("model.safetensors")
    assert "model.safetensors" in refusal(fetched, CheckpointError)
    assert hub.cached(NAME) is None and hashlib.sha256(WEIGHTS).hexdigest() not in os.listdir(cache / "blobs")


def test_the_token_goes_to_the_hub_and_nowhere_else(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    online.faults.gated.add(NAME)
    online.faults.breaks["model.safetensors"] = [CUT]
    assert same_files(fetched())
    assert [r.token for r in online.gets()] == [None, None]
    assert {r.token for r in online.requests if not r.path.startswith("/content/")} == {"hf_granted"}


def test_progress_tells_bytes_and_ends_at_all(online: Hub, tmp_path: Path) -> None:
    """Three shards, fetched at once; what an earlier run brought counts from the start."""
    others = {"readme.md": b"x" * 999, "onnx/model.safetensors": b"y" * 999}
    online.repositories[NAME] = {"config.json": b'{"model_type": "x"}'} | others
    shards = {f"model-0000{i}-of-00003.safetensors": os.urandom(50_000 + i) for i in (1, 2, 3)}
    online.repositories[NAME] |= shards
    online.faults.breaks["model-00002-of-00003.safetensors"] = [20_000] + [0] * 50
    refusal(fetched)
    online.faults.breaks.clear()
    seen: list[hub.LoadProgress] = []
    folder = fetched(on_progress=seen.append)
    assert {file.name for file in folder.iterdir()} == {"config.json", *shards}
    assert {at.what for at in seen} == {"download"} and {at.name for at in seen} == {NAME}
    assert [at.done for at in seen] == sorted(at.done for at in seen) and seen[-1].done == seen[-1].total
    assert 0 < seen[-1].total <= 150_006


def test_reading_is_told_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 40_000)
    seen: list[hub.LoadProgress] = []
    mlx_mtp.load(TARGET, drafter=TIED, depth=2, on_progress=seen.append)
    for name in (str(TARGET), "its drafter"):
        steps = [at for at in seen if at.name == name]
        assert len(steps) > 1 and {at.what for at in steps} == {"load"} and len({at.total for at in steps}) == 1
        assert [at.done for at in steps] == sorted({at.done for at in steps}) and steps[-1].done == steps[-1].total


def test_an_update_fetches_only_what_changed(online: Hub) -> None:
    old = fetched()
    online.repositories[NAME]["generation_config.json"] = b'{"eos_token_id": 7}'
    online.requests.clear()
    new = fetched()
    assert new != old and (new / "generation_config.json").read_bytes() == b'{"eos_token_id": 7}'
    assert online.gets("model") == [] and (new / "model.safetensors").read_bytes() == WEIGHTS


# Refusals


@pytest.mark.parametrize("name", ["google/nothing", "a--b/c", "a/b..c", "a/" + "x" * 200])
def test_names_of_no_model_and_names_the_hub_does_not_allow(online: Hub, name: str) -> None:
    assert "is neither" in refusal(lambda: fetched(name))
    asked = [request for request in online.requests if "agent-harnesses" not in request.path]  # huggingface_hub's own
    assert len(asked) == (name == "google/nothing")


@pytest.mark.parametrize(
    ("faults", "token", "said"),
    [({"gated": {NAME}}, None, "licence"), ({"gated": {NAME}}, "hf_other", "licence"),
     ({}, "hf_expired", "token (401)"),
     *(({"status": {place: status}}, None, said) for place in ("/api/models/", "/content/")
       for status, said in ((503, "its own (503)"), (403, "token (403)"), (429, "no more requests")))],
)  # fmt: skip
def test_gates_tokens_and_errors_of_the_hub(
    online: Hub, monkeypatch: pytest.MonkeyPatch, faults: dict[str, Any], token: str | None, said: str
) -> None:
    monkeypatch.setattr(huggingface_hub.utils._http.time, "sleep", lambda _: None)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    vars(online.faults).update(faults)
    sentence = refusal(fetched)
    assert said in sentence
    assert said != "licence" or (f"{online.endpoint}/{NAME}" in sentence and "HF_TOKEN" in sentence)


def test_repositories_that_hold_something_else(online: Hub) -> None:
    online.repositories["a/gguf"] = {"config.json": b"{}", "model.gguf": b"GGUF"}
    online.repositories["a/adapter"] = {"model.safetensors": b"x"}
    online.repositories["a/empty"] = {}
    for name in ("a/gguf", "a/adapter", "a/empty"):
        assert "GGUF" in refusal(lambda name=name: fetched(name))
    assert not online.gets()


def test_a_listing_cannot_name_places_outside_the_cache(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    api = huggingface_hub.HfApi.model_info

    def odd(*arguments: object, **named: object) -> object:
        info = api(*arguments, **named)
        for sibling in info.siblings:
            if sibling.lfs:
                sibling.lfs.sha256 = "../../../outside"
        info.id = "../elsewhere"
        return info

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", odd)
    listing = hub.find(NAME)
    assert isinstance(listing, hub.Listing) and listing.name == NAME and not listing.large


# Without a hub


@pytest.fixture
def without(online: Hub, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes the hub away, in one of four ways."""
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    ways: dict[str, Callable[[], object]] = {
        "offline": lambda: monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True),
        "gone": lambda: (online.close(), huggingface_hub.close_session()),
        "silent": lambda: setattr(online.faults, "silent", True),
        "broken": lambda: online.faults.status.update({"/": 502}),
    }
    return lambda how: online.requests.clear() or ways[how]()


@pytest.mark.parametrize("how", ["offline", "gone", "silent", "broken"])
def test_a_whole_copy_serves_without_the_hub(without: Callable[[str], None], how: str) -> None:
    folder = fetched()
    without(how)
    assert fetched() == folder


@pytest.mark.parametrize("how", ["offline", "gone"])
def test_half_a_copy_does_not(online: Hub, without: Callable[[str], None], cache: Path, how: str) -> None:
    online.faults.breaks["model.safetensors"] = [CUT] + [0] * 50
    refusal(fetched)
    without(how)
    assert NAME in refusal(fetched)
    assert (cache / "blobs").is_dir()


def test_an_update_that_broke_off_leaves_the_older_copy(online: Hub, without: Callable[[str], None]) -> None:
    old = fetched()
    online.repositories[NAME]["model.safetensors"] = WEIGHTS[:-4] + b"1234"
    online.repositories[NAME]["config.json"] += b" "
    online.faults.status["/resolve/" + online.commit(NAME) + "/generation_config"] = 404
    refusal(fetched)
    assert len(list(old.parent.iterdir())) == 2
    without("broken")
    assert fetched() == old


INDEX = json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}})
# A file is taken out of a snapshot, or one left that says there must be more.
SPOILT: dict[str, Callable[[Path], object]] = {
    "weights": lambda folder: (folder / "model.safetensors").unlink(),
    "blob": lambda folder: Path(os.path.realpath(folder / "model.safetensors")).unlink(),
    "config": lambda folder: (folder / "config.json").unlink(),
    "shard": lambda folder: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"),
    "index": lambda folder: (folder / "model.safetensors.index.json").write_text(INDEX),
}


@pytest.mark.parametrize(("how", "listed"), [("weights", True), ("weights", False), ("blob", True), ("config", False),
                                             ("shard", False), ("index", True)])  # fmt: skip
def test_half_a_snapshot_is_never_taken_for_whole(online: Hub, cache: Path, how: str, listed: bool) -> None:
    """With and without the listing that newer versions of huggingface_hub keep beside the snapshot."""
    folder = fetched()
    if not listed:
        shutil.rmtree(cache / "trees")
    copy = folder.parent.parent / "snapshots" / ("0" * 40)
    shutil.copytree(folder, copy, symlinks=True)
    shutil.rmtree(folder)
    (cache / "refs" / "main").write_text(copy.name)
    assert hub.cached(NAME) == copy
    SPOILT[how](copy)
    assert checkpoint.lacking(copy) and hub.cached(NAME) is None
    refusal(lambda: mlx_mtp.load(copy), CheckpointError)  # as a path, too


# Room


def test_no_disk(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=150_000))
    sentence = refusal(lambda: mlx_mtp.load(NAME), DoesNotFit)
    assert NAME in sentence and DRAFTER in sentence and "150.0 kB" in sentence and "HF_HOME" in sentence
    assert not online.gets()
    mlx_mtp.load(NAME, drafter=None)  # the target alone takes less


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """A machine with so many bytes for a model, and no fixed head-room."""

    def set_to(size: float) -> None:
        monkeypatch.setattr(memory, "HEAD_ROOM_BYTES", 0)
        monkeypatch.setattr(memory, "available_bytes", lambda: int(size))

    return set_to


def test_no_memory_for_a_name_nothing_is_downloaded(online: Hub, small: Callable[[float], None]) -> None:
    small(100_000)
    sentence = refusal(lambda: mlx_mtp.load(NAME, drafter=None), DoesNotFit)
    assert "100.0 kB" in sentence and NAME in sentence and "embedded model fits" in sentence
    assert memory.IGNORE in sentence and not online.gets()


def test_no_memory_for_a_folder_no_weight_is_read(small: Callable[[float], None], monkeypatch) -> None:
    small(9e9)
    monkeypatch.setattr(targets, "load_target", lambda _: pytest.fail("the weights were read"))
    monkeypatch.setattr(memory, "held_bytes", lambda _: 40 * 10**9)
    sentence = refusal(lambda: mlx_mtp.load(TARGET), DoesNotFit)
    assert str(TARGET) in sentence and "'mlx-community/gemma-4-e4b-it-4bit' fits" in sentence and "44.0 GB" in sentence
    assert "with its drafter" in refusal(lambda: mlx_mtp.load(TARGET, drafter=TIED), DoesNotFit)


def test_memory_may_be_ignored(small: Callable[[float], None], monkeypatch, caplog) -> None:
    small(100_000)
    monkeypatch.setenv(memory.IGNORE, "1")
    assert mlx_mtp.load(TARGET, drafter=None).generate(IDS, max_tokens=2).tokens
    assert "expect swapping" in caplog.text


def test_what_is_wrong_is_known_before_weights_are_downloaded(online: Hub) -> None:
    """A model type that nobody implements, and a drafter for another width."""
    online.repositories[NAME]["config.json"] = b'{"model_type": "abacus"}'
    assert "abacus" in refusal(lambda: mlx_mtp.load(NAME), mlx_mtp.UnsupportedModel)
    config = json.loads((TIED / "config.json").read_text()) | {"backbone_hidden_size": 48}
    online.repositories[DRAFTER]["config.json"] = json.dumps(config).encode()
    said = refusal(lambda: mlx_mtp.load(TARGET, drafter=DRAFTER), mlx_mtp.IncompatibleDrafter)
    assert "size 48" in said and "hidden size 32" in said and not online.gets()


def test_the_headers_on_the_hub_tell_the_size(online: Hub) -> None:
    listing = hub.find(NAME)
    assert isinstance(listing, hub.Listing) and memory.held_bytes(listing.tensors()) == memory.folder_bytes(TARGET)
    online.faults.status["/resolve/"] = 500  # an upper bound without them
    assert memory.held_bytes(listing.tensors()) >= len(WEIGHTS)


def test_a_drafter_that_nobody_asked_for_gives_way(online: Hub, small: Callable[[float], None], caplog) -> None:
    small(memory.folder_bytes(TARGET) * 1.15)
    assert mlx_mtp.load(NAME).drafter is None
    assert "not with its drafter" in caplog.text and hub.cached(DRAFTER) is None
    refusal(lambda: mlx_mtp.load(NAME, drafter=DRAFTER), DoesNotFit)


def test_halves_cost_more_on_a_cpu_and_towers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    towers = [("model.vision_tower.x", "F32", 10**9), ("model.embed_audio.y", "BF16", 10)]
    assert memory.held_bytes([*towers, ("model.norm", "U32", 8)]) == 8
    assert memory.held_bytes([("a", "BF16", 2), ("b", "F32", 4)]) == 3 * 2 + 4
    pair = pairs.KnownPair(target="a", assistant="b", bits=4, weight_bytes=4500 * 10**6)
    on_cpu = pair.memory_bytes
    monkeypatch.setattr(memory, "on_cpu", lambda: False)
    assert memory.held_bytes([("a", "BF16", 2), ("b", "F32", 4)]) == 6
    assert pair.memory_bytes == memory.needed_bytes(4500 * 10**6) < on_cpu


def test_the_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.available_bytes()
    for text, expected in (("123456\n", 123456), ("max\n", None), (f"{2**62}\n", None)):
        (tmp_path / "max").write_text(text)
        monkeypatch.setattr(memory, "CGROUP_FILES", (str(tmp_path / "max"), str(tmp_path / "none")))
        assert memory.available_bytes() == (expected or max(whole, memory.available_bytes()))


def test_wired_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [7]

    class Owner:
        pass

    monkeypatch.setattr(memory.mx, "set_wired_limit", lambda limit: (limits[-1], limits.append(limit))[0])
    monkeypatch.setattr(memory, "_engines", weakref.WeakKeyDictionary())
    first, second, third = Owner(), Owner(), Owner()
    memory.keep_resident(first, 10**9)
    assert limits == [7]  # no Metal here
    monkeypatch.setattr(memory, "on_metal", lambda: True)
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * 10**9)
    for owner, weights in ((first, 1), (second, 1), (third, 2)):
        memory.keep_resident(owner, weights * 10**9)
    # never more than macOS recommends
    assert limits == [7, memory.needed_bytes(10**9), memory.needed_bytes(2 * 10**9), 3 * 10**9]
    del first, second, owner
    memory.keep_resident(third, 2 * 10**9)
    assert limits[-1] == memory.needed_bytes(2 * 10**9)  # of those alive


# Pairs


def test_auto_finds_the_assistant_on_the_hub(online: Hub) -> None:
    engine = mlx_mtp.load(NAME, depth=2)
    result = engine.generate(IDS, max_tokens=12, ignore_end=True)
    assert result.stats.drafted > 0 and len(online.gets()) == 2
    assert result.tokens == mlx_mtp.load(TARGET, drafter=None).generate(IDS, max_tokens=12, ignore_end=True).tokens
    snapshot = hub.cached(NAME)
    assert snapshot and mlx_mtp.load(snapshot, depth=2).drafter is not None  # the cache's folder has the name in it


def test_auto_finds_the_assistant_next_to_a_folder(tmp_path: Path) -> None:
    shutil.copytree(TARGET, tmp_path / "target", copy_function=shutil.copyfile)
    assert mlx_mtp.load(tmp_path / "target", depth=2).drafter is None
    for place in ("assistant", "target-assistant", "target/assistant"):  # the later ones are preferred
        shutil.copytree(TIED, tmp_path / place, copy_function=shutil.copyfile)
        assert pairs.beside(tmp_path / "target") == tmp_path / place
    assert mlx_mtp.load(tmp_path / "target", depth=2).drafter is not None


def test_without_its_drafter_a_target_decodes_plainly(online: Hub, caplog) -> None:
    online.faults.gated.add(DRAFTER)
    assert mlx_mtp.load(NAME).drafter is None
    assert "Decoding plainly" in caplog.text and "licence" in caplog.text
    assert "licence" in refusal(lambda: mlx_mtp.load(NAME, drafter=DRAFTER))  # who asks for it hears why not
    online.faults.gated.clear()
    del online.repositories[DRAFTER]
    assert mlx_mtp.load(NAME).drafter is None
    assert isinstance(mlx_mtp.load(NAME, drafter="lookup+auto").drafter, loading.Lookup)


SIZES = ("E2B", "E4B", "12B", "26B-A4B", "31B")


@pytest.mark.usefixtures("user_table")
def test_names_of_google_and_mlx_community() -> None:
    for size in SIZES:
        google, community = f"google/gemma-4-{size}-it", f"mlx-community/gemma-4-{size}-it"
        assert pairs.assistant_of(google) == google + "-assistant"
        for kind in ("4bit", "mxfp4", "OptiQ-4bit"):
            for name in (f"{community}-{kind}", f"{community.lower()}-{kind}"):
                assert pairs.assistant_of(name) == community + "-assistant-bf16"
        others = (google + "-assistant", community + "-assistant-4bit", f"google/gemma-3-{size}-it", google[:-3])
        assert not any(pairs.assistant_of(other) for other in others)


@pytest.mark.usefixtures("user_table")
def test_the_table() -> None:
    known = pairs.known_pairs()
    assert len({pair.target.casefold() for pair in known}) == len(known) == 20
    for pair in known:
        assert hub.NAME.fullmatch(pair.target) and pair.assistant == pairs.assistant_of(pair.target) and pair.source
        size = next(size for size in SIZES if f"-{size}-".casefold() in pair.target.casefold())
        assert f"-{size}-" in pair.assistant
        assert 0 < pair.weight_bytes < pair.download_bytes < 65 * 10**9  # towers and tokenizer are not held
        assert pair.bits in (4, 6, 8, 16)


@pytest.mark.usefixtures("user_table")
def test_best_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """What macOS gives the GPU of Macs with 8, 16, 24 and 32 GB, and more."""
    monkeypatch.setattr(memory, "on_cpu", lambda: False)
    best = {2: None, 4: "e2b", 5.3: "e4b", 11.4: "12B", 17.1: "26b-a4b", 22.9: "31b", 400: "31b"}
    for gigabytes, name in best.items():
        pair = pairs.best_pair(int(gigabytes * 10**9))
        assert (pair and pair.target) == (name and f"mlx-community/gemma-4-{name}-it-4bit")


@pytest.fixture
def user_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | bytes], Path]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def write(text: str | bytes) -> Path:
        pairs.user_table().parent.mkdir(parents=True, exist_ok=True)
        pairs.user_table().write_bytes(text if isinstance(text, bytes) else text.encode())
        return pairs.user_table()

    return write


def test_the_users_own_pairs_come_first(user_table: Callable[[str | bytes], Path]) -> None:
    own = [
        {"target": "google/gemma-4-E2B-it", "assistant": "me/mine", "weight_bytes": 10**9, "download_bytes": 10**9},
        {"target": "me/plain", "assistant": None},
        {"target": str(TARGET), "assistant": str(TIED)},
    ]
    user_table(json.dumps({"pairs": own, "patterns": [{"target": "me/tuned-*", "assistant": "{target}-mtp"}]}))
    assert pairs.assistant_of("google/gemma-4-E2B-it") == "me/mine"
    assert mlx_mtp.load(TARGET, depth=2).drafter is not None
    assert pairs.assistant_of("me/tuned-3") == "me/tuned-3-mtp" and pairs.assistant_of("me/plain") is None
    assert pairs.assistant_of("google/gemma-4-E4B-it") == "google/gemma-4-E4B-it-assistant"
    known = pairs.known_pairs()
    assert [pair.target for pair in known[:3]] == [entry["target"] for entry in own] and len(known) == 22
    best = pairs.best_pair(10**10)
    assert best and best.target == "google/gemma-4-E2B-it"


@pytest.mark.parametrize(
    "text", ["", "[]", b"\xff\xfe", "[" * 100_000, '{"pairs": 7}', '{"pairs": [7]}', '{"pairs": [{"target": "a/b"}]}',
             '{"pairs": [{"target": 7, "assistant": "a/b"}]}', '{"pairs": [{"target": "a/b", "assistant": 7}]}',
             '{"patterns": [{"target": "", "assistant": "a/b"}]}',
             '{"pairs": [{"target": "a/b", "assistant": "c/d", "bits": "4"}]}',
             '{"pairs": [{"target": "a/b", "assistant": "c/d", "weight_bytes": -1}]}']
)  # fmt: skip
def test_a_corrupt_table_is_one_sentence(user_table: Callable[[str | bytes], Path], text: str | bytes) -> None:
    file = user_table(text)
    assert str(file) in refusal(pairs.known_pairs, OptionError)
    assert str(file) in refusal(lambda: mlx_mtp.load(TARGET), OptionError)


# Whether the hub is there


def test_hub_answers(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub.hub_answers()
    online.faults.status["/"] = 503
    assert not hub.hub_answers()
    online.faults.status.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    online.requests.clear()
    assert not hub.hub_answers() and not online.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    online.faults.silent = True
    assert not hub.hub_answers(0.2)
    online.close()
    assert not hub.hub_answers()


# The command line


def rows(shown: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.splitlines() if line.startswith("|")]


def test_models_as_json_and_as_markdown(online: Hub, small, user_table, command: Command) -> None:
    small(9e9)
    user_table(json.dumps({"pairs": [{"target": NAME, "assistant": DRAFTER}]}))
    for expected in ("no", "partly", "yes"):
        code, out, err = command("models", "--json")
        assert code == 0 and err == "" and out.count("\n") == 1
        found = json.loads(out)
        assert set(found) == {"memory_bytes", "best", "pairs"} and found["memory_bytes"] == 9 * 10**9
        assert found["best"] == "mlx-community/gemma-4-e4b-it-4bit" and len(found["pairs"]) == 22
        own = found["pairs"][0]
        assert (own["target"], own["fits"], own["download_bytes"], own["downloaded"]) == (NAME, None, None, expected)
        fetched(NAME if expected == "no" else DRAFTER)
    code, out, err = command("models")
    assert code == 0 and err == "" and "The first that fits: mlx-community/gemma-4-e4b-it-4bit" in out
    lines = rows(out)
    assert len(lines) == 24 and lines[2] == [f"{NAME}, {DRAFTER}", "?", "?", "?", "yes"]
    _, out, _ = command("models", "--fitting")
    assert {line[3] for line in rows(out)[2:]} == {"yes"}
    user_table("{")
    code, out, err = command("models")
    assert code == 2 and out == "" and err.count("\n") == 1 and "pairs.json" in err


# The same in processes of their own, which read the environment


def start(home: Path, endpoint: str, *args: str, **more: str) -> subprocess.Popen[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    environment = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "XDG_CONFIG_HOME": str(home), **more}
    program = f"from huggingface_hub import constants as c; c.DOWNLOAD_CHUNK_SIZE = {CHUNK}; {MAIN}"
    command = [sys.executable, "-c", program, "generate", "--model", NAME, "--tokens", "1,2,3",
               "--max-tokens", "6", "--depth", "2", "--json", *args]  # fmt: skip
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_in_mid_file_and_resumed(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_TOKEN as a user sets them; the process dies as in a power cut."""
    home = tmp_path / "elsewhere"
    with Hub() as server:
        server.add(NAME, TARGET)
        server.add(DRAFTER, TIED)
        server.faults.stall["model.safetensors"] = CUT
        first = start(home, server.endpoint, HF_TOKEN="hf_mine")
        assert server.stalled.wait(PATIENCE)
        assert arrived(home, CUT)
        first.send_signal(signal.SIGKILL)
        first.communicate(timeout=PATIENCE)
        assert {request.token for request in server.asked("/api/models/")} == {"hf_mine"}
        server.requests.clear()
        second = start(home, server.endpoint)
        out, err = second.communicate(timeout=PATIENCE)
        assert second.returncode == 0 and err == "", err
        assert [r.start for r in server.gets(f"{NAME}/")] == [CUT]
        assert (home / "hub" / "models--google--gemma-4-tiny-it" / "snapshots" / server.commit(NAME)).is_dir()
    expected = mlx_mtp.load(TARGET, drafter=None).generate(IDS, max_tokens=6).tokens
    assert json.loads(out)["tokens"] == expected and json.loads(out)["stats"]["drafted"] > 0
