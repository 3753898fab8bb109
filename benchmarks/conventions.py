"""Which position of the query an assistant was trained with: A or B (`mlx_mtp.drafters.assistant.Convention`).

    .venv/bin/python benchmarks/conventions.py [--model DIR --drafter DIR] [--tokens 48] [--json FILE]

First drafts under both conventions against the target's own next token, all along its greedy replies to some of the
built-in prompts of `mlx-mtp bench`. An assistant that is run with the wrong one loses drafts, never exactness.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any

import common
import mlx.core as mx

import mlx_mtp
from mlx_mtp.drafters.assistant import Assistant, Convention
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder, GenerationRequest
from mlx_mtp.generation.sampling import DraftSampler
from mlx_mtp.measuring.diagnosis import sample_texts

DEVIATIONS = 2.0  # of the standard kind, from which on two conventions differ by more than noise


def compare_conventions(
    decoder: Decoder, assistant: Assistant, prompts: Iterable[list[int]], stop: Collection[int], tokens: int
) -> dict[str, Any]:
    """First drafts under both conventions against the target's own next token, all along its greedy replies.

    tokens: places compared. share_a, share_b: of the first drafts that were right. only_a, only_b: places where one
    alone was. used: the convention that the drafter is run with. better: None where the difference may be chance.
    """
    drafters = [Assistant(assistant.model, assistant.name, convention) for convention in Convention]
    for drafter in drafters:
        drafter.attach(decoder.target)
    right: list[tuple[bool, bool]] = []
    for ids in prompts:
        state = decoder.prefill(GenerationRequest(ids=ids, budget=tokens + 2), tokens + 2)
        token = decoder.rounds.first(state).tokens[0, 0].item()
        for _ in range(tokens):
            if token in stop:
                break
            sample = DraftSampler(state.spec, state.arrays, state.history, mx.random.split(state.key, 1))
            drafts = [one.draft({}, state.token, state.hidden, state.cache, 1, sample)[0] for one in drafters]
            # Evaluated before the round is submitted: a buffer they still held would be copied, not updated.
            mx.eval(drafts)
            token = decoder.rounds.submit(state, 0).tokens[0, 0].item()
            a, b = (draft[0, 0].item() == token for draft in drafts)
            right.append((a, b))
    only_a, only_b, both = (right.count(case) for case in ((True, False), (False, True), (True, True)))
    # A split by chance alone is so lopsided less than once in twenty times.
    lopsided = abs(only_a - only_b) > DEVIATIONS * math.sqrt(only_a + only_b)
    better = None if not lopsided else "A" if only_a > only_b else "B"
    count = max(1, len(right))
    return {"tokens": len(right), "share_a": (only_a + both) / count, "share_b": (only_b + both) / count,
            "only_a": only_a, "only_b": only_b, "used": assistant.convention.name, "better": better}  # fmt: skip


def main() -> None:
    args = common.options(__doc__, model=str, drafter="auto", tokens=48)
    engine = mlx_mtp.load(args.model, drafter=args.drafter, depth=0)
    if not isinstance(engine.drafter, Assistant):
        raise SystemExit("The drafter is no assistant; name one with --drafter.")
    decoder = Decoder(engine.target, engine.drafter, FixedDepth(0))
    found = compare_conventions(decoder, engine.drafter, sample_texts(engine), engine.stop_tokens, args.tokens)
    print(common.line({name: value for name, value in found.items() if not isinstance(value, str | None)}))
    print(f"run with {found['used']}; better: {found['better'] or 'neither beyond chance'}")
    common.save(args.json, found)


if __name__ == "__main__":
    main()
