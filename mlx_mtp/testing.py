"""Public fakes for tests of engines and drafters, and the promises that every pair of a target and a drafter keeps."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast
from unittest import mock

import mlx.core as mx
import numpy as np

from mlx_mtp.engine import DEEPEST, Engine
from mlx_mtp.generation import acceptance, exactness, loop
from mlx_mtp.generation.cache import CAPACITY_STEP, KVCache
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.interfaces import Drafter, Memory, SampleDraft, States, Target, TargetInfo
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.generation.prefix import Session
from mlx_mtp.generation.request import GenerationRequest
from mlx_mtp.generation.sampling import DraftSampler, TokenDistribution
from mlx_mtp.generation.types import NEUTRAL, Result, Sampling, Stats

# Kernels round differently for one row and for several. This is more than rounding explains on any device, and far
# less than what one wrong row of K/V changes.
NEAR_TIE = 1e-3
# Where a script is right, so that rounds are cut at every draft.
MIXED = [bool(int(digit)) for digit in "101111110101100"]
NEWEST_DRAFTS = 16
# The probe for exact mode takes seconds and says the same of one target every time.
_probes = functools.lru_cache(maxsize=64)(exactness.Probes)


class ScriptedDrafter(Drafter):
    """Proposes what a script says follows, and is right and wrong at known places.

    script: script[i] is the token for absolute position i; where it is the prompt and the target's own continuation,
    the draft for position i is accepted if and only if right[i % len(right)] and all before it in the round are.
    Where not right, and beyond the script's end, another token is proposed. So for a new target, or a loop of your own:

        expected = plain.generate(prompt, max_tokens=60, ignore_end=True).tokens
        drafter = ScriptedDrafter([*prompt, *expected], right=[True, True, False])
        result = Engine(target, drafter, tokenizer, depth=depth).generate(prompt, max_tokens=60, ignore_end=True)
        assert result.tokens == expected
        assert result.stats.accepted == sum(drafter.accepted(len(prompt), 60, depth))
    """

    def __init__(self, script: Sequence[int], right: Sequence[bool] = (True,)) -> None:
        self._right = [right[i % len(right)] for i in range(len(script))]
        proposals = [token if holds else int(token == 0) for token, holds in zip(script, self._right, strict=True)]
        self.proposals = mx.array([*proposals, *[0] * 64], dtype=mx.int32)

    def accepted(self, prompt: int, tokens: int, depth: int) -> list[int]:
        """Drafts accepted in each round of a greedy reply of `tokens` tokens after a prompt of `prompt` tokens.

        As `Stats` counts them: what the budget cuts off the last round was not accepted. ValueError where the script
        ends before the reply.
        """
        end = prompt + tokens
        if len(self._right) < end:
            raise ValueError(f"expected a script of {end} tokens, found {len(self._right)}")
        rounds, at = [], prompt + 1  # the prompt's own pass gives the first token
        while at < end:
            drafts = self._right[at : min(at + depth, end)]
            rounds.append(drafts.index(False) if False in drafts else len(drafts))
            at += rounds[-1] + 1
        return rounds

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        places = cache.length[:, None] + 1 + mx.arange(depth, dtype=mx.int32)
        return sample.point_mass(self.proposals[mx.minimum(places, self.proposals.size - 1)]), memory


class MarkovTarget(Target):
    """A target whose next-token logits depend on the last token alone: table [V, V]; its distribution is known."""

    def __init__(self, table: mx.array, max_context: int = 1 << 20) -> None:
        self.table = table
        self.info = TargetInfo(
            vocab_size=table.shape[0], hidden_size=1, max_context=max_context, window=1, readable={},
            storing_layers={}, attention_heads=1,
        )  # fmt: skip

    def embed(self, tokens: mx.array) -> mx.array:
        return tokens[..., None].astype(mx.float32)

    def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
        return States(self.embed(tokens if keep is None else tokens[:, tokens.shape[1] - keep :]))

    def head(self, hidden: mx.array) -> mx.array:
        return self.table[hidden[..., 0].astype(mx.int32)]

    def logits(self, tokens: mx.array) -> mx.array:
        return self.table[tokens]


class MarkovDrafter(ScriptedDrafter):
    """Drafts from a table [V, V] of its own, by whatever sampling is asked for."""

    def __init__(self, table: mx.array) -> None:
        super().__init__([])
        self.table = table

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        drafts = [token]
        for _ in range(depth):
            drafts.append(sample(self.table[drafts[-1]]))
        return mx.concatenate(drafts[1:], axis=1), memory


class _Guided:
    """A drafter that drafts, observes and rolls back as ever, while a script's tokens are proposed.

    So rounds accept and reject known drafts, which those of an untrained drafter never do. The script is part of the
    memory, so that another one needs no other graph. `drafts` there holds the newest drafts of its own.
    """

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self._script = drafter, mx.zeros((2 * CAPACITY_STEP,), dtype=mx.int32)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._drafter, name)

    def follow(self, script: ScriptedDrafter) -> None:
        """Proposes its tokens from the next request on."""
        self._script = mx.pad(script.proposals, (0, self._script.size - script.proposals.size))

    def start(self, batch: int, capacity: int) -> Memory:
        drafts = mx.zeros((batch, NEWEST_DRAFTS), dtype=mx.int32)
        return {"script": self._script, "drafts": drafts, "own": self._drafter.start(batch, capacity)}

    def grow(self, memory: Memory, capacity: int) -> Memory:
        return {**memory, "own": self._drafter.grow(memory["own"], capacity)}

    def expect(self, memory: Memory, tokens: mx.array) -> Memory:
        return {**memory, "own": self._drafter.expect(memory["own"], tokens)}

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        drafts, own = self._drafter.draft(memory["own"], token, hidden, cache, depth, sample)
        kept = mx.concatenate([memory["drafts"], drafts], axis=1)[:, -NEWEST_DRAFTS:]
        places = cache.length[:, None] + 1 + mx.arange(depth, dtype=mx.int32)
        return memory["script"][places], {**memory, "drafts": kept, "own": own}

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        return {**memory, "own": self._drafter.observe(memory["own"], tokens, states, accepted)}

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        return {**memory, "script": self._script, "own": self._drafter.rewind(memory["own"], length, states)}


class Conformance:
    """What every target promises with every drafter, checked on a pair of yours; the names are in `PROMISES`.

        @pytest.mark.parametrize("promise", PROMISES)
        def test_promise(promise: str) -> None:
            Conformance(target, drafter).check(promise)

    drafter: None = a script alone. The target needs room for 512 tokens and should write varied text, or it cannot
    show an error: one with random weights and a tied head repeats a token whatever it reads; give it a random head.
    An AssertionError says what was promised and what was found.
    """

    def __init__(self, target: Target, drafter: Drafter | None = None) -> None:
        self.target, self.drafter = target, drafter or ScriptedDrafter([])
        self.drafter.attach(target)
        self.depth = min(self.drafter.max_depth, DEEPEST)
        self.guided = _Guided(self.drafter)
        self._engines: dict[tuple[int, str], Engine] = {}

    def check(self, promise: str) -> None:
        """Checks one of `PROMISES`."""
        PROMISES[promise](self)

    def prompt(self, length: int, seed: int = 2) -> list[int]:
        """Random tokens."""
        tokens: list[int] = np.random.default_rng(seed).integers(3, self.target.info.vocab_size, length).tolist()
        return tokens

    def engine(self, depth: int = 0, mode: str = "fast") -> Engine:
        """The pair, proposing what the last script says; at depth 0 the target without any drafter."""
        if (depth, mode) not in self._engines:
            drafter = cast(Drafter, self.guided) if depth else None
            made = self._engines[depth, mode] = Engine(self.target, drafter, None, depth=depth, mode=mode)
            made.exactness = made.exactness and _probes(self.target)  # type: ignore[arg-type]
        return self._engines[depth, mode]

    def _reply(self, engine: Engine, ids: Sequence[int], tokens: int, **options: Any) -> Result:
        """A greedy reply, with statistics that add up."""
        result = engine.generate(list(ids), max_tokens=tokens, ignore_end=True, **options)
        _require(len(result.tokens), tokens, "tokens of a reply")
        _check_statistics(result.stats)
        return result

    def _script(self, ids: Sequence[int], tokens: Sequence[int], right: Sequence[bool]) -> ScriptedDrafter:
        script = ScriptedDrafter([*ids, *tokens], right)
        self.guided.follow(script)
        return script

    def _check_greedy(self, ids: Sequence[int], result: Result) -> None:
        """Every token is the likeliest after those before it, by one pass without a cache, or as likely but for
        rounding; and so are its logprobs, where there are some."""
        count = len(result.tokens)
        logits = np.array(self.target.logits(mx.array([[*ids, *result.tokens]])))[0, -count - 1 : -1]
        best, chosen = logits.max(axis=1), logits[np.arange(count), result.tokens]
        at = int((best - chosen).argmax())
        _require(bool(best[at] - chosen[at] <= NEAR_TIE), True, f"token {at} after {len(ids)} to be the likeliest")
        if result.logprobs is not None:
            logprobs = chosen - best - np.log(np.exp(logits - best[:, None]).sum(axis=1))
            off = float(np.abs(logprobs - np.array(result.logprobs)).max())
            _require(off < NEAR_TIE, True, f"logprobs to be those of a pass without a cache (off by {off})")

    def every_depth(self) -> None:
        """Whatever is accepted and rejected, greedy tokens are the likeliest ones, over wraps and growing buffers."""
        for begin, count in ((4, 48), (CAPACITY_STEP - 20, 32)):
            ids = self.prompt(begin)
            plain = self._reply(self.engine(), ids, count)
            self._check_greedy(ids, plain)
            _require(len(set(plain.tokens)) > count // 5, True, "varied text, or an error would not be seen")
            few, most = min(3, self.depth), self.depth
            for depth, right in ((1, [False]), (1, MIXED), (few, MIXED), (most, [True]), (most, MIXED)):
                script = self._script(ids, plain.tokens, right)
                with mock.patch.object(loop, "MAX_CHUNK", 100):  # the longer prompt in pieces
                    result = self._reply(self.engine(depth), ids, count)
                self._check_greedy(ids, result)
                rounds = script.accepted(begin, count, depth)
                if result.tokens == plain.tokens:
                    found = result.stats.rounds, result.stats.drafted, result.stats.accepted
                    _require(found, (len(rounds), depth * len(rounds), sum(rounds)), "rounds, drafted, accepted")

    def budgets(self) -> None:
        """A reply is as long as was asked for, and ends at a stop token inside a draft."""
        ids = self.prompt(8)
        plain = self._reply(self.engine(), ids, 24).tokens
        self._script(ids, plain, [True])
        for budget in (1, 2, self.depth + 1, self.depth + 2):
            _require(self._reply(self.engine(self.depth), ids, budget).tokens, plain[:budget], "tokens of a budget")
        stop = plain[10]
        engine = Engine(self.target, cast(Drafter, self.guided), None, stop_tokens=[stop], depth=self.depth)
        result = engine.generate(ids, max_tokens=24)
        _check_statistics(result.stats)
        found = result.tokens, result.finish_reason, result.stop_token
        _require(found, (plain[: plain.index(stop)], "stop", stop), "tokens up to a stop token")

    def distribution(self) -> None:
        """Over a vocabulary of four tokens, a round emits them with the target's own probabilities: every block of
        drafts is tried."""
        depth, allowed = min(2, self.depth), list(dict.fromkeys(self.prompt(64)))[:4]
        sampling = Sampling(temperature=4.0, logit_bias=dict.fromkeys(allowed, 100.0)).over(NEUTRAL)
        ids = [allowed[i] for i in np.random.default_rng(1).integers(0, 4, 12)]
        state = Decoder(self.target, self.drafter, FixedDepth(depth)).prefill(
            GenerationRequest(ids=ids[:-1], budget=8, sampling=sampling), depth
        )
        token, spec, arrays = ids[-1], state.spec, state.arrays

        def distributions(logits: mx.array) -> TokenDistribution:
            return spec.distribution(spec.processed(logits, None, arrays, {}), None, arrays)

        prefixes = [p for n in range(depth + 1) for p in itertools.product(allowed, repeat=n)]
        rows = mx.array([[*ids, *p, *[0] * (depth - len(p))] for p in prefixes])
        every = np.array(distributions(self.target.logits(rows)).probabilities)
        after = {p: every[i, len(ids) - 1 + len(p)] for i, p in enumerate(prefixes)}
        emitted: dict[tuple[int, ...], float] = {}
        for block in itertools.product(allowed, repeat=depth):
            sample = DraftSampler(spec, arrays, {}, mx.random.split(state.key, depth))
            args = state.memory, mx.array([[token]]), state.hidden, state.cache, depth, sample
            told = [mx.array([[one]], dtype=mx.int32) for one in block]
            with mock.patch.object(TokenDistribution, "draw", side_effect=told):
                drafts, q = self.drafter.draft(*args)[0], sample.distribution
            assert q is not None, "it is not greedy"
            drawn = float(np.array(q.at(mx.array([block]))).prod())
            if drawn == 0:
                continue
            _require(drafts.tolist(), [list(block)], "drafts to be those that were sampled")
            states = self.target.forward(mx.array([[token, *block]]), state.cache)
            odds = acceptance.block_odds(drafts, q, distributions(self.target.head(states.hidden)))
            passes, residual = np.array(odds.pass_)[0], np.array(odds.residual.probabilities)[0]
            for accepted in range(depth + 1):
                chance = drawn * (passes[accepted - 1] if accepted else 1.0) * (1.0 - passes[accepted:]).prod()
                for one in allowed:
                    key = (*block[:accepted], one)
                    emitted[key] = emitted.get(key, 0.0) + float(chance * residual[accepted, one])
        for sequence in itertools.product(allowed, repeat=depth + 1):
            chances = [float(after[sequence[:i]][sequence[i]]) for i in range(depth + 1)]
            found = sum(emitted.get(sequence[:i], 0.0) * float(np.prod(chances[i:])) for i in range(1, depth + 2))
            _require(abs(found - float(np.prod(chances))) < NEAR_TIE, True, f"the probability of {sequence}")

    def seeds(self) -> None:
        """One seed gives one reply, another one another."""
        engine, sampling = Engine(self.target, self.drafter, None, depth=min(2, self.depth)), Sampling(temperature=2.0)
        one, same, other = (self._reply(engine, self.prompt(9), 24, sampling=sampling, seed=seed).tokens
                            for seed in (7, 7, 8))  # fmt: skip
        _require(same, one, "the reply of the same seed")
        _require(other != one, True, "another reply for another seed")

    def sessions(self) -> None:
        """A second turn, a retry and an edit run only what is new, and continue as a fresh conversation does."""
        engine, session, first = self.engine(min(3, self.depth)), Session(), self.prompt(50)
        said = self._reply(self.engine(), first, 44).tokens
        second, edited = [*first, *said, *self.prompt(9, 3)], [*first, *self.prompt(12, 4)]
        before: list[int] = []
        for ids, most in ((first, 50), (second, 10), (second, len(second)), (edited, len(edited))):
            count = 44 if ids is first else 16
            self._script(ids, said if ids is first else self._reply(self.engine(), ids, count).tokens, MIXED)
            other = Session()
            result, fresh = (self._reply(engine, ids, count, session=one, logprobs=1)
                             for one in (session, other))  # fmt: skip
            self._check_greedy(ids, result)
            _require(result.stats.prefilled_tokens <= most, True, f"at most {most} tokens of a prompt to be run")
            _require(fresh.stats.prefilled_tokens, len(ids), "tokens that a new session runs")
            drafts = [one.lease.memory["drafts"].tolist() for one in (session, other) if one.lease is not None]
            # A family may draft better where it has seen the reply once; and tokens may be near ties.
            if ids is not before and result.tokens == fresh.tokens:
                _require(drafts[0], drafts[1], "the drafts of a fresh conversation")
            before = ids

    def exact(self) -> None:
        """In exact mode tokens and logprobs are bit-equal to plain decoding, in sessions too, or nothing is drafted."""
        ids = self.prompt(61, 6)
        said = self._reply(self.engine(0, "exact"), ids, 50).tokens
        turns = ids, [*ids, *said[:30], *ids[:13]], ids
        plain = self._turns(self.engine(0, "exact"), turns)
        self._script(ids, said, MIXED)
        for depth in {1, min(4, self.depth)}:
            engine = self.engine(depth, "exact")
            for one, other in zip(plain, drafted := self._turns(engine, turns), strict=True):
                _require(other.tokens, one.tokens, "the tokens of plain decoding")
                _require(other.logprobs, one.logprobs, "the very logprobs of plain decoding")
                _require(other.top_logprobs, one.top_logprobs, "the very alternatives of plain decoding")
                _require((one.stats.mode, other.stats.mode, one.stats.drafted), ("exact", "exact", 0), "exact mode")
            stats = drafted[0].stats
            drafts = len(engine.allowed_depths) > 1
            _require(0 < stats.accepted < stats.drafted if drafts else stats.drafted == 0, True, "drafts, or none")

    def _turns(self, engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Result]:
        session = Session()
        return [self._reply(engine, ids, 50, session=session, logprobs=3) for ids in prompts]


PROMISES: dict[str, Callable[[Conformance], None]] = {
    promise.__name__: promise
    for promise in (Conformance.every_depth, Conformance.budgets, Conformance.distribution, Conformance.seeds,
                    Conformance.sessions, Conformance.exact)
}  # fmt: skip


def _require(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"expected {what}: {expected}; found {found}")


def _check_statistics(stats: Stats) -> None:
    """Counts that must add up, whatever was drafted."""
    positions = zip(stats.drafted_by_position, stats.verified_by_position, stats.accepted_by_position, strict=True)
    _require(all(a >= b >= c for a, b, c in positions), True, "accepted <= verified <= drafted at every position")
    sums = sum(stats.drafted_by_position), sum(stats.accepted_by_position), sum(stats.depth_counts.values())
    _require(sums, (stats.drafted, stats.accepted, stats.rounds), "sums of the counts by position and depth")
    _require(stats.tokens <= 1 + stats.accepted + stats.rounds, True, "no more tokens than rounds can give")
    _require(stats.host_syncs <= stats.rounds + 2, True, "one blocking read a round")
    _require(stats.head_passes, stats.rounds + 1, "output-head passes")
