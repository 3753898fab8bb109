"""What drafting costs where it cannot help: text the drafter is bad at, and a drafter that is bad at everything.

    .venv/bin/python benchmarks/unfriendly.py [--tokens 128] [--repeats 7] [--json FILE]

The promise is that depth "auto" is never more than 2 % slower than depth 0. Embedded pair, arms interleaved in one
run; the random drafter agrees with the target by chance only. Beside the times, which scatter, the share of rounds that
drafted. Speeds on ordinary text: `mlx-mtp bench`.
"""

from __future__ import annotations

import mlx_mtp  # isort: skip  (before MLX: on Linux it brings the fast BLAS)

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from prompts import unfriendly

from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.generation.types import NEUTRAL
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring import machine
from mlx_mtp.measuring.arms import GEMMA, sampling_name
from mlx_mtp.measuring.turns import Arm, Job, Record, differences, engine_arm, interleave, ratio

PLAIN = "depth 0"


def random_drafter_arm() -> Arm:
    """The embedded target with an assistant of random weights; depth auto."""
    plain, drafter = mlx_mtp.load(drafter=None), load_drafter(Checkpoint.open(EMBEDDED / "assistant"))
    mx.random.seed(0)
    model = drafter.model  # type: ignore[attr-defined]
    model.update(tree_map(lambda weight: 0.05 * mx.random.normal(weight.shape), model.parameters()))
    mx.eval(model.parameters())  # or every round would draw them anew
    return engine_arm(mlx_mtp.Engine(plain.target, drafter, plain.tokenizer, depth="auto"))


def drafted(record: Record) -> float:
    """Share of all rounds that had drafts."""
    counts = [timing.stats.depth_counts for repeats in record.timings for timing in repeats if timing.stats]
    return 1.0 - sum(one.get(0, 0) for one in counts) / sum(sum(one.values()) for one in counts)


def report(engine: mlx_mtp.Engine, jobs: list[Job], records: dict[str, Record]) -> dict[str, Any]:
    """Prints a line an arm and returns them."""
    found: dict[str, Any] = {}
    for name, record in records.items():
        over, low, high = ratio(record, records[PLAIN])
        row: dict[str, Any] = {
            "tokens_per_second": record.rate, "ratio": over, "interval": [low, high], "drafted_rounds": drafted(record)
        }  # fmt: skip
        line = f"  {name:22} {record.rate:7.1f} tokens/s  {over:5.2f} [{low:.2f}, {high:.2f}] of plain"
        line += f"  {row['drafted_rounds']:.1%} of rounds drafted"
        if not jobs[0].sampling.temperature:
            parted = differences(engine.target, jobs, records[PLAIN], record)
            row["same_tokens"] = not parted
            line += f"  ({parted[0]})" if parted else ""
        print(line, flush=True)
        found[name] = row
    return found


def main() -> None:
    """Parses options, runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = mlx_mtp.load(drafter=None)
    assert engine.tokenizer is not None
    arms = {PLAIN: engine_arm(engine), "auto": engine_arm(mlx_mtp.load()), "auto, random drafter": random_drafter_arm()}
    sets = unfriendly(300, engine.tokenizer.encode, engine.target.info.vocab_size)
    results: dict[str, Any] = {"about": asdict(machine.describe()) | {"tokens": args.tokens, "repeats": args.repeats}}
    for sampling in (NEUTRAL, GEMMA.over(NEUTRAL)):
        everything, every_job = {name: Record() for name in arms}, []
        for name, ids in sets.items():
            title = f"{name}, {sampling_name(sampling)}"
            print(title)
            jobs = [Job(ids, args.tokens, sampling)]
            *_, records = interleave(arms, jobs, args.repeats)
            results[title] = report(engine, jobs, records)
            every_job += jobs
            for arm, record in records.items():
                everything[arm].timings += record.timings
        title = f"all of them, {sampling_name(sampling)}"
        print(title)
        results[title] = report(engine, every_job, everything)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
