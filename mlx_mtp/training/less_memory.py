"""Gradients in less memory: heads one after the other, layers run again, a scheduler that does not run ahead."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.errors import OptionError

# leaf(i, hidden [B, T, D], *shared) -> loss and figure of head i, both scalars.
Leaf = Callable[..., tuple[mx.array, mx.array]]


def in_order(leaf: Leaf, weights: Sequence[float | mx.array]) -> Callable[..., tuple[mx.array, mx.array]]:
    """(hiddens [n, B, T, D], *shared) -> sum of weights[i] * loss_i, and the figures [n].

    The gradient is computed with the loss, head by head, so that a step needs memory for the logits of one head and
    not of n (Gloeckle et al. 2024, section 2). shared: arrays every head uses and that learn, such as the unembedding
    [V, D].
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


@contextlib.contextmanager
def checkpointed_layers(module: nn.Module) -> Iterator[None]:
    """Within: layers in lists named `layers`, at any depth, keep only their inputs and are run again for the gradient.

    A layer must be a pure function of its arguments and parameters. Its class is replaced by one of the same name
    (Python looks `__call__` up there) and restored on leaving; other modules of that class are not touched.
    Raises OptionError for a module without layers.
    """
    lists = [part["layers"] for part in module.modules() if isinstance(part.get("layers"), list)]
    layers = [layer for found in lists for layer in found if isinstance(layer, nn.Module)]
    if not layers:
        raise OptionError(f"{type(module).__name__} has no list `layers` to run again; leave checkpoint_gradients out.")
    classes = [type(layer) for layer in layers]
    derived = {cls: _checkpointed(cls) for cls in classes}
    for layer, cls in zip(layers, classes, strict=True):
        layer.__class__ = derived[cls]
    try:
        yield
    finally:
        for layer, cls in zip(layers, classes, strict=True):
            layer.__class__ = cls


def _checkpointed(cls: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        return nn.utils.checkpoint(self, cls.__call__.__get__(self))(*arguments, **named)

    return type(cls.__name__, (cls,), {"__call__": call})


@contextlib.contextmanager
def one_operation_at_a_time() -> Iterator[None]:
    """Within: MLX's scheduler waits for memory to be freed before it queues more work.

    On the CPU it otherwise allocates far ahead of what has been computed, so that a step's peak is a multiple of what
    it needs. MLX waits whenever its memory limit is passed: the lowest limit makes it wait at every operation.
    """
    before = mx.set_memory_limit(1)
    try:
        yield
    finally:
        mx.set_memory_limit(before)
