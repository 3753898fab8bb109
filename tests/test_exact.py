"""Exact mode: bit-equal output with and without a drafter, or a clear refusal to draft; on every kind of device.

What a device does to a row is made up where a test depends on it: `Device` leaves in its K/V how each row was computed,
in whole numbers, so that one row that went another way changes all that follows, whatever the BLAS. What a
real device does to real families is in tests/conformance.py.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlx_mtp
from mlx_mtp.generation.cache import FULL, SLIDING, KVCache, LayerShape
from mlx_mtp.generation.exactness import CANONICAL, Exactness, probe
from mlx_mtp.generation.interfaces import Memory, States
from mlx_mtp.generation.prefix import Session
from mlx_mtp.generation.types import Result
from mlx_mtp.testing import MarkovTarget, ScriptedDrafter

VOCABULARY, WINDOW = 40, 8
# (rows of a pass, number of the row, capacity) -> what the kernels for it add to an exact result.
Rounding = Callable[[int, int, int], int]
EVERY_WIDTH: Rounding = lambda rows, row, capacity: 0  # noqa: E731
EVEN_WIDTHS: Rounding = lambda rows, row, capacity: rows % 2 if rows > 1 else 0  # noqa: E731
FILLED: Rounding = lambda rows, row, capacity: rows  # noqa: E731
NO_WAY: Rounding = lambda rows, row, capacity: rows + row  # noqa: E731
BY_CAPACITY: Rounding = lambda *pass_: (EVERY_WIDTH, NO_WAY, FILLED)[(pass_[2] // 256 - 1) % 3](*pass_)  # noqa: E731
DEVICES = {"every width": EVERY_WIDTH, "even widths": EVEN_WIDTHS, "filled": FILLED, "no way": NO_WAY,
           "by capacity": BY_CAPACITY}  # fmt: skip


class Device(MarkovTarget):
    """A target whose next token depends on the last one, and whose logits' last bits tell how all rows were computed.

    Every row leaves a whole number in the K/V, by `rounding`, or, in a chunk of a prompt, by the chunk and by the rows
    whose states are wanted. A logit is scaled by the sum of those it sees, in a full layer and in a window.
    """

    def __init__(self, rounding: Rounding) -> None:
        super().__init__(mx.array(np.random.default_rng(5).normal(size=(VOCABULARY, VOCABULARY)), dtype=mx.float32))
        self.rounding, self.traced = rounding, []
        self.info = replace(self.info, hidden_size=2, window=WINDOW)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        return KVCache((LayerShape(FULL, 1, 1), LayerShape(SLIDING, 1, 1)), WINDOW, capacity, mx.float32, batch)

    def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
        rows, step = tokens.shape[1], cache.plan(tokens.shape[1])
        self.traced.append((rows, cache.capacity))
        numbers = [self.rounding(rows, row, cache.capacity) if rows < 10 else (rows + row + (keep is not None)) % 5
                   for row in range(rows)]  # fmt: skip
        left = mx.array(numbers, dtype=mx.float32)[None, None, :, None]
        seen = mx.zeros((1, rows))
        for layer, shape in enumerate(cache.shapes):
            kept, _ = cache.update(layer, left, left, step)
            seen = seen + mx.where(step.masks[shape.kind][:, 0], kept[:, 0, :, 0][:, None], 0.0).sum(axis=-1)
        hidden = mx.stack([tokens.astype(mx.float32), seen], axis=-1)
        return States(hidden if keep is None else hidden[:, rows - keep :])

    def head(self, hidden: mx.array) -> mx.array:
        return self.table[hidden[..., 0].astype(mx.int32)] * (1.0 + 2.0**-16 * hidden[..., 1:])


class Reader(ScriptedDrafter):
    """A script whose drafter wants the state of every row, as heads do, and remembers that of the last one."""

    reads_prompt = reads_states = True

    def start(self, batch: int, capacity: int) -> Memory:
        return {"state": mx.zeros((batch, 1, 1))}

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        assert states.hidden.shape[1] == tokens.shape[1]
        return {"state": mx.take_along_axis(states.hidden, accepted[:, None, None], axis=1)[..., :1]}

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        assert states is not None and states.hidden.shape[1] == 1
        return {"state": states.hidden[..., :1]}


def numbers(count: int, seed: int, vocabulary: int = VOCABULARY) -> list[int]:
    return np.random.default_rng(seed).integers(3, vocabulary, count).tolist()


def engine_of(target: object, drafter: object = None, depth: int = 0, ends: Sequence[int] = ()) -> mlx_mtp.Engine:
    return mlx_mtp.Engine(target, drafter, None, mode="exact", depth=depth, stop_tokens=ends)


def turns(engine: mlx_mtp.Engine, prompt: list[int], tokens: int, said: list[int], **options: object) -> list[Result]:
    """A reply, a second turn, that one again, and the first one again; `said` is what the first reply was."""
    session, second = Session(), [*prompt, *said, *prompt[:13]]
    return [engine.generate(ids, max_tokens=tokens, session=session, logprobs=3, **options)
            for ids in (prompt, second, second, prompt)]  # fmt: skip


def check_equal(plain: list[Result], drafted: list[Result]) -> None:
    """Tokens, and the logprobs' very bits (of Python's floats == says so: none is a NaN or a negative zero)."""
    for one, other in zip(plain, drafted, strict=True):
        assert (other.tokens, other.logprobs, other.top_logprobs) == (one.tokens, one.logprobs, one.top_logprobs)
        assert other.stats.mode == one.stats.mode == "exact" and one.stats.drafted == 0


@pytest.mark.parametrize(("name", "length"), [(name, 300) for name in DEVICES] + [("by capacity", 20),
                                                                                  ("by capacity", 560)])  # fmt: skip
def test_every_device(name: str, length: int) -> None:
    """Fresh, second turn and both again, with drafts of which some are right, or plainly and saying so."""
    device, prompt = DEVICES[name], numbers(length, 1)
    first = engine_of(Device(device)).generate(prompt, max_tokens=40)
    plain = turns(engine_of(Device(device)), prompt, 40, first.tokens)
    script = [*prompt, *first.tokens, *prompt[:13]]
    script[length + 2 :: 3] = [(token + 1) % VOCABULARY for token in script[length + 2 :: 3]]
    for drafter, depth in ((ScriptedDrafter, 1), (Reader, 3)):
        engine = engine_of(Device(device), drafter(script), depth)
        drafted = turns(engine, prompt, 40, first.tokens)
        check_equal(plain, drafted)
        capacity = -(-(length + 40 + 36) // 256) * 256
        possible = engine.exactness.at(capacity).possible
        assert possible == (name != "no way" and (name != "by capacity" or capacity != 512))
        for found in (drafted[0], drafted[3])[: 1 if name == "by capacity" else 2]:  # the room has grown in between
            stats = found.stats
            assert 0 < stats.accepted < stats.drafted if possible else stats.drafted == 0
        assert drafted[2].stats.prefilled_tokens == 0 and drafted[1].stats.prefilled_tokens == 40 + 13


def test_a_device_and_tokens_after_the_end_of_a_reply() -> None:
    """Rounds run past an ending token; a conversation goes on the same whether they did or not."""
    prompt = numbers(30, 2)
    said = engine_of(Device(FILLED)).generate(prompt, max_tokens=40).tokens
    ends = [said[11]]
    said = said[: said.index(ends[0])]
    plain = turns(engine_of(Device(FILLED), ends=ends), prompt, 40, [*said, *ends])
    assert len(plain[0].tokens) == len(said) and plain[0].finish_reason == "stop"
    script = [*prompt, *engine_of(Device(FILLED)).generate(prompt, max_tokens=40).tokens]
    drafting = engine_of(Device(FILLED), ScriptedDrafter(script), 4, ends)
    check_equal(plain, turns(drafting, prompt, 40, [*said, *ends]))
    # By what a session knows a server picks the one to go on with.
    sessions = [Session(), Session()]
    for engine, session in zip((engine_of(Device(FILLED), ends=ends), drafting), sessions, strict=True):
        engine.generate(prompt, max_tokens=40, session=session)
    assert sessions[0].ids == sessions[1].ids == prompt


def test_a_device_and_an_edit_far_back() -> None:
    """Undoing goes back to the same rows for every family, however far ahead its rounds have written."""
    one, two = numbers(50, 3), numbers(20, 4)
    results = []
    for drafter, depth in ((None, 0), (ScriptedDrafter(one), 4), (Reader(one), 2)):
        engine, session = engine_of(Device(FILLED), drafter, depth), Session()
        asked = one, [*one, *two], [*one, *two[:9], *one], [*one[:40], *two], one
        results.append([engine.generate(ids, max_tokens=30, session=session, logprobs=1) for ids in asked])
    for found in results[1:]:
        assert [r.logprobs for r in found] == [r.logprobs for r in results[0]]
        assert [r.stats.prefilled_tokens for r in found] == [r.stats.prefilled_tokens for r in results[0]]


def test_a_device_says_where_it_decodes_plainly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = engine_of(Device(BY_CAPACITY), ScriptedDrafter([]), 3)
        assert not caplog.text and engine.generate([5], max_tokens=20).stats.drafted > 0
        assert engine.generate(numbers(250, 1), max_tokens=20).stats.drafted == 0
        assert engine.generate(numbers(251, 1), max_tokens=20).stats.mode == "exact"
    assert caplog.text.count("decoding plainly") == caplog.text.count("with room for 512 tokens") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        engine = engine_of(Device(NO_WAY), ScriptedDrafter([]), 3)
        assert engine.depth == 3 and not caplog.text  # nothing is probed before the first request
        assert engine.generate([5], max_tokens=20).stats.drafted == 0
    assert "decoding plainly" in caplog.text


def test_the_pass_is_traced_by_itself() -> None:
    """Once for every number of rows and capacity: neither sampling nor drafts are in its graph, and processors that
    run between it and acceptance find the same one."""
    target = Device(EVERY_WIDTH)
    options = ({}, {"logprobs": 2}, {"sampling": mlx_mtp.Sampling(logit_bias={3: 2.0})},
               {"sampling": mlx_mtp.Sampling(repetition_penalty=1.5, frequency_penalty=0.5)},
               {"logits_processors": [lambda tokens, logits: logits]})  # fmt: skip
    engine = engine_of(target, ScriptedDrafter([]), 2)
    engine.generate([5, 6], max_tokens=20)
    target.traced.clear()
    for each in options:
        engine.generate([5, 6], max_tokens=20, **each)
    assert target.traced == [(2, 256)] * len(options)  # the prompts


@pytest.mark.parametrize(("rounding", "found"), [
    (EVERY_WIDTH, Exactness(tuple(range(9)), None)),
    (EVEN_WIDTHS, Exactness((0, 1, 3, 5, 7), None)),
    (FILLED, Exactness(tuple(range(CANONICAL)), CANONICAL)),
    (NO_WAY, Exactness((0,), None)),
    (lambda rows, row, capacity: int(rows > 5 and row == rows - 1), Exactness((0, 1, 2, 3, 4), None)),
])  # fmt: skip
@pytest.mark.parametrize("capacity", [256, 768])
def test_the_probe_finds_the_way(rounding: Rounding, found: Exactness, capacity: int) -> None:
    assert probe(Device(rounding), capacity) == found


@pytest.mark.parametrize("where", ["logits", "keys", "wrong drafts"])
def test_the_probe_sees_one_differing_bit(where: str) -> None:
    """In the least part of one row, in K/V that no probed token reads, and where only drafts in front are wrong."""

    class Off(Device):
        def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
            states, rows = super().forward(tokens, cache, keep), tokens.shape[1]
            if where == "keys" and 1 < rows < 10:
                cache.values[0] = cache.values[0] + 2.0**-20
            if where == "wrong drafts" and 1 < rows < 10:  # the first row sees what stands in the last
                return States(states.hidden + mx.array([0.0, 1.0]) * (tokens[:, -1:, None] % 2))
            return states

        def head(self, hidden: mx.array) -> mx.array:
            logits, rows = super().head(hidden), hidden.shape[1]
            return logits * (1.0 + 2.0**-22 * (mx.arange(rows) == 3)[:, None]) if where == "logits" else logits

    found = probe(Off(EVERY_WIDTH), 512)
    assert found == (Exactness((0, 1, 2), None) if where == "logits" else Exactness((0,), None))


@pytest.mark.parametrize("way", ["penalties", "processors"])
def test_other_ways_to_logits(way: str) -> None:
    prompt = numbers(40, 8)
    options = {
        "penalties": {"sampling": mlx_mtp.Sampling(repetition_penalty=1.3, presence_penalty=0.2, logit_bias={5: 1.5})},
        "processors": {"logits_processors": [lambda tokens, logits: logits * (1.0 + 0.01 * tokens.size)]},
    }[way]
    said = engine_of(Device(FILLED)).generate(prompt, max_tokens=30, **options).tokens
    plain = turns(engine_of(Device(FILLED)), prompt, 30, said, **options)
    script = [*prompt, *said]
    script[43::5] = [0] * len(script[43::5])
    drafted = turns(engine_of(Device(FILLED), Reader(script), 3), prompt, 30, said, **options)
    check_equal(plain, drafted)
    assert 0 < drafted[0].stats.accepted < drafted[0].stats.drafted
