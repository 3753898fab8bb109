"""Exact mode: greedy output with drafts against without, bit for bit, on tiny models of every precision.

    .venv/bin/python benchmarks/exact.py [--prompts 50] [--tokens 300] [--json FILE]

For each precision the embedded target is stored anew (float32, float16, bfloat16, 4-bit affine), loaded in mode
exact with and without its assistant, and both continue the same random prompts.
"""

from __future__ import annotations

import mlx_mtp  # isort: skip  (before MLX: on Linux it brings the fast BLAS)

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.loading import EMBEDDED

FORMS = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16, "4 bits": None}


def stored(form: str, folder: Path) -> Path:
    """The embedded target in another precision."""
    shutil.copytree(EMBEDDED / "target", folder)
    weights = dict(mx.load(str(folder / "model.safetensors")))  # type: ignore[arg-type]
    dtype, found = FORMS[form], {}
    for name, weight in weights.items():
        if dtype is not None:
            found[name] = weight.astype(dtype)
        elif weight.ndim == 2 and weight.shape[-1] % 64 == 0:
            parts = mx.quantize(weight.astype(mx.float32), group_size=64, bits=4)
            names = [name, name.replace(".weight", ".scales"), name.replace(".weight", ".biases")]
            found |= dict(zip(names, parts, strict=True))
        else:
            found[name] = weight
    mx.eval(found)
    if dtype is None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization": {"group_size": 64, "bits": 4}}))
    mx.save_safetensors(str(folder / "model.safetensors"), found, {"format": "pt"})
    return folder


def main() -> None:
    """Parses options, runs, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    figures: dict[str, Any] = {}
    for form in FORMS:
        with tempfile.TemporaryDirectory() as folder:
            target = stored(form, Path(folder) / "target")
            plain = mlx_mtp.load(target, drafter=None, mode="exact")
            drafted = mlx_mtp.load(target, drafter=EMBEDDED / "assistant", depth=args.depth, mode="exact")
        prompts = np.random.default_rng(0).integers(6, 4096, (args.prompts, 24)).tolist()
        equal, rounds, tokens = 0, 0, 0
        for prompt in prompts:
            one, other = (e.generate(prompt, max_tokens=args.tokens, ignore_end=True) for e in (plain, drafted))
            equal += one.tokens == other.tokens
            rounds, tokens = rounds + other.stats.rounds, tokens + other.stats.tokens
        way = drafted.exactness
        figures[form] = {"equal": equal, "prompts": args.prompts, "tokens_per_round": tokens / rounds,
                         "depths": way and way.depths, "width": way and way.width}  # fmt: skip
        print(form, figures[form], flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
