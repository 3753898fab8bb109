"""Speed against stock mlx-lm and mlx-vlm on the same pair, arms interleaved in one run.

    .venv/bin/python benchmarks/speed.py [--model DIR --drafter DIR] [--depths 3,auto] [--json FILE]

1.00 is stock mlx_lm plain decoding of the same weights in the same precision with the same BLAS. Prompts: held-out
code of 200 to 1,000 tokens; with --unfriendly, text the drafter is bad at, and a drafter that is bad at everything,
compared with this engine's depth 0.
mlx-vlm takes part where it is installed (make peers).
"""

from __future__ import annotations

import mlx_mtp  # isort: skip  (before MLX: on Linux it brings the fast BLAS)

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from prompts import held_out_code, unfriendly

from mlx_mtp import blas
from mlx_mtp.benchmark import Arm, Job, Record, engine_arm, interleave, mlx_lm_arm, mlx_vlm_arm, ratio, same_tokens
from mlx_mtp.checkpoint import Checkpoint
from mlx_mtp.drafters import load_drafter
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.results import NEUTRAL

CONTEXTS = (200, 500, 1000)
GEMMA = mlx_mtp.Sampling(temperature=1.0, top_k=64, top_p=0.95)
GREEDY = mlx_mtp.Sampling(temperature=0.0)


def make_arms(args: argparse.Namespace, deepest: int) -> dict[str, Arm]:
    """The arms by name, stock mlx-lm first."""
    target = Path(args.model or EMBEDDED / "target")
    assistant = Path(args.drafter or EMBEDDED / "assistant")
    arms = {"stock mlx-lm": mlx_lm_arm(target)}
    arms["depth 0"] = engine_arm(mlx_mtp.load(args.model, drafter=None))
    for name in args.drafters.split(","):
        drafter = args.drafter if name == "auto" and args.drafter else name
        for depth in args.depths.split(","):
            engine = mlx_mtp.load(args.model, drafter=drafter, depth=depth if depth == "auto" else int(depth))
            arms[f"depth {depth}" if name == "auto" else f"{name}, depth {depth}"] = engine_arm(engine)
    if not args.no_vlm:
        try:
            arms[f"mlx-vlm, depth {deepest}"] = mlx_vlm_arm(target, assistant, deepest)
        except ImportError:
            print("mlx-vlm is not installed (make peers): left out")
    return arms


def random_drafter_arm() -> Arm:
    """The embedded target with an assistant of random weights, which agrees with it by chance only; depth auto."""
    plain, drafter = mlx_mtp.load(drafter=None), load_drafter(Checkpoint.open(EMBEDDED / "assistant"))
    mx.random.seed(0)
    model = drafter.model  # type: ignore[attr-defined]
    model.update(tree_map(lambda weight: 0.05 * mx.random.normal(weight.shape), model.parameters()))
    return engine_arm(mlx_mtp.Engine(plain.target, drafter, plain.tokenizer, depth="auto"))


def report(records: dict[str, Record], base: str, greedy: bool) -> dict[str, Any]:
    """Prints a table and returns it."""
    found: dict[str, Any] = {}
    plain = records["depth 0"]
    for name, record in records.items():
        faster, low, high = ratio(record, records[base])
        row: dict[str, Any] = {
            "tokens_per_second": record.rate, "ratio": faster, "interval": [low, high],
            "peak_megabytes": max(t.peak_bytes for r in record.timings for t in r) / 1e6,
        }  # fmt: skip
        line = f"  {name:28} {record.rate:7.1f} tokens/s  {faster:5.2f} [{low:.2f}, {high:.2f}]"
        if record.acceptance():
            row |= {"tokens_per_round": record.tokens_per_round, "acceptance": record.acceptance()}
            line += f"  {record.tokens_per_round:.2f} a round, " + " ".join(f"{a:.0%}" for a in record.acceptance())
        if greedy:
            differs = same_tokens(record, plain)
            row["same_tokens"] = differs is None
            line += "" if differs is None else f"  (other tokens than depth 0 from prompt {differs})"
        print(line, flush=True)
        found[name] = row
    return found


def main() -> None:
    """Parses options, runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--drafter")
    parser.add_argument("--drafters", default="auto", help="auto, lookup, lookup+auto")
    parser.add_argument("--depths", default="3,auto")
    parser.add_argument("--prompts", type=int, default=4, help="per context length")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contexts", default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--unfriendly", action="store_true")
    parser.add_argument("--no-vlm", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    deepest = max((int(d) for d in args.depths.split(",") if d != "auto"), default=3)
    arms = make_arms(args, deepest)
    engine = mlx_mtp.load(args.model, drafter=None)
    assert engine.tokenizer is not None
    encode = engine.tokenizer.encode
    if args.unfriendly:
        arms["auto, random drafter"] = random_drafter_arm()
        sets = {name: [ids] for name, ids in unfriendly(300, encode, engine.target.info.vocab_size).items()}
    else:
        lengths = [int(n) for n in args.contexts.split(",")]
        sets = {f"code, context {n}": held_out_code(n, args.prompts, encode) for n in lengths}
    about = {
        "machine": platform.processor() or platform.machine(), "device": str(mx.default_device()), "blas": blas.name(),
        "mlx_mtp": mlx_mtp.__version__, "mlx": mx.__version__, "tokens": args.tokens, "repeats": args.repeats,
    }  # fmt: skip
    print(about)
    results: dict[str, Any] = {"about": about}
    for temperature in args.temperatures.split(","):
        sampling = (GREEDY if float(temperature) == 0 else GEMMA).over(NEUTRAL)
        for name, prompts in sets.items():
            print(f"{name}, temperature {temperature}, {len(prompts)} prompts")
            jobs = [Job(prompt, args.tokens, sampling, seed) for seed, prompt in enumerate(prompts)]
            *_, records = interleave(arms, jobs, args.repeats)
            base = "depth 0" if args.unfriendly else "stock mlx-lm"
            results[f"{name}, T = {temperature}"] = report(records, base, sampling.temperature == 0)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
