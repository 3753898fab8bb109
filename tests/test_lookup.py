"""Lookup against a brute-force search in plain Python, alone and in front of another drafter."""

import mlx.core as mx
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_mtp
from mlx_mtp.drafters.lookup import LONGEST, Lookup
from mlx_mtp.generation.interfaces import States

NO_STATES = States(mx.zeros((1, 0, 0)))


def by_hand(text: list[int], depth: int) -> tuple[list[int], int]:
    """Continuation of the most recent of the longest matches of the text's end, and the match's length."""
    best, size = None, 0
    for end in range(len(text) - 1):
        length = 0
        while length < min(LONGEST, end + 1) and text[end - length] == text[-1 - length]:
            length += 1
        if length and length >= size:
            best, size = end, length
    if best is None:
        return [text[-1]] * depth, 0
    period = len(text) - 1 - best
    return [text[best + 1 + i % period] for i in range(depth)], size


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 8), st.integers(1, 9))
def test_like_a_search_by_hand(text: list[int], depth: int, chunk: int) -> None:
    lookup = Lookup()
    memory = lookup.start(1, 64)
    for start in range(0, len(text) - 1, chunk):
        rows = text[:-1][start : start + chunk]
        rejected = [9] * 3  # written behind the rows, never committed
        memory = lookup.observe(memory, mx.array([rows + rejected]), NO_STATES, mx.array([len(rows) - 1]))
    found, size = lookup.continuation(memory, mx.array([text[-1:]]), depth)
    assert (found.tolist()[0], size.item()) == by_hand(text, depth)


def test_it_drafts_what_was_written_before() -> None:
    """The embedded target, asked to go on with a text that repeats itself, is drafted almost perfectly."""
    engine = mlx_mtp.load(drafter="lookup", depth=4)
    text = "import os\nimport sys\nimport re\n\n" * 6
    result = engine.generate(text, raw=True, max_tokens=100, ignore_end=True)
    assert result.stats.tokens_per_round > 3
