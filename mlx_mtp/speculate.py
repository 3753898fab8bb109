"""One round: draft, verify, accept, commit. Names no model and no drafter family.

What it does: builds the round as one lazy graph (compiled once per depth, capacity and kind of sampling) and submits
it without waiting. What it does not do: read a value, stop, or know text.

Invariant: whatever the round wrote behind the committed length is dead; committing is `length += accepted + 1`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from mlx_mtp import sampling, threads, verify
from mlx_mtp.cache import KVCache
from mlx_mtp.interfaces import Drafter, Memory, Target
from mlx_mtp.sampling import Chooser, History, Knobs, Rules

# mlx-lm's convention: (all tokens so far [T], logits [1, V]) -> logits [1, V].
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]
# Compiled rounds kept: a server meets every kind of sampling there is, and each graph takes memory.
MOST_COMPILED = 128
# Random keys a round spends besides one a draft: the next round's, acceptance, the token behind the drafts.
SPARE_KEYS = 3


@dataclass(frozen=True)
class Outcome:
    """What the host learns of a round, still on the device.

    tokens int32 [B, M + 1]: the tokens of the round and, last, how many drafts stand. logprobs float32 [B, M] of
    those tokens, top ids and values [B, M, n]; None unless asked for.
    """

    tokens: mx.array
    logprobs: mx.array | None = None
    top: tuple[mx.array, mx.array] | None = None


@dataclass
class Request:
    """The device state of one request.

    token [B, 1] is the newest token, whose K/V is not in the cache yet; hidden [B, 1, D] the state that produced it.
    """

    token: mx.array
    hidden: mx.array
    cache: KVCache
    memory: Memory
    rules: Rules = field(default_factory=Rules)
    knobs: Knobs = field(default_factory=dict)
    history: History = field(default_factory=dict)
    key: mx.array = field(default_factory=lambda: mx.random.key(0))

    @property
    def state(self) -> dict[str, Any]:
        """Everything a round changes, as one tree of arrays."""
        return {
            "token": self.token, "hidden": self.hidden, "cache": self.cache.arrays, "memory": self.memory,
            "history": self.history, "key": self.key,
        }  # fmt: skip

    @state.setter
    def state(self, tree: dict[str, Any]) -> None:
        self.token, self.hidden, self.cache.arrays = tree["token"], tree["hidden"], tree["cache"]
        self.memory, self.history, self.key = tree["memory"], tree["history"], tree["key"]


class Rounds:
    """Rounds for one pair. Stateless but for the compiled functions, so that requests may take turns.

    width: rows every pass is filled up to, for the exact mode; None = as many as there are.
    """

    def __init__(self, target: Target, drafter: Drafter | None, width: int | None = None) -> None:
        self._target = target
        self._drafter = drafter
        self._width = width
        self._compiled: dict[tuple[Any, ...], Callable[..., Any]] = {}
        _alive.add(self)

    def forget(self) -> None:
        """Lets go of the compiled functions."""
        self._compiled.clear()

    def is_new(self, request: Request, depth: int) -> bool:
        """Whether the next `submit` with these sizes has to build its graph first (and its time says little)."""
        return (depth, request.cache.capacity, request.rules) not in self._compiled

    def submit(self, request: Request, depth: int) -> Outcome:
        """Starts a round on the device and moves `request` behind it.

        Reading the outcome is the only wait there is, and the caller may submit the next round first.
        """
        return _started(request, self.build(request, depth))

    def build(self, request: Request, depth: int) -> Outcome:
        """A round that nobody has asked the device for yet; `request` stands behind it."""
        key = (depth, request.cache.capacity, request.rules)
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            if len(self._compiled) >= MOST_COMPILED:
                self._compiled.pop(list(self._compiled)[0], None)  # the least recently used; two threads may be here
            compiled = mx.compile(self._round(request.cache.layout(), request.rules, depth))
        self._compiled[key] = compiled
        request.state, outcome = compiled(request.state, request.knobs)
        return Outcome(*outcome)

    def submit_processed(
        self, request: Request, depth: int, so_far: Sequence[int], processors: Sequence[LogitsProcessor]
    ) -> Outcome:
        """A round whose logits pass through Python functions that need all tokens `so_far`; never compiled."""
        one_round = self._round(request.cache.layout(), request.rules, depth, so_far, processors)
        request.state, outcome = one_round(request.state, request.knobs)
        return _started(request, Outcome(*outcome))

    def first(
        self, request: Request, so_far: Sequence[int] = (), processors: Sequence[LogitsProcessor] = ()
    ) -> Outcome:
        """The token behind the prompt, from `request.hidden`: a round without a pass of its own."""
        logits = self._target.head(request.hidden)
        request.state, outcome = self._accept(request.rules, request.state, request.knobs, None, None, logits,
                                              so_far, processors)  # fmt: skip
        return _started(request, Outcome(*outcome))

    def _round(
        self,
        layout: KVCache,
        rules: Rules,
        depth: int,
        so_far: Sequence[int] = (),
        processors: Sequence[LogitsProcessor] = (),
    ) -> Callable[..., Any]:
        """The round as a pure function of arrays, for one cache layout, one set of rules and one depth."""
        target, drafter = self._target, self._drafter

        def one_round(state: dict[str, Any], knobs: Knobs) -> tuple[dict[str, Any], tuple[Any, ...]]:
            cache, memory = layout.around(state["cache"]), state["memory"]
            keys = mx.random.split(state["key"], depth + SPARE_KEYS)
            rows, drafts, law = state["token"], None, None
            if drafter is not None and depth:
                choose = Chooser(rules, knobs, state["history"], keys[SPARE_KEYS:])
                drafts, memory = drafter.draft(memory, rows, state["hidden"], cache, depth, choose)
                rows, law = mx.concatenate([rows, drafts], axis=1), choose.law
            filled = target.forward(self._filled(rows), cache)
            logits = target.head(filled.hidden)[:, : depth + 1]
            states = filled.first(depth + 1)
            state, outcome = self._accept(rules, {**state, "key": keys}, knobs, drafts, law, logits, so_far, processors)
            accepted = outcome[0][:, -1]
            if drafter is not None:
                memory = drafter.observe(memory, rows, states, accepted)
            cache.advance(accepted + 1)
            hidden = mx.take_along_axis(states.hidden, accepted[:, None, None], axis=1)
            return {**state, "hidden": hidden, "cache": cache.arrays, "memory": memory}, outcome

        return one_round

    def _filled(self, rows: mx.array) -> mx.array:
        """Rows [B, M], repeated up to the width of the exact mode; what is beyond the drafts is never committed."""
        if self._width is None or rows.shape[1] >= self._width:
            return rows
        return mx.concatenate([rows, mx.repeat(rows[:, :1], self._width - rows.shape[1], axis=1)], axis=1)

    @staticmethod
    def _accept(
        rules: Rules, state: dict[str, Any], knobs: Knobs, drafts: mx.array | None, law: sampling.Law | None,
        logits: mx.array, so_far: Sequence[int], processors: Sequence[LogitsProcessor],
    ) -> tuple[dict[str, Any], tuple[Any, ...]]:  # fmt: skip
        """Judges drafts by logits [B, M, V]; returns the state with the newest token and the fields of an Outcome."""
        history = state["history"]
        if processors:
            logits = _processed(logits, so_far, state["token"], drafts, processors)
        if rules.penalties:
            rows = {**history, "generated": sampling.running_counts(history["generated"], drafts)}
            logits = rules.processed(logits, None, knobs, rows)
        elif rules.bias:
            logits = rules.processed(logits, None, knobs, {})
        key = state["key"]
        if rules.greedy:
            found = verify.greedy(drafts, logits)
            key = key[0] if key.ndim == 2 else key
        else:
            keys = key if key.ndim == 2 else mx.random.split(key, SPARE_KEYS)
            found = verify.sampled(drafts, law, rules.law(logits, None, knobs), keys[1:SPARE_KEYS])
            key = keys[0]
        if rules.penalties:
            counts = sampling.counted(history["generated"], found.tokens, found.accepted + 1)
            history = {**history, "generated": counts}
        outcome = mx.concatenate([found.tokens, found.accepted[:, None]], axis=1)
        state = {**state, "token": found.last, "history": history, "key": key}
        return state, (outcome, *_logprobs(logits, found.tokens, rules.logprobs))


_alive: WeakSet[Rounds] = WeakSet()


@threads.at_end.append
def _forget_all() -> None:
    """Graphs go before the functions that they are made of: the other way round MLX locks itself out (0.32.4)."""
    for rounds in list(_alive):
        rounds.forget()


def _started(request: Request, outcome: Outcome) -> Outcome:
    """Hands a built round to the device without waiting."""
    mx.async_eval(outcome.tokens, outcome.logprobs, outcome.top, request.state)
    return outcome


def _logprobs(logits: mx.array, tokens: mx.array, most: int) -> tuple[Any, ...]:
    """Logarithms of the probabilities of tokens [B, M], and the `most` likeliest alternatives; nothing for 0."""
    if not most:
        return ()
    laws = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    best = mx.argpartition(-laws, kth=most - 1, axis=-1)[..., :most]
    values = mx.take_along_axis(laws, best, axis=-1)
    order = mx.argsort(-values, axis=-1)
    top = mx.take_along_axis(best, order, axis=-1), mx.take_along_axis(values, order, axis=-1)
    return mx.take_along_axis(laws, tokens[..., None], axis=-1)[..., 0], top


def _processed(
    logits: mx.array, so_far: Sequence[int], token: mx.array, drafts: mx.array | None,
    processors: Sequence[LogitsProcessor],
) -> mx.array:  # fmt: skip
    """Every row through the processors, each with the tokens before it; `so_far` ends with `token`."""
    rows = []
    for i in range(logits.shape[1]):
        tokens = mx.array(list(so_far), dtype=mx.int32)
        if drafts is not None and i:
            tokens = mx.concatenate([tokens, drafts[0, :i]])
        row = logits[:, i]
        for processor in processors:
            row = processor(tokens, row)
        rows.append(row)
    return mx.stack(rows, axis=1).astype(mx.float32)
