"""The embedded target and its drafters, from Python's standard library: source files, and questions about them.

    .venv/bin/python benchmarks/embedded/make.py --out runs/embedded [--target-steps 1400] [--documents N] ...

Writes the corpus without the held-out modules (OUT/corpus.jsonl) and a fresh target with its tokenizer (OUT/start),
then trains it and an assistant as `mlx-mtp train` does, into OUT/run. Run again, it goes on where it was stopped.
Drafters of other families: `mlx-mtp train --target OUT/run/target --data OUT/corpus.jsonl`.
"""

from __future__ import annotations

import mlx_mtp  # isort: skip  (before MLX: on Linux it brings the fast BLAS)  # noqa: F401

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import mlx.core as mx
from corpus import is_held_out, modules_and_questions
from tokenizer import train_tokenizer

from mlx_mtp.checkpoints.checkpoint import write_checkpoint
from mlx_mtp.targets.gemma4 import Gemma4Model, published_weights
from mlx_mtp.targets.gemma4_config import Gemma4Config
from mlx_mtp.training.data import Document
from mlx_mtp.training.pipeline import train
from mlx_mtp.training.recipe import Recipe
from mlx_mtp.training.small_target import target_config

SIZES = {"target_steps": 1400, "drafter_steps": 900, "tokens": 600_000, "batch_size": 4, "length": 512, "seed": 0}


def write_corpus(documents: Iterable[Document], file: Path) -> None:
    """A line of JSONL for each."""
    rows = ({"text": d.text} if d.messages is None else {"messages": d.messages} for d in documents)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_start(documents: Iterable[Document], folder: Path, vocabulary: int, seed: int) -> None:
    """A target with random weights, and a tokenizer made of the documents."""
    train_tokenizer((document.plain for document in documents), folder, vocabulary)
    mx.random.seed(seed)
    config = target_config(vocabulary)
    write_checkpoint(folder, config, published_weights(Gemma4Model(Gemma4Config.from_dict(config))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--documents", type=int, help="only the first so many")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    start, corpus = args.out / "start", args.out / "corpus.jsonl"
    if not (start / "config.json").exists():
        documents = [d for d in modules_and_questions() if not is_held_out(d.module)][: args.documents]
        write_corpus(documents, corpus)
        write_start(documents, start, args.vocabulary, args.seed)
    recipe = Recipe(start=str(start), data=(str(corpus),), **{name: getattr(args, name) for name in SIZES})
    for stage in train(args.out / "run", recipe):
        if stage.step % 20 == 0 or stage.step == stage.steps:
            loss = f", loss {stage.figures['loss']:.3f}" if stage.figures else ""
            print(f"{stage.name}: {stage.step} of {stage.steps}{loss}", flush=True)


if __name__ == "__main__":
    main()
