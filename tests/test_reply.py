"""What a reply is: its text, tokens and statistics end at one token, whatever was drafted and however runs were cut.

References are searches in the whole text and counts by hand. Drafts are accepted and rejected for real.
"""

import codecs
import itertools
import os
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import mlx.core as mx
import pytest
from conftest import uncompiled
from hypothesis import example, given, settings
from hypothesis import strategies as st

import mlx_mtp
from mlx_mtp.generation.loop import Chunk
from mlx_mtp.generation.reply import Reply
from mlx_mtp.testing import MarkovDrafter, MarkovTarget, _check_statistics
from mlx_mtp.text.channels import GEMMA, THOUGHTS, CallFormat, Channels, ToolCall

CALL = GEMMA.opening, GEMMA.closing
CLOSING = dict([*THOUGHTS, CALL])

PROPERTY = {"deadline": None, "derandomize": True}
GREEDY = mlx_mtp.Sampling(temperature=0.0)


class Stream:
    """Bytes to characters as they come."""

    def __init__(self, bytes_of: Sequence[bytes]) -> None:
        self.bytes_of, self.reader = bytes_of, codecs.getincrementaldecoder("utf-8")("replace")
        self.last_segment = ""

    def add_token(self, token: int) -> None:
        self.last_segment = self.reader.decode(self.bytes_of[token])

    def finalize(self) -> None:
        self.last_segment = self.reader.decode(b"", final=True)


@dataclass
class Spelling:
    """A tokenizer of any tokens: `bytes_of` says what each id is; a character may be spread over several."""

    bytes_of: Sequence[bytes]
    opened: str | None = None
    has_chat_template: bool = True

    def decode(self, ids: Sequence[int]) -> str:
        return b"".join(self.bytes_of[i] for i in ids).decode("utf-8", "replace")

    def stream(self) -> Stream:
        return Stream(self.bytes_of)

    def call_format(self, tools: object = None) -> CallFormat:
        return GEMMA

    def opened_thought(self, ids: Sequence[int]) -> str | None:
        return self.opened


# References


@dataclass
class Expected:
    """text: as written, up to a stop. count: tokens."""

    text: str
    count: int
    stopped: bool
    content: str
    thinking: str


def expected(parts: Sequence[bytes], stops: Sequence[str], opened: str | None, raw: bool) -> Expected:
    """With nothing but searches in the whole text and in what the first n tokens decode to."""
    whole = b"".join(parts).decode("utf-8", "replace")
    answers, thoughts = [(0, len(whole))], []
    if not raw:
        answers, thoughts = told_apart(whole, opened)
    hits = []
    for begin, end in answers:
        for stop in filter(None, stops):
            at = whole.find(stop, begin, end)
            if at >= 0:
                hits.append((at + len(stop), at))
    if not hits:
        cut, count = len(whole), len(parts)
    else:
        last, cut = min(hits)
        for count in range(1, len(parts) + 1):
            so_far = b"".join(parts[:count]).decode("utf-8", "replace")
            if len(os.path.commonprefix((so_far, whole))) >= last:
                break
    content = "".join(whole[begin : min(end, cut)] for begin, end in answers if begin < cut)
    thinking = "".join(whole[begin : min(end, cut)] for begin, end in thoughts if begin < cut)
    return Expected(whole[:cut], count, bool(hits), content, thinking)


def told_apart(whole: str, opened: str | None) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the answer and the thoughts are in a text without any call that can be read."""
    answers: list[tuple[int, int]] = []
    thoughts: list[tuple[int, int]] = []
    place, empty = 0, True
    while place < len(whole) or opened:
        if opened is None:
            found = [(at, marker) for marker in CLOSING if marker != CALL[0] and (at := whole.find(marker, place)) >= 0]
            at, marker = min(found, default=(len(whole), None))
            begin = place
            while empty and begin < at and whole[begin] == "\n":
                begin += 1
            empty &= begin == at
            answers.append((begin, at))
            if marker is None:
                return answers, thoughts
            place, opened = at + len(marker), marker
            if marker == "<|channel>":
                closes = whole.find(CLOSING[marker], place)
                line = whole.find("\n", place, closes if closes >= 0 else len(whole))
                place = line + 1 if line >= 0 else closes if closes >= 0 else len(whole)
        end = whole.find(CLOSING[opened], place)
        thoughts.append((place, end if end >= 0 else len(whole)))
        if end < 0:
            return answers, thoughts
        place, opened = end + len(CLOSING[opened]), None
    return answers, thoughts


# The reply, fed by hand

WORDS = ["a", "b ", "\n", "\n\n", "<", "<|", "|>", "<th", "ink>", "é", "€", "thought\n", "ab", "aab"]
MARKERS = [marker for pair in CLOSING.items() if CALL[0] not in pair for marker in pair]


@st.composite
def written(draw: st.DrawFn) -> list[bytes]:
    """Tokens of a reply: words and markers, cut anywhere, in characters too."""
    whole = "".join(draw(st.lists(st.sampled_from(WORDS + MARKERS), min_size=1, max_size=14))).encode()
    places = sorted(draw(st.sets(st.integers(1, len(whole)), max_size=20)))
    tokens = [whole[a:b] for a, b in zip([0, *places], [*places, len(whole)], strict=True)]
    if draw(st.booleans()):
        tokens.append("€".encode()[:2])  # a character that never comes to its end
    return [token for token in tokens if token]


STOPS = st.lists(st.text("ab <\né>", max_size=3) | st.sampled_from(["ink>", "�", "<th", "a<", "thought"]), max_size=3)


@settings(max_examples=500, **PROPERTY)
@given(written(), STOPS, st.sampled_from([None, "<think>", "<|channel>"]), st.booleans(), st.data())
@example([b"a", b"<thx"], ["<"], None, False, None)  # known to be no marker one token later
@example([b"a", b"<", b"x"], ["<"], None, False, None)  # and by a token that is not in the reply
@example([b"a\xe2"], ["�"], None, True, None)  # known to be no character at the very end
@example([b"ab<think>\n</think>b", b"\n"], ["bb", "b\n"], None, False, None)
def test_any_reply_like_a_search(
    parts: list[bytes], stops: list[str], opened: str | None, raw: bool, data: st.DataObject | None
) -> None:
    size = len(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, size), max_size=6))) if data else list(range(size))
    reply = Reply(Stream(parts), stops, None if raw else Channels(opened))
    events = []
    for begin, end in itertools.pairwise([0, *cuts, size]):
        ids = list(range(begin, end))
        reply.extend(Chunk(ids, [-0.5 * i for i in ids], [{i: 0.0} for i in ids]), ())
        events.append(reply.event())
    reply.finish()
    events.append(reply.event())
    wanted = expected(parts, stops, None if raw else opened, raw)
    assert (reply.stops.found is not None) == wanted.stopped
    assert reply.text == "".join(event.text for event in events) == wanted.text
    assert reply.tokens == [token for event in events for token in event.tokens] == list(range(wanted.count))
    scores = [one for event in events for one in zip(event.logprobs or [], event.top_logprobs or [], strict=True)]
    assert scores == list(zip(reply.logprobs, reply.top, strict=True)) == [(-0.5 * i, {i: 0.0}) for i in reply.tokens]
    assert "".join(event.content for event in events) == wanted.content
    assert "".join(event.thinking for event in events) == wanted.thinking
    # "both end at the same token": the tokens are the text, and the stop string in their last one.
    assert b"".join(parts[i] for i in reply.tokens).decode("utf-8", "replace").startswith(wanted.text.rstrip("�"))


def test_no_stop_in_a_call() -> None:
    """Neither in one that can be read nor in one that is shown as it was written."""
    for body, calls in (("call:f{a:1}", [ToolCall("f", {"a": 1})]), ("call:f{a:1", [])):
        text = f"Well. {CALL[0]}{body}{CALL[1]} Then f{{a:1 again."
        parts = [character.encode() for character in text]
        reply = Reply(Stream(parts), ["f{a", ". <"], Channels(calls=GEMMA))
        reply.extend(Chunk(list(range(len(parts)))), ())
        event = reply.event()
        assert reply.stops.found is not None and reply.text == text[: text.rindex("f{a")] and event.calls == calls
        assert len(reply.tokens) == text.rindex("f{a") + 3
        assert event.content == "Well.  Then " if calls else event.content == reply.text


def test_text_is_shown_at_once() -> None:
    """But for what may become a stop string, a marker or a character; tokens only wait for a stop string."""
    parts = [b"ab", b"<", b"thx", b"\xe2", b"\x82\xac", b"<|tool_call>", b"call:f{", b"}<tool", b"_call|>"]

    def shown(stops: list[str]) -> list[tuple[str, int]]:
        reply, found = Reply(Stream(parts), stops, Channels(calls=GEMMA)), []
        for i in range(len(parts)):
            reply.extend(Chunk([i]), ())
            event = reply.event()
            found.append((event.text, len(event.tokens)))
        return found

    texts = ["ab", "", "<thx", "", "€", "<|tool_call>", "call:f{", "}", "<tool_call|>"]
    assert shown([]) == [(text, 1) for text in texts]
    texts[0], texts[2] = "a", "b<thx"  # "b<" may begin "b<!"
    assert shown(["b<!"]) == list(zip(texts, [1, 0, 2, 1, 1, 1, 1, 0, 2], strict=True))


# The engine


def told_to_write(parts: Sequence[bytes], depth: int, wrong: Sequence[int] = (), end: bool = False) -> mlx_mtp.Engine:
    """Token i follows i - 1 (the prompt is token 0), then an ending token where wanted; drafts are wrong at `wrong`."""
    count = len(parts) + 2
    table = -20.0 * mx.ones((count, count))
    drafts = mx.array(table)
    for i in range(count - 1):
        table[i, i + 1] = 20.0
        drafts[i, 0 if i + 1 in wrong else i + 1] = 20.0
    table[count - 1, count - 1] = 20.0
    spelling = Spelling([b"", *parts, b"<end>"])
    drafter = MarkovDrafter(drafts) if depth else None
    return mlx_mtp.Engine(MarkovTarget(table), drafter, spelling, stop_tokens=[count - 1] if end else (), depth=depth)


@dataclass
class Story:
    parts: list[bytes]
    stops: list[str]
    wrong: list[int]
    budget: int
    end: bool


@st.composite
def stories(draw: st.DrawFn) -> Story:
    parts = draw(written().filter(lambda parts: len(parts) > 2))
    wrong = draw(st.lists(st.integers(1, len(parts) + 1), max_size=6))
    return Story(parts, draw(STOPS), wrong, draw(st.integers(1, len(parts) + 1)), draw(st.booleans()))


@settings(max_examples=30, **PROPERTY)
@given(stories())
@example(Story([b"a", b"b", b"ab", b"a", b"b ", b"c", b"d", b"e"], ["ab "], [], 7, True))
@example(Story([b"a", b"b", b"c", b"d"], ["d"], [], 6, True))  # completed right before the ending token
@example(Story([b"a", b"b", b"c", b"d", b"e", b"f", b"g"], ["de"], [3], 7, False))
def test_every_depth_ends_at_the_same_token(story: Story) -> None:
    wanted = None
    for depth in (0, 1, 2, 3, 5, 8):
        engine, session = told_to_write(story.parts, depth, story.wrong, story.end), mlx_mtp.Session()
        with uncompiled():
            events = list(engine.stream(
                [0], max_tokens=story.budget, stop=[stop for stop in story.stops if stop], logprobs=2,
                session=session, sampling=GREEDY,
            ))  # fmt: skip
        result = events[-1].result
        if wanted is None:
            room = story.parts[: story.budget]
            wanted = expected(room, story.stops, None, raw=False)
            ended = story.end and story.budget > len(story.parts)
            if not story.end and story.budget > len(story.parts):  # the token that would end it, as text
                wanted = expected([*room, b"<end>"], story.stops, None, raw=False)
        assert result.finish_reason == ("stop" if wanted.stopped or ended else "length")
        assert result.tokens == [i + 1 for i in range(wanted.count)] == [t for event in events for t in event.tokens]
        assert result.text == wanted.text == "".join(event.text for event in events)
        assert len(result.logprobs) == len(result.top_logprobs) == result.stats.tokens == wanted.count
        assert "".join(event.content for event in events) == wanted.content
        read = max(wanted.count, 1) + (ended and not wanted.stopped)
        assert session.ids == [0, *result.tokens][: read]
        _check_statistics(result.stats)


def test_what_is_not_in_the_reply_was_not_accepted() -> None:
    parts = [bytes([65 + i]) for i in range(26)]
    engine = told_to_write(parts, 8)
    for options, tokens, accepted in (
        ({"max_tokens": 2}, 2, [1]), ({"max_tokens": 1}, 1, []), ({"max_tokens": 10}, 10, [1] * 8),
        ({"stop": ["CD"]}, 4, [1] * 3), ({"max_tokens": 12}, 12, [2, 2] + [1] * 6),
    ):  # fmt: skip
        stats = engine.generate([0], raw=True, sampling=GREEDY, **{"max_tokens": 20, **options}).stats
        assert stats.tokens == tokens and stats.accepted == sum(accepted)
        assert [n for n in stats.accepted_by_position if n] == accepted
        assert [n for n in stats.verified_by_position if n] == accepted  # nothing was rejected in front of the end
        assert stats.drafted == 8 * bool(accepted) * (1 + (tokens > 10))
    rejected = told_to_write(parts, 8, wrong=[4]).generate([0], raw=True, max_tokens=4, sampling=GREEDY).stats
    assert rejected.accepted_by_position == [1, 1, 0, 0, 0, 0, 0, 0]
    assert rejected.verified_by_position == [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("depth", [0, 8])
def test_a_turn_after_a_stop_is_that_of_a_fresh_run(depth: int) -> None:
    """Rows that were written beyond the stop are not part of the conversation."""
    engine = mlx_mtp.load(drafter="none" if depth == 0 else "auto", depth=depth)
    ids = engine.tokenizer.encode("import os\n\n\nclass Reader:\n")
    text = engine.generate(ids, max_tokens=40, raw=True).text
    session = mlx_mtp.Session()
    *_, last = engine.stream(ids, max_tokens=40, raw=True, stop=[text[30:33]], session=session)
    tokens = last.result.tokens
    assert last.result.text == text[: text.index(text[30:33])] and session.ids == [*ids, *tokens[:-1]]
    for following in ([*ids, *tokens], [*ids, *tokens[:-2], 9, 9], [*ids, *tokens, *ids]):
        *_, again = engine.stream(following, max_tokens=12, raw=True, session=session)
        assert again.result.tokens == engine.generate(following, max_tokens=12, raw=True).tokens


# A long reply


@pytest.mark.parametrize("kind", ["plain", "stops", "thought", "call", "name", "processors"])
def test_a_token_costs_the_same_at_any_length(kind: str) -> None:
    """Bytes allocated for a token, where one string or list of the whole reply would show: 8 bytes a token and more."""
    parts = [b"<|tool_call>", b"call:f{", b"a "] if kind == "call" else [b"<|channel>", b"thought\n", b"a "]
    parts = [parts[0], b"x", b"a "] if kind == "name" else parts
    table = -20.0 * mx.ones((4, 4))
    for i, following in enumerate((3 if kind in ("plain", "stops", "processors") else 1, 2, 3, 3)):
        table[i, following] = 20.0
    engine = mlx_mtp.Engine(MarkovTarget(table), None, Spelling([b"", *parts]))
    options = {"stop": ["a b", "never"]} if kind == "stops" else {}
    if kind == "processors":
        options["logits_processors"] = [lambda tokens, logits: logits]
    length, window = 3000, 300
    costs: list[int] = []
    tracemalloc.start()
    try:
        for _ in engine.stream([0], max_tokens=length, sampling=GREEDY, **options):
            now, peak = tracemalloc.get_traced_memory()
            costs.append(peak - now)
            tracemalloc.reset_peak()
    finally:
        tracemalloc.stop()
    early, late = median(costs[200 : 200 + window]), median(costs[-window - 10 : -10])
    assert late < early + 4 * (length - window) / 2, (early, late)
