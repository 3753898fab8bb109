"""What compiling a round brings: host and wall time of pipelined rounds, compiled and built anew, in turns.

    .venv/bin/python benchmarks/compiled.py [--depths 0,4] [--context 500] [--turns 6] [--json FILE]

Host: Python's time to build and submit a round. Wall: time between two reads with one round in flight. Medians over
all turns (A B B A ...) of 30 rounds each.
"""

from __future__ import annotations

import mlx_mtp  # isort: skip  (before MLX: on Linux it brings the fast BLAS)

import argparse
import json
import statistics
import time
from pathlib import Path

import mlx.core as mx
from prompts import held_out_code

from mlx_mtp.decode import Asked, Decoder
from mlx_mtp.depth import FixedDepth

ROUNDS = 30


def turn(engine: mlx_mtp.Engine, prompt: list[int], depth: int) -> tuple[list[float], list[float]]:
    """Milliseconds of the host and of the wall for every round of a turn."""
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(depth))
    request = decoder.prefill(Asked(ids=prompt, budget=1), (ROUNDS + 4) * (depth + 1))
    decoder.rounds.first(request)
    host, wall, pending, read_at = [], [], decoder.rounds.submit(request, depth), 0.0
    for _ in range(ROUNDS + 3):
        began = time.perf_counter()
        ahead = decoder.rounds.submit(request, depth)
        host.append(1e3 * (time.perf_counter() - began))
        mx.eval(pending.tokens)
        now = time.perf_counter()
        wall.append(1e3 * (now - read_at))
        pending, read_at = ahead, now
    mx.eval(pending.tokens)
    return host[3:], wall[3:]


def main() -> None:
    """Parses options, runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", default="0,4")
    parser.add_argument("--context", type=int, default=500)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine, found = mlx_mtp.load(depth=4), {}
    assert engine.tokenizer is not None
    prompt = held_out_code(args.context, 1, engine.tokenizer.encode)[0]
    for depth in map(int, args.depths.split(",")):
        booked: dict[str, tuple[list[float], list[float]]] = {"compiled": ([], []), "built anew": ([], [])}
        for at in range(args.turns):
            for name in list(booked) if at % 2 == 0 else list(booked)[::-1]:
                (mx.enable_compile if name == "compiled" else mx.disable_compile)()
                for all_times, times in zip(booked[name], turn(engine, prompt, depth), strict=True):
                    all_times += times
        mx.enable_compile()
        found[depth] = {name: dict(zip(("host_milliseconds", "wall_milliseconds"), map(statistics.median, times),
                                       strict=True)) for name, times in booked.items()}  # fmt: skip
        for name, row in found[depth].items():
            print(f"depth {depth}, {name}: " + ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in row.items()))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
