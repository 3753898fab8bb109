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
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn, TextIO

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_mtp.checkpoints.atomic import write_state
from mlx_mtp.checkpoints.checkpoint import check_finite, named_parameters
from mlx_mtp.errors import CheckpointError, DataError, OptionError
from mlx_mtp.training import optimizers
from mlx_mtp.training.less_memory import checkpointed_layers, one_operation_at_a_time
from mlx_mtp.training.ranges import check_ranges
from mlx_mtp.training.run_folder import RESUME, cut_log, locked, read_log, read_state

# A batch is one array [B, ...] or several. loss(module, batch, progress) -> scalar to minimise and a vector of figures
# to report, both means over the rows. progress: float32 scalar, the share of all steps that is done, from 0 to below 1.
Loss = Callable[[Any, Any, mx.array], tuple[mx.array, mx.array]]

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
# Options that change no figure: a run may be resumed with other values of these.
FREE = frozenset({"save_seconds", "memory_saving"})


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Hyper-parameters of one run. Rates are per step; `clip` bounds the global gradient norm.

    patience: the run ends where so many evaluations brought no better figures; 0 = never.
    optimizer: "adamw", or "muon" for the hidden matrices with AdamW for the rest (optimizers.py); same learning_rate.
    accumulate: a step's batch goes through in that many equal parts, their gradients averaged.
    checkpoint_gradients: layers are run again for the gradient in place of keeping what they computed.
    dtype: of parameters and activations while training; "bfloat16" keeps float32 weights beside them, to which the
    optimiser's small steps are added.
    memory_saving: work is queued only as memory is freed; on the CPU, where MLX otherwise runs far ahead.
    """

    steps: int
    learning_rate: float = 2e-3
    final_rate: float = 0.02  # share of learning_rate at the end
    flat: float = 0.3  # share of the steps before it falls
    warmup: int = 20
    weight_decay: float = 0.05
    clip: float = 1.0
    save_seconds: float = 60.0
    evaluate_every: int = 200
    patience: int = 0
    optimizer: str = "muon"
    accumulate: int = 1
    checkpoint_gradients: bool = False
    dtype: str = "float32"
    memory_saving: bool = False

    def __post_init__(self) -> None:
        tiny, most = math.ulp(0.0), sys.float_info.max
        check_ranges(self, steps=(1, most), learning_rate=(tiny, most), clip=(tiny, most), save_seconds=(tiny, most),
                     evaluate_every=(1, most), accumulate=(1, most))  # fmt: skip
        for name, known in (("optimizer", optimizers.OPTIMIZERS), ("dtype", tuple(DTYPES))):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}.")

    def schedule(self) -> optimizers.Schedule:
        """Linear warm-up, flat, then straight down to final_rate."""
        warmup = min(self.warmup, max(1, self.steps // 10))
        flat = max(0, round(self.flat * self.steps) - warmup)
        parts = [
            optim.linear_schedule(0.0, self.learning_rate, warmup),
            optim.linear_schedule(self.learning_rate, self.learning_rate, max(1, flat)),
            optim.linear_schedule(self.learning_rate, self.learning_rate * self.final_rate,
                                  max(1, self.steps - warmup - flat)),
        ]  # fmt: skip
        joined: optimizers.Schedule = optim.join_schedules(parts, [warmup, warmup + max(1, flat)])
        return joined


@dataclass(frozen=True)
class Progress:
    """One finished step: the loss figures since the last report, speed, and seconds left at that speed."""

    step: int
    steps: int
    loss: float
    figures: list[float]
    tokens_per_second: float
    seconds_left: float
    held_out: list[float] | None = None


class Trainer:
    """Trains `module` with `loss` on `batch_at(step)`; all files go to `folder`.

    figures: names of the loss's second result, for the log. The module's weights are float32 before and after a run,
    whatever it is computed in.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        batch_at: Callable[[int], Any],
        options: TrainOptions,
        folder: Path,
        *,
        data: str,
        held_out: Sequence[Any] | None = None,
        figures: tuple[str, ...] = (),
    ) -> None:
        self.module, self.loss, self.batch_at, self.options, self.folder = module, loss, batch_at, options, folder
        self.held_out = [tree_map(mx.array, batch) for batch in held_out or []]
        self.figures = figures
        self.data = data
        self.step = 0
        self.judged: list[float] = []  # sums of held-out figures, in order
        module.update(_cast(module.trainable_parameters(), mx.float32))
        self.optimizer = optimizers.make_optimizer(options.optimizer, module, options.schedule(), options.weight_decay)
        # The float32 weights under "weights" while the module holds rounded ones; else empty.
        self._masters: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def state_file(self) -> Path:
        """The one checkpoint of this run."""
        return self.folder / "training.safetensors"

    @property
    def log_file(self) -> Path:
        """One JSON object a step."""
        return self.folder / "log.jsonl"

    def save(self) -> None:
        """Writes the checkpoint beside the old one and renames; a full disk leaves the old one untouched.

        CheckpointError, and nothing is written, where weights or the optimiser's state are not finite.
        """
        weights = named_parameters(self.module) | dict(tree_flatten(self._masters.get("weights", {})))
        tensors = {f"model.{k}": v for k, v in weights.items()}
        tensors |= {f"optimizer.{k}": v for k, v in dict(tree_flatten(self.optimizer.state)).items()}
        check_finite(tensors.items(), self.state_file, "the last checkpoint is untouched")
        about = {"step": self.step, "data": self.data, "options": asdict(self.options)}
        write_state(self.state_file, tensors, about, RESUME)

    def resume(self) -> bool:
        """Continues from the checkpoint if there is one.

        Refuses one of other data, options or module, and one whose numbers are not all finite.
        """
        if not self.state_file.exists():
            return False
        tensors, about = read_state(self.state_file)
        if about["data"] != self.data:
            raise DataError(f"{self.state_file}: was trained on other data; use the same data, or another folder.")
        # An option that is younger than the checkpoint had its default then.
        then = {field.name: field.default for field in fields(self.options)} | about["options"]
        changed = [k for k, v in asdict(self.options).items() if k not in FREE and then[k] != v]
        if changed:
            raise OptionError(
                f"{self.state_file}: was trained with other values of {', '.join(changed)} "
                f"({', '.join(str(then[k]) for k in changed)}); use the same, or another folder."
            )
        check_finite(tensors.items(), self.state_file, "no run can go on from it: train into another folder")
        parts: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
        for key, value in tensors.items():
            part, name = key.split(".", 1)
            parts[part].append((name, value))
        try:
            self.module.load_weights(parts["model"], strict=True)
        except ValueError as error:
            raise CheckpointError(
                f"{self.state_file}: holds the weights of another model ({str(error).splitlines()[0]}); use the same "
                "model, or another folder."
            ) from error
        self.optimizer.state = tree_unflatten(parts["optimizer"])
        self.optimizer.init(self.module.trainable_parameters())
        self.step = about["step"]
        mx.eval(self.module.state, self.optimizer.state)
        return True

    @property
    def stalled(self) -> bool:
        """Whether the last `patience` evaluations brought no higher sum of held-out figures than those before."""
        patience = self.options.patience
        return 0 < patience < len(self.judged) and max(self.judged[-patience:]) <= max(self.judged[:-patience])

    def evaluate(self) -> list[float]:
        """Mean loss and figures over the held-out batches, at the last finished step's progress."""
        self.module.eval()
        progress = self._progress(max(0, self.step - 1))
        rows = []
        for batch in self.held_out:
            loss, figures = self.loss(self.module, batch, progress)
            rows.append(mx.concatenate([loss[None], figures]))
            mx.eval(rows[-1])
        self.module.train()
        mean: list[float] = mx.stack(rows).mean(axis=0).tolist()  # type: ignore[assignment]
        return mean

    def run(self) -> Iterator[Progress]:
        """Trains to the last step, saving as it goes, and yields every step's progress.

        Closing the iterator early saves first, and so does an interrupt (Ctrl-C), so nothing is lost. A loss, gradient,
        weight or held-out figure that is not finite ends the run with OptionError, after the last step too; the last
        checkpoint is then kept as it is.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(self.folder))
            stack.enter_context(self._rounded())
            if self.options.checkpoint_gradients:
                stack.enter_context(checkpointed_layers(self.module))
            if self.options.memory_saving:
                stack.enter_context(one_operation_at_a_time())
            cut_log(self.log_file, self.step)
            past = read_log(self.log_file) if self.log_file.exists() else []
            self.judged = [sum(r["held_out"].get(name, 0.0) for name in self.figures) for r in past if "held_out" in r]
            log = stack.enter_context(self.log_file.open("a", encoding="utf-8"))
            yield from _Run(self, log).steps()

    def _progress(self, step: int) -> mx.array:
        return mx.array(step / self.options.steps, dtype=mx.float32)

    @contextlib.contextmanager
    def _rounded(self) -> Iterator[None]:
        """Within: the module holds its weights in options.dtype, and _masters the trained ones in float32."""
        if self.options.dtype == "float32":
            yield
            return
        trained = self.module.trainable_parameters()
        names = dict(tree_flatten(trained)).keys()
        frozen = [(k, v) for k, v in named_parameters(self.module).items() if k not in names]
        self._masters["weights"] = trained
        self.module.set_dtype(DTYPES[self.options.dtype])
        try:
            yield
        finally:
            self.module.update(self._masters.pop("weights"))
            if frozen:
                self.module.update(tree_unflatten(frozen))

    def _compiled_step(self) -> Callable[..., Any]:
        """step(part of a batch, progress, sums of the parts before or None, whether it is the last) ->
        (loss, figures, gradient norm, whether all weights are finite after it) of the whole batch after the last
        part, else the sums."""
        gradient, options = nn.value_and_grad(self.module, self.loss), self.options
        state = [self.module.state, self.optimizer.state, self._masters]

        def one_step(batch: mx.array, progress: mx.array, sums: Any, last: bool) -> Any:
            held = self.module.trainable_parameters()
            (loss, figures), gradients = gradient(self.module, batch, progress)
            self.module.update(held)  # checkpointed layers leave what they were traced with
            found = (loss, figures, _cast(gradients, mx.float32))
            if sums is not None:
                found = tree_map(mx.add, sums, found)
            if not last:
                return found
            if options.accumulate > 1:
                found = tree_map(lambda total: total / options.accumulate, found)
            loss, figures, gradients = found
            gradients, norm = optim.clip_grad_norm(gradients, options.clip)
            before = self._masters.get("weights", held)
            # In the order of the tree before: MLX merges an optimiser's groups through a set, whose order changes from
            # process to process, and a compiled function knows the arrays of its state by their order alone.
            new = dict(tree_flatten(self.optimizer.apply_gradients(gradients, before)))
            weights = tree_unflatten([(name, new[name]) for name in dict(tree_flatten(before))])
            if self._masters:
                self._masters["weights"] = weights
            self.module.update(_cast(weights, DTYPES[options.dtype]))
            sound = mx.stack([mx.isfinite(value).all() for value in dict(tree_flatten(weights)).values()]).all()
            return loss, figures, norm, sound

        compiled: Callable[..., Any] = mx.compile(one_step, inputs=state, outputs=state)
        return compiled


class _Run:
    """One call of Trainer.run, and how far it is between the moments at which it can be interrupted."""

    def __init__(self, trainer: Trainer, log: TextIO) -> None:
        self.trainer, self.log = trainer, log
        self.step_fn = trainer._compiled_step()
        self.began, self.first = time.perf_counter(), trainer.step
        # A step's results from when the weights have moved until it is logged and counted.
        self.moved: list[Any] = []
        self.tokens = 0
        self.broken = False

    def steps(self) -> Iterator[Progress]:
        trainer, saved = self.trainer, self.began
        try:
            while trainer.step < trainer.options.steps and not trainer.stalled:
                self._advance()
                progress = self._finish()
                if time.perf_counter() - saved > trainer.options.save_seconds:
                    self._save()
                    saved = time.perf_counter()
                yield progress
        finally:
            # An interrupt mostly arrives while a step is computed: that step is finished, not thrown away.
            if self.moved and not self.broken:
                self._finish()
            if not self.broken and optimizers.steps_taken(trainer.optimizer) == trainer.step:
                self._save()

    def _advance(self) -> None:
        """Queues a step; all but its last part are waited for, so that only one is in memory."""
        trainer, count = self.trainer, self.trainer.options.accumulate
        batch, progress = trainer.batch_at(trainer.step), trainer._progress(trainer.step)
        first = batch[0] if isinstance(batch, tuple) else batch
        if len(first) % count:
            raise OptionError(
                f"A batch of {len(first)} rows cannot go through in {count} equal parts; choose another accumulate."
            )
        parts, sums = [tree_map(lambda a, i=i: mx.array(np.split(a, count)[i]), batch) for i in range(count)], None
        for part in parts[:-1]:
            sums = self.step_fn(part, progress, sums, False)
            mx.eval(sums)
        self.tokens = first.size
        # Python raises an interrupt right after a call, before its result is stored: then the weights would have
        # moved and nobody would know. Within `extend` nothing comes in between.
        self.moved.extend(map(self.step_fn, [parts[-1]], [progress], [sums], [True]))

    def _finish(self) -> Progress:
        """Waits for the step, checks, evaluates, logs and counts it; may be run again where it was interrupted."""
        trainer, options = self.trainer, self.trainer.options
        loss, figures, norm, sound = self.moved[0]
        mx.eval(loss, figures, norm, sound, trainer.module.state, trainer.optimizer.state, trainer._masters)
        step = trainer.step + 1
        if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
            self._break_off(f"the loss is {loss.item()}, the norm of its gradient {norm.item()}", step)
        if not sound.item():
            self._break_off("weights are not finite any more", step)
        seconds, done = time.perf_counter() - self.began, step - self.first
        held_out = None
        if trainer.held_out and (step % options.evaluate_every == 0 or step == options.steps):
            held_out = trainer.evaluate()
            if not all(map(math.isfinite, held_out)):
                self._break_off(f"the figures on held-out data are {', '.join(map(str, held_out))}", step)
        progress = Progress(
            step, options.steps, loss.item(), figures.tolist(),
            done * self.tokens / seconds, (options.steps - step) * seconds / done, held_out,
        )  # fmt: skip
        self.log.write(json.dumps(_record(trainer.figures, progress, seconds)) + "\n")
        self.log.flush()
        judged = trainer.judged if held_out is None else [*trainer.judged, sum(held_out[1:])]
        self.moved, trainer.step, trainer.judged = [], step, judged  # no call in between, so no interrupt either
        return progress

    def _break_off(self, wrong: str, step: int) -> NoReturn:
        """Ends the run without saving: the weights are no good any more."""
        self.broken = True
        raise OptionError(
            f"{self.trainer.folder}: {wrong} at step {step}; the last checkpoint is kept, train with a lower "
            "learning_rate into another folder."
        )

    def _save(self) -> None:
        # A save that failed is not tried again on the way out.
        self.broken = True
        os.fsync(self.log.fileno())
        self.trainer.save()
        self.broken = False


def _cast(tree: Any, dtype: mx.Dtype) -> Any:
    return tree_map(lambda value: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value, tree)


def _record(names: tuple[str, ...], progress: Progress, seconds: float) -> dict[str, Any]:
    record: dict[str, Any] = {"step": progress.step, "loss": progress.loss}
    record |= dict(zip(names, progress.figures, strict=False))
    record |= {"tokens_per_second": round(progress.tokens_per_second, 1), "seconds": round(seconds, 1)}
    if progress.held_out is not None:
        record["held_out"] = dict(zip(("loss", *names), progress.held_out, strict=False))
    return record
