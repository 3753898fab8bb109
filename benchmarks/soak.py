"""Memory over a long reply and over many requests, and what a long context costs.

    .venv/bin/python benchmarks/soak.py [--tokens 7000] [--requests 500] [--json FILE]

Active memory is read after every request (and every 1,000 tokens of the long ones): it may not grow but for the K/V
buffers, whose capacity is known. The context of the embedded target ends at 8,192, so 20,000 tokens are three replies.
"""

from __future__ import annotations

import mlx_mtp  # isort: skip  (before MLX: on Linux it brings the fast BLAS)

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
from prompts import held_out_code

from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder, GenerationRequest
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring.turns import mlx_lm_step


def long_replies(engine: mlx_mtp.Engine, tokens: int, replies: int) -> list[dict[str, float]]:
    """Active and peak megabytes after each of some long replies, after every 1,000 tokens."""
    found = []
    for reply in range(replies):
        made, mark = 0, 0
        for event in engine.stream("import os\n", raw=True, max_tokens=tokens, ignore_end=True):
            made += len(event.tokens)
            if made // 1000 > mark or event.result:
                mark = made // 1000
                found.append({"reply": reply, "tokens": made, "active_megabytes": mx.get_active_memory() / 1e6,
                              "peak_megabytes": mx.get_peak_memory() / 1e6})  # fmt: skip
    return found


def many_requests(engine: mlx_mtp.Engine, count: int) -> list[float]:
    """Active megabytes after each of many short requests, a third of them dropped half-way."""
    found = []
    for i in range(count):
        stream = engine.stream("import os\n" * (1 + i % 7), raw=True, max_tokens=12, seed=i)
        for at, _ in enumerate(stream):
            if i % 3 == 0 and at == 2:
                stream.close()  # type: ignore[attr-defined]
                break
        found.append(mx.get_active_memory() / 1e6)
    return found


def round_milliseconds(engine: mlx_mtp.Engine, prompt: list[int], depth: int, repeats: int = 21) -> float:
    """Median of a round evaluated alone behind a prompt."""
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(depth))
    request = decoder.prefill(GenerationRequest(ids=prompt, budget=1), (repeats + 4) * (depth + 1))
    decoder.rounds.first(request)
    times = []
    for _ in range(repeats + 3):
        output = decoder.rounds.build(request, depth)
        began = time.perf_counter()
        mx.eval(output.tokens, request.tree)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def stock_milliseconds(prompt: list[int], repeats: int = 21) -> float:
    """Median of mlx-lm's plain step behind the same prompt."""
    step, times = mlx_lm_step(EMBEDDED / "target", prompt), []
    for _ in range(repeats + 3):
        arrays = step()
        began = time.perf_counter()
        mx.eval(arrays)
        times.append(1e3 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def context_cost(engine: mlx_mtp.Engine, turns: int = 5) -> dict[str, dict[str, float]]:
    """Milliseconds at both contexts and their ratio; medians over turns, so that a slow minute falls on all alike."""
    assert engine.tokenizer is not None
    prompts = [held_out_code(n, 1, engine.tokenizer.encode)[0] for n in (500, 8000)]
    arms = {
        "round, depth 0": lambda ids: round_milliseconds(engine, ids, 0),
        "round, depth 3": lambda ids: round_milliseconds(engine, ids, 3),
        "mlx-lm step": stock_milliseconds,
    }
    booked: dict[str, list[list[float]]] = {name: [] for name in arms}
    for turn in range(turns):
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            booked[name].append([arms[name](ids) for ids in prompts])
    found = {}
    for name, rows in booked.items():
        columns = zip(*((short, long, long / short) for short, long in rows), strict=True)
        short, long, ratio = map(statistics.median, columns)
        found[name] = {"at 500": short, "at 8000": long, "ratio": ratio}
    return found


def main() -> None:
    """Parses options, runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=7000, help="of a long reply")
    parser.add_argument("--replies", type=int, default=3)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    engine = mlx_mtp.load(depth=3)
    assert engine.tokenizer is not None
    found: dict[str, Any] = {"long": long_replies(engine, args.tokens, args.replies)}
    for row in found["long"]:
        print(", ".join(f"{key.replace('_', ' ')} {value:.1f}" for key, value in row.items()), flush=True)
    memory = many_requests(engine, args.requests)
    found["requests"] = {"first 50": max(memory[:50]), "last 50": max(memory[-50:])}
    print("active megabytes over", args.requests, "requests:", found["requests"], flush=True)
    found["context"] = context_cost(engine)
    for name, row in found["context"].items():
        print(f"{name}: {row['at 500']:.2f} ms at 500, {row['at 8000']:.2f} ms at 8,000, ratio {row['ratio']:.2f}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
