"""One round: draft, verify, accept, commit (`Rounds._stages`). Names no model and no drafter family.

A round is one lazy graph, compiled once per depth, capacity and kind of sampling, and submitted without waiting: no
value is read here.

Invariant: whatever the round wrote after the committed length is dead; committing is `length += accepted + 1`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import mlx.core as mx

from mlx_mtp.backend import threads
from mlx_mtp.generation import acceptance, sampling
from mlx_mtp.generation.cache import KVCache
from mlx_mtp.generation.exactness import Exactness, TargetPass
from mlx_mtp.generation.interfaces import Drafter, Memory, States, Target
from mlx_mtp.generation.sampling import DraftSampler, History, Override, SamplingArrays, SamplingSpec, TokenDistribution

Tree = dict[str, Any]
Output = tuple[Any, ...]  # the fields of a RoundOutput
# Compiled rounds kept: a server meets every kind of sampling there is, and each graph takes memory.
MOST_COMPILED = 128
# What a round changes of a SequenceState, besides the arrays of its cache.
CHANGING = ("token", "hidden", "memory", "history", "key")
# Random keys a round spends besides one a draft: the next round's, acceptance, the token after the drafts.
SPARE_KEYS = 3


@dataclass(frozen=True)
class RoundOutput:
    """What the host learns of a round, still on the device.

    tokens int32 [B, M + 1]: the tokens of the round and, last, how many drafts were accepted. logprobs float32 [B, M]
    of those tokens, top ids and values [B, M, n]; None unless asked for.
    """

    tokens: mx.array
    logprobs: mx.array | None = None
    top: tuple[mx.array, mx.array] | None = None


@dataclass
class SequenceState:
    """The device state of one sequence.

    token [B, 1] is the newest token, whose K/V is not in the cache yet; hidden [B, 1, D] the state that produced it.
    exact: how passes over this cache are kept exact; None for the fast mode.
    """

    token: mx.array
    hidden: mx.array
    cache: KVCache
    memory: Memory
    spec: SamplingSpec = field(default_factory=SamplingSpec)
    arrays: SamplingArrays = field(default_factory=dict)
    history: History = field(default_factory=dict)
    key: mx.array = field(default_factory=lambda: mx.random.key(0))
    exact: Exactness | None = None

    @property
    def tree(self) -> Tree:
        """Everything a round changes, as one tree of arrays."""
        return {name: getattr(self, name) for name in CHANGING} | {"cache": self.cache.arrays}

    @tree.setter
    def tree(self, tree: Tree) -> None:
        vars(self).update((name, tree[name]) for name in CHANGING)
        self.cache.arrays = tree["cache"]


Part = Callable[..., Any]
# Drafts [B, K] (None where there are none) and logits [B, M, V] -> the logits to decide by.
ChangeLogits = Callable[[mx.array | None, mx.array], mx.array]


def _uncompiled(part: Part) -> Part:
    """In place of mx.compile for what is part of a larger graph, or made of smaller ones."""
    return part


class Rounds:
    """Rounds for one pair. Stateless but for the compiled functions, so that requests may take turns.

    exact: whether every pass is the one of exactness.TargetPass, of which it is known what its bits depend on.
    """

    def __init__(self, target: Target, drafter: Drafter | None, exact: bool = False) -> None:
        self._target, self._drafter = target, drafter
        self._exact = TargetPass(target) if exact else None
        self._pass = self._exact or self._forward
        self._compiled: dict[tuple[Any, ...], Any] = {}
        _alive.add(self)

    def forget(self) -> None:
        """Lets go of the compiled functions."""
        self._compiled.clear()
        if self._exact is not None:
            self._exact.forget()

    def is_new(self, state: SequenceState, depth: int) -> bool:
        """Whether the next `submit` with these sizes has to build its graph first (and its time says little)."""
        return (depth, state.cache.capacity, state.spec) not in self._compiled

    def submit(
        self, state: SequenceState, depth: int, change: ChangeLogits | None = None, override: Override | None = None
    ) -> RoundOutput:
        """Starts a round on the device and moves `state` past it.

        Reading the output is the only wait there is, and the caller may submit the next round first.
        change: of the logits, on the host, once the drafts are known and while the pass runs. override: with it, drafts
        that are not the drafter's.
        """
        if change is None:
            return _started(state, *self._graphs(state, depth)(state.tree, state.arrays))
        verify, accept = self._graphs(state, depth, (override is not None,))
        tree, cache, verified, logits = verify(state.tree, state.arrays, override or {})
        state.cache.arrays = cache  # nobody else may hold the buffers that the pass writes
        mx.async_eval(verified.get("drafts"))
        mx.async_eval(tree, cache, verified, logits)
        logits = change(verified.get("drafts"), logits)
        return _started(state, *accept(state.arrays, tree, cache, verified, logits))

    def build(self, state: SequenceState, depth: int) -> RoundOutput:
        """A round that nobody has asked the device for yet; `state` is past it."""
        state.tree, output = self._graphs(state, depth)(state.tree, state.arrays)
        return RoundOutput(*output)

    def first(self, state: SequenceState, change: ChangeLogits | None = None) -> RoundOutput:
        """The token after the prompt, from `state.hidden`: a round without a pass of its own."""
        spec, tree, keys = state.spec, state.tree, mx.random.split(state.key, SPARE_KEYS)
        logits = self._target.head(state.hidden)
        logits = change(None, logits) if change else logits
        logits = _processed(spec, tree, state.arrays, None, logits, spec.processed)
        tree = {**tree, "key": keys[0]}
        return _started(state, *_accept(spec, tree, state.arrays, keys[1:], None, None, logits))

    def _graphs(self, state: SequenceState, depth: int, between: tuple[bool, ...] = ()) -> Any:
        """The compiled round; with `between` its two stages by themselves, for what is done between them."""
        key = (depth, state.cache.capacity, state.spec, *between)
        compiled = self._compiled.pop(key, None)
        if compiled is None:
            if len(self._compiled) >= MOST_COMPILED:
                self._compiled.pop(list(self._compiled)[0], None)  # the least recently used; two threads may be here
            # Each part by itself where bits count, and the pass is one of them.
            apart = self._exact is not None and state.spec.greedy
            whole, part = (_uncompiled, mx.compile) if apart else (mx.compile, _uncompiled)
            verify, accept = self._stages(state, depth, part)

            def both(tree: Tree, arrays: SamplingArrays) -> tuple[Tree, Output]:
                found: tuple[Tree, Output] = accept(arrays, *verify(tree, arrays, {}))
                return found

            compiled = (whole(verify), whole(accept)) if between else whole(both)
        self._compiled[key] = compiled
        return compiled

    def _forward(self, rows: mx.array, cache: KVCache) -> tuple[States, mx.array]:
        """What TargetPass gives, as part of whatever graph is being made."""
        states = self._target.forward(rows, cache)
        return states, self._target.head(states.hidden)

    def _stages(self, state: SequenceState, depth: int, part: Callable[[Part], Part]) -> tuple[Part, Part]:
        """The round as two pure functions of arrays, for one cache layout, one SamplingSpec and one depth.

        The first drafts and runs the pass; the second decides by its logits, and commits. part: how parts are compiled.
        """
        layout, spec, drafter = state.cache.layout(), state.spec, self._drafter
        width = state.exact.width if state.exact else None
        process = part(spec.processed)

        def draft(tree: Tree, arrays: SamplingArrays, keys: mx.array, override: Override) -> tuple[Any, ...]:
            assert drafter is not None
            sample = DraftSampler(spec, arrays, tree["history"], keys, override)
            cache = layout.around(tree["cache"])
            drafts, memory = drafter.draft(tree["memory"], tree["token"], tree["hidden"], cache, depth, sample)
            q = sample.distribution
            return drafts, memory, None if q is None else (q.tokens, q.probabilities)

        def decide(tree: Tree, arrays: SamplingArrays, verified: Tree, logits: mx.array) -> tuple[Tree, Output]:
            drafts, q, states = verified.get("drafts"), verified.get("q"), States(*verified["states"])
            q = None if q is None else TokenDistribution(*q)
            tree, output = _accept(spec, tree, arrays, verified["keys"], drafts, q, logits)
            accepted = output[0][:, -1]
            if drafter is not None:
                memory = drafter.observe(tree["memory"], verified["tokens"], states, accepted)
                tree = {**tree, "memory": memory}
            return {**tree, "hidden": mx.take_along_axis(states.hidden, accepted[:, None, None], axis=1)}, output

        draft, decide = part(draft), part(decide)

        def verify(tree: Tree, arrays: SamplingArrays, override: Override) -> tuple[Any, ...]:
            keys = mx.random.split(tree["key"], depth + SPARE_KEYS)
            tree, tokens = {**tree, "key": keys[0]}, tree["token"]
            verified: Tree = {"keys": keys[1:SPARE_KEYS]}
            if drafter is not None and depth:
                verified["drafts"], tree["memory"], verified["q"] = draft(tree, arrays, keys[SPARE_KEYS:], override)
                tokens = mx.concatenate([tokens, verified["drafts"]], axis=1)
            rows, cache = tokens, layout.around(tree.pop("cache"))
            if width is not None and width > depth + 1:  # what is beyond the drafts is never committed
                rows = mx.concatenate([rows, mx.repeat(rows[:, :1], width - depth - 1, axis=1)], axis=1)
            states, logits = self._pass(rows, cache)
            states = states.of_layers(drafter.aux_layers if drafter else ()).first(depth + 1)
            verified |= {"tokens": tokens, "states": (states.hidden, states.aux)}
            return tree, cache.arrays, verified, logits[:, : depth + 1]

        def accept(
            arrays: SamplingArrays, tree: Tree, cached: Any, verified: Tree, logits: mx.array
        ) -> tuple[Tree, Output]:
            cache = layout.around(cached)
            logits = _processed(spec, tree, arrays, verified.get("drafts"), logits, process)
            tree, output = decide(tree, arrays, verified, logits)
            cache.advance(output[0][:, -1] + 1)  # commit
            return {**tree, "cache": cache.arrays}, output

        return verify, accept


def _accept(
    spec: SamplingSpec, tree: Tree, arrays: SamplingArrays, keys: mx.array, drafts: mx.array | None,
    q: TokenDistribution | None, logits: mx.array,
) -> tuple[Tree, Output]:  # fmt: skip
    """Verifies drafts by logits [B, M, V]: the state with the newest token, and the fields of a RoundOutput.

    keys [2, 2]: for acceptance, and for the token after the accepted drafts.
    """
    if spec.greedy:
        found = acceptance.greedy(drafts, logits)
    else:
        found = acceptance.sampled(drafts, q, spec.distribution(logits, None, arrays), keys)
    history = tree["history"]
    if spec.penalties:
        counts = sampling.counted(history["generated"], found.tokens, found.accepted + 1)
        history = {**history, "generated": counts}
    output = mx.concatenate([found.tokens, found.accepted[:, None]], axis=1)
    tree = {**tree, "token": found.last, "history": history}
    return tree, (output, *token_logprobs(logits, found.tokens, spec.logprobs))


_alive: WeakSet[Rounds] = WeakSet()


@threads.at_end.append
def _forget_all() -> None:
    """Graphs go before the functions that they are made of: the other way round MLX locks itself out (0.32.4)."""
    for rounds in list(_alive):
        rounds.forget()


def _processed(
    spec: SamplingSpec, tree: Tree, arrays: SamplingArrays, drafts: mx.array | None, logits: mx.array, process: Part
) -> mx.array:
    """Logits [B, M, V] after penalties and bias, each row with the history of its own."""
    if not spec.penalties and not spec.bias:
        return logits
    history = dict(tree["history"])
    if spec.penalties:
        history["generated"] = sampling.running_counts(history["generated"], drafts)
    found: mx.array = process(logits, None, arrays, history)
    return found


def _started(state: SequenceState, tree: Tree, output: Output) -> RoundOutput:
    """Hands a built round to the device without waiting, and moves the state past it."""
    state.tree = tree
    mx.async_eval(output, tree)
    return RoundOutput(*output)


def token_logprobs(logits: mx.array, tokens: mx.array, most: int) -> tuple[Any, ...]:
    """Logarithms of the probabilities of tokens [B, M], and the `most` likeliest alternatives; nothing for 0."""
    if not most:
        return ()
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    best = mx.argpartition(-logprobs, kth=most - 1, axis=-1)[..., :most]
    values = mx.take_along_axis(logprobs, best, axis=-1)
    order = mx.argsort(-values, axis=-1)
    top = mx.take_along_axis(best, order, axis=-1), mx.take_along_axis(values, order, axis=-1)
    return mx.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0], top
