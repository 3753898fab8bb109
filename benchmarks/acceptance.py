"""Acceptance by position on held-out modules: how often the drafter agrees with its target in real decoding.

    .venv/bin/python benchmarks/acceptance.py [--model DIR] [--drafters NAME,DIR] [--depth 4] [--json FILE]

Prompts: held-out source files and questions about held-out modules. Greedy, 128 tokens each, stop tokens honoured.
Acceptance at position i is the share of drafts i that were accepted among those whose predecessors all were; "of all"
divides by every round. Parallel heads draft as many tokens as there are heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import common

import mlx_mtp
from mlx_mtp.generation.types import acceptance, total
from mlx_mtp.loading import FAMILIES

CONTEXT = 150


def measure(engine: mlx_mtp.Engine, asked: Sequence[Any], tokens: int) -> dict[str, Any]:
    """Sums of a kind's statistics and what follows from them."""
    replies = [engine.generate(prompt, max_tokens=tokens).stats for prompt in asked]
    emitted = sum(max(0, stats.tokens - 1) for stats in replies)
    drafted, accepted = total(replies, "drafted_by_position", "accepted_by_position")
    return {
        "prompts": len(asked),
        "tokens": emitted,
        "tokens_per_round": emitted / sum(stats.rounds for stats in replies),
        "conditional_acceptance": acceptance(replies),
        "acceptance_of_all": [a / max(1, d) for a, d in zip(accepted, drafted, strict=True)],
    }


def main() -> None:
    args = common.options(__doc__, model=str, drafters="", depth=4, tokens=128, prompts=40, draft_head_bits=0)
    figures: dict[str, dict[str, Any]] = {}
    names = args.drafters or ("auto" if args.model else ",".join(FAMILIES))
    for name in names.split(","):
        engine = mlx_mtp.load(args.model, drafter=name, draft_head_bits=args.draft_head_bits)
        assert engine.drafter is not None and engine.tokenizer is not None
        depth = min(args.depth, engine.drafter.max_depth)
        engine = mlx_mtp.load(args.model, drafter=name, depth=depth, draft_head_bits=args.draft_head_bits)
        figures[name] = {"depth": depth}
        asked = {"code": common.held_out_code(CONTEXT, args.prompts, engine.tokenizer.encode),
                 "chat": common.held_out_chat(args.prompts)}  # fmt: skip
        for kind, prompts in asked.items():
            found = figures[name][kind] = measure(engine, prompts, args.tokens)
            shown = ", ".join(f"{share:.1%}" for share in found["conditional_acceptance"])
            print(f"{name}, {kind}: {found['tokens_per_round']:.2f} tokens a round, acceptance by position {shown}")
    common.save(args.json, figures)


if __name__ == "__main__":
    main()
