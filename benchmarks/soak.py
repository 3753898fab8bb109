"""Memory over a long reply and over many requests, and what a long context costs.

    .venv/bin/python benchmarks/soak.py [--tokens 7000] [--requests 500] [--json FILE]

Active memory is read after every request (and every 1,000 tokens of the long ones): it may not grow but for the K/V
buffers, whose capacity is known. The context of the embedded target ends at 8,192, so 20,000 tokens are three replies.
"""

from __future__ import annotations

import statistics
from typing import Any

import common
import mlx.core as mx

import mlx_mtp
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring.timing import rounds_alone, timed_in_turns
from mlx_mtp.measuring.turns import fair_turns


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


def context_cost(engine: mlx_mtp.Engine, turns: int = 5, repeats: int = 21) -> dict[int, dict[str, float]]:
    """Milliseconds at both contexts; medians over turns, so that a slow minute falls on all alike."""
    assert engine.tokenizer is not None
    prompts = [common.held_out_code(n, 1, engine.tokenizer.encode)[0] for n in (500, 8000)]

    def ours(ids: list[int], depth: int) -> float:
        decoder = Decoder(engine.target, engine.drafter, FixedDepth(depth))
        return 1e3 * rounds_alone(decoder, ids, [depth], repeats)[0].device

    def stock(ids: list[int]) -> float:
        return 1e3 * timed_in_turns([common.mlx_lm_step(EMBEDDED / "target", ids)], repeats)[0].device

    measured = {"round, depth 0": lambda ids: ours(ids, 0), "round, depth 3": lambda ids: ours(ids, 3),
                "mlx-lm step": stock}  # fmt: skip
    times: dict[str, list[list[float]]] = {name: [] for name in measured}
    for _, name in fair_turns(measured, turns):
        times[name].append([measured[name](ids) for ids in prompts])
    return {len(ids): {name: statistics.median(row[i] for row in rows) for name, rows in times.items()}
            for i, ids in enumerate(prompts)}  # fmt: skip


def main() -> None:
    args = common.options(__doc__, tokens=7000, replies=3, requests=500)
    engine = mlx_mtp.load(depth=3)
    found: dict[str, Any] = {"long": long_replies(engine, args.tokens, args.replies)}
    for row in found["long"]:
        print(common.line(row), flush=True)
    memory = many_requests(engine, args.requests)
    found["requests"] = {"first 50": max(memory[:50]), "last 50": max(memory[-50:])}
    print("active megabytes over", args.requests, "requests:", found["requests"], flush=True)
    found["context"] = context_cost(engine)
    for tokens, row in found["context"].items():
        print(f"milliseconds after {tokens:,} tokens: {common.line(row)}")
    common.save(args.json, found)


if __name__ == "__main__":
    main()
