"""What compiling a round brings: its time compiled and built anew, in turns.

    .venv/bin/python benchmarks/compiled.py [--depths 0,4] [--context 500] [--turns 6] [--json FILE]

Build: Python's time to make the graph of a round. Wall: a pipelined round, the fastest of a turn's 30. Medians over
the turns (A B B A ...).
"""

from __future__ import annotations

import statistics

import common
import mlx.core as mx

import mlx_mtp
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.measuring.timing import pipelined_rounds, rounds_alone
from mlx_mtp.measuring.turns import fair_turns

ROUNDS = 30
SWITCHES = {"compiled": mx.enable_compile, "built anew": mx.disable_compile}


def turn(engine: mlx_mtp.Engine, prompt: list[int], depth: int) -> tuple[float, float]:
    """Milliseconds to build a round, and of a pipelined one."""
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(depth))
    (alone,) = rounds_alone(decoder, prompt, [depth], ROUNDS)
    return 1e3 * alone.build, 1e3 * pipelined_rounds(decoder, prompt, [depth], ROUNDS)[depth]


def main() -> None:
    args = common.options(__doc__, depths="0,4", context=500, turns=6)
    engine = mlx_mtp.load(depth=4)
    assert engine.tokenizer is not None
    prompt = common.held_out_code(args.context, 1, engine.tokenizer.encode)[0]
    found: dict[int, dict[str, dict[str, float]]] = {}
    for depth in map(int, args.depths.split(",")):
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in SWITCHES}
        for _, name in fair_turns(SWITCHES, args.turns):
            SWITCHES[name]()
            times[name].append(turn(engine, prompt, depth))
        mx.enable_compile()
        medians = {name: map(statistics.median, zip(*rows, strict=True)) for name, rows in times.items()}
        found[depth] = {name: dict(zip(("build_milliseconds", "wall_milliseconds"), values, strict=True))
                        for name, values in medians.items()}  # fmt: skip
        for name, row in found[depth].items():
            print(f"depth {depth}, {name}: {common.line(row)}")
    common.save(args.json, found)


if __name__ == "__main__":
    main()
