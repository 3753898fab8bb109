"""Losses of several heads one after the other: the logits of one are gone before those of the next exist.

What it does: gives a loss over n hidden states whose gradient is computed with it, head by head, so that a step needs
memory for the logits of one head and not of n (Gloeckle et al. 2024, section 2, "memory-efficient implementation").
What it does not do: know a model, or what the loss is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx

# leaf(i, hidden [B, T, D], *shared) -> loss and figure of head i, both scalars.
Leaf = Callable[..., tuple[mx.array, mx.array]]


def in_order(leaf: Leaf, weights: Sequence[float | mx.array]) -> Callable[..., tuple[mx.array, mx.array]]:
    """(hiddens [n, B, T, D], *shared) -> sum of weights[i] * loss_i, and the figures [n].

    shared: arrays every head uses and that learn, such as the unembedding [V, D].
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

            def one(arrays: list[mx.array], i: int = i) -> tuple[mx.array, mx.array]:
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

    def loss(hiddens: mx.array, *shared: mx.array) -> tuple[mx.array, mx.array]:
        total, figures, *_ = cast(tuple[mx.array, ...], forward(hiddens, *shared))
        return total, mx.stop_gradient(figures)

    return loss
