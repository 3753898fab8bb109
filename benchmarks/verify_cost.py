"""What a round is made of: passes of 1 to 9 tokens, draft steps, the host's time, memory, how long the device idles.

    .venv/bin/python benchmarks/verify_cost.py [--model DIR --drafter DIR] [--context 500] [--json FILE]

Every piece is evaluated alone: built first (host time), then waited for (device time); medians. The idle share of a
depth is 1 - (its round evaluated alone) / (wall time per round in the pipelined loop), both at the same context.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import common
import mlx.core as mx

import mlx_mtp
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.exactness import WIDEST
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring.timing import Passes, rounds_alone, timed_in_turns


def round_seconds(engine: mlx_mtp.Engine, prompt: list[int], depth: int, repeats: int) -> dict[str, float]:
    """One depth: host and device seconds of a round evaluated alone, wall seconds of one in the loop, memory."""
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(depth))
    (alone,) = rounds_alone(decoder, prompt, [depth], repeats)
    fixed = mlx_mtp.Engine(engine.target, engine.drafter, engine.tokenizer, depth=depth)
    # As many tokens as keep the context where the pieces were measured.
    room = repeats * (depth + 1)
    replies = [fixed.generate(prompt, max_tokens=room, ignore_end=True).stats for _ in range(3)]
    wall = statistics.median(stats.decode_seconds / stats.rounds for stats in replies)
    return {
        "host_milliseconds": 1e3 * alone.build, "device_milliseconds": 1e3 * alone.device,
        "wall_milliseconds": 1e3 * wall, "idle_share": max(0.0, 1.0 - alone.device / wall),
        "peak_megabytes": replies[-1].peak_memory_bytes / 1e6, "active_megabytes": mx.get_active_memory() / 1e6,
    }  # fmt: skip


def main() -> None:
    args = common.options(__doc__, model=str, drafter="auto", context=500, repeats=21, depths="0,1,2,3,4,6,8")
    engine = mlx_mtp.load(args.model, drafter=args.drafter, depth=1)
    assert engine.tokenizer is not None
    (prompt,) = common.held_out_code(args.context, 1, engine.tokenizer.encode)
    passes = Passes(engine.target).alone(prompt, range(1, WIDEST + 1), args.repeats)
    verify = [one.device for one in passes]
    print(f"context {args.context}: pass of M tokens in ms, and over one row")
    print("  " + "  ".join(f"{m}: {1e3 * t:.2f} ({t / verify[0]:.2f})" for m, t in enumerate(verify, 1)))
    step = common.mlx_lm_step(Path(args.model or EMBEDDED / "target"), prompt)
    stock = timed_in_turns([step], args.repeats)[0].device
    print(f"stock mlx-lm's step: {1e3 * stock:.2f} ms")
    found: dict[str, Any] = {"context": args.context, "verify_milliseconds": [1e3 * t for t in verify],
                             "mlx_lm_step_milliseconds": 1e3 * stock, "rounds": {}}  # fmt: skip
    for depth in map(int, args.depths.split(",")):
        row = round_seconds(engine, prompt, depth, args.repeats)
        row["draft_step_milliseconds"] = (row["device_milliseconds"] - 1e3 * verify[depth]) / depth if depth else 0.0
        found["rounds"][depth] = row
        print(f"depth {depth}: {common.line(row)}")
    common.save(args.json, found)


if __name__ == "__main__":
    main()
