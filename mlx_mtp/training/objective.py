"""Losses: next token for a target, and what every drafter family is trained for, with its target or on a frozen one.

Every loss is a function (module, batch, progress): batch int32 [B, T + 1 + K], whose first T tokens are the places
that learn; progress float32 in [0, 1), the share of the training that is done. K is the number of drafts. Draft j
(from 0) at place t knows the tokens up to t and perhaps those up to t + 1 + j, and proposes token t + 2 + j.

Shapes: B batch, T places, K drafts, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.backend.activations import logsumexp, probabilities
from mlx_mtp.drafters.assistant import AssistantModel
from mlx_mtp.drafters.layers import same_chat
from mlx_mtp.drafters.parallel import ParallelModel
from mlx_mtp.drafters.sequential import SequentialModel
from mlx_mtp.generation.cache import NoCache
from mlx_mtp.generation.interfaces import States, Target
from mlx_mtp.targets.gemma4 import Gemma4Model
from mlx_mtp.training.chats import REPLY, ChatCache

START = mx.array(0.0)
LATE = 0.6  # share of the training after which acceptance itself is learned
LEAST = 1e-4  # of an overlap: below it nothing is learned from its logarithm
Result = tuple[mx.array, mx.array]
Loss = Callable[..., Result]


def in_order(leaf: Loss, weights: Sequence[float | mx.array]) -> Loss:
    """(hiddens [n, B, T, D], *shared) -> sum of weights[i] * loss_i, and the figures [n].

    leaf(i, hidden [B, T, D], *shared) -> loss and figure of head i, both scalars. shared: arrays that every head uses
    and that learn, such as the unembedding [V, D]. The gradient is computed with the loss, head by head, so that a step
    needs memory for the logits of one head and not of n (Gloeckle et al. 2024, section 2).
    """

    @mx.custom_function
    def forward(hiddens: mx.array, *shared: mx.array) -> tuple[mx.array, ...]:
        total = mx.array(0.0)
        figures: list[mx.array] = []
        by_hidden: list[mx.array] = []
        by_shared = [mx.zeros_like(array) for array in shared]
        for i, weight in enumerate(weights):
            # Nothing of this head is computed before the gradients of the last one are.
            (hidden,) = mx.depends([hiddens[i]], [total, *figures[-1:], *by_hidden[-1:], *by_shared])

            def one(arrays: list[mx.array], i: int = i) -> Result:
                return leaf(i, *arrays)

            (loss, figure), gradients = mx.value_and_grad(one)([hidden, *shared])
            total = total + weight * loss
            figures.append(figure)
            by_hidden.append(weight * gradients[0])
            by_shared = [sum_ + weight * new for sum_, new in zip(by_shared, gradients[1:], strict=True)]
        return total, mx.stack(figures), mx.stack(by_hidden), *by_shared

    @forward.vjp
    def backward(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, ...]:
        return tuple(cotangents[0] * gradient for gradient in outputs[2:])

    def loss(hiddens: mx.array, *shared: mx.array) -> Result:
        total, figures, *_ = cast(tuple[mx.array, ...], forward(hiddens, *shared))
        return total, mx.stop_gradient(figures)

    return loss


# A target, alone or together with its drafter


class Joint(nn.Module):
    """A target and the drafter that is trained with it, as one tree of parameters."""

    def __init__(self, target: Gemma4Model, drafter: Any) -> None:
        super().__init__()
        self.target, self.drafter = target, drafter


def next_token_loss(model: Gemma4Model, batch: mx.array, progress: mx.array = START) -> Result:
    """Mean cross-entropy of tokens 1.. given those before; batch [B, T + 1]. Second result: share predicted right."""
    return _on_labels(model, batch, [_states(model, batch[:, :-1]).hidden], [1.0])


def joint_parallel_loss(weight: float = 1.0) -> Loss:
    """Gloeckle et al. 2024, equation 2: the sum over n heads of the cross-entropy of the token i = 1..n places on.

    Head 1 is the target's own, so without others this is next_token_loss; heads 2..n count `weight` times. Batches
    [B, T + n] for a Joint of Gemma4Model and ParallelModel. Second result [n]: share of tokens predicted right.
    """

    def loss(module: Joint, batch: mx.array, progress: mx.array = START) -> Result:
        heads: ParallelModel = module.drafter
        count = len(heads.heads)
        states = _states(module.target, batch[:, : batch.shape[1] - 1 - count]).of_layers(heads.aux_layers)
        hiddens = [states.hidden, *heads(heads.read(states))]
        return _on_labels(module.target, batch, hiddens, [1.0] + [weight] * count)

    return loss


def deepseek_weight(progress: mx.array) -> mx.array:
    """DeepSeek-V3's lambda (section 4.2): 0.3 for the first 10 of its 14.8 trillion tokens, then 0.1."""
    return mx.where(progress < 10.0 / 14.8, 0.3, 0.1)


def joint_sequential_loss(steps: int) -> Loss:
    """DeepSeek-V3, equations 21 to 25: the target's cross-entropy plus lambda / K times the sum of the modules'.

    steps: K; beyond the number of modules the last one is trained for being used again on its own states. Every
    module's mean is over the same T places, where the paper's, without the tokens after a sequence, has fewer for
    later modules. Batches [B, T + 1 + K] for a Joint of Gemma4Model and SequentialModel. Second result [1 + K]: share
    of tokens predicted right.
    """

    def loss(module: Joint, batch: mx.array, progress: mx.array = START) -> Result:
        modules: SequentialModel = module.drafter
        target, rows = module.target, batch.shape[1] - 1 - steps
        states = _states(target, batch[:, :rows]).of_layers(modules.aux_layers)
        hiddens = [states.hidden, *modules(modules.read(states), target.embed(batch[:, 1 : rows + steps]), steps)]
        return _on_labels(target, batch, hiddens, [1.0] + [deepseek_weight(progress) / steps] * steps)

    return loss


def _states(model: Gemma4Model, tokens: mx.array) -> States:
    return model(tokens, NoCache(model.config.sliding_window, tokens.shape[0]))


def _on_labels(
    model: Gemma4Model, batch: mx.array, hiddens: list[mx.array], weights: Sequence[float | mx.array]
) -> Result:
    """Weighted sum of mean cross-entropies, in nats: result i [B, T, D] of `hiddens` against the tokens i + 1 places
    on. Second result: the shares of places where the best token is that one."""
    rows = hiddens[0].shape[1]

    def leaf(i: int, hidden: mx.array, table: mx.array) -> Result:
        labels = batch[:, i + 1 : i + 1 + rows]
        logits = model.capped(hidden @ table.T)
        right = (mx.argmax(mx.stop_gradient(logits), axis=-1) == labels).mean()
        (logits,) = mx.depends([logits], [right])  # nobody else needs them then, and the gradient may take their place
        return (logsumexp(logits) - mx.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]).mean(), right

    return in_order(leaf, weights)(mx.stack(hiddens), model.embed_tokens.weight)


# A drafter on a frozen target


@mx.custom_function
def _distance(logits: mx.array, p: mx.array, late: mx.array) -> tuple[mx.array, mx.array]:
    """The loss of every place and its gradient [..., V], by hand: taken step by step it costs twice the time."""
    most, mass = logits.max(axis=-1, keepdims=True), p.sum(axis=-1, keepdims=True)
    powers = probabilities(logits - most)
    total = powers.sum(axis=-1, keepdims=True)
    q, surprise = powers / total, (mx.log(total) + most) * mass - (p * logits).sum(axis=-1, keepdims=True)
    lacking, overlap = mx.where(q < p, q, 0.0), mx.minimum(p, q).sum(axis=-1, keepdims=True)
    known = mx.maximum(overlap, LEAST)
    half, slope = mx.where(late, 0.5, 0.0), mx.where(late & (overlap > LEAST), 0.5, 0.0) / known
    value = (1 - half) * surprise - half * mx.log(known)
    gradient = q * ((1 - half) * mass + slope * lacking.sum(axis=-1, keepdims=True)) - (1 - half) * p - slope * lacking
    return value[..., 0], gradient


@_distance.vjp
def _distance_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    return cotangents[0][..., None] * outputs[1], mx.zeros_like(primals[1]), mx.zeros_like(primals[2])


def distance(logits: mx.array, p: mx.array, late: mx.array) -> mx.array:
    """Of the distribution of `logits` [..., V] from p [..., V], which may lack tokens and does not learn -> [...].

    Cross-entropy, in nats; where `late`, half of it and half of -log sum min(p, q).
    """
    value, _ = cast(tuple[mx.array, mx.array], _distance(logits, p, late))
    return value


# (drafter, the target's states, tokens and the places where their chats begin [B, T + K], T) -> of every draft what
# only lacks the unembedding [B, T, D].
Draft = Callable[[Any, States, mx.array, mx.array, int], list[mx.array]]
# drafter -> its own unembedding [V, D] and the tokens its rows are for [V], None = all in order.
Table = Callable[[Any], tuple[mx.array, mx.array | None]]


def parallel_loss(target: Target, steps: int, decay: float = 1.0, shortlist: mx.array | None = None) -> Loss:
    """Heads 2..n (K = steps = n - 1) of a ParallelModel on a frozen target, whose own head is head 1; as in _frozen."""

    def draft(drafter: ParallelModel, states: States, tokens: mx.array, start: mx.array, rows: int) -> list[mx.array]:
        if drafter.config.reads == "trunk":
            states = target.forward(tokens, _remembering(target, start)).of_layers(drafter.aux_layers)
        return drafter(drafter.read(states.first(rows)), start[:, :rows])

    return _frozen(target, draft, steps, decay, shortlist)


def sequential_loss(target: Target, steps: int, decay: float = 1.0, shortlist: mx.array | None = None) -> Loss:
    """K = steps of a SequentialModel on a frozen target; beyond its modules the last one goes on from its own states.

    Each row sees what it will see in decoding: of the rows before its chain the K/V from true states, and of the
    chain its own. As in _frozen.
    """

    def draft(drafter: SequentialModel, states: States, tokens: mx.array, start: mx.array, rows: int) -> list[mx.array]:
        embedded = target.embed(tokens[:, 1 : rows + steps])
        return drafter(drafter.read(states.first(rows)), embedded, steps, start[:, :rows])

    return _frozen(target, draft, steps, decay, shortlist)


def assistant_loss(target: Target, steps: int, decay: float = 0.8, shortlist: mx.array | None = None) -> Loss:
    """An assistant on a frozen target, K = steps, as in _frozen.

    The drafter's row at position t reads the target's K/V up to t, as in decoding (convention B: query position
    t, P = t + 1), so the target's pass is run again. Its step j gets the embedding of token t + 1 + j. From the second
    step on the state is the drafter's own, as in decoding. All of its own table learns, whatever the shortlist:
    choosing among centroids is for decoding.
    """

    def draft(drafter: AssistantModel, states: States, tokens: mx.array, start: mx.array, rows: int) -> list[mx.array]:
        cache = _remembering(target, start)
        states = target.forward(tokens, cache)
        shared = {k: (cache.keys[i][:, :, :rows], cache.values[i][:, :, :rows])
                  for k, i in target.info.storing_layers.items()}  # fmt: skip
        view = NoCache(target.info.window, tokens.shape[0]).plan(rows)
        masks = {kind: mask & same_chat(start[:, :rows]) for kind, mask in view.masks.items()}
        state, found = states.hidden[:, :rows], []
        for j in range(steps):
            embedded = target.embed(tokens[:, j + 1 : j + 1 + rows])
            inner, state = drafter.step(embedded, state, view.offset, shared, masks)
            found.append(inner)
        return found

    def own(drafter: AssistantModel) -> tuple[mx.array, mx.array | None]:
        ordering = drafter.masked_embedding.token_ordering if drafter.config.centroids else None
        return drafter.model.embed_tokens.weight, ordering

    return _frozen(target, draft, steps, decay, None, own)


def _frozen(
    target: Target, draft: Draft, steps: int, decay: float, shortlist: mx.array | None, own: Table | None = None
) -> Loss:
    """The loss of K = steps drafts on a target that does not learn, by `own` unembedding or the target's.

    Batches are those of chats.py: tokens, mask, start, best, norm [B, T + 1 + K], states [B, T + 1 + K, D (1 + N)] with
    the inputs of N layers, and replies [B, R / B]. Places count whose drafted token is of a reply in their own chat,
    and only for these R tokens logits are computed. Cross-entropy of every draft against the target's own distribution
    of the same token, as far as it lies on the shortlist; from LATE of the training on half of it is -log sum min(p,
    q), the share that is accepted at temperature 1. Draft j is weighted by decay^j, because it only counts when all
    before it were accepted; the weights add up to 1. Second result [K]: share of places where this draft and all before
    it are the target's best tokens, so that 1 + their sum are the tokens of a round.
    """
    head = target.head if shortlist is None else target.head_on(shortlist)

    def loss(drafter: Any, batch: tuple[mx.array, ...], progress: mx.array = START) -> Result:
        tokens, mask, start, best, norm, kept, replies = batch
        width = tokens.shape[1]
        rows, token = width - 1 - steps, replies.reshape(-1)
        parts = kept.shape[2] // target.info.hidden_size
        final, *aux = mx.split(kept.astype(mx.float32), parts, axis=-1)
        states = States(final[:, :-1], tuple(state[:, :-1] for state in aux))
        hiddens = draft(drafter, states, tokens[:, :-1], start[:, :-1], rows)

        def counts(j: int) -> mx.array:
            there = slice(j + 2, j + 2 + rows)
            return (mask[:, there] == REPLY) & (start[:, there] == start[:, :rows])

        def place(j: int) -> mx.array:
            """Whose draft j each token is, [R]; there is none outside 0 to T - 1."""
            return token % width - 2 - j

        def of_tokens(j: int, places: mx.array) -> mx.array:
            """[B, T, ...] -> [R, ...]: of the place whose draft j each token is; of any where there is none."""
            return places.reshape(-1, *places.shape[2:])[token // width * rows + mx.clip(place(j), 0, rows - 1)]

        *table, ids = own(drafter) if own else (shortlist,)
        before = mx.maximum(token - 1, 0)
        wanted = head(final.reshape(-1, final.shape[2])[before][None])[0]
        if own and ids is not None:
            wanted = wanted[:, ids]
        targets, late = probabilities(wanted - norm.reshape(-1, 1)[before]), progress >= LATE

        def leaf(j: int, hidden: mx.array, *unembedding: mx.array) -> Result:
            told = of_tokens(j, counts(j)) & (place(j) >= 0) & (place(j) < rows)
            q = hidden @ unembedding[0].T if unembedding else head(hidden[None])[0]
            drawn = mx.argmax(mx.stop_gradient(q), axis=-1)
            right = (drawn if ids is None else ids[drawn]) == best.reshape(-1)[before]
            (q,) = mx.depends([q], [right])  # as in _on_labels
            return (distance(q, targets, late) * told).sum() / mx.maximum(told.sum(), 1), right

        weights = [decay**j / sum(decay**i for i in range(steps)) for j in range(steps)]
        found = mx.stack([of_tokens(j, hidden) for j, hidden in enumerate(hiddens)])
        total, right = in_order(leaf, weights)(found, *table)
        slot = mx.cumsum((mask == REPLY).reshape(-1)).reshape(mask.shape) - 1
        chain = [right[j][slot[:, j + 2 : j + 2 + rows]] & counts(j) for j in range(steps)]
        accepted = mx.cumprod(mx.stack(chain).astype(mx.float32), axis=0).sum(axis=(1, 2))
        return total, accepted / mx.maximum(counts(0).sum(), 1)

    return loss


def _remembering(target: Target, start: mx.array) -> ChatCache:
    """A cache of the target's for the tokens whose chats begin at `start` [B, T], with every row left to be read."""
    batch, rows = start.shape
    cache = ChatCache.of(target, rows, batch, slack=rows)  # of so much slack, its sliding layers forget none
    cache.start = start
    return cache
