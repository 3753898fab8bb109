"""What `mlx-mtp adapt` wins back: a target is fine-tuned away from its drafter, then the drafter follows it.

    .venv/bin/python benchmarks/adapt.py --out DIR [--steps 200] [--json FILE]

The embedded target (Python) goes on with C++: the headers that come with MLX, on every machine that runs this. Then the
embedded assistant is adapted with the command's own defaults, prompts taken from the same headers. Tokens per round on
held-out prompts, greedily; the wall time of adapting; and whether the answers are the target's own before and after.
"""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

import common
import mlx.core as mx

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint, write_checkpoint
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.targets.gemma4 import Gemma4Target, published_weights
from mlx_mtp.training.adapt import DEFAULTS, adapt
from mlx_mtp.training.data import Batches, pack, read_documents
from mlx_mtp.training.objective import next_token_loss
from mlx_mtp.training.trainer import Trainer, TrainOptions

HEADERS = Path(mx.__file__).parent / "include"


def headers(folder: Path) -> Path:
    """A text file for every header."""
    texts = folder / "headers"
    texts.mkdir(parents=True, exist_ok=True)
    for i, file in enumerate(sorted(HEADERS.rglob("*.h"))):
        (texts / f"{i:04}-{file.stem}.txt").write_text(file.read_text(encoding="utf-8", errors="replace"))
    return texts


def drifted(folder: Path, texts: Path, steps: int) -> Path:
    """The embedded target after `steps` more steps on the headers."""
    from mlx_lm.tokenizer_utils import load as load_tokenizer

    out = folder / "target"
    if (out / "config.json").exists():
        return out
    target = mlx_mtp.load(drafter=None).target
    assert isinstance(target, Gemma4Target) and target.path
    ids = pack(read_documents([str(texts)]), load_tokenizer(target.path))
    cut = len(ids) * 9 // 10
    learned, held = Batches(ids[:cut], 4, 256, 0), Batches(ids[cut:], 4, 256, 0)
    options = TrainOptions(steps=steps, learning_rate=1e-3)
    trainer = Trainer(target.model, next_token_loss, learned.batch, options, folder / "train-target", data=learned.name,
                      held_out=[held.batch(i) for i in range(4)], figures=("accuracy",), name="target")  # fmt: skip
    common.told(trainer.run())
    shutil.copytree(EMBEDDED / "target", out)
    write_checkpoint(out, Checkpoint.open(EMBEDDED / "target").config, published_weights(target.model))
    return out


def main() -> None:
    args = common.options(__doc__, out=Path, steps=200, family="assistant")
    if args.out is None:
        raise SystemExit("Name a folder with --out.")
    texts = headers(args.out)
    target = drifted(args.out, texts, args.steps)
    began, recipe = time.perf_counter(), replace(DEFAULTS, data=(str(texts),))
    report = common.told(adapt(target, EMBEDDED / args.family, args.out / args.family, recipe))
    seconds = time.perf_counter() - began
    plain = mlx_mtp.load(target, drafter=None)
    adapted = mlx_mtp.load(target, drafter=args.out / args.family, depth=4)
    assert plain.tokenizer is not None
    asked = [plain.tokenizer.encode(file.read_text())[:100] for file in sorted(texts.glob("*.txt"))[:5]]
    same = [
        plain.generate(prompt, max_tokens=200, ignore_end=True).tokens
        == adapted.generate(prompt, max_tokens=200, ignore_end=True).tokens
        for prompt in asked
    ]
    gain = report.after / report.before - 1
    print(
        f"{report.before:.2f} tokens per round before, {report.after:.2f} after ({gain:+.0%}), "
        f"{seconds / 60:.1f} minutes; answers of the target alone: {sum(same)} of {len(same)} equal"
    )
    found = {"before": report.before, "after": report.after, "minutes": seconds / 60, "same_answers": same}
    common.save(args.json, found)


if __name__ == "__main__":
    main()
