"""Sessions beyond what every pair promises (conformance.py): snapshots of rings, cut replies, whose K/V they are."""

import gc
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import mlx.core as mx
import pytest
from conftest import GOLDEN
from families import config_of, written
from greedy import assert_greedy, ids, lively
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_mtp
from mlx_mtp.generation.cache import FULL, SLIDING, KVCache, LayerShape
from mlx_mtp.generation.prefix import Session, _intact


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, mlx_mtp.Engine]:
    """One target with windows of 8 tokens; decoding plainly, and with drafters without and with K/V of their own."""
    folder = tmp_path_factory.mktemp("drafters")
    sequential = written(folder / "sequential", config_of("sequential_modules", 32, 128, 2, aux_layers=[1]))
    drafters = {"none": None, "assistant": GOLDEN / "ple" / "assistant_tied", "sequential": sequential}
    return {name: lively("ple", drafter, depth=2 if drafter else "auto") for name, drafter in drafters.items()}


def reply(engine: mlx_mtp.Engine, prompt: list[int], session: Session | None = None, tokens: int = 24):
    """A reply that a fresh run could have given: greedy by a pass without a cache."""
    result = engine.generate(prompt, max_tokens=tokens, ignore_end=True, session=session)
    assert_greedy(engine, prompt, result.tokens)
    return result


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


@pytest.mark.parametrize("family", ["none", "assistant", "sequential"])
def test_a_fork_goes_its_own_way(engines: dict[str, mlx_mtp.Engine], family: str) -> None:
    """Both go on, in turns, and neither writes into what the other holds; processors make the loop write in place."""
    engine, session = engines[family], Session()
    processed = {"max_tokens": 12, "ignore_end": True, "logits_processors": [lambda tokens, logits: logits]}
    one = ids(30)
    one += engine.generate(one, session=session, **processed).tokens
    with ThreadPoolExecutor(1) as pool:  # a server's thread, which is not the one that computes replies
        other, fork = [*one[:30], *ids(6, 9)], pool.submit(session.fork).result()
    for turn in range(3):
        for said, its in ((other, fork), (one, session)):
            said += ids(3, turn)
            result = engine.generate(said, session=its, **processed)
            assert_greedy(engine, said, result.tokens)
            assert result.stats.prefilled_tokens < (30 if turn or its is session else 37)
            said += result.tokens
    assert session.fork().fork().ids == session.ids


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
    stop = mock.Mock(side_effect=KeyboardInterrupt)
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


# Whose K/V they are


def foreign(engine: mlx_mtp.Engine, session: Session) -> None:
    before = list(session.ids)
    with pytest.raises(mlx_mtp.OptionError, match="another engine"):
        engine.stream(ids(40), session=session)  # before anything runs
    assert session.ids == before and not session.busy


def test_a_session_belongs_to_the_engine_that_filled_it(engines: dict[str, mlx_mtp.Engine]) -> None:
    """To none around other drafters, modes, sizes or models, nor to the same files loaded again."""
    target, options = GOLDEN / "ple" / "target", ({}, {"mode": "exact"}, {"max_context": 100})
    others = [*engines.values(), *(mlx_mtp.load(target, drafter=None, **each) for each in options),
              mlx_mtp.load(GOLDEN / "keqv" / "target", drafter=None)]  # fmt: skip
    for engine in engines.values():
        session = Session()
        reply(engine, ids(40), session)
        for other in others:
            if other is not engine:
                foreign(other, session)
        assert reply(engine, ids(40), session).tokens == reply(engine, ids(40)).tokens
    session.clear()  # nothing is held: anybody may fill it
    assert reply(others[4], ids(40), session).tokens == reply(others[4], ids(40)).tokens
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
