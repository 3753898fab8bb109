"""Answers held to a grammar: the distribution by enumeration and by the real loop, and every way to ask for one.

Reference: languages small enough to be listed. A token may follow a text where some text of the list goes on with it.
"""

import asyncio
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import pydantic
import pytest
from conftest import GOLDEN, Command
from greedy import NEAR_TIE, lively
from llguidance import LLTokenizer, TokenizerWrapper
from references import log_softmax
from test_sampling import filtered

import mlx_mtp
from mlx_mtp import OptionError, Sampling
from mlx_mtp.generation import acceptance
from mlx_mtp.generation.constraint import WORD, Constraint, Grammar
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.generation.request import GenerationRequest
from mlx_mtp.generation.sampling import SamplingSpec, TokenDistribution, point_mass, stacked
from mlx_mtp.generation.types import NEUTRAL, Stats
from mlx_mtp.testing import MarkovDrafter, MarkovTarget
from mlx_mtp.text.channels import ThoughtTokens

END = 0
# (kind, grammar, every text of its language)
LANGUAGES: dict[str, tuple[str, Any, list[str]]] = {
    "regex": ("regex", "(a|b)?c(ab|ba){1,2}", [f"{x}c{y}{z}" for x in ("", "a", "b") for y in ("ab", "ba")
                                               for z in ("", "ab", "ba")]),
    "lark": ("grammar", 'start: "a" middle "c"?\nmiddle: "b" | "cc" | "bab"',
             [f"a{x}{y}" for x in ("b", "cc", "bab") for y in ("", "c")]),
    "schema": ("json_schema", {"enum": ["ab", "abba", "c"]}, ['"ab"', '"abba"', '"c"']),
}  # fmt: skip
TOKENS = [b"<end>", b"a", b"b", b"c", b"ab", b'"']
# Longer texts of fewer tokens, so that every block of eight drafts can be tried.
LONG: dict[str, tuple[str, Any, list[str]]] = {
    "long regex": ("regex", '(a|")?(a|"a){2,6}', [x + "".join(rest) for x in ("", "a", '"') for count in range(2, 7)
                                                  for rest in itertools.product(("a", '"a'), repeat=count)]),
    "long lark": ("grammar", 'start: "a" ("\\"" | "aa")~1..6',
                  ["a" + "".join(rest) for count in range(1, 7)
                   for rest in itertools.product(('"', "aa"), repeat=count)]),
    "long schema": ("json_schema", {"enum": ["a", "aaa", "aaaaaaa"]}, ['"a"', '"aaa"', '"aaaaaaa"']),
}  # fmt: skip
FEW = [b"<end>", b"a", b'"']


class Letters:
    """A tokenizer as llguidance wants one."""

    eos_token_id, bos_token_id, special_token_ids = END, None, [END]

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = list(tokens)

    def __call__(self, text: bytes) -> list[int]:
        found = []
        while text:
            best = max((one for one in self.tokens[1:] if text.startswith(one)), key=len, default=b"")
            found += [self.tokens.index(best)] if best else []
            text = text[len(best) or 1 :]
        return found


def grammar(name: str, tokens: Sequence[bytes] = TOKENS) -> Grammar:
    kind, text, _ = (LANGUAGES | LONG)[name]
    table = LLTokenizer(TokenizerWrapper(Letters(tokens)), eos_token=END)
    return Grammar.of(table, len(tokens), [END], kind, text)


def may_follow(name: str, before: Sequence[int], tokens: Sequence[bytes] = TOKENS) -> list[bool]:
    """Of every token, by the list of all texts."""
    texts = [text.encode() for text in (LANGUAGES | LONG)[name][2]]
    said = b"".join(tokens[token] for token in before)
    follows = [any(text.startswith(said + token) for text in texts) for token in tokens]
    return [said in texts, *follows[1:]]


def allowed(mask: np.ndarray, count: int) -> list[bool]:
    return [bool(mask[token // WORD] >> (token % WORD) & 1) for token in range(count)]


@pytest.mark.parametrize("name", LANGUAGES)
def test_masks_after_every_draft(name: str) -> None:
    """For all sequences of up to three drafts, from every place that a reply can come to."""
    places, seen = [()], 0
    while places:
        said = places.pop()
        follows = may_follow(name, said)
        places += [(*said, token) for token in range(1, len(TOKENS)) if follows[token]]
        constraint = Constraint(grammar(name))
        constraint.add(said)
        for drafts in itertools.product(range(len(TOKENS)), repeat=3):
            valid = True
            for i, mask in enumerate(constraint.masks(drafts)):
                found, before = allowed(mask, len(TOKENS)), (*said, *drafts[:i])
                assert found == may_follow(name, before) if valid else all(found)
                valid = valid and i < 3 and drafts[i] != END and found[drafts[i]]
                seen += 1
        assert constraint.complete == follows[END]
        forced = constraint.override(4)
        text = b"".join(TOKENS[token] for token, on in zip(*(forced[key].tolist()[0] for key in ("tokens", "mask")),
                                                           strict=True) if on)  # fmt: skip
        rest = {text.encode()[len(b"".join(TOKENS[one] for one in said)) :] for text in LANGUAGES[name][2]
                if text.encode().startswith(b"".join(TOKENS[one] for one in said))}  # fmt: skip
        assert all(one.startswith(text) for one in rest)
    assert seen > 1000


def drafted(how: str, size: int, depth: int) -> tuple[np.ndarray, TokenDistribution, np.ndarray]:
    """Every block of drafts [B, K], what each draft was drawn from [B, K, V], and how often the block is drawn [B].

    As the families draft: each draft given the one before (a chain), all of them at once (parallel heads), nothing
    but one block (lookup), and a chain after a first draft of which it is certain (a draft that a grammar forces).
    """
    chance = np.random.default_rng(depth)
    blocks = np.array(list(itertools.product(range(size), repeat=depth)), dtype=np.int32)
    logits = chance.normal(size=(depth, size, size)).astype(np.float32)
    before = np.pad(blocks[:, :-1], ((0, 0), (1, 0)), constant_values=1)
    if how == "parallel":
        before = np.ones_like(before)
    q = np.array(mx.softmax(mx.array(logits[np.arange(depth), before]), axis=-1))
    if how in ("lookup", "forced"):
        sure = chance.integers(1, size, depth if how == "lookup" else 1)
        q[:, : len(sure)] = np.eye(size, dtype=np.float32)[sure]
    drawn = np.take_along_axis(q, blocks[..., None], axis=-1)[..., 0].astype(np.float64).prod(axis=1)
    taken = drawn > 0
    return blocks[taken], TokenDistribution(None, mx.array(q[taken])), drawn[taken]


@pytest.mark.parametrize("how", ["chain", "parallel", "lookup", "forced"])
@pytest.mark.parametrize("odds", [acceptance.block_odds, acceptance.token_odds])
@pytest.mark.parametrize(("names", "tokens", "depth"), [
    *((LANGUAGES, TOKENS, depth) for depth in (1, 2, 3)), *((LONG, FEW, depth) for depth in (4, 5, 6, 7, 8)),
])  # fmt: skip
def test_enumeration(names: Sequence[str], tokens: Sequence[bytes], depth: int, odds: Any, how: str) -> None:
    """Every block of drafts, drawn without any grammar: what a round emits follows plain constrained decoding."""
    size = len(tokens)
    p_logits = np.random.default_rng(depth).normal(size=(size, size)).astype(np.float32) * 1.5
    sampling = Sampling(temperature=1.3, top_p=0.97)
    full = sampling.over(NEUTRAL)
    spec = SamplingSpec.of(full, size)
    for name in names:
        constraint = Constraint(grammar(name, tokens))

        @cache
        def chances(before: tuple[int, ...], name: str = name) -> np.ndarray:
            """Plain constrained decoding in float64: the grammar before the filters."""
            row = p_logits[before[-1] if before else 1].astype(np.float64)
            return filtered(np.where(may_follow(name, before, tokens), row, -np.inf), sampling)

        blocks, q, drawn = drafted(how, size, depth)
        masks = np.stack([constraint.masks(block.tolist()) for block in blocks])
        rows = p_logits[np.pad(blocks, ((0, 0), (1, 0)), constant_values=1)]
        rows = np.where(np.stack([masks[..., 0] >> token & 1 for token in range(size)], axis=-1) == 1, rows, -np.inf)
        found = odds(mx.array(blocks), q, spec.distribution(mx.array(rows), None, spec.arrays(full, size)))
        passes, residual = np.array(found.pass_), np.array(found.residual.probabilities)
        emitted: dict[tuple[int, ...], float] = {}
        for accepted in range(depth + 1):
            ending = 1.0 - (passes[:, accepted : accepted + 1] if found.prefix else passes[:, accepted:])
            passed = passes[:, :accepted] if found.prefix else passes[:, max(accepted - 1, 0) : accepted]
            weights = (drawn * passed.prod(axis=1) * ending.prod(axis=1))[:, None] * residual[:, accepted]
            for block, row in zip(blocks[:, :accepted].tolist(), weights, strict=True):
                for token in np.flatnonzero(row):
                    said = (*block, int(token))
                    said = said[: said.index(END) + 1] if END in said else said
                    emitted[said] = emitted.get(said, 0.0) + float(row[token])
        assert sum(emitted.values()) == pytest.approx(1.0, abs=1e-4)
        places, seen = [((), 1.0, 0.0)], 0
        while places:
            # What plain decoding gives this text, and what the round does: what it emitted, gone on with plainly.
            said, wanted, got = places.pop()
            got += emitted.pop(said, 0.0)
            if len(said) == depth + 1 or END in said:
                assert abs(got - wanted) < 1e-5, (name, said)
                seen += 1
                continue
            following = chances(said).tolist()
            places += [((*said, token), wanted * one, got * one) for token, one in enumerate(following) if one > 0]
        assert seen > 1 and sum(emitted.values()) < 1e-6, "something was emitted that plain decoding never gives"


def test_forced_drafts_are_point_masses() -> None:
    """Where only one text can follow, whatever the drafter thinks of it."""
    forced = {"mask": mx.array([[True, False]]), "tokens": mx.array([[3, 0]])}
    target, drafter = MarkovTarget(mx.zeros((6, 6))), MarkovDrafter(mx.zeros((6, 6)))
    decoder = Decoder(target, drafter, FixedDepth(2))
    sampling = Sampling(temperature=1.0).over(NEUTRAL)
    state = decoder.prefill(GenerationRequest(ids=[1, 2], budget=8, sampling=sampling), 2)
    seen = []

    def change(drafts: mx.array | None, logits: mx.array) -> mx.array:
        assert drafts is not None
        seen.append(drafts.tolist()[0])
        return mx.where(mx.arange(6) == drafts[0, 0], 50.0, logits)  # surely accepted, as q is 1 there

    output = decoder.rounds.submit(state, 2, change, forced)
    assert seen[0][0] == 3 and output.tokens.tolist()[0][0] == 3 and output.tokens.tolist()[0][-1] >= 1
    assert stacked([point_mass(mx.array([[3]]))]).at(mx.array([[3]])).item() == 1.0


@pytest.mark.parametrize(("name", "depth"), [("regex", 0), *((name, 3) for name in LANGUAGES)])
def test_the_real_loop(name: str, depth: int) -> None:
    """Many replies by seed: every text of the language as often as plain constrained decoding gives it."""
    chance = np.random.default_rng(5)
    table, drafts = (mx.array(chance.normal(size=(6, 6)).astype(np.float32)) for _ in range(2))
    decoder = Decoder(MarkovTarget(table), MarkovDrafter(drafts) if depth else None, FixedDepth(depth))
    weights = np.array(table)

    def chance_of(said: list[int]) -> float:
        total = 1.0
        for i, token in enumerate(said):
            before = said[i - 1] if i else 1
            logits = np.where(may_follow(name, said[:i]), weights[before].astype(np.float64), -np.inf)
            total *= np.exp(logits[token]) / np.exp(logits).sum()
        return float(total)

    counts: dict[tuple[int, ...], int] = {}
    runs, rules, accepted = 300, grammar(name), 0
    for seed in range(runs):
        request = GenerationRequest(ids=[2, 1], budget=12, sampling=Sampling(temperature=1.0).over(NEUTRAL), seed=seed,
                                    seeded=True, grammar=rules)  # fmt: skip
        tokens: list[int] = []
        for chunk in decoder.decode(request, Stats(prompt_tokens=2)):
            accepted += chunk.accepted
            tokens += chunk.tokens
            if END in tokens:
                break
        said = tuple(tokens[: tokens.index(END) + 1])
        assert b"".join(TOKENS[token] for token in said[:-1]).decode() in LANGUAGES[name][2]
        counts[said] = counts.get(said, 0) + 1
    expected = {said: runs * chance_of(list(said)) for said in counts}
    square = sum((counts[said] - one) ** 2 / one for said, one in expected.items() if one > 2)
    bins = sum(one > 2 for one in expected.values())
    assert square < bins + 6 * (2 * bins) ** 0.5 + 6, (square, bins)  # far out in the tail of chi-square
    assert sum(expected.values()) > 0.9 * runs and (accepted > 0 or not depth)


@pytest.mark.parametrize("depth", [0, 2])
def test_greedy_is_the_likeliest_that_may_follow(depth: int) -> None:
    """A golden pair with its own K/V: each token against a pass without a cache, by the list of all texts."""
    engine = lively("ple", GOLDEN / "ple" / "assistant_tied" if depth else None, depth=depth if depth else "auto")
    tokens = [b"<end>", *(bytes([i]) for i in range(1, 128))]
    rules = grammar("regex", tokens)
    for seed in range(6):
        ids = np.random.default_rng(seed).integers(3, 128, 20).tolist()
        request = replace(engine.request(ids, max_tokens=20, logprobs=1, ignore_end=True), grammar=rules,
                          stop_tokens=frozenset([END]))  # fmt: skip
        *_, last = engine.run(request)
        found = last.result.tokens
        assert b"".join(tokens[one] for one in found).decode() in LANGUAGES["regex"][2]
        logits = np.array(engine.target.logits(mx.array([[*ids, *found]])))[0, len(ids) - 1 :].astype(np.float64)
        for i, token in enumerate([*found, END]):
            row = np.where(may_follow("regex", found[:i], tokens), logits[i], -np.inf)
            assert row[token] > row.max() - NEAR_TIE
            if i < len(found):
                assert last.result.logprobs[i] == pytest.approx(log_softmax(row)[token], abs=5 * NEAR_TIE)


def test_exact_mode_and_penalties_hold() -> None:
    """Bit-equal tokens and logprobs with and without drafts, whatever the device allows."""
    tokens, results = [b"<end>", *(bytes([i]) for i in range(1, 128))], []
    for drafter in (None, GOLDEN / "ple" / "assistant_tied"):
        engine = lively("ple", drafter, depth=2 if drafter else "auto", mode="exact")
        request = engine.request([5, 6, 7, 8], max_tokens=20, logprobs=2, repetition_penalty=1.3)
        *_, last = engine.run(replace(request, grammar=grammar("regex", tokens), stop_tokens=frozenset([END])))
        results.append(last.result)
    assert results[0].tokens == results[1].tokens and results[0].logprobs == results[1].logprobs


def test_thoughts_are_free() -> None:
    """The grammar begins after a thought, in the middle of a round too; within one nothing ends the reply."""
    tokens = [*TOKENS, b"<think>", b"</think>"]
    opening, closing, text = 6, 7, may_follow("regex", (), tokens)
    fresh = Constraint(grammar("regex", tokens), ThoughtTokens(opening, closing))
    masks = [allowed(mask, 8) for mask in fresh.masks([opening, 5, closing, 3])]
    free = [token != END for token in range(8)]
    assert masks[0] == [follows or token == opening for token, follows in enumerate(text)]
    assert masks[1:3] == [free, free] and masks[3] == text and masks[4] == may_follow("regex", (3,), tokens)
    assert [allowed(mask, 8) for mask in fresh.masks([3])][1] == may_follow("regex", (3,), tokens)  # no thought at all
    fresh.add([opening, 5, closing])
    assert not fresh.complete and allowed(fresh.masks([])[0], 8) == text
    opened = Constraint(grammar("regex", tokens), ThoughtTokens(opening, closing, is_open=True))
    assert [allowed(mask, 8) for mask in opened.masks([closing])] == [free, text]


# The options


class Record(pydantic.BaseModel):
    """What a reply must be."""

    model_config = pydantic.ConfigDict(extra="forbid")
    name: str = pydantic.Field(max_length=12)
    age: int = pydantic.Field(ge=0, le=150)
    kind: Literal["alpha", "beta"]
    tags: list[Literal["x", "y"]] = pydantic.Field(max_length=3)


def test_every_reply_is_a_record(embedded: mlx_mtp.Engine) -> None:
    complete = drafted = accepted = 0
    for seed, temperature in enumerate((0.0, 1.0, 1.0, 2.0)):
        result = embedded.generate("A record.", json_schema=Record, max_tokens=160, temperature=temperature, seed=seed)
        drafted, accepted = drafted + result.stats.drafted, accepted + result.stats.accepted
        if result.finish_reason == "stop":
            Record.model_validate_json(str(result), strict=True)
            complete += 1
        else:
            assert len(result.tokens) == 160
    assert complete >= 2 and 0 < accepted < drafted


def test_every_way_to_ask(embedded: mlx_mtp.Engine) -> None:
    pattern, lark = "[a-c]{3}-[0-9]{1,4}", 'start: "yes" | "no"'
    assert re.fullmatch(pattern, str(embedded.generate("A number.", regex=pattern, max_tokens=20)))
    assert str(embedded.generate("Yes?", grammar=lark, max_tokens=20)) in ("yes", "no")
    chat = embedded.chat()
    for _ in range(2):  # the second turn goes on in the same session
        assert str(chat.ask("Yes?", grammar=lark, max_tokens=20)) in ("yes", "no")
    assert len(chat.messages) == 4

    async def streamed() -> str:
        return "".join([event.text async for event in embedded.astream("Yes?", grammar=lark, max_tokens=20)])

    assert asyncio.run(streamed()) in ("yes", "no")


@pytest.mark.parametrize(("options", "words"), [
    ({"json_schema": {"type": "nonsense"}}, "nonsense"),
    ({"json_schema": "{}"}, "must be an object"),
    ({"json_schema": {"enum": [{1, 2}]}}, "no JSON"),
    ({"regex": "(("}, "unclosed"),
    ({"grammar": "start: nowhere"}, "nowhere"),
    ({"grammar": 3}, "must be a string"),
    ({"regex": "a", "json_schema": {}}, "both given"),
    ({"temperature": 1.0, "sampling": Sampling()}, "both given"),
    ({"top_k": 1.5}, "top_k"),
])  # fmt: skip
def test_what_cannot_be_asked_for(embedded: mlx_mtp.Engine, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        embedded.stream("x", **options)


def test_bans_that_leave_nothing(embedded: mlx_mtp.Engine) -> None:
    """Found out when it happens, and the engine goes on."""
    (seven,) = embedded.tokenizer.encode("7", special=False)[-1:]
    with pytest.raises(mlx_mtp.MLXMTPError, match="bans all"):
        embedded.generate("x", regex="7", logit_bias={seven: -float("inf")}, max_tokens=5)
    assert str(embedded.generate("x", regex="7", max_tokens=5)) == "7"


def test_the_command(tmp_path: Path, command: Command) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(Record.model_json_schema()))
    run = partial(command, "generate", "A record.")
    code, out, _ = run("--json-schema", str(schema), "--max-tokens", "160", "--json")
    assert code == 0
    Record.model_validate_json(json.loads(out)["text"])
    assert run("--regex", "[0-9]{3}")[1].strip().isdecimal()
    for words, said in ((("--json-schema", str(tmp_path / "no")), "cannot be read"), (("--regex", "(("), "unclosed")):
        code, out, error = run(*words)
        assert code == 2 and said in error and not out
    schema.write_text("[1]")
    assert "must hold an object" in run("--json-schema", str(schema))[2]
