r"""Prompts of many kinds, as a target is asked when it writes a drafter's data; JSON lines for `mlx-mtp train --data`.

    .venv/bin/python benchmarks/prompts.py [--count 20000] [--seed 0] [--held-out] > prompts.jsonl
    mlx-mtp train --target smollm2 --family sequential --data prompts.jsonl --tokens 5000000 --inner 1536 \
        --shortlist 12288 --out runs/smollm2

A target that asks itself asks mostly about everyday matters, and a drafter then meets translations, summaries,
questions on a given text and sums for the first time in use. Texts and functions are those of Python's standard
library. Topics, texts, functions and names are divided by a hash of each, so that what is held out shares none of them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import random
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

HELD_OUT = 10  # one in so many of the topics, texts, functions and names
SHORTEST, LONGEST = 150, 620  # characters of a text; functions are shorter

LISTS: dict[str, list[str]] = json.loads(Path(__file__).with_suffix(".json").read_text())


def kept(items: Sequence[str], held_out: bool) -> list[str]:
    """Those of one side."""
    return [item for item in items
            if (int(hashlib.sha256(item.encode()).hexdigest(), 16) % HELD_OUT == 0) == held_out]  # fmt: skip


def library() -> tuple[list[str], list[str]]:
    """Docstrings and short functions of the standard library, in an order that is always the same."""
    texts, functions = set[str](), set[str]()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(file.read_bytes())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                about = ast.get_docstring(node) or ""
                texts |= {about} if SHORTEST < len(about) < LONGEST else set()
            if isinstance(node, ast.FunctionDef) and 60 < len(code := ast.unparse(node)) < LONGEST - SHORTEST:
                functions.add(code)
    return sorted(texts), sorted(functions)


def problem(draw: random.Random, names: Sequence[str]) -> str:
    """A sum, bare or in words."""
    (one, other), (goods, more) = draw.sample(names, 2), draw.sample(LISTS["goods"], 2)
    a, b, c, d = draw.randint(3, 60), draw.randint(2, 30), draw.randint(2, 12), draw.randint(2, 9)
    return draw.choice((
        f"{one} owns {a} {goods} and finds {b} more. How many {goods} does {one} own now?",
        f"{one} packs {c} bags with {b} {goods} each. How many {goods} are that?",
        f"{goods.capitalize()} cost ${d} each and {more} ${c} each. What do {b} {goods} and {d} {more} cost?",
        f"{one} had {a + b} {goods} and gave {other} {b} of them. How many are left?",
        f"{one} earns ${a} an hour and works {d} hours on {c} days. How much is that?",
        f"{one} is {d} years older than {other}, and both together are {2 * b + d}. How old is {other}?",
        f"A car drives {a} miles an hour for {d} hours. How far does it get?", f"What is {a} + {b * 7}?",
        f"What is {a} times {c}?", f"What is {a * c} / {c}?", f"Solve {d}x + {b} = {d * c + b}.",
        f"What is {d * 5}% of {a * 10}?", f"A rectangle is {a} cm long and {b} cm wide. What is its area?",
    ))  # fmt: skip


def prompts(seed: int, held_out: bool) -> Callable[[], str]:
    """A source of prompts, one a call."""
    draw = random.Random(f"{seed} {held_out}")
    texts, functions = (kept(found, held_out) for found in library())
    topics, tasks, things, names = (kept(LISTS[name], held_out) for name in ("topics", "tasks", "things", "names"))

    def ask(about: str, **filled: str) -> str:
        return draw.choice(LISTS[about]).format(**filled)

    def translation() -> str:
        sentences = [each.strip() + "." for each in draw.choice(texts).split(".") if 25 < len(each) < 200]
        text = " ".join(draw.choice(sentences or texts).split())
        return ask("translations", text=text, language=draw.choice(LISTS["languages"]))

    kinds: dict[Callable[[], str], int] = {
        lambda: ask("about topics", it=draw.choice(topics)): 26, lambda: ask("about tasks", it=draw.choice(tasks)): 7,
        lambda: f"{ask('about functions')}\n\n```python\n{draw.choice(functions)}\n```": 13,
        lambda: f"{ask('about texts')}\n\n{draw.choice(texts)}": 26, translation: 11,
        lambda: ask("about things", it=draw.choice(things)): 8, lambda: problem(draw, names): 9,
    }  # fmt: skip
    return lambda: draw.choices(list(kinds), list(kinds.values()))[0]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--held-out", action="store_true", help="prompts that share nothing with the others")
    given = parser.parse_args()
    draw, found = prompts(given.seed, given.held_out), dict[str, None]()
    while len(found) < given.count:
        found[draw()] = None
    for prompt in found:
        print(json.dumps({"prompt": prompt}, ensure_ascii=False))


if __name__ == "__main__":
    main()
