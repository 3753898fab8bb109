"""Exact mode: greedy logprobs with drafts against without, bit for bit, over families, room and turns.

    .venv/bin/python benchmarks/exact.py [--prompts 50] [--tokens 8] [--capacities 256 512 1024] [--form float32]
                                         [--json FILE]

The embedded target, stored in the precision that is asked for, continues random prompts in mode exact, plainly and with
a drafter of every family; then a second turn of the same conversation, and that once more. Prompts are as long as
caches of the given sizes are made for. Printed for each family, size and turn: logprobs that differ in any bit, of how
many, and how many drafts were accepted of how many (none where the engine decodes plainly).
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import common
import numpy as np
from mlx_lm import convert

import mlx_mtp
from mlx_mtp.backend import blas
from mlx_mtp.generation.cache import CAPACITY_STEP, capacity_for
from mlx_mtp.generation.exactness import WIDEST
from mlx_mtp.generation.prefix import Session
from mlx_mtp.generation.types import Result
from mlx_mtp.loading import EMBEDDED

FAMILIES = ("assistant", "parallel", "sequential", "lookup", "lookup+assistant")
TURNS = ("fresh", "second", "retry")
FORMS = ("float32", "float16", "bfloat16", "4 bits")


def prompts_for(capacity: int, count: int, tokens: int) -> Iterator[list[int]]:
    """Random prompts with which every turn is given a cache of just this capacity."""
    smaller = max((size for size in range(0, capacity, CAPACITY_STEP) if capacity_for(size) < capacity), default=0)
    room = 4 * WIDEST + tokens
    low, high = max(8, smaller - room + 1), capacity - room - tokens - 9
    chance = np.random.default_rng(capacity)
    for _ in range(count):
        yield chance.integers(6, 4096, int(chance.integers(low, high + 1))).tolist()


def turns(engine: mlx_mtp.Engine, prompt: list[int], said: list[int], tokens: int) -> list[Result]:
    """A reply, another one after `said` and a few words more, and that again."""
    session, second = Session(), [*prompt, *said, *prompt[:9]]
    return [engine.generate(ids, max_tokens=tokens, ignore_end=True, logprobs=1, session=session)
            for ids in (prompt, second, second)]  # fmt: skip


def differing(one: Result, other: Result) -> int:
    """Logprobs that are not the same float32, tokens that differ included."""
    assert one.logprobs is not None and other.logprobs is not None
    mine, its = (np.array(found, dtype=np.float32).view(np.uint32) for found in (one.logprobs, other.logprobs))
    return int(((mine != its) | (np.array(one.tokens) != np.array(other.tokens))).sum())


def loaded(form: str, depth: int) -> dict[str, mlx_mtp.Engine]:
    """An engine for plain decoding, "none", and one a family."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "target"
        stored: dict[str, Any] = {"quantize": True, "q_bits": 4} if form == "4 bits" else {"dtype": form}
        convert(str(EMBEDDED / "target"), str(target), **stored)
        drafters = {name: name.replace("assistant", str(EMBEDDED / "assistant")) for name in FAMILIES}
        drafters |= {name: str(EMBEDDED / name) for name in ("parallel", "sequential")}
        return {name: mlx_mtp.load(target, drafter=drafter, mode="exact", depth=depth if name != "none" else 0)
                for name, drafter in ({"none": None} | drafters).items()}  # fmt: skip


def compare(engines: dict[str, mlx_mtp.Engine], capacity: int, count: int, tokens: int) -> list[dict[str, Any]]:
    """One row a family and turn."""
    plain = engines["none"]
    assert plain.exactness is not None
    way, counts = plain.exactness.at(capacity), defaultdict[tuple[str, str], Counter[str]](Counter)
    for family in FAMILIES:
        probes = engines[family].exactness
        assert probes is not None
        probes.found.setdefault(capacity, way)
    for prompt in prompts_for(capacity, count, tokens):
        said = plain.generate(prompt, max_tokens=tokens, ignore_end=True).tokens
        expected = turns(plain, prompt, said, tokens)
        for family in FAMILIES:
            for turn, one, other in zip(TURNS, expected, turns(engines[family], prompt, said, tokens), strict=True):
                counts[family, turn].update(
                    logprobs=len(one.tokens), differing=differing(one, other), accepted=other.stats.accepted,
                    drafted=other.stats.drafted,
                )  # fmt: skip
    return [{"family": family, "capacity": capacity, "turn": turn, "width": way.width, "depths": way.depths, **found}
            for (family, turn), found in counts.items()]  # fmt: skip


def main() -> None:
    capacities = (256, 512, 1024, 2048, 4608)
    args = common.options(__doc__, prompts=50, tokens=8, depth=3, capacities=capacities, form="float32")
    if wrong := [size for size in args.capacities if capacity_for(size) != size]:
        raise SystemExit(f"No cache has a capacity of {wrong[0]}; take {capacity_for(wrong[0])}.")
    if args.form not in FORMS:
        raise SystemExit(f"--form is one of {', '.join(FORMS)}, not {args.form}.")
    engines, figures = loaded(args.form, args.depth), []
    for capacity in args.capacities:
        began = time.perf_counter()
        found = compare(engines, capacity, args.prompts, args.tokens)
        figures += found
        for row in found:
            print(f"{row['family']:17} {capacity:5} {row['turn']:6}  {row['differing']} of {row['logprobs']} differ, "
                  f"{row['accepted']} of {row['drafted']} drafts accepted")  # fmt: skip
        print(f"{capacity}: depths {found[0]['depths']}, width {found[0]['width']}; "
              f"{time.perf_counter() - began:.0f} s", flush=True)  # fmt: skip
        common.save(args.json, {"form": args.form, "blas": blas.name(), "rows": figures})
    print(f"{sum(row['differing'] for row in figures)} of {sum(row['logprobs'] for row in figures)} logprobs differ")


if __name__ == "__main__":
    main()
