"""Whether drafting changes the distribution: many sampled tokens with drafts against as many without, on the real pair.

    .venv/bin/python benchmarks/distribution.py [--tokens 100000] [--depth 4] [--json FILE]

One prompt, many short replies with seeds of their own, so that the replies are independent. Compared are the
marginals of every place of the reply and the pairs of neighbours, by total variation and by chi-square over the cells
that are expected at least five times. What chance alone gives is measured too: the same distance between two
halves of the undrafted replies.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import common
import numpy as np

import mlx_mtp
from mlx_mtp.measuring.configurations import GEMMA

PROMPT = "import os\n\n"


def replies(depth: int, count: int, length: int, first_seed: int) -> list[list[int]]:
    """`count` sampled replies of `length` tokens."""
    engine = mlx_mtp.load(drafter="auto" if depth else None, depth=depth if depth else "auto")
    return [
        engine.generate(
            PROMPT, raw=True, max_tokens=length, sampling=GEMMA, seed=first_seed + i, ignore_end=True
        ).tokens
        for i in range(count)
    ]  # fmt: skip


def cells(found: Sequence[Sequence[int]], width: int) -> Counter[tuple[int, ...]]:
    """How often each token, or each run of so many neighbours, is at each place."""
    return Counter((i, *row[i : i + width]) for row in found for i in range(len(row) - width + 1))


def distance(one: Counter[tuple[int, ...]], other: Counter[tuple[int, ...]]) -> dict[str, float]:
    """Total variation, and chi-square of two samples with its distance from what is expected in deviations."""
    keys = sorted(one.keys() | other.keys())
    a, b = (np.array([counts[key] for key in keys], dtype=np.float64) for counts in (one, other))
    total = 0.5 * np.abs(a / a.sum() - b / b.sum()).sum()
    # Rare cells are added up to one, so that every cell is expected five times or more in each sample.
    rare = a + b < 10
    a, b = (np.append(x[~rare], x[rare].sum()) for x in (a, b))
    scale = np.sqrt(b.sum() / a.sum())
    chi = ((a * scale - b / scale) ** 2 / np.maximum(a + b, 1.0)).sum()
    free = len(a) - 1
    return {"total_variation": float(total), "chi_square": float(chi), "cells": free,
            "deviations": float((chi - free) / np.sqrt(2.0 * free))}  # fmt: skip


def main() -> None:
    args = common.options(__doc__, tokens=100_000, length=20, depth=4)
    count = args.tokens // args.length
    plain = replies(0, count, args.length, 0)
    drafted = replies(args.depth, count, args.length, 10**6)
    found: dict[str, Any] = {"tokens": count * args.length, "depth": args.depth}
    half = count // 2
    compared = {
        "drafted against plain": (drafted, plain),
        "halves, drafted against plain": (drafted[:half], plain[:half]),
        "halves, plain against plain": (plain[:half], plain[half:]),
    }
    for name, width in (("marginals", 1), ("pairs", 2)):
        found[name] = {}
        for what, (one, other) in compared.items():
            row = found[name][what] = distance(cells(one, width), cells(other, width))
            print(f"{name}, {what}: {common.line(row)}")
    common.save(args.json, found)


if __name__ == "__main__":
    main()
