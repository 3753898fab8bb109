"""Training speed against mlx-lm's own trainer: the same target, batch, length, optimiser and precision.

    .venv/bin/python benchmarks/training.py [--turns 6] [--steps 4] [--json FILE]

Full fine-tuning of the embedded target in float32 with AdamW, 4 x 512 tokens a step, on the standard library. Both take
turns (A B B A ...); a turn builds its step anew, so its first step does not count. Medians of all other steps.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from embedded.corpus import modules_and_questions

import mlx_mtp
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring.turns import fair_turns
from mlx_mtp.targets.gemma4 import Gemma4Target
from mlx_mtp.training.data import Batches, pack
from mlx_mtp.training.objective import next_token_loss
from mlx_mtp.training.trainer import Trainer, TrainOptions

BATCH, LENGTH, RATE = 4, 512, 1e-4


def packed(most: int) -> np.ndarray:
    """Ids of the first documents, enough for all steps."""
    from mlx_lm.tokenizer_utils import load

    documents = [document for document in modules_and_questions() if document.text][:60]
    return pack(documents, load(EMBEDDED / "target"))[:most]


def ours(ids: np.ndarray, steps: int) -> Callable[[], list[float]]:
    """Seconds of every step of a turn of ours."""
    target = mlx_mtp.load(drafter=None).target
    assert isinstance(target, Gemma4Target)

    def turn() -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            batches = Batches(ids, BATCH, LENGTH, 0)
            options = TrainOptions(steps=steps, learning_rate=RATE, optimizer="adamw")
            trainer = Trainer(target.model, next_token_loss, batches.batch, options, Path(folder), data=batches.name)
            stamps = [time.perf_counter(), *(time.perf_counter() for _ in trainer.run())]
        return [float(each) for each in np.diff(stamps)]

    return turn


def mlx_lms(ids: np.ndarray, steps: int) -> Callable[[], list[float]]:
    """The same of mlx_lm.tuner.trainer.train."""
    from mlx_lm import load
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train

    model = load(str(EMBEDDED / "target"))[0]
    model.set_dtype(mx.float32)
    model.unfreeze()
    # It cuts rows at a multiple of 32 and one: the same 512 places learn.
    rows = [(ids[i * LENGTH : (i + 1) * LENGTH + 1].tolist(), 0) for i in range((len(ids) - 1) // LENGTH)]

    def turn() -> list[float]:
        seconds: list[float] = []
        told = TrainingCallback()
        told.on_train_loss_report = lambda info: seconds.append(1.0 / info["iterations_per_second"])
        with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as null:
            args = TrainingArgs(
                batch_size=BATCH, iters=steps, steps_per_report=1, steps_per_save=10**9, max_seq_length=LENGTH + 1,
                adapter_file=str(Path(folder) / "weights.safetensors"),
            )  # fmt: skip
            optimizer = optim.AdamW(learning_rate=RATE, betas=[0.9, 0.95], weight_decay=0.05)
            with contextlib.redirect_stdout(null):
                train(model, optimizer, rows, args=args, training_callback=told)
        return seconds

    return turn


def main() -> None:
    args = common.options(__doc__, turns=6, steps=4)
    ids = packed(64 * LENGTH + 1)
    trainers = {"mlx-mtp": ours(ids, args.steps), "mlx-lm": mlx_lms(ids, args.steps)}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _, name in fair_turns(trainers, args.turns):
        seconds[name] += trainers[name]()[1:]
    speed = {name: BATCH * LENGTH / statistics.median(times) for name, times in seconds.items()}
    ratio = speed["mlx-mtp"] / speed["mlx-lm"]
    for name, tokens in speed.items():
        low, high = min(seconds[name]), max(seconds[name])
        print(f"{name}: {tokens:,.0f} tokens/s, a step {low:.2f} to {high:.2f} s over {len(seconds[name])} steps")
    print(f"ratio {ratio:.2f}")
    common.save(args.json, {"tokens_per_second": speed, "ratio": ratio})


if __name__ == "__main__":
    main()
