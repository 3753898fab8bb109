"""Answers by a schema: whether any is invalid, and what holding them costs.

    .venv/bin/python benchmarks/constrained.py documents [--model smollm2] [--count 2000] [--json FILE]
    .venv/bin/python benchmarks/constrained.py speed [--model smollm2] [--json FILE]

documents: so many answers to the schemas of schemas.jsonl, in turn at T = 0, 1 and 2 and depths 1 to 8, checked by the
library jsonschema. speed: tokens a second of one answer, free with drafts, held with drafts and held without, in turns;
and milliseconds that a round's masks take.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema

import mlx_mtp
from mlx_mtp.generation.constraint import Constraint, Grammar

SCHEMAS = [json.loads(line) for line in (Path(__file__).parent / "schemas.jsonl").read_text("utf-8").splitlines()]
ASK = "Answer in JSON, with made-up but sensible values, by this schema: "
REPORT: dict[str, Any] = {
    "type": "object",
    "properties": {"people": {"type": "array", "minItems": 6, "maxItems": 6, "items": {
        "type": "object", "required": ["name", "age", "city", "hobby"], "properties": {
            "name": {"type": "string", "maxLength": 30}, "age": {"type": "integer", "minimum": 1, "maximum": 99},
            "city": {"type": "string", "maxLength": 30}, "hobby": {"type": "string", "maxLength": 60},
        },
    }}},
    "required": ["people"],
}  # fmt: skip


def documents(model: str | None, count: int, most: int) -> dict[str, Any]:
    """How many of `count` answers were complete, how many of these invalid, and how many the length ended."""
    engines = {depth: mlx_mtp.load(model, depth=depth) for depth in (1, 2, 3)}
    deepest = mlx_mtp.load(model, drafter="lookup", depth=8)
    met = Counter[str]()
    for i in range(count):
        schema, temperature = SCHEMAS[i % len(SCHEMAS)], (0.0, 1.0, 2.0)[i // len(SCHEMAS) % 3]
        engine = deepest if i % 4 == 3 else engines[i % 4 + 1]
        result = engine.generate(ASK + json.dumps(schema, ensure_ascii=False), json_schema=schema, seed=i,
                                 temperature=temperature, max_tokens=most)  # fmt: skip
        met["drafted"] += result.stats.drafted
        met["accepted"] += result.stats.accepted
        if result.finish_reason != "stop":
            met["ended by length"] += 1
            continue
        met["complete"] += 1
        try:
            jsonschema.validate(json.loads(result.text), schema)
        except (ValueError, jsonschema.ValidationError) as error:
            met["invalid"] += 1
            print(f"invalid: {result.text!r} for {json.dumps(schema)}: {error}")
        if i % 200 == 199:
            print(i + 1, dict(met), flush=True)
    return {"asked": count, "invalid": 0, **met}


def speed(model: str | None, runs: int, tokens: int) -> dict[str, Any]:
    """Medians of tokens a second, interleaved, and of the ratios that matter."""
    mtp = mlx_mtp.load(model)
    plain = mlx_mtp.Engine(mtp.target, None, mtp.tokenizer, stop_tokens=mtp.stop_tokens, defaults=mtp.defaults)
    prompt = ASK + json.dumps(REPORT)
    kinds: dict[str, tuple[mlx_mtp.Engine, dict[str, Any]]] = {
        "free, with drafts": (mtp, {"ignore_end": True}), "held, with drafts": (mtp, {"json_schema": REPORT}),
        "held, without": (plain, {"json_schema": REPORT}),
    }  # fmt: skip
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    passes: dict[str, float] = {}
    for run in range(runs + 1):
        for kind in (list(kinds) if run % 2 else list(reversed(kinds))):
            engine, options = kinds[kind]
            stats = engine.generate(prompt, max_tokens=tokens, temperature=0, **options).stats
            passes[kind] = stats.tokens_per_round
            if run:  # the first compiles
                found[kind].append(stats.decode_tokens_per_second)
    medians = {kind: statistics.median(rates) for kind, rates in found.items()}
    free, held, without = medians.values()
    return {"tokens_per_second": medians, "tokens_per_round": passes, "held over free": held / free,
            "with over without drafts": held / without, "mask_ms": masks(mtp)}  # fmt: skip


def masks(engine: mlx_mtp.Engine, drafts: int = 3) -> dict[str, float]:
    """Milliseconds of one round's masks along random documents: median and 99th percentile."""
    assert engine.tokenizer is not None
    size, chance, times = engine.target.info.vocab_size, random.Random(1), list[float]()
    table = engine.tokenizer.grammar_table(size, engine.stop_tokens)
    for schema in SCHEMAS:
        constraint = Constraint(Grammar.of(table, size, engine.stop_tokens, "json_schema", schema))
        for _ in range(40):
            row = constraint.masks([])[0]
            allowed = [t for t in range(size) if row[t // 32] >> (t % 32) & 1 and t not in engine.stop_tokens]
            if not allowed:
                break
            token = chance.choice(allowed[:50])
            began = time.perf_counter()
            constraint.masks([token] * drafts)
            times.append(1000 * (time.perf_counter() - began))
            constraint.add([token])
    times.sort()
    return {"median": statistics.median(times), "p99": times[int(0.99 * len(times))], "vocabulary": size}


def main() -> None:
    """One of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["documents", "speed"])
    parser.add_argument("--model")
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.what == "documents":
        found = documents(given.model, given.count, given.max_tokens)
    else:
        found = speed(given.model, given.runs, given.max_tokens)
    print(json.dumps(found, indent=1))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
