"""Acceptance by position on held-out prompts: how often the drafter agrees with its target in real decoding.

    .venv/bin/python benchmarks/acceptance.py [--model DIR] [--drafters NAME,DIR] [--depth 4] [--json FILE]
    .venv/bin/python benchmarks/acceptance.py --model smollm2 --asked benchmarks/handwritten.jsonl --depth 3

Prompts: held-out source files and questions about held-out modules, or those of a file, a line each with `kind` and
`prompt`, as handwritten.jsonl, whose 52 are in no training data. Greedy, 128 tokens each, stop tokens honoured.
Acceptance at position i is the share of drafts i that were accepted among those whose predecessors all were; "of all"
divides by every round. Parallel heads draft as many tokens as there are heads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

import mlx_mtp
from mlx_mtp.generation.types import Stats, acceptance, total
from mlx_mtp.loading import FAMILIES

CONTEXT = 150


def asked_in(file: Path) -> dict[str, list[str]]:
    """Prompts by kind."""
    found: dict[str, list[str]] = {}
    for line in file.read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["kind"], []).append(row["prompt"])
    return found


def summed(replies: Sequence[Stats]) -> dict[str, Any]:
    """Sums of statistics and what follows from them."""
    emitted = sum(max(0, stats.tokens - 1) for stats in replies)
    rounds = sum(stats.rounds for stats in replies)
    drafted, accepted = total(replies, "drafted_by_position", "accepted_by_position")
    return {
        "prompts": len(replies),
        "tokens": emitted,
        "rounds": rounds,
        "tokens_per_round": emitted / rounds,
        "conditional_acceptance": acceptance(replies),
        "acceptance_of_all": [a / max(1, d) for a, d in zip(accepted, drafted, strict=True)],
    }


def measured(engine: mlx_mtp.Engine, asked: Mapping[str, Sequence[Any]], tokens: int) -> Iterator[tuple[str, Any]]:
    """By kind, and all of them together."""
    replies: list[Stats] = []
    for kind, prompts in asked.items():
        found = [engine.generate(prompt, max_tokens=tokens).stats for prompt in prompts]
        replies += found
        yield kind, summed(found)
    yield "all", summed(replies)


def main() -> None:
    args = common.options(
        __doc__, model=str, drafters="", depth=4, tokens=128, prompts=40, asked=Path, draft_head_bits=0
    )
    figures: dict[str, dict[str, Any]] = {}
    names = args.drafters or ("auto" if args.model else ",".join(FAMILIES))
    for name in names.split(","):
        engine = mlx_mtp.load(args.model, drafter=name, draft_head_bits=args.draft_head_bits)
        assert engine.drafter is not None and engine.tokenizer is not None
        depth = min(args.depth, engine.drafter.max_depth)
        engine = mlx_mtp.load(args.model, drafter=name, depth=depth, draft_head_bits=args.draft_head_bits)
        figures[name] = {"depth": depth}
        asked = asked_in(args.asked) if args.asked else {
            "code": common.held_out_code(CONTEXT, args.prompts, engine.tokenizer.encode),
            "chat": common.held_out_chat(args.prompts),
        }  # fmt: skip
        for kind, found in measured(engine, asked, args.tokens):
            figures[name][kind] = found
            shown = ", ".join(f"{share:.1%}" for share in found["conditional_acceptance"])
            print(f"{name}, {kind}: {found['tokens_per_round']:.2f} tokens a round, acceptance by position {shown}",
                  flush=True)  # fmt: skip
    common.save(args.json, figures)


if __name__ == "__main__":
    main()
