"""From logits to the distribution a token is drawn from: penalties, bias, temperature, top-k, top-p, min-p; on device.

The same filters, in float32, for the target's distribution p and the drafter's distribution q, on whatever support is
small enough: with top-k only k tokens a row are ever normalised, sorted or compared. They act in transformers' order:
penalties and bias on the logits, then temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlx_mtp.generation.types import Sampling

SamplingArrays = dict[str, mx.array]
History = dict[str, mx.array]
Forced = tuple[mx.array, mx.array]
# Drafts that are not the drafter's: "tokens" [B, K] where "mask" [B, K] is set. Empty for none.
Override = dict[str, mx.array]


@dataclass(frozen=True)
class TokenDistribution:
    """Probabilities float32 [..., N] of tokens int32 [..., N]; tokens None = the whole vocabulary in order."""

    tokens: mx.array | None
    probabilities: mx.array

    def at(self, tokens: mx.array) -> mx.array:
        """The probability of one token a row, [...] -> [...]; 0 outside the support."""
        if self.tokens is None:
            return mx.take_along_axis(self.probabilities, tokens[..., None], axis=-1)[..., 0]
        return mx.where(self.tokens == tokens[..., None], self.probabilities, 0.0).sum(axis=-1)

    def on(self, other: TokenDistribution) -> mx.array:
        """This distribution's probabilities of the other's tokens, [B, M, N] -> [B, M, N of the other]."""
        if self.tokens is None:
            if other.tokens is None:
                return self.probabilities
            return mx.take_along_axis(self.probabilities, other.tokens, axis=-1)
        if other.tokens is None:
            return mx.zeros(other.probabilities.shape).at[_cells(self.tokens)].add(self.probabilities)
        # Both supports' tokens are numbered together, 0 for the smallest, and met in a table of these numbers: memory
        # grows with the two sizes added, where comparing every token with every other would multiply them.
        count = self.tokens.shape[-1]
        numbers = _ranks(mx.concatenate([self.tokens, other.tokens], axis=-1))
        table = mx.zeros(numbers.shape).at[_cells(numbers[..., :count])].add(self.probabilities)
        return mx.take_along_axis(table, numbers[..., count:], axis=-1)

    def draw(self, key: mx.array) -> mx.array:
        """One token a row, [...]."""
        index = mx.random.categorical(mx.log(self.probabilities), key=key).astype(mx.int32)
        if self.tokens is None:
            return index
        return mx.take_along_axis(self.tokens, index[..., None], axis=-1)[..., 0].astype(mx.int32)

    def overridden(self, mask: mx.array, tokens: mx.array) -> TokenDistribution:
        """This distribution, with all weight on `tokens` [...] where mask [...] is set."""
        mask, tokens = mask[..., None], tokens[..., None]
        if self.tokens is None:
            sure = (mx.arange(self.probabilities.shape[-1]) == tokens).astype(mx.float32)
            return TokenDistribution(None, mx.where(mask, sure, self.probabilities))
        first = mx.arange(self.probabilities.shape[-1]) == 0
        # The token may be in the support a second time, with weight 0: weights of equal tokens are added up.
        support = mx.where(mask & first, tokens, self.tokens)
        return TokenDistribution(support, mx.where(mask, first.astype(mx.float32), self.probabilities))

    def each(self, change: Callable[[mx.array], mx.array]) -> TokenDistribution:
        """The same change of both arrays: other rows of a distribution [B, M, N]."""
        return TokenDistribution(None if self.tokens is None else change(self.tokens), change(self.probabilities))


def _cells(places: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Places [B, M, N] along the last axis of an array [B, M, any] as an index of it."""
    batch, rows = places.shape[:2]
    return mx.arange(batch)[:, None, None], mx.arange(rows)[:, None], places


def _ranks(tokens: mx.array) -> mx.array:
    """How many different smaller tokens each token's row has, [..., N] -> int32 [..., N] below N; equal ones share."""
    order = mx.argsort(tokens, axis=-1)
    ordered = mx.take_along_axis(tokens, order, axis=-1)
    rises = (ordered[..., 1:] != ordered[..., :-1]).astype(mx.int32)
    ranks = mx.concatenate([mx.zeros_like(rises[..., :1]), mx.cumsum(rises, axis=-1)], axis=-1)
    return mx.put_along_axis(mx.zeros_like(ranks), order, ranks, axis=-1)


def stacked(distributions: list[TokenDistribution]) -> TokenDistribution:
    """Distributions [B, 1, N] of the same kind of support, one after the other: [B, K, N]."""
    tokens = [distribution.tokens for distribution in distributions if distribution.tokens is not None]
    probabilities = mx.concatenate([distribution.probabilities for distribution in distributions], axis=1)
    return TokenDistribution(mx.concatenate(tokens, axis=1) if tokens else None, probabilities)


def point_mass(tokens: mx.array) -> TokenDistribution:
    """All weight on one token a row, [...] -> support of size 1."""
    return TokenDistribution(tokens[..., None], mx.ones((*tokens.shape, 1)))


@dataclass(frozen=True)
class SamplingSpec:
    """The part of a Sampling that shapes the graph; equal specs share compiled rounds. Values are SamplingArrays."""

    greedy: bool = True
    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    penalties: bool = False
    bias: bool = False
    logprobs: int = 0

    @classmethod
    def of(cls, sampling: Sampling, vocab_size: int, logprobs: int = 0) -> SamplingSpec:
        """The spec of a resolved Sampling (no field None)."""
        assert sampling.temperature is not None and sampling.top_k is not None
        filtered = sampling.temperature > 0
        return cls(
            greedy=not filtered,
            top_k=sampling.top_k if filtered and sampling.top_k < vocab_size else 0,
            top_p=filtered and sampling.top_p != 1.0,
            min_p=filtered and sampling.min_p != 0.0,
            penalties=(sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) != (1, 0, 0),
            bias=bool(sampling.logit_bias),
            logprobs=logprobs,
        )

    def arrays(self, sampling: Sampling, vocab_size: int) -> SamplingArrays:
        """The values that go with the spec, as arrays, so that other values need no other graph."""
        names = ["temperature"] * (not self.greedy) + ["top_p"] * self.top_p + ["min_p"] * self.min_p
        if self.penalties:
            names += ["repetition_penalty", "presence_penalty", "frequency_penalty"]
        arrays = {name: mx.array(getattr(sampling, name), dtype=mx.float32) for name in names}
        if self.bias:
            bias = mx.zeros((vocab_size,))
            assert sampling.logit_bias is not None
            bias[mx.array(list(sampling.logit_bias))] = mx.array(list(sampling.logit_bias.values()), dtype=mx.float32)
            arrays["bias"] = bias
        return arrays

    def history(self, prompt: list[int], vocab_size: int) -> History:
        """What penalties count, [B, V]: whether a token was in the prompt, how often it was generated."""
        if not self.penalties:
            return {}
        prompted = mx.zeros((1, vocab_size), dtype=mx.bool_)
        prompted[:, mx.array(prompt)] = True
        return {"prompted": prompted, "generated": mx.zeros((1, vocab_size))}

    def processed(
        self, logits: mx.array, tokens: mx.array | None, arrays: SamplingArrays, history: History
    ) -> mx.array:
        """Penalties and bias on logits [B, M, N] of `tokens`; the history is [B, V] or, per row, [B, M, V].

        Repetition divides positive and multiplies negative logits of every token seen, prompt included (CTRL, arXiv
        1909.05858); presence and frequency subtract once and per occurrence among the generated (OpenAI's API).
        """
        if self.penalties:
            generated, prompted = history["generated"], history["prompted"]
            generated = generated if generated.ndim == 3 else generated[:, None]
            prompted = mx.broadcast_to(prompted[:, None], generated.shape)
            if tokens is not None:
                rows = (*tokens.shape[:2], generated.shape[-1])
                generated, prompted = (mx.take_along_axis(mx.broadcast_to(seen, rows), tokens, axis=-1)
                                       for seen in (generated, prompted))  # fmt: skip
            factor = arrays["repetition_penalty"]
            scaled = mx.where(logits > 0, logits / factor, logits * factor)
            logits = mx.where(prompted | (generated > 0), scaled, logits)
            logits = logits - arrays["presence_penalty"] * (generated > 0) - arrays["frequency_penalty"] * generated
        if self.bias:
            logits = logits + (arrays["bias"] if tokens is None else arrays["bias"][tokens])
        return logits

    def distribution(self, logits: mx.array, tokens: mx.array | None, arrays: SamplingArrays) -> TokenDistribution:
        """The filtered distribution of processed float32 logits [..., N]."""
        if 0 < self.top_k < logits.shape[-1]:  # before the temperature, which does not change the order
            chosen = mx.argpartition(-logits, kth=self.top_k - 1, axis=-1)[..., : self.top_k].astype(mx.int32)
            logits = mx.take_along_axis(logits, chosen, axis=-1)
            tokens = chosen if tokens is None else mx.take_along_axis(tokens, chosen, axis=-1)
        # Below the best one: divided by however small a temperature, none overflows to infinity.
        logits = (logits - logits.max(axis=-1, keepdims=True)) / arrays["temperature"]
        if self.top_p:
            # Kept: the likeliest tokens until their weight reaches top_p, the one that reaches it included.
            ordered = mx.sort(logits, axis=-1)[..., ::-1]
            weights = mx.softmax(ordered, axis=-1)
            before = mx.cumsum(weights, axis=-1) - weights
            kept = mx.where(before < arrays["top_p"], ordered, mx.inf)
            logits = mx.where(logits >= kept.min(axis=-1, keepdims=True), logits, -mx.inf)
        if self.min_p:
            logits = mx.where(logits >= mx.log(arrays["min_p"]), logits, -mx.inf)  # the best is 0
        return TokenDistribution(tokens, mx.softmax(logits, axis=-1))


def counted(generated: mx.array, tokens: mx.array, upto: mx.array | None = None) -> mx.array:
    """Counts [B, V] with tokens [B, M] added, of which only the first `upto` [B] count."""
    found = (tokens[..., None] == mx.arange(generated.shape[-1])).astype(generated.dtype)
    if upto is not None:
        found = found * (mx.arange(tokens.shape[1]) < upto[:, None])[..., None]
    return generated + found.sum(axis=1)


def running_counts(generated: mx.array, drafts: mx.array | None) -> mx.array:
    """Counts as each row of a pass sees them: [B, V] and drafts [B, K] -> [B, K + 1, V]."""
    start = generated[:, None]
    if drafts is None:
        return start
    found = (drafts[..., None] == mx.arange(generated.shape[-1])).astype(generated.dtype)
    return mx.concatenate([start, start + mx.cumsum(found, axis=1)], axis=1)


class DraftSampler:
    """Samples one round's drafts: greedily, or from the filtered distribution, which it keeps for acceptance."""

    def __init__(
        self, spec: SamplingSpec, arrays: SamplingArrays, history: History, keys: mx.array,
        override: Override | None = None,
    ) -> None:  # fmt: skip
        self._spec, self._arrays, self._history, self._keys = spec, arrays, dict(history), keys
        self._override, self._steps = override or {}, 0
        self._distributions: list[TokenDistribution] = []

    @property
    def distribution(self) -> TokenDistribution | None:
        """What the drafts were drawn from, [B, K, N]; None when greedy."""
        return stacked(self._distributions) if self._distributions else None

    def __call__(self, logits: mx.array, tokens: mx.array | None = None, forced: Forced | None = None) -> mx.array:
        """The next draft [B, 1] from logits [B, 1, N] of `tokens` (None = the whole vocabulary).

        forced: where its mask [B, 1] is set, its token [B, 1] is taken instead, as a point mass.
        """
        logits = self._spec.processed(logits.astype(mx.float32), tokens, self._arrays, self._history)
        taken = [one for one in (forced, self._overridden(1)) if one is not None]
        if self._spec.greedy:
            best = mx.argmax(logits, axis=-1).astype(mx.int32)
            chosen = best if tokens is None else mx.take_along_axis(tokens, best[..., None], axis=-1)[..., 0]
            for mask, token in taken:
                chosen = mx.where(mask, token, chosen)
        else:
            distribution = self._spec.distribution(logits, tokens, self._arrays)
            for mask, token in taken:
                distribution = distribution.overridden(mask, token)
            chosen = distribution.draw(self._keys[len(self._distributions)])
            self._distributions.append(distribution)
        if self._spec.penalties:
            self._history["generated"] = counted(self._history["generated"], chosen)
        return chosen.astype(mx.int32)

    def point_mass(self, tokens: mx.array) -> mx.array:
        """Drafts [B, K] that come without scores, from a lookup: q is all on each of them."""
        if (found := self._overridden(tokens.shape[1])) is not None:
            tokens = mx.where(*found, tokens)
        if not self._spec.greedy:
            self._distributions.append(point_mass(tokens))
        return tokens

    def _overridden(self, steps: int) -> Forced | None:
        """What is put in place of the next drafts, [B, steps] each."""
        first, self._steps = self._steps, self._steps + steps
        if not self._override:
            return None
        return self._override["mask"][:, first : self._steps], self._override["tokens"][:, first : self._steps]
