"""What the benchmarks share: options, results, turns, and prompts: held-out modules of the standard library, and texts
the drafter was not made for. To be imported before MLX."""

from __future__ import annotations

import mlx_mtp  # isort: skip  # noqa: F401  (before MLX: on Linux it brings the fast BLAS)

import argparse
import json
import random
import statistics
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from embedded.corpus import is_held_out, modules_and_questions

from mlx_mtp.generation.interfaces import Target
from mlx_mtp.measuring.engines import Decode, DecodeJob, mlx_lm_model
from mlx_mtp.measuring.turns import Difference, Runs, difference, fair_turns
from mlx_mtp.training.trainer import Returned, Stage, followed

CHARACTERS_APART = 4000
Encode = Callable[[str], list[int]]

SPANISH = (
    "La primavera llegó tarde aquel año, y los almendros del valle no abrieron sus flores hasta bien entrado abril. "
    "Los viejos decían que era señal de buena cosecha, pero nadie lo creía del todo. "
)
GERMAN = (
    "Der Zug hielt auf freier Strecke, und niemand wusste, weshalb. Draußen lag das Land unter einer dünnen Schicht "
    "Reif, und ein einzelner Vogel zog seine Kreise über den Feldern. "
)


def options(doc: str | None, **defaults: Any) -> argparse.Namespace:
    """The command line of a benchmark: an option for every default, and --json FILE.

    A default is a value, a tuple for several numbers or some of these words, or a type where there is none; a list
    holds the choices of a positional word.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {**defaults, "json": Path}.items():
        option = "--" + name.replace("_", "-")
        if isinstance(default, list):
            parser.add_argument(name, choices=default)
        elif isinstance(default, type):
            parser.add_argument(option, type=default)
        elif isinstance(default, tuple):
            kind, *_ = *map(type, default), str
            words = default if default and kind is str else None
            parser.add_argument(option, nargs="*", type=kind, default=default, choices=words)
        else:
            parser.add_argument(option, type=type(default), default=default)
    return parser.parse_args()


def save(file: Path | None, found: Any) -> None:
    """Writes results as JSON where --json asked for it."""
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=2) + "\n")


def line(row: dict[str, float]) -> str:
    """'build milliseconds 1.23, ...'."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items())


def interleave(
    decoders: Mapping[str, Decode], jobs: Sequence[DecodeJob], repeats: int, pause: float = 0.0
) -> Iterator[dict[str, Runs]]:
    """Takes turns with every job, once untimed first: kernels are built, files are read; yields all runs so far."""
    found = {name: Runs() for name in decoders}
    for job in jobs:
        for name, decode in decoders.items():
            decode(job)
            found[name].by_job.append([])
        for turn, name in fair_turns(decoders, repeats, pause):
            found[name].by_job[-1].append(decoders[name](job.of_turn(turn)))
        yield found


def rate(runs: Runs) -> float:
    """Tokens per second over all jobs: each job's tokens over its median time."""
    seconds = [statistics.median(run.seconds for run in turns) for turns in runs.by_job]
    return sum(len(turns[0].tokens) - 1 for turns in runs.by_job) / sum(seconds)


def relative_speed(runs: Runs, base: Runs) -> dict[str, Any]:
    """Tokens per second, and how much faster than the base."""
    faster, low, high = runs.ratio(base)
    return {"tokens_per_second": rate(runs), "ratio": faster, "interval": [low, high]}


def first_difference(target: Target, jobs: Sequence[DecodeJob], expected: Runs, found: Runs) -> Difference | None:
    """Of greedy outputs, over all jobs."""
    pairs = zip(jobs, expected.by_job, found.by_job, strict=True)
    return next(filter(None, (difference(target, job, *pair) for job, *pair in pairs)), None)


def told(stages: Generator[Stage, None, Returned]) -> Returned:
    """Runs a training to its end, prints every 20th step, and returns what it returns."""

    def tell(stage: Stage) -> None:
        if stage.step % 20 == 0 or stage.step == stage.steps:
            loss = f", loss {stage.figures['loss']:.3f}" if stage.figures else ""
            print(f"{stage.name}: {stage.step} of {stage.steps}{loss}", flush=True)

    return followed(stages, tell)


def mlx_lm_step(folder: Path, prompt: Sequence[int]) -> Callable[[], Any]:
    """One plain step of mlx-lm after a prompt, to be evaluated: token and cache."""
    from mlx_lm.models.cache import make_prompt_cache

    model = mlx_lm_model(folder)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([list(prompt)]), cache=cache)[:, -1:])
    token = mx.array([[prompt[-1]]])
    return lambda: (mx.argmax(model(token, cache=cache)[:, -1], axis=-1), [layer.state for layer in cache])


def held_out_code(tokens: int, most: int, encode: Encode) -> list[list[int]]:
    """The beginnings of held-out source files and every 4000 characters, `tokens` tokens each, evenly chosen."""
    found: list[list[int]] = []
    for text in (d.text for d in modules_and_questions() if is_held_out(d.module) and d.text):
        for start in range(0, max(1, len(text) - 6 * tokens), CHARACTERS_APART):
            ids = encode(text[start : start + 8 * tokens])[:tokens]
            if len(ids) == tokens:
                found.append(ids)
    return found[:: max(1, len(found) // most)][:most]


def held_out_chat(most: int) -> list[list[dict[str, str]]]:
    """Questions about held-out modules."""
    found = [d.messages[:1] for d in modules_and_questions() if is_held_out(d.module) and d.messages]
    return found[:: max(1, len(found) // most)][:most]


def unfriendly(tokens: int, encode: Encode, vocabulary: int) -> dict[str, list[int]]:
    """Prompts that a drafter trained on Python is bad at: shuffled words, other languages, random bytes, random ids."""
    chance = random.Random(0)
    words = " ".join(d.text or "" for d in modules_and_questions() if d.module == "textwrap").split()
    chance.shuffle(words)
    texts = {
        "shuffled words": " ".join(words),
        "Spanish": SPANISH * 20,
        "German": GERMAN * 20,
        "random bytes": "".join(chr(chance.randrange(33, 383)) for _ in range(4 * tokens)),
    }
    found = {name: encode(text)[:tokens] for name, text in texts.items()}
    found["random ids"] = [chance.randrange(6, vocabulary) for _ in range(tokens)]
    return found
