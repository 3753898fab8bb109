"""The families side by side on one target and the same prompts; and what training them jointly does to the main head.

    .venv/bin/python benchmarks/families.py [--runs DIR] [--joint-runs DIR --joint-steps 150] \
        [--json FILE --plot FILE.png]

Stock mlx_lm (1.00), plain, lookup, assistant, lookup in front of it, parallel heads, sequential module; greedy, in fair
turns. Draft cost: a round evaluated alone, less a pass of as many tokens. --runs: the folder in which the
drafters were trained, for their training times. Jointly: the same small target is trained for --joint-steps without
and with each auxiliary objective; the loss is that of the main head alone on held-out modules.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import blocks
import common
import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import load as load_tokenizer
from verify_cost import round_seconds

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.generation.exactness import WIDEST
from mlx_mtp.generation.types import acceptance
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring import tables
from mlx_mtp.measuring.engines import DecodeJob, with_engine, with_mlx_lm
from mlx_mtp.measuring.timing import Passes
from mlx_mtp.measuring.turns import tokens_per_round
from mlx_mtp.targets.gemma4 import Gemma4Target
from mlx_mtp.training.data import Batches, pack, split, standard_library
from mlx_mtp.training.families import DrafterShape
from mlx_mtp.training.objective import next_token_loss
from mlx_mtp.training.pipeline import train
from mlx_mtp.training.recipe import Recipe

DRAFTERS = ("lookup", "assistant", "lookup+assistant", "parallel", "sequential")


def training_minutes(runs: Path, family: str) -> float | None:
    """Minutes in the log of a family's training."""
    log = runs / f"train-{family}" / "log.jsonl"
    return json.loads(log.read_text().splitlines()[-1])["seconds"] / 60 if log.exists() else None


def compare(depth: int, context: int, prompts: int, repeats: int, runs: Path | None) -> dict[str, dict[str, Any]]:
    """Speed, acceptance and cost of every configuration."""
    depths = {name: min(depth, mlx_mtp.load(drafter=name).drafter.max_depth) for name in DRAFTERS}  # type: ignore[union-attr]
    engines = {name: mlx_mtp.load(drafter=name, depth=depths[name]) for name in DRAFTERS}
    plain = mlx_mtp.load(drafter=None)
    assert plain.tokenizer is not None
    decoders = {"stock mlx-lm": with_mlx_lm(EMBEDDED / "target"), "plain": with_engine(plain)}
    decoders |= {name: with_engine(engine) for name, engine in engines.items()}
    ids = common.held_out_code(context, prompts, plain.tokenizer.encode)
    jobs = [DecodeJob(prompt, 128) for prompt in ids]
    *_, everything = common.interleave(decoders, jobs, repeats)
    passes = [one.device for one in Passes(plain.target).alone(ids[0], range(1, WIDEST + 1), 15)]
    found: dict[str, dict[str, Any]] = {}
    for name, runs_of in everything.items():
        row = found[name] = common.relative_speed(runs_of, everything["stock mlx-lm"])
        differs = common.first_difference(plain.target, jobs, everything["plain"], runs_of)
        row["same_tokens_as_plain"] = differs is None
        if name in engines:
            alone = round_seconds(engines[name], ids[0], depths[name], 15)["device_milliseconds"]
            row |= {"depth": depths[name], "tokens_per_round": tokens_per_round(runs_of.stats),
                    "acceptance": acceptance(runs_of.stats),
                    "draft_milliseconds": alone - 1e3 * passes[depths[name]]}  # fmt: skip
        if (EMBEDDED / name / "config.json").exists():
            row["parameters"] = sum(w.size for w in Checkpoint.open(EMBEDDED / name).weights().values())
            if runs and (minutes := training_minutes(runs, name)) is not None:
                row["training_minutes"] = minutes
    return found


def main_head_losses(folder: Path, steps: int) -> dict[str, float]:
    """Held-out loss of the next token of small targets trained alone and with each auxiliary objective."""
    found = {}
    for name, shape in (("alone", None), ("parallel", "parallel"), ("sequential", "sequential")):
        shapes = (DrafterShape(family=shape, inner=320),) if shape else ()
        recipe = Recipe(drafters=shapes, joint=bool(shape), target_steps=steps, length=256)
        common.told(train(folder / name, recipe))
        target = mlx_mtp.load(folder / name / "target", drafter=None).target
        assert isinstance(target, Gemma4Target)
        _, held_out = split(list(standard_library()))
        held = Batches(pack(held_out, load_tokenizer(folder / name / "tokenizer")), 4, 512, 0)
        losses = [next_token_loss(target.model, mx.array(held.batch(i)))[0].item() for i in range(16)]
        found[name] = float(np.mean(losses))
        print(f"main head, {name}: held-out loss {found[name]:.4f}", flush=True)
    return found


def plot(found: dict[str, dict[str, Any]], file: Path) -> None:
    """Speed of every configuration with its interval, and acceptance by position."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, row in reversed(found.items()):
        low, high = row["interval"]
        errors = [[max(0.0, row["ratio"] - low)], [max(0.0, high - row["ratio"])]]
        left.barh(name, row["ratio"], xerr=errors, color="#4477aa", capsize=3)
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlabel("speed over stock mlx_lm (95 % interval)")
    for name, row in found.items():
        if rates := row.get("acceptance"):
            right.plot(range(1, len(rates) + 1), rates, marker="o", label=name)
    right.set(xlabel="draft position", ylabel="share of drafts accepted", ylim=(0, 1))
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    args = common.options(
        __doc__, depth=4, context=500, prompts=4, repeats=5, runs=Path, joint_runs=Path, joint_steps=150, plot=Path
    )
    results: dict[str, Any] = {"depth": args.depth, "context": args.context}
    if args.joint_runs:
        losses = main_head_losses(args.joint_runs, args.joint_steps)
        results["main_head_held_out_loss"] = {"steps": args.joint_steps, **losses}
    found = results["arms"] = compare(args.depth, args.context, args.prompts, args.repeats, args.runs)
    print(tables.markdown([tables.Table("", *blocks.families(results))]))
    common.save(args.json, results)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
