"""Acceptance by position on held-out modules: how often the drafter agrees with its target in real decoding.

    .venv/bin/python benchmarks/acceptance.py [--model DIR] [--drafters NAME,DIR] [--depth 4] [--json FILE]

Prompts: the beginnings of held-out source files (cut at a line's end, every 4000 characters) and the questions about
held-out modules. Greedy, 128 tokens each, ending tokens honoured. Acceptance at position i is the share of drafts i
that stood among those drafts i whose predecessors all stood; "of all" divides by every round. Parallel heads draft as
many tokens as there are heads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from embedded.corpus import is_held_out, standard_library

import mlx_mtp
from mlx_mtp.generation.types import acceptance, total
from mlx_mtp.loading import FAMILIES
from mlx_mtp.text.tokenizer import Prompt

STRIDE, PREFIX = 4000, 600


def prompts(engine: mlx_mtp.Engine, most: int) -> dict[str, list[Prompt]]:
    """Held-out prompts per kind, evenly chosen, at most `most` of each."""
    assert engine.tokenizer is not None
    code: list[Prompt] = []
    chat: list[Prompt] = []
    for document in standard_library():
        if not is_held_out(document.module):
            continue
        if document.messages:
            chat.append(document.messages[:1])
            continue
        text = document.text or ""
        for start in range(0, max(1, len(text) - PREFIX), STRIDE):
            cut = text[start : start + PREFIX]
            code.append(engine.tokenizer.encode(cut[: cut.rfind("\n") + 1] or cut))
    return {kind: found[:: max(1, len(found) // most)][:most] for kind, found in (("code", code), ("chat", chat))}


def measure(engine: mlx_mtp.Engine, asked: list[Prompt], tokens: int) -> dict[str, Any]:
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
    """Prints one line a kind; --json writes the same figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=None)
    parser.add_argument("--drafters", help="folders, hub names or names of the embedded; default: all of these, or "
                        "what goes with --model")
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--draft-head-bits", type=int, default=0, help="0 (as it is), 4 or 8")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    names = options.drafters or ("auto" if options.model else ",".join(FAMILIES))
    for name in names.split(","):
        engine = mlx_mtp.load(options.model, drafter=name, draft_head_bits=options.draft_head_bits)
        assert engine.drafter is not None
        depth = min(options.depth, engine.drafter.max_depth)
        engine = mlx_mtp.load(options.model, drafter=name, depth=depth, draft_head_bits=options.draft_head_bits)
        figures[name] = {"depth": depth}
        for kind, asked in prompts(engine, options.prompts).items():
            found = figures[name][kind] = measure(engine, asked, options.tokens)
            shown = ", ".join(f"{share:.1%}" for share in found["conditional_acceptance"])
            print(f"{name}, {kind}: {found['tokens_per_round']:.2f} tokens a round, acceptance by position {shown}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
