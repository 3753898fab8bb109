"""What drafting costs where it cannot help: text the drafter is bad at, and a drafter that is bad at everything.

    .venv/bin/python benchmarks/unfriendly.py [--tokens 128] [--repeats 7] [--json FILE]

The promise is that depth "auto" is never more than 2 % slower than depth 0. Embedded pair, in fair turns; the random
drafter agrees with the target by chance only. Beside the times, which scatter, the share of rounds that drafted. Speeds
on ordinary text: `mlx-mtp bench`.
"""

from __future__ import annotations

from typing import Any

import common
import mlx.core as mx
from blocks import PLAIN, ratio
from mlx.utils import tree_map

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.generation.types import NEUTRAL
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring import machine
from mlx_mtp.measuring.configurations import GEMMA, sampling_name
from mlx_mtp.measuring.engines import Decode, DecodeJob, with_engine
from mlx_mtp.measuring.turns import Runs


def with_random_drafter() -> Decode:
    """The embedded target with an assistant of random weights; depth auto."""
    plain, drafter = mlx_mtp.load(drafter=None), load_drafter(Checkpoint.open(EMBEDDED / "assistant"))
    mx.random.seed(0)
    model = drafter.model  # type: ignore[attr-defined]
    model.update(tree_map(lambda weight: 0.05 * mx.random.normal(weight.shape), model.parameters()))
    mx.eval(model.parameters())  # or every round would draw them anew
    return with_engine(mlx_mtp.Engine(plain.target, drafter, plain.tokenizer, depth="auto"))


def drafted(runs: Runs) -> float:
    """Share of all rounds that had drafts."""
    counts = [stats.depth_counts for stats in runs.stats]
    return 1.0 - sum(one.get(0, 0) for one in counts) / sum(sum(one.values()) for one in counts)


def printed(engine: mlx_mtp.Engine, jobs: list[DecodeJob], found: dict[str, Runs]) -> dict[str, Any]:
    """Prints a line a configuration and returns them."""
    rows: dict[str, Any] = {}
    for name, runs in found.items():
        row = rows[name] = common.relative_speed(runs, found[PLAIN]) | {"drafted_rounds": drafted(runs)}
        line = f"  {name:22} {row['tokens_per_second']:7.1f} tokens/s  {ratio(row)} of plain"
        line += f"  {row['drafted_rounds']:.1%} of rounds drafted"
        if not jobs[0].sampling.temperature:
            differs = common.first_difference(engine.target, jobs, found[PLAIN], runs)
            row["same_tokens"] = differs is None
            line += f"  (differs at token {differs.token + 1})" if differs else ""
        print(line, flush=True)
    return rows


def main() -> None:
    args = common.options(__doc__, tokens=128, repeats=7)
    engine = mlx_mtp.load(drafter=None)
    assert engine.tokenizer is not None
    decoders = {PLAIN: with_engine(engine), "auto": with_engine(mlx_mtp.load()),
                "auto, random drafter": with_random_drafter()}  # fmt: skip
    sets = common.unfriendly(300, engine.tokenizer.encode, engine.target.info.vocab_size)
    results: dict[str, Any] = {"about": machine.describe() | {"tokens": args.tokens, "repeats": args.repeats}}
    for sampling in (NEUTRAL, GEMMA.over(NEUTRAL)):
        everything, every_job = {name: Runs() for name in decoders}, []
        for name, ids in sets.items():
            title = f"{name}, {sampling_name(sampling)}"
            print(title)
            jobs = [DecodeJob(ids, args.tokens, sampling)]
            *_, found = common.interleave(decoders, jobs, args.repeats)
            results[title] = printed(engine, jobs, found)
            every_job += jobs
            for each, runs in found.items():
                everything[each].by_job += runs.by_job
        title = f"all of them, {sampling_name(sampling)}"
        print(title)
        results[title] = printed(engine, every_job, everything)
    common.save(args.json, results)


if __name__ == "__main__":
    main()
