"""What compiling a round brings: its time compiled and built anew, in turns.

    .venv/bin/python benchmarks/compiled.py [--depths 0,4] [--context 500] [--turns 6] [--json FILE]

Build: Python's time to make the graph of a round. Wall: a pipelined round, the fastest of a turn's 30. Medians over
the turns (A B B A ...).
"""

from __future__ import annotations

import mlx_mtp  # isort: skip  (before MLX: on Linux it brings the fast BLAS)

import argparse
import json
import statistics
from pathlib import Path

import mlx.core as mx
from prompts import held_out_code

from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.measuring.diagnosis import rounds_alone

ROUNDS = 30
SWITCHES = {"compiled": mx.enable_compile, "built anew": mx.disable_compile}


def turn(engine: mlx_mtp.Engine, prompt: list[int], depth: int) -> tuple[float, float]:
    """Milliseconds to build a round, and of a pipelined one."""
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(depth))
    (alone,) = rounds_alone(decoder, prompt, [depth], ROUNDS)
    return 1e3 * alone.build, 1e3 * decoder.seconds_by_depth([depth], ROUNDS, prompt)[depth]


def main() -> None:
    """Parses options, runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="0,4")
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = mlx_mtp.load(depth=4)
    assert engine.tokenizer is not None
    prompt = held_out_code(args.context, 1, engine.tokenizer.encode)[0]
    found: dict[int, dict[str, dict[str, float]]] = {}
    for depth in map(int, args.depths.split(",")):
        booked: dict[str, list[tuple[float, float]]] = {name: [] for name in SWITCHES}
        for at in range(args.turns):
            for name in list(booked) if at % 2 == 0 else list(booked)[::-1]:
                SWITCHES[name]()
                booked[name].append(turn(engine, prompt, depth))
        mx.enable_compile()
        medians = {name: map(statistics.median, zip(*rows, strict=True)) for name, rows in booked.items()}
        found[depth] = {name: dict(zip(("build_milliseconds", "wall_milliseconds"), values, strict=True))
                        for name, values in medians.items()}  # fmt: skip
        for name, row in found[depth].items():
            print(f"depth {depth}, {name}: " + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
