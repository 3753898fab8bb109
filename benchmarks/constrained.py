"""Answers by a schema: whether any is invalid, and what holding them costs.

    .venv/bin/python benchmarks/constrained.py documents [--model smollm2] [--start 0] [--count 2000] [--json FILE]
    .venv/bin/python benchmarks/constrained.py speed [--model smollm2] [--drafter lookup+auto] [--json FILE]
    .venv/bin/python benchmarks/constrained.py masks --model FOLDER [--json FILE]

documents: so many answers to the schemas of schemas.jsonl, in turn at T = 0, 1 and 2 and depths 1 to 8, checked by the
library jsonschema; answer n is the same wherever a run starts, so that many can be made in parts, which --json adds up
by model. speed: tokens a second of answers that the model also writes where nothing holds it, so that the text is the
same: free with drafts, held with drafts and held without, in turns. masks: milliseconds that a round's masks take, for
a folder's tokenizer; no model runs.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import common
import jsonschema

import mlx_mtp
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.generation.constraint import Constraint, Grammar
from mlx_mtp.text.tokenizer import Tokenizer

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

DOCUMENT = {"people": [{"name": f"Ada Lindqvist {i}", "age": 31 + i, "city": "Göteborg am See",
                        "hobby": 'restoring old radios; "hiking" in naïve places'} for i in range(6)]}  # fmt: skip
REPEATS = 20  # readings of the document


def documents(model: str | None, start: int, count: int, most: int) -> dict[str, Any]:
    """How many of `count` answers were complete, how many of these invalid, and how many the length ended."""
    engines = {depth: mlx_mtp.load(model, depth=depth) for depth in (1, 2, 3)}
    deepest = mlx_mtp.load(model, drafter="lookup", depth=8)
    met = Counter[str]()
    for i in range(start, start + count):
        schema, temperature = SCHEMAS[i % len(SCHEMAS)], (0.0, 1.0, 2.0)[i // len(SCHEMAS) % 3]
        engine = deepest if i % 4 == 3 else engines[i % 4 + 1]
        result = engine.generate(ASK + json.dumps(schema, ensure_ascii=False), json_schema=schema, seed=i,
                                 temperature=temperature, max_tokens=most)  # fmt: skip
        met["drafted"] += result.stats.drafted
        met["accepted"] += result.stats.accepted
        met["complete" if result.finish_reason == "stop" else "ended by length"] += 1
        if result.finish_reason == "stop" and (error := wrong(result.text, schema)):
            met["invalid"] += 1
            print(f"invalid: {result.text!r} for {json.dumps(schema)}: {error}")
        if i % 200 == 199:
            print(i + 1, dict(met), flush=True)
    return {"asked": count, **met}


def wrong(text: str, schema: dict[str, Any]) -> Exception | None:
    """What is wrong with a document, by an independent library."""
    try:
        jsonschema.validate(json.loads(text), schema)
    except (ValueError, jsonschema.ValidationError) as error:
        return error
    return None


PEOPLE = [("Ann", "Oslo", 34, "rowing"), ("Bo", "Turku", 51, "chess"), ("Cleo", "Nice", 28, "pottery"),
          ("Dag", "Bergen", 45, "skiing"), ("Eva", "Graz", 39, "running"), ("Finn", "Cork", 62, "fishing")]  # fmt: skip
TOLD, SHORT = 2, 3  # people of the example, and the first one of a short question
LIST = {"type": "array", "items": {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "city", "hobby"],
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"},
                   "hobby": {"type": "string"}},
}}  # fmt: skip


def tasks() -> dict[str, list[dict[str, str]]]:
    """Chats with one example of what is asked, after which a small model answers in JSON by itself."""

    def listed(people: Any, city: str | None = None) -> str:
        return json.dumps([{"name": name, "age": age, "city": city or home, "hobby": hobby}
                           for name, home, age, hobby in people])  # fmt: skip

    def text(people: Any) -> str:
        return "Write as JSON: " + " ".join(
            f"{name} is {age} years old, lives in {city} and likes {hobby}." for name, city, age, hobby in people
        )

    def chat(*said: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}
                for role, content in zip(("user", "assistant", "user"), said, strict=True)]  # fmt: skip

    known, asked = PEOPLE[:TOLD], PEOPLE[TOLD:]
    return {
        "from a text": chat(text(known), listed(known), text(asked)),
        "from a short text": chat(text(known), listed(known), text(PEOPLE[SHORT:])),
        "an edit": chat(f"Change the city of all to Rome: {listed(known)}", listed(known, "Rome"),
                        f"Change the city of all to Paris: {listed(asked)}"),
        "invented": chat("Invent 4 people as JSON.", listed(PEOPLE[:4]), "Invent 4 other people as JSON."),
    }  # fmt: skip


def speed(model: str | None, drafter: str, runs: int, most: int) -> dict[str, Any]:
    """Of every task medians of tokens a second, interleaved; means of the ratios where the text is the same."""
    mtp = mlx_mtp.load(model, drafter=drafter)
    plain = mlx_mtp.Engine(mtp.target, None, mtp.tokenizer, stop_tokens=mtp.stop_tokens, defaults=mtp.defaults)
    kinds: dict[str, tuple[mlx_mtp.Engine, dict[str, Any]]] = {
        "free": (mtp, {}), "held": (mtp, {"json_schema": LIST}), "held plainly": (plain, {"json_schema": LIST})
    }  # fmt: skip
    rows: dict[str, dict[str, Any]] = {}
    for task, chat in tasks().items():
        rates, results = {kind: list[float]() for kind in kinds}, dict[str, mlx_mtp.Result]()
        for run in range(runs + 1):
            for kind in list(kinds) if run % 2 else list(reversed(kinds)):
                engine, options = kinds[kind]
                results[kind] = engine.generate(chat, max_tokens=most, temperature=0, **options)
                if run:  # the first compiles
                    rates[kind].append(results[kind].stats.decode_tokens_per_second)
        free, held, without = (statistics.median(each) for each in rates.values())
        rows[task] = {
            "tokens": results["held"].stats.tokens, "same text": len({result.text for result in results.values()}) == 1,
            "tokens_per_second": dict(zip(kinds, (free, held, without), strict=True)),
            "tokens_per_round": {kind: result.stats.tokens_per_round for kind, result in results.items()},
            "held over free": held / free, "held over held plainly": held / without,
        }  # fmt: skip
        print(task, rows[task], flush=True)
    alike = [row for row in rows.values() if row["same text"]]
    means = {name: statistics.geometric_mean(row[name] for row in alike)
             for name in ("held over free", "held over held plainly")}  # fmt: skip
    assert mtp.target.path is not None
    return {"tasks": rows, **means, "mask_ms": masks(mtp.target.path)}


def masks(folder: Path) -> dict[str, Any]:
    """Milliseconds that one round's masks take the thread that makes them, along a document whose drafts are all right,
    so that none is spared: median and 99th percentile by depth. Of a model only the tokenizer is used."""
    checkpoint, tokenizer = Checkpoint.open(folder), Tokenizer.load(folder)
    assert tokenizer is not None
    stops, size = checkpoint.config["eos_token_id"], checkpoint.config["vocab_size"]
    stops = stops if isinstance(stops, list) else [stops]
    began = time.perf_counter()
    table = tokenizer.grammar_table(size, stops)
    found: dict[str, Any] = {"vocabulary": size, "table_seconds": time.perf_counter() - began, "rounds": {}}
    grammar = Grammar.of(table, size, stops, "json_schema", REPORT)
    tokens = tokenizer.encode(json.dumps(DOCUMENT, ensure_ascii=False), special=False)
    for depth in (1, 3, 8):
        times = list[float]()
        for _ in range(REPEATS):
            constraint = Constraint(grammar)
            for at in range(0, len(tokens), depth + 1):
                now = time.thread_time()  # not the clock: what other programs take is not the masks'
                constraint.masks(tokens[at : at + depth])
                times.append(1000 * (time.thread_time() - now))
                constraint.add(tokens[at : at + depth + 1])
        times.sort()
        found["rounds"][depth] = {"median": statistics.median(times), "p99": times[int(0.99 * len(times))]}
    return found


def main() -> None:
    args = common.options(__doc__, what=["documents", "speed", "masks"], model=str, drafter="auto", start=0,
                          count=2000, max_tokens=300, runs=5)  # fmt: skip
    if args.what == "documents":
        found = documents(args.model, args.start, args.count, args.max_tokens)
        before = json.loads(args.json.read_text("utf-8")) if args.json and args.json.exists() else {}
        name = args.model or "embedded"
        found = {**before, name: dict(Counter(before.get(name, {}) if args.start else {}) + Counter(found))}
    elif args.what == "masks":
        found = masks(Path(args.model))
    else:
        found = speed(args.model, args.drafter, args.runs, args.max_tokens)
    print(json.dumps(found, indent=1))
    common.save(args.json, found)


if __name__ == "__main__":
    main()
