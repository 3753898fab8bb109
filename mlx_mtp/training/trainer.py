"""The training loop: compiled step, schedule, durable checkpoints, resume as if never stopped.

A checkpoint is one file that replaces the last by a rename, so a kill at any moment leaves a whole one.
Parameters, optimiser state and step are all there is to resume: batches and schedule follow from the step, and a
loss may draw no random numbers. The log then holds what a run without the kill would have logged, but for its times.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_mtp.backend.allocation import freed_memory_kept
from mlx_mtp.checkpoints.atomic import write_state
from mlx_mtp.checkpoints.checkpoint import check_finite
from mlx_mtp.errors import CheckpointError, OptionError
from mlx_mtp.generation import checks
from mlx_mtp.training import optimizers
from mlx_mtp.training.run_folder import RESUME, cut_log, locked, read_log, read_state

# A batch is one array [B, ...] or several. loss(module, batch, progress) -> scalar to minimise and a vector of figures
# to report, both means over the rows. progress: float32 scalar, the share of all steps that is done, from 0 to below 1.
Loss = Callable[[Any, Any, mx.array], tuple[mx.array, mx.array]]
Returned = TypeVar("Returned")

FLAT, FINAL_RATE = 0.3, 0.02  # share of the steps before the rate falls, and what is left of it at the end
CLIP = 1.0  # most that the global norm of a gradient may be


@dataclass(frozen=True)
class Stage:
    """What is being done and how far it is.

    Where something is trained, figures are the loss and the loss's own figures of the last step by name, and held_out
    the same over the batches held out, where they were looked at.
    """

    name: str
    step: int
    steps: int
    figures: Mapping[str, float] = field(default_factory=dict)
    held_out: Mapping[str, float] | None = None
    tokens_per_second: float = 0.0


def followed(stages: Generator[Stage, None, Returned], hear: Callable[[Stage], None]) -> Returned:
    """Runs stages to their end, tells of each, and returns what they return."""
    while True:
        try:
            stage = next(stages)
        except StopIteration as end:
            returned: Returned = end.value
            return returned
        hear(stage)


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Hyper-parameters of one run. Rates are per step.

    patience: the run ends where so many evaluations brought no better figures; 0 = never.
    optimizer: "adamw", or "muon" for the hidden matrices with AdamW for the rest (optimizers.py); same learning_rate.
    accumulate: a step's batch goes through in that many equal parts, their gradients averaged.
    """

    steps: int
    learning_rate: float = 2e-3
    warmup: int = 20
    weight_decay: float = 0.05
    save_seconds: float = 60.0
    evaluate_every: int = 200
    patience: int = 0
    optimizer: str = "muon"
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "evaluate_every", "accumulate"):
            checks.whole(name, vars(self)[name], 1)
        checks.number("learning_rate", self.learning_rate, checks.SMALLEST, checks.LARGEST)
        checks.one_of("optimizer", self.optimizer, optimizers.OPTIMIZERS)

    def schedule(self) -> optimizers.Schedule:
        """The rate of a step: linear warm-up, flat, then straight down to FINAL_RATE of it."""
        warmup, fall = min(self.warmup, max(1, self.steps // 10)), (1 - FLAT) * self.steps

        def rate(step: mx.array) -> mx.array:
            done = step.astype(mx.float32)
            down = FINAL_RATE + (1 - FINAL_RATE) * (self.steps - done) / fall
            return self.learning_rate * mx.minimum(mx.minimum(done / warmup, 1.0), down)

        return rate


class Trainer:
    """Trains `module` in float32 with `loss` on `batch_at(step)`; all files go to `folder`.

    name: what the stage is called. data: names what is learned, in the checkpoint's record. figures: names of the
    loss's second result.
    """

    def __init__(
        self, module: nn.Module, loss: Loss, batch_at: Callable[[int], Any], options: TrainOptions, folder: Path, *,
        data: str, held_out: Sequence[Any] = (), figures: tuple[str, ...] = (), name: str = "training",
    ) -> None:  # fmt: skip
        self.module, self.loss, self.batch_at, self.options, self.folder = module, loss, batch_at, options, folder
        self.held_out = [tree_map(mx.array, batch) for batch in held_out]
        self.figures, self.name = figures, name
        self.step = 0
        self.evaluations: list[float] = []  # sums of held-out figures, in order
        module.set_dtype(mx.float32)
        self.optimizer = optimizers.make_optimizer(options.optimizer, module, options.schedule(), options.weight_decay)
        self.state_file, self.log_file = folder / "training.safetensors", folder / "log.jsonl"
        self._settings = {"data": data, **asdict(options)}
        folder.mkdir(parents=True, exist_ok=True)

    def save(self) -> None:
        """Writes the checkpoint beside the old one and renames; a full disk leaves the old one untouched.

        CheckpointError, and nothing is written, where weights or the optimiser's state are not finite.
        """
        tensors = dict(tree_flatten({"model": self.module.parameters(), "optimizer": self.optimizer.state}))
        check_finite(tensors.items(), self.state_file, "the last checkpoint is untouched")
        write_state(self.state_file, tensors, {"step": self.step, **self._settings}, RESUME)

    def resume(self) -> bool:
        """Continues from the checkpoint if there is one.

        Refuses one of other data, options or module, and one whose numbers are not all finite.
        """
        if not self.state_file.exists():
            return False
        tensors, about = read_state(self.state_file)
        if changed := [name for name, value in self._settings.items() if about.get(name) != value]:
            raise OptionError(
                f"{self.state_file}: was trained with another {', '.join(changed)}; use the same, or another folder."
            )
        check_finite(tensors.items(), self.state_file, "no run can go on from it: train into another folder")
        state: Any = tree_unflatten(list(tensors.items()))
        weights: Any = tree_flatten(state["model"])
        try:
            self.module.load_weights(weights, strict=True)
        except ValueError as error:
            raise CheckpointError(
                f"{self.state_file}: holds the weights of another model ({str(error).splitlines()[0]}); use the same "
                "model, or another folder."
            ) from error
        self.optimizer.state = state["optimizer"]
        self.optimizer.init(self.module.trainable_parameters())
        self.step = about["step"]
        mx.eval(self.module.state, self.optimizer.state)
        return True

    @property
    def stalled(self) -> bool:
        """Whether the last `patience` evaluations brought no higher sum of held-out figures than those before."""
        patience, seen = self.options.patience, self.evaluations
        return 0 < patience < len(seen) and max(seen[-patience:]) <= max(seen[:-patience])

    def run(self) -> Iterator[Stage]:
        """Trains from the checkpoint, or from the weights the module has where there is none, to the last step, saving
        as it goes, and yields every step.

        Closing the iterator early saves first, and so does an interrupt (Ctrl-C), so nothing is lost. A loss, gradient,
        weight or held-out figure that is not finite ends the run with OptionError, after the last step too; the last
        checkpoint is then kept as it is.
        """
        with locked(self.folder), freed_memory_kept():
            self.resume()
            cut_log(self.log_file, self.step)
            past = read_log(self.log_file) if self.log_file.exists() else []
            self.evaluations = [self._sum(record["held_out"]) for record in past if "held_out" in record]
            with self.log_file.open("a", encoding="utf-8") as log:
                began = saved = time.perf_counter()
                first, step_fn = self.step, self._compiled_step()
                try:
                    while self.step < self.options.steps and not self.stalled:
                        with interrupts_wait():
                            stage = self._advance(step_fn, log, began, first)
                        if time.perf_counter() - saved > self.options.save_seconds:
                            self._save_after(log.fileno())
                            saved = time.perf_counter()
                        yield stage
                finally:
                    if optimizers.steps_taken(self.optimizer) == self.step:  # not after a step that went wrong
                        self._save_after(log.fileno())

    def _save_after(self, log: int) -> None:
        """Saves once the log, a file descriptor, is on the disk: it may know more than the checkpoint, never less."""
        os.fsync(log)
        self.save()

    def _sum(self, held_out: Mapping[str, float]) -> float:
        return sum(held_out.get(name, 0.0) for name in self.figures)

    def _advance(self, step_fn: Callable[..., Any], log: TextIO, began: float, first: int) -> Stage:
        """Takes the next step, logs and counts it; `first` steps were done when the run `began`."""
        batch = self.batch_at(self.step)
        figures, held_out = self._take_step(step_fn, tree_map(mx.array, batch))
        seconds, step = time.perf_counter() - began, self.step + 1
        tokens = (batch[0] if isinstance(batch, tuple) else batch).size
        speed = round((step - first) * tokens / seconds, 1)
        record = {"step": step, **figures, "tokens_per_second": speed, "seconds": round(seconds, 1)}
        log.write(json.dumps(record | ({"held_out": held_out} if held_out else {})) + "\n")
        log.flush()
        self.step = step
        self.evaluations += [self._sum(held_out)] if held_out else []
        return Stage(self.name, step, self.options.steps, figures, held_out, speed)

    def _take_step(self, step_fn: Callable[..., Any], batch: Any) -> tuple[dict[str, float], dict[str, float] | None]:
        """The loss and figures of the next step and, where it is time, of the batches held out; OptionError where
        something is not finite."""
        step, options, wrong, held_out = self.step + 1, self.options, "", None
        means, norm, sound = step_fn(batch, self._progress(self.step))
        mx.eval(means, norm, sound, self.module.state, self.optimizer.state)
        figures = self._named(means)
        if not math.isfinite(figures["loss"] + norm.item()):
            wrong = f"the loss is {figures['loss']}, the norm of its gradient {norm.item()}"
        elif not sound.item():
            wrong = "weights are not finite any more"
        elif self.held_out and (step % options.evaluate_every == 0 or step == options.steps):
            held_out = self._evaluate()
            if not all(map(math.isfinite, held_out.values())):
                wrong = f"the figures on held-out data are {', '.join(map(str, held_out.values()))}"
        if wrong:
            raise OptionError(
                f"{self.folder}: {wrong} at step {step}; the last checkpoint is kept, train with a lower "
                "learning_rate into another folder."
            )
        return figures, held_out

    def _evaluate(self) -> dict[str, float]:
        """Mean loss and figures over the held-out batches, at the progress of the step that was taken."""
        rows = []
        for batch in self.held_out:
            rows.append(_joined(self.loss(self.module, batch, self._progress(self.step))))
            mx.eval(rows[-1])
        return self._named(mx.stack(rows).mean(axis=0))

    def _named(self, means: mx.array) -> dict[str, float]:
        return dict(zip(("loss", *self.figures), means.tolist(), strict=False))  # type: ignore[arg-type]

    def _progress(self, step: int) -> mx.array:
        return mx.array(step / self.options.steps, dtype=mx.float32)

    def _compiled_step(self) -> Callable[..., Any]:
        """step(batch, progress) -> (loss and figures, gradient norm, whether all weights are finite after it)."""
        gradient, parts = nn.value_and_grad(self.module, self.loss), self.options.accumulate
        state = [self.module.state, self.optimizer.state]

        def one_step(batch: Any, progress: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            held, total = self.module.trainable_parameters(), None
            for i in range(parts):
                part = tree_map(lambda array, i=i: mx.split(array, parts)[i], batch)
                if total is not None:  # nothing of this part is computed before the gradients of the last one are
                    done = list(dict(tree_flatten(total)).values())
                    part = tree_map(lambda array, done=done: mx.depends([array], done)[0], part)
                value, gradients = gradient(self.module, part, progress)
                self.module.update(held)  # in place of what it was traced with
                found = _joined(value), gradients
                total = found if total is None else tree_map(mx.add, total, found)
            means, gradients = tree_map(lambda array: array / parts, total)
            gradients, norm = optim.clip_grad_norm(gradients, CLIP)
            self.optimizer.update(self.module, gradients)
            weights = dict(tree_flatten(self.module.trainable_parameters())).values()
            return means, norm, mx.stack([mx.isfinite(value).all() for value in weights]).all()

        compiled: Callable[..., Any] = mx.compile(one_step, inputs=state, outputs=state)
        return compiled


def _joined(value: tuple[mx.array, mx.array]) -> mx.array:
    """A loss and its figures as one vector."""
    return mx.concatenate([value[0][None], value[1]])


@contextlib.contextmanager
def interrupts_wait() -> Iterator[None]:
    """Within: Ctrl-C waits for the end of the block, so that what is in it is done whole or not begun.

    Python interrupts its main thread alone; in others nothing has to wait, nor where Ctrl-C is ignored.
    """
    came: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:  # a signal raised anew would count as a second one
        before(came[0], None)
