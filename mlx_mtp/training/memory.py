"""Training in less memory: gradient checkpointing of a module's layers, and a scheduler that does not run ahead.

What it does: two context managers, each undone on leaving. What it does not do: accumulate gradients (trainer.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_mtp.errors import OptionError


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The members of every list named `layers` in the module and below it."""
    found: list[nn.Module] = []
    for part in module.modules():
        layers = part.get("layers")
        if isinstance(layers, list):
            found += [layer for layer in layers if isinstance(layer, nn.Module)]
    return found


@contextlib.contextmanager
def checkpointed_layers(module: nn.Module) -> Iterator[None]:
    """Within: the module's layers keep only their inputs, and are run again for the gradient.

    A layer must be a pure function of its arguments and parameters. Its class is replaced by one of the same name
    (Python looks `__call__` up there) and restored on leaving; other modules of that class are not touched.
    Raises OptionError for a module without layers.
    """
    layers = layers_of(module)
    if not layers:
        raise OptionError(
            f"Expected a module with a list `layers` for checkpoint_gradients, found none in {type(module).__name__}; "
            "switch the option off."
        )
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
        def run(parameters: dict[str, Any], *arguments: Any, **named: Any) -> Any:
            self.update(parameters)
            return cls.__call__(self, *arguments, **named)

        # Parameters as arguments: MLX returns gradients for a checkpointed function's arguments alone.
        return mx.checkpoint(run)(self.trainable_parameters(), *arguments, **named)

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
