"""Optimisers: AdamW for everything, or Muon for hidden matrices beside AdamW for the rest.

One learning rate serves both: Muon's step is scaled to the size of AdamW's, so rate, schedule and weight decay mean the
same for every weight.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

OPTIMIZERS = ("adamw", "muon")
# Matrices that write logits or choose rows of a table: not hidden to hidden, so not Muon's.
HEADS = ("head", "lm_head", "output", "unembed", "centroids")
# Root mean square of AdamW's steps in practice, and so of ours (Moonlight, arXiv 2502.16982, 2.2).
STEP_SIZE = 0.2

Schedule = Callable[[mx.array], mx.array]


class Muon(optim.Muon):
    """Muon with steps of AdamW's size and AdamW's decoupled weight decay (Moonlight, arXiv 2502.16982, 2.2).

    MLX's own adds the decay to the gradient before it is orthogonalised, where its size is lost.
    """

    def __init__(self, learning_rate: float | Schedule, weight_decay: float) -> None:
        super().__init__(learning_rate, momentum=0.95, weight_decay=0.0)
        self.decay = weight_decay

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict[str, mx.array]) -> mx.array:
        """One matrix [outputs, inputs]."""
        rate = self.learning_rate.astype(parameter.dtype)
        # MLX's step -rate * sqrt(max(1, outputs / inputs)) * Q has an RMS of rate / sqrt(inputs), whatever the shape.
        step = super().apply_single(gradient, mx.zeros_like(parameter), state)
        return parameter * (1 - rate * self.decay) + STEP_SIZE * parameter.shape[-1] ** 0.5 * step


def make_optimizer(name: str, module: nn.Module, schedule: Schedule, weight_decay: float) -> optim.Optimizer:
    """The optimiser `name` (one of OPTIMIZERS) for the module's trainable parameters, its state initialised."""
    adamw = optim.AdamW(schedule, betas=[0.9, 0.95], weight_decay=weight_decay)
    optimizer: optim.Optimizer = adamw
    if name == "muon":
        hidden = {
            f"{name}.weight"
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and name.rpartition(".")[2] not in HEADS
        }
        optimizer = optim.MultiOptimizer([Muon(schedule, weight_decay), adamw], [lambda path, _: path in hidden])
    optimizer.init(module.trainable_parameters())
    return optimizer


def steps_taken(optimizer: optim.Optimizer) -> int:
    """How many updates the optimiser's state has seen."""
    state = optimizer.state
    return int(state["states"][0]["step"] if "states" in state else state["step"])
