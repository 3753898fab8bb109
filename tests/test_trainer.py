"""The trainer: optimisers against NumPy, batches in parts, kills, interrupts, full disks, curves."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_mtp
from mlx_mtp.checkpoints import atomic
from mlx_mtp.checkpoints.atomic import write_state
from mlx_mtp.training import run_folder
from mlx_mtp.training.optimizers import make_optimizer
from mlx_mtp.training.trainer import Trainer, TrainOptions


class Stack(nn.Module):
    """Two layers under `layers`, a table and a head: one weight of every kind that optimisers tell apart."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(1)
        self.table = nn.Embedding(12, 6)
        self.layers = [nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6)) for _ in range(2)]
        self.head = nn.Linear(6, 12, bias=False)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.table(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def stack_loss(model: Stack, batch: mx.array, progress: mx.array) -> tuple[mx.array, mx.array]:
    loss = nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")
    return loss, mx.stack([loss, progress])


def stack_batch(step: int) -> np.ndarray:
    return np.random.default_rng(step).integers(0, 12, (4, 7)).astype(np.int32)


def trainer(folder: Path, steps: int = 6, **options: object) -> Trainer:
    made = TrainOptions(steps=steps, warmup=2, **options)
    held_out = [stack_batch(1000)]
    return Trainer(Stack(), stack_loss, stack_batch, made, folder, data="same", held_out=held_out,
                   figures=("again", "progress"))  # fmt: skip


def weights(module: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in tree_flatten(module.parameters())}


def apart(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    return max(float(np.abs(value - other[name]).max()) for name, value in one.items())


def slopes_of(model: Stack, step: int) -> tuple[mx.array, dict]:
    batch = mx.array(stack_batch(step))
    return nn.value_and_grad(model, lambda m: stack_loss(m, batch, mx.array(0.0))[0])(model)


# Optimisers


def orthogonal(matrix: np.ndarray) -> np.ndarray:
    """Newton-Schulz in five steps with Keller Jordan's coefficients."""
    turned = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if turned else matrix
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if turned else x


def test_muon_against_numpy() -> None:
    """Three steps on hidden matrices, both ways round, with nesterov momentum, decay and AdamW's step size."""
    model, rate, decay = Stack(), 0.01, 0.1
    optimizer = make_optimizer("muon", model, lambda step: mx.array(rate), decay)
    expected = {n: w.astype(np.float64) for n, w in weights(model).items() if "layers" in n and n.endswith("weight")}
    assert {w.shape for w in expected.values()} == {(9, 6), (6, 9)}
    momentum = {name: np.zeros_like(value) for name, value in expected.items()}
    for step in range(3):
        _, slopes = slopes_of(model, step)
        optimizer.update(model, slopes)
        for name, slope in tree_flatten(slopes):
            if name in expected:
                slope = np.array(slope).astype(np.float64)
                momentum[name] = 0.95 * momentum[name] + 0.05 * slope
                pushed = orthogonal(0.05 * slope + 0.95 * momentum[name])
                outputs, inputs = slope.shape
                step_size = 0.2 * np.sqrt(inputs) * np.sqrt(max(1.0, outputs / inputs))
                expected[name] = expected[name] * (1 - rate * decay) - rate * step_size * pushed
    found = weights(model)
    assert max(np.abs(found[name] - value).max() for name, value in expected.items()) < 2e-4
    assert max(np.abs(found[name] - value).max() for name, value in weights(Stack()).items() if name in expected) > 1e-3


def test_muon_leaves_tables_heads_and_vectors_to_adamw() -> None:
    models = [Stack(), Stack()]
    for model, name in zip(models, ("muon", "adamw"), strict=True):
        optimizer = make_optimizer(name, model, lambda step: mx.array(0.01), 0.0)
        _, slopes = slopes_of(model, 0)
        optimizer.update(model, slopes)
    muon, adamw = map(weights, models)
    same = {name for name in muon if np.array_equal(muon[name], adamw[name])}
    assert same == {name for name in muon if "layers" not in name or name.endswith("bias")}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_batch_in_parts_changes_nothing(tmp_path: Path, optimizer: str) -> None:
    whole = trainer(tmp_path / "whole", optimizer=optimizer)
    expected = list(whole.run())
    parts = trainer(tmp_path / "parts", optimizer=optimizer, accumulate=2)
    for one, other in zip(parts.run(), expected, strict=True):
        assert np.allclose(list(one.figures.values()), list(other.figures.values()), rtol=1e-5, atol=1e-6)
    assert apart(weights(parts.module), weights(whole.module)) < 1e-5


class Wide(nn.Module):
    """Many matrices and vectors of one shape, so that arrays out of order would go unnoticed."""

    def __init__(self) -> None:
        super().__init__()
        mx.random.seed(2)
        self.table = nn.Embedding(12, 6)
        for name in "abcdefgh":
            self[name] = nn.Linear(6, 6)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.table(tokens)
        for name in "abcdefgh":
            x = x + mx.tanh(self[name](x))
        return self.table.as_linear(x)


def test_weights_of_two_optimisers_stay_in_order(tmp_path: Path) -> None:
    """MLX merges what its optimisers return in the order of a set; a compiled step would mix equal shapes up."""
    run = Trainer(Wide(), stack_loss, stack_batch, TrainOptions(steps=4, warmup=2), tmp_path, data="same")
    names = [name for name, _ in tree_flatten(run.module.trainable_parameters())]
    steps = run.run()
    for _ in range(2):
        next(steps)
        assert [name for name, _ in tree_flatten(run.module.trainable_parameters())] == names
    steps.close()


# Stopping and going on


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw"}, {"accumulate": 2}])
def test_resuming_gives_the_same_weights_and_log(tmp_path: Path, options: dict) -> None:
    whole = trainer(tmp_path / "whole", steps=8, evaluate_every=3, **options)
    list(whole.run())
    for stop in (2, 3):
        part = trainer(tmp_path / "parts", steps=8, evaluate_every=3, **options)
        part.resume()
        run = part.run()
        for _ in range(stop):
            next(run)
        run.close()
    last = trainer(tmp_path / "parts", steps=8, evaluate_every=3, **options)
    assert last.resume() and last.step == 5
    list(last.run())
    assert apart(weights(last.module), weights(whole.module)) == 0
    assert records(last.log_file) == records(whole.log_file)
    assert [r["progress"] for r in records(last.log_file)] == pytest.approx([i / 8 for i in range(8)])


def test_an_interrupt_waits_for_the_step_and_saves(tmp_path: Path) -> None:
    def interrupted(step: int) -> np.ndarray:
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return stack_batch(step)

    run = Trainer(Stack(), stack_loss, interrupted, TrainOptions(steps=6), tmp_path, data="same")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever another test has left there
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run.run())
    finally:
        signal.signal(signal.SIGINT, before)
    again = Trainer(Stack(), stack_loss, stack_batch, TrainOptions(steps=6), tmp_path, data="same")
    assert again.resume() and again.step == 3
    assert [record["step"] for record in records(again.log_file)] == [1, 2, 3]


def records(log: Path) -> list[dict]:
    found = run_folder.read_log(log)
    return [{k: v for k, v in record.items() if k not in ("tokens_per_second", "seconds")} for record in found]


KILLED = """
import mlx_mtp  # before MLX, as conftest.py does: another BLAS rounds otherwise
import sys; sys.path.insert(0, {tests!r})
from pathlib import Path
from test_trainer import trainer
run = trainer(Path({folder!r}), steps=60, save_seconds=1e-6, evaluate_every=7)
run.resume()
for progress in run.run():
    print(progress.step, flush=True)
    sys.stdin.readline()  # so that it cannot get ahead of the one that kills it
"""


def test_kill_at_any_moment(tmp_path: Path) -> None:
    """kill -9 again and again, at chance moments, saving at every step: the end is that of a run left alone."""
    whole = trainer(tmp_path / "whole", steps=60, save_seconds=1e9, evaluate_every=7)
    list(whole.run())
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "killed"))
    chance, kills = np.random.default_rng(0), 0
    for attempt in range(40):
        command = [sys.executable, "-c", script]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(int(chance.integers(5, 25)) if attempt < 4 else 1000):
                if not process.stdout.readline():
                    break
                print(file=process.stdin, flush=True)
            time.sleep(float(chance.uniform(0, 0.01)))
            if attempt < 4:
                process.send_signal(signal.SIGKILL)
                kills += 1
        if process.returncode == 0:
            break
    assert kills >= 2
    last = trainer(tmp_path / "killed", steps=60, save_seconds=1e-6, evaluate_every=7)
    assert last.resume() and last.step == 60
    assert apart(weights(last.module), weights(whole.module)) == 0
    assert records(last.log_file) == records(whole.log_file)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = trainer(tmp_path, steps=3)
    run = first.run()
    next(run)
    run.close()
    kept = first.state_file.read_bytes()
    for name, error in (("save", RuntimeError("[save] disk full")), ("sync", OSError(28, "No space left on device"))):
        again = trainer(tmp_path, steps=3)
        again.resume()
        with monkeypatch.context() as patch:
            place = (mx, "save_safetensors") if name == "save" else (atomic.os, "fsync")
            patch.setattr(*place, mock.Mock(side_effect=error))
            with pytest.raises(mlx_mtp.CheckpointError, match="last checkpoint is untouched"):
                again.save()
        assert first.state_file.read_bytes() == kept
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(mlx_mtp.CheckpointError, match="MB are free"):
        trainer(tmp_path, steps=3).save()
    assert first.state_file.read_bytes() == kept
    assert not list(tmp_path.glob("*.part*")) and not list(tmp_path.glob(".*.partial*"))


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    def loss(model: Stack, batch: mx.array, progress: mx.array) -> tuple[mx.array, mx.array]:
        value, figures = stack_loss(model, batch, progress)
        return value * mx.where(progress >= 0.5, mx.inf, 1.0), figures

    broken = Trainer(Stack(), loss, stack_batch, TrainOptions(steps=6), tmp_path, data="same")
    with pytest.raises(mlx_mtp.OptionError, match="the loss is inf.* at step 4"):
        for progress in broken.run():
            broken.save()
            assert progress.step < 4
    again = Trainer(Stack(), stack_loss, stack_batch, TrainOptions(steps=6), tmp_path, data="same")
    assert again.resume() and again.step == 3
    assert all(np.isfinite(value).all() for value in weights(again.module).values())


class Weight(nn.Module):
    """One number, and one that no loss depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.idle = mx.array([1.0]), mx.array([1.0])


def square(model: Weight, batch: mx.array, progress: mx.array) -> tuple[mx.array, mx.array]:
    loss = (model.weight**2).sum() + 0.0 * model.idle.sum()
    return loss, loss[None]


def one_weight(folder: Path, held_out: bool = False) -> Trainer:
    batch = np.zeros((1, 1), np.int32)
    options = TrainOptions(steps=3, weight_decay=0.0, save_seconds=1e-9, optimizer="adamw")
    return Trainer(Weight(), square, lambda _: batch, options, folder, data="same", held_out=[batch] * held_out)


@pytest.mark.parametrize(("rate", "found"), [(mx.inf, "not finite any more"), (1e30, "held-out data are inf")])
def test_a_last_update_that_is_not_finite_is_never_written(rate: float, found: str, tmp_path: Path) -> None:
    """Loss and gradient of the last step are finite: its weights are not, or what the loss makes of them is not."""
    broken = one_weight(tmp_path, held_out=rate < mx.inf)
    broken.optimizer._schedulers["learning_rate"] = lambda step: mx.where(step >= 2, rate, 0.01)
    with pytest.raises(mlx_mtp.OptionError, match=f"{found}.* at step 3; the last checkpoint is kept"):
        list(broken.run())
    assert [record["step"] for record in records(broken.log_file)] == [1, 2]
    again = one_weight(tmp_path)
    assert again.resume() and again.step == 2 and abs(again.module.weight.item()) < 2
    again.module.weight = mx.array([mx.nan])
    with pytest.raises(mlx_mtp.CheckpointError, match="finite numbers as weights, found others in 'model.weight'"):
        again.save()
    assert one_weight(tmp_path).resume()


@pytest.mark.parametrize("name", ["model.idle", "optimizer.weight.v"])
@pytest.mark.parametrize("value", [mx.nan, -mx.inf])
def test_a_checkpoint_that_is_not_finite_is_not_resumed(name: str, value: float, tmp_path: Path) -> None:
    first = one_weight(tmp_path)
    list(first.run())
    tensors, about = run_folder.read_state(first.state_file)
    assert name in tensors
    write_state(first.state_file, {**tensors, name: mx.array([value])}, about, run_folder.RESUME)
    with pytest.raises(mlx_mtp.CheckpointError, match=f"{name}.*no run can go on from it"):
        one_weight(tmp_path).resume()


def test_two_runs_into_one_folder(tmp_path: Path) -> None:
    first = trainer(tmp_path).run()
    next(first)
    with pytest.raises(mlx_mtp.CheckpointError, match="another run"):
        next(trainer(tmp_path).run())
    first.close()
    next(trainer(tmp_path).run())


def test_a_log_of_odd_lines(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 2, 3)]
    log.write_text("\n".join([*lines, "nonsense", '{"loss": 2}', "[1]", ""]))
    assert [record["step"] for record in run_folder.read_log(log)] == [1, 2, 3]
    run_folder.cut_log(log, 2)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [1, 2]


def test_a_run_ends_where_nothing_is_gained(tmp_path: Path) -> None:
    """The held-out figures of this loss never rise; a run that goes on ends at once, for it knows what came before."""
    options = {"steps": 40, "evaluate_every": 2, "patience": 3}

    def loss(model: Stack, batch: mx.array, progress: mx.array) -> tuple[mx.array, mx.array]:
        value, _ = stack_loss(model, batch, progress)
        return value, mx.array([0.25, 0.5])

    def made() -> Trainer:
        return Trainer(Stack(), loss, stack_batch, TrainOptions(**options), tmp_path, data="same",
                       held_out=[stack_batch(1)], figures=("a", "b"))  # fmt: skip

    assert [progress.step for progress in made().run()] == list(range(1, 9))
    again = made()
    assert again.resume() and again.step == 8 and list(again.run()) == []
