"""The training loop: compiled step, cosine schedule, atomic checkpoints, resume as if never stopped.

What it does: minimises any loss over any module on batches that are a pure function of the step. What it does not
do: know what is trained, print, or choose hyper-parameters.

Invariant: a checkpoint is one file that replaces the last by a rename, so a kill at any moment leaves a whole one.
Parameters, optimiser state and step are all there is to resume: batches and schedule follow from the step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_mtp.checkpoint import named_parameters
from mlx_mtp.errors import CheckpointError, DataError, OptionError

# loss(module, batch int32 [B, T]) -> scalar to minimise and a vector of figures to report.
Loss = Callable[[Any, mx.array], tuple[mx.array, mx.array]]


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """Hyper-parameters of one run. Rates are per step; `clip` bounds the global gradient norm."""

    steps: int
    learning_rate: float = 2e-3
    final_rate: float = 0.05  # share of learning_rate at the end of the cosine
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    save_seconds: float = 60.0
    evaluate_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "learning_rate", "clip", "save_seconds", "evaluate_every"):
            if getattr(self, name) <= 0:
                raise OptionError(f"Expected {name} above 0, found {getattr(self, name)}; choose a positive value.")

    def schedule(self) -> Callable[[mx.array], mx.array]:
        """Linear warm-up, then a cosine down to final_rate."""
        warmup = min(self.warmup, max(1, self.steps // 10))
        rise = optim.linear_schedule(0.0, self.learning_rate, warmup)
        fall = optim.cosine_decay(
            self.learning_rate, max(1, self.steps - warmup), self.learning_rate * self.final_rate
        )
        joined: Callable[[mx.array], mx.array] = optim.join_schedules([rise, fall], [warmup])
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

    figures: names of the loss's second result, for the log.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Loss,
        batch_at: Callable[[int], np.ndarray],
        options: TrainOptions,
        folder: Path,
        *,
        data: str,
        held_out: list[np.ndarray] | None = None,
        figures: tuple[str, ...] = (),
    ) -> None:
        self.module, self.loss, self.batch_at, self.options, self.folder = module, loss, batch_at, options, folder
        self.held_out = [mx.array(batch) for batch in held_out or []]
        self.figures = figures
        self.data = data
        self.step = 0
        self.optimizer = optim.AdamW(options.schedule(), betas=[0.9, 0.95], weight_decay=options.weight_decay)
        self.optimizer.init(module.trainable_parameters())
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def state_file(self) -> Path:
        """The one checkpoint of this run."""
        return self.folder / "training.safetensors"

    def save(self) -> None:
        """Writes the checkpoint beside the old one and renames; a full disk leaves the old one untouched."""
        tensors = {f"model.{k}": v for k, v in named_parameters(self.module).items()}
        tensors |= {f"optimizer.{k}": v for k, v in dict(tree_flatten(self.optimizer.state)).items()}
        about = {"step": self.step, "data": self.data, "options": asdict(self.options)}
        fresh = self.state_file.with_name("training.part.safetensors")
        try:
            mx.save_safetensors(str(fresh), tensors, {"mlx_mtp": json.dumps(about)})
            os.replace(fresh, self.state_file)
        except (OSError, RuntimeError) as error:
            fresh.unlink(missing_ok=True)
            raise CheckpointError(
                f"{self.state_file}: could not be written ({error}); the last checkpoint is untouched, "
                "free some disk space and resume."
            ) from error

    def resume(self) -> bool:
        """Continues from the checkpoint if there is one; refuses one of other data or options."""
        if not self.state_file.exists():
            return False
        try:
            loaded: Any = mx.load(str(self.state_file), return_metadata=True)
            tensors, metadata = loaded
            about: dict[str, Any] = json.loads(metadata["mlx_mtp"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{self.state_file}: not a checkpoint of this trainer ({error}); move it.") from error
        if about["data"] != self.data:
            raise DataError(f"{self.state_file}: was trained on other data; use the same data, or another folder.")
        if about["options"] != asdict(self.options):
            changed = [k for k, v in asdict(self.options).items() if about["options"].get(k) != v]
            raise OptionError(
                f"{self.state_file}: was trained with other values of {', '.join(changed)} "
                f"({', '.join(str(about['options'].get(k)) for k in changed)}); use the same, or another folder."
            )
        parts: dict[str, list[tuple[str, mx.array]]] = {"model": [], "optimizer": []}
        for key, value in tensors.items():
            part, name = key.split(".", 1)
            parts[part].append((name, value))
        self.module.load_weights(parts["model"], strict=True)
        self.optimizer.state = tree_unflatten(parts["optimizer"])
        self.step = about["step"]
        mx.eval(self.module.state, self.optimizer.state)
        return True

    def _compiled_step(self) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
        gradient = nn.value_and_grad(self.module, self.loss)
        state = [self.module.state, self.optimizer.state]

        def one_step(batch: mx.array) -> tuple[mx.array, mx.array]:
            (loss, figures), gradients = gradient(self.module, batch)
            gradients, _ = optim.clip_grad_norm(gradients, self.options.clip)
            self.optimizer.update(self.module, gradients)
            return loss, figures

        compiled: Callable[[mx.array], tuple[mx.array, mx.array]] = mx.compile(one_step, inputs=state, outputs=state)
        return compiled

    def evaluate(self) -> list[float]:
        """Mean loss and figures over the held-out batches."""
        self.module.eval()
        rows = []
        for batch in self.held_out:
            loss, figures = self.loss(self.module, batch)
            rows.append(mx.concatenate([loss[None], figures]))
            mx.eval(rows[-1])
        self.module.train()
        mean: list[float] = mx.stack(rows).mean(axis=0).tolist()  # type: ignore[assignment]
        return mean

    def run(self) -> Iterator[Progress]:
        """Trains to the last step, saving as it goes, and yields every step's progress.

        Closing the iterator early (Ctrl-C in the consumer) saves first, so nothing is lost.
        """
        step_fn, began, first = self._compiled_step(), time.perf_counter(), self.step
        saved, log = began, (self.folder / "log.jsonl").open("a", encoding="utf-8")
        try:
            while self.step < self.options.steps:
                batch = mx.array(self.batch_at(self.step))
                loss, figures = step_fn(batch)
                mx.eval(loss, figures, self.module.state, self.optimizer.state)
                self.step += 1
                seconds = time.perf_counter() - began
                done = self.step - first
                held_out = None
                if self.held_out and (self.step % self.options.evaluate_every == 0 or self.step == self.options.steps):
                    held_out = self.evaluate()
                progress = Progress(
                    self.step, self.options.steps, loss.item(), figures.tolist(),  # type: ignore[arg-type]
                    done * batch.size / seconds, (self.options.steps - self.step) * seconds / done, held_out,
                )
                log.write(json.dumps(self._record(progress, seconds)) + "\n")
                log.flush()
                if time.perf_counter() - saved > self.options.save_seconds:
                    self.save()
                    saved = time.perf_counter()
                yield progress
        finally:
            log.close()
            self.save()

    def _record(self, progress: Progress, seconds: float) -> dict[str, Any]:
        record: dict[str, Any] = {"step": progress.step, "loss": progress.loss}
        record |= dict(zip(self.figures, progress.figures, strict=False))
        record |= {"tokens_per_second": round(progress.tokens_per_second, 1), "seconds": round(seconds, 1)}
        if progress.held_out is not None:
            record["held_out"] = dict(zip(("loss", *self.figures), progress.held_out, strict=False))
        return record
