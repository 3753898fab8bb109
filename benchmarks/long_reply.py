"""Tokens per second of the host's part of a long reply: it must not fall as the reply grows.

    .venv/bin/python benchmarks/long_reply.py [--tokens 100000] [--depth 3] [--json FILE]

The target answers from a table, so nearly all the time is spent around it: rounds, text, thoughts told apart, stop
strings and logits processors. The rate is that of the tokens since the last mark.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import common
import mlx.core as mx

import mlx_mtp
from mlx_mtp.testing import MarkovDrafter, MarkovTarget

MARKS = (5_000, 20_000, 40_000, 100_000)
WORDS, FIRST = 97, 600  # tokens that follow each other in a circle, and the first, an id of the embedded tokenizer


def circle(depth: int) -> mlx_mtp.Engine:
    """Writes the same words of the embedded tokenizer again and again; drafts are right but at one word."""
    tokenizer = mlx_mtp.load(drafter=None).tokenizer
    after = mx.array([FIRST + (i - FIRST + 1) % WORDS for i in range(FIRST + WORDS)])
    table = 20.0 * (after[:, None] == mx.arange(FIRST + WORDS)).astype(mx.float32)
    wrong = mx.array(table)
    wrong[FIRST] = mx.roll(table[FIRST], 1)
    return mlx_mtp.Engine(MarkovTarget(table), MarkovDrafter(wrong) if depth else None, tokenizer, depth=depth)


def rates(events: Iterator[mlx_mtp.Event], tokens: int) -> dict[str, float]:
    """Tokens per second between the marks."""
    found, made, before, began = {}, 0, 0, time.perf_counter()
    marks = [mark for mark in MARKS if mark < tokens] + [tokens]
    for event in events:
        made += len(event.tokens)
        if marks and made >= marks[0]:
            now = time.perf_counter()
            found[f"to {marks.pop(0):,}"] = (made - before) / (now - began)
            before, began = made, now
    return found


def main() -> None:
    args = common.options(__doc__, tokens=MARKS[-1], depth=3)
    engine = circle(args.depth)
    kinds: dict[str, dict[str, Any]] = {
        "text": {}, "stop strings": {"stop": ["\n\n\n\n", "never said"]}, "raw": {"raw": True},
        "logits processors": {"logits_processors": [lambda tokens, logits: logits]},
    }  # fmt: skip
    found = {}
    for name, options in kinds.items():
        found[name] = rates(engine.stream([FIRST], max_tokens=args.tokens, **options), args.tokens)
        print(name + ": " + ", ".join(f"{mark} {rate:,.0f}/s" for mark, rate in found[name].items()), flush=True)
    common.save(args.json, found)


if __name__ == "__main__":
    main()
