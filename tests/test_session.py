"""Sessions beyond what every pair promises (conformance.py): snapshots of rings, cut replies, whose K/V they are."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from families import config_of, written
from greedy import assert_greedy, lively
from hypothesis import given, settings
from hypothesis import strategies as st
from thinking import thinking_engine

import mlx_mtp
from mlx_mtp.generation.cache import FULL, SLIDING, KVCache, LayerShape
from mlx_mtp.generation.prefix import Lease, Session, _intact


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, mlx_mtp.Engine]:
    """One target with windows of 8 tokens; decoding plainly, and with drafters without and with K/V of their own."""
    folder = tmp_path_factory.mktemp("drafters")
    sequential = written(folder / "sequential", config_of("sequential_modules", 32, 128, 2))
    drafters = {"none": None, "assistant": GOLDEN / "ple" / "assistant_tied", "sequential": sequential}
    return {name: lively("ple", drafter, depth=2 if drafter else "auto") for name, drafter in drafters.items()}


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


def reply(engine: mlx_mtp.Engine, prompt: list[int], session: Session | None = None, tokens: int = 24):
    """A reply that a fresh run could have given: greedy by a pass without a cache."""
    result = engine.generate(prompt, max_tokens=tokens, ignore_end=True, session=session)
    assert_greedy(engine, prompt, result.tokens)
    return result


def test_edits_beyond_the_ring(engines: dict[str, mlx_mtp.Engine]) -> None:
    """Windows of 8 and rings of 40 slots: after 44 new tokens nothing of the last prompt's window is left in them."""
    engine, session, one = engines["sequential"], Session(), ids(50)
    first = reply(engine, one, session, 44)
    assert reply(engine, one, session, 44).stats.prefilled_tokens <= 50  # retry: the snapshot at the prompt's end
    reply(engine, [*one, *first.tokens, *ids(20, 1)], session, 44)
    other = [*one, *first.tokens, *ids(20, 2)]  # undo, and say something else: the snapshot of the first prompt
    assert reply(engine, other, session).stats.prefilled_tokens == len(other) - 50
    assert reply(engine, ids(70, 9), session).stats.prefilled_tokens == 70  # another conversation


@pytest.mark.parametrize("family", ["none", "assistant"])
def test_snapshots_are_not_written_into(engines: dict[str, mlx_mtp.Engine], family: str) -> None:
    """Rounds with logits processors are not compiled: they write into the very arrays that Python holds."""
    engine, session, one = engines[family], Session(), ids(50)
    processed = {"max_tokens": 44, "ignore_end": True, "logits_processors": [lambda tokens, logits: logits]}
    for seed in range(3):
        other = [*one, *ids(5 * seed, seed)]
        again = engine.generate(other, session=session, **processed)
        assert_greedy(engine, other, again.tokens)
        assert again.stats.prefilled_tokens == (5 * seed or 50)


def test_a_reply_that_is_dropped_leaves_what_it_had(engines: dict[str, mlx_mtp.Engine]) -> None:
    engine, session = engines["assistant"], Session()
    stream = engine.stream(ids(40), max_tokens=50, ignore_end=True, session=session)
    heard = [*next(stream).tokens, *next(stream).tokens, *next(stream).tokens]
    with pytest.raises(mlx_mtp.OptionError, match="in use"):
        reply(engine, ids(40), session)
    stream.close()
    prompt = [*ids(40), *heard, *ids(5, 1)]
    result = reply(engine, prompt, session)
    assert result.stats.prefilled_tokens == 6


def test_a_prompt_that_fails_leaves_an_empty_session(engines: dict[str, mlx_mtp.Engine]) -> None:
    engine, session = engines["assistant"], Session()
    reply(engine, ids(40), session)

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(engine.stream([*ids(40), *ids(40, 1)], session=session, on_prefill=stop))
    assert not session.busy and session.ids == [] and session.lease is None
    assert reply(engine, ids(40), session).stats.prefilled_tokens == 40


def test_snapshots_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch, engines: dict[str, mlx_mtp.Engine]) -> None:
    engine, session = engines["none"], Session()
    reply(engine, ids(50), session)
    one = session.snapshots[0].nbytes
    monkeypatch.setattr("mlx_mtp.generation.prefix.SNAPSHOT_BYTES", 2 * one)
    said = ids(50)
    for turn in range(4):
        said = [*said, *reply(engine, said, session).tokens, *ids(3, turn)]
    assert len(session.snapshots) == 2 and session.nbytes > 2 * one
    session.clear()
    assert session.nbytes == 0


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 9), st.integers(0, 12), st.lists(st.integers(1, 20), min_size=1, max_size=8), st.data())
def test_what_a_ring_holds(window: int, slack: int, writes: list[int], data: st.DataObject) -> None:
    """Against a plain list that remembers who wrote last into every slot."""
    cache = KVCache((LayerShape(SLIDING, 1, 1), LayerShape(FULL, 1, 1)), window, 256, mx.float32, slack=slack)
    size, last, newest, length = cache.slots(SLIDING), {}, -1, 0
    for count in writes:
        for position in range(length, length + count):
            last[position % size] = position
        newest, length = max(newest, length + count - 1), length + count
        length = data.draw(st.integers(max(0, length - 3), length))
    wanted = data.draw(st.integers(0, length))
    intact = all(last.get(p % size, p) == p for p in range(max(0, wanted - window + 1), wanted))
    # A row that was overwritten by one that rolled back still counts as lost: the rule knows only the newest row.
    assert not _intact(cache, wanted, newest) or intact


def test_only_what_was_released_is_held() -> None:
    session = Session()
    assert session.acquire([1, 2], 0) is None
    session.release(Lease(KVCache((), 1, 256, mx.float32), {}, 4), [1, 2, 3])
    assert session.common([1, 2, 9]) == 2 and session.common([]) == 0 and session.common([1, 2, 3, 4]) == 3
    lease, begin, _ = session.acquire([1, 2, 3], 0) or (None, 0, None)
    assert lease is not None and begin == 2 and lease.cache.length.item() == 2 and session.ids == []
    with pytest.raises(mlx_mtp.OptionError):
        session.acquire([1], 0)


# Whose K/V they are


def foreign(engine: mlx_mtp.Engine, session: Session) -> None:
    before = list(session.ids)
    with pytest.raises(mlx_mtp.OptionError, match="another engine"):
        engine.stream(ids(40), session=session)  # before anything runs
    assert session.ids == before and not session.busy


def test_a_session_belongs_to_the_engine_that_filled_it(engines: dict[str, mlx_mtp.Engine]) -> None:
    for family, engine in engines.items():
        session = Session()
        reply(engine, ids(40), session)
        for name, other in engines.items():
            if name != family:
                foreign(other, session)
        assert reply(engine, ids(40), session).tokens == reply(engine, ids(40)).tokens


def test_the_same_files_loaded_again_are_another_engine(engines: dict[str, mlx_mtp.Engine], probed_once: None) -> None:
    session, target = Session(), GOLDEN / "ple" / "target"
    reply(engines["none"], ids(40), session)
    for options in ({}, {"mode": "exact"}, {"max_context": 100}):
        foreign(mlx_mtp.load(target, drafter=None, **options), session)
    foreign(mlx_mtp.load(GOLDEN / "keqv" / "target", drafter=None), session)
    session.clear()  # nothing is held: anybody may fill it
    other = mlx_mtp.load(target, drafter=None, mode="exact")
    assert reply(other, ids(40), session).tokens == reply(other, ids(40)).tokens
    foreign(engines["none"], session)


def test_engines_around_the_same_pair_share_sessions(engines: dict[str, mlx_mtp.Engine]) -> None:
    """The depth is no matter of K/V, the mode is."""
    one = engines["assistant"]
    other = mlx_mtp.Engine(one.target, one.drafter, None, depth=1)
    session = Session()
    first = reply(one, ids(40), session)
    second = reply(other, [*ids(40), *first.tokens, *ids(5, 1)], session)
    assert second.stats.prefilled_tokens == 6
    assert second.tokens == reply(one, [*ids(40), *first.tokens, *ids(5, 1)]).tokens


def test_a_session_outlives_its_engine_and_is_nobodys_then() -> None:
    session, target = Session(), GOLDEN / "ple" / "target"
    reply(mlx_mtp.load(target, drafter=None), ids(40), session)
    gc.collect()
    foreign(mlx_mtp.load(target, drafter=None), session)


def test_two_threads_cannot_have_one_session(engines: dict[str, mlx_mtp.Engine]) -> None:
    engine, session = engines["assistant"], Session()
    stream = engine.stream(ids(40), max_tokens=50, ignore_end=True, session=session)
    next(stream)
    with ThreadPoolExecutor(3) as pool:
        for found in [pool.submit(reply, engine, ids(40), session) for _ in range(3)]:
            assert isinstance(found.exception(), mlx_mtp.OptionError)
    stream.close()
    assert reply(engine, ids(40), session).tokens == reply(engine, ids(40)).tokens


def test_a_chat_with_the_session_of_another_engine(tmp_path: Path) -> None:
    one, other = (thinking_engine(tmp_path / str(depth), depth) for depth in (1, 2))
    chat = one.chat()
    list(chat.send("Why?"))
    stolen = other.chat()
    stolen.session = chat.session
    with pytest.raises(mlx_mtp.OptionError, match="another engine"):
        stolen.send("Why?")
    moved = chat.moved(other)
    list(moved.send("And?"))
    assert moved.last is not None and moved.last.stats.prefilled_tokens == moved.last.stats.prompt_tokens
