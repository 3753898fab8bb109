"""Arms and fair turns: the same prompts through this engine, stock mlx-lm and mlx-vlm, interleaved in one run.

What it does: runs one prompt through one engine and times its decoding; orders the runs; sums them up; finds where
outputs part. What it does not do: choose prompts or print. What `mlx-mtp bench` makes of it is in benchmarking/.

Every arm decodes the same weights in the same precision, with ending tokens ignored, and is timed from its first
token to its last: (N - 1) / (t_N - t_1). Speeds are only ever compared within a run.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import numpy as np

from mlx_mtp.checkpoints.checkpoint import Checkpoint, section, visible
from mlx_mtp.engine import Engine
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.generation.types import NEUTRAL, Sampling, Stats, acceptance

# Between the seeds of one job's repeats, far enough apart that jobs numbered 0, 1, 2, ... share none.
SEED_STEP = 100_003
RESAMPLES = 400


@dataclass(frozen=True)
class Job:
    """One prompt to decode: token ids, how many new tokens, how they are drawn."""

    prompt: Sequence[int]
    tokens: int
    sampling: Sampling = NEUTRAL
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """One decoding: the tokens, seconds from the first to the last, bytes at the peak, this engine's statistics.

    first_seconds: from the request to the first token. joules: of the whole run, None where nobody measured them.
    held_bytes: in use before the run, the weights of all arms among them; 0 where nobody looked.
    """

    tokens: list[int]
    seconds: float
    peak_bytes: int
    stats: Stats | None = None
    first_seconds: float = 0.0
    joules: float | None = None
    held_bytes: int = 0

    @property
    def tokens_per_second(self) -> float:
        """(N - 1) / (t_N - t_1)."""
        return (len(self.tokens) - 1) / self.seconds


Arm = Callable[[Job], Timing]
Found = TypeVar("Found")


def engine_arm(engine: Engine) -> Arm:
    """This engine as it was loaded."""

    def run(job: Job) -> Timing:
        # No seed with depth auto: it would fix the depth.
        seed = None if engine.depth == "auto" else job.seed
        result = engine.generate(
            job.prompt, max_tokens=job.tokens, sampling=job.sampling, seed=seed, ignore_end=True
        )
        stats = result.stats
        return Timing(
            result.tokens, stats.decode_seconds, stats.peak_memory_bytes, stats, stats.prefill_seconds
        )  # fmt: skip

    return run


def mlx_lm_arm(folder: Path) -> Arm:
    """mlx-lm's own plain loop; in float32 on a CPU, as this engine computes there."""
    from mlx_lm.generate import generate_step, generation_stream
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    model = _mlx_lm_model(folder)

    def run(job: Job) -> Timing:
        s = job.sampling
        sampler = make_sampler(s.temperature or 0.0, s.top_p or 1.0, s.min_p or 0.0, top_k=s.top_k or 0)
        processors = None
        if s.repetition_penalty not in (None, 1.0):  # over everything so far, as this engine takes it
            everything = len(job.prompt) + job.tokens
            processors = make_logits_processors(None, s.repetition_penalty, everything)
        mx.random.seed(job.seed)
        steps = generate_step(
            mx.array(list(job.prompt)), model, max_tokens=job.tokens, sampler=sampler, logits_processors=processors
        )
        return _timed((int(token) for token, _ in steps), lambda: mx.synchronize(generation_stream))

    return run


def mlx_lm_step(folder: Path, prompt: Sequence[int]) -> Callable[[], Any]:
    """One plain step of mlx-lm behind a prompt, to be evaluated: token and cache."""
    from mlx_lm.models.cache import make_prompt_cache

    model = _mlx_lm_model(folder)
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([list(prompt)]), cache=cache)[:, -1:])
    token = mx.array([[prompt[-1]]])
    return lambda: (mx.argmax(model(token, cache=cache)[:, -1], axis=-1), [layer.state for layer in cache])


def _mlx_lm_model(folder: Path) -> Any:
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
    return model


def mlx_vlm_arm(target: Path, assistant: Path | None, depth: int) -> Arm:
    """mlx-vlm's MTP (or, without an assistant, plain) decoding of a Gemma 4 pair; raises ImportError without mlx-vlm.

    mlx-vlm always builds a vision tower: a checkpoint without one gets a tiny one that is never run.
    """
    from mlx_vlm.generate.ar import generate_step, generation_stream
    from mlx_vlm.models import gemma4
    from mlx_vlm.speculative.drafters import load_drafter

    checkpoint = Checkpoint.open(target)
    config: dict[str, Any] = json.loads(json.dumps(dict(checkpoint.config)))
    tiny = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    tiny |= dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 32)
    parsed = gemma4.ModelConfig.from_dict(config)
    parsed.text_config = gemma4.TextConfig.from_dict(section(config, "text_config"))
    parsed.vision_config = gemma4.VisionConfig.from_dict({"model_type": "gemma4_vision", **tiny})
    model = gemma4.Model(parsed)
    weights: dict[str, mx.array] = {}
    for file in visible(target.glob("*.safetensors")):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    weights = model.sanitize(weights)
    if stored := config.get("quantization"):
        _quantised_like(model, weights, stored)
    model.load_weights(list(weights.items()), strict=False)
    drafter, kind = load_drafter(str(assistant)) if assistant else (None, "mtp")
    if mx.default_device() == mx.Device(mx.cpu):
        for module in filter(None, (model, drafter)):
            module.set_dtype(mx.float32)
    extra: dict[str, Any] = {}
    if drafter:
        extra = {"draft_model": drafter, "draft_kind": kind, "draft_block_size": depth + 1}

    def run(job: Job) -> Timing:
        s = job.sampling
        mx.random.seed(job.seed)
        steps = generate_step(
            mx.array([job.prompt]), model, None, None, max_tokens=job.tokens, temperature=s.temperature,
            top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, **extra,
        )  # fmt: skip
        return _timed((int(token) for token, _ in steps), lambda: mx.synchronize(generation_stream))

    return run


def _quantised_like(model: Any, weights: Mapping[str, mx.array], stored: Mapping[str, Any]) -> None:
    """Gives the model quantised layers where the weights have scales; stored: "quantization" of a config.json."""
    from mlx import nn

    def kind(path: str, module: Any) -> bool | dict[str, Any]:
        own = stored.get(path)
        return own if isinstance(own, dict) else hasattr(module, "to_quantized") and f"{path}.scales" in weights

    whole = {name: stored[name] for name in ("group_size", "bits", "mode") if name in stored}
    nn.quantize(model, class_predicate=kind, **whole)


def _timed(tokens: Iterable[int], settle: Callable[[], None]) -> Timing:
    """settle: waits for what the engine has submitted beyond its last token, untimed, so that no other arm pays."""
    mx.reset_peak_memory()
    found, first, began = [], 0.0, time.perf_counter()
    for token in tokens:
        found.append(token)
        first = first or time.perf_counter()
    seconds = time.perf_counter() - first
    settle()
    return Timing(found, seconds, mx.get_peak_memory(), None, first - began)


@dataclass
class Record:
    """All timings of one arm, in the order of the jobs: timings[job][repeat]."""

    timings: list[list[Timing]] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Tokens per second over all jobs: each job's tokens over its median time."""
        seconds = [statistics.median(t.seconds for t in repeats) for repeats in self.timings]
        return sum(len(repeats[0].tokens) - 1 for repeats in self.timings) / sum(seconds)

    @property
    def tokens_per_round(self) -> float:
        """Emitted tokens behind the first over passes of the target."""
        stats = [t.stats for repeats in self.timings for t in repeats if t.stats]
        return sum(s.tokens - 1 for s in stats) / max(1, sum(s.rounds for s in stats))

    def acceptance(self) -> list[float]:
        """Share of the drafts at each position that stood once those before them did."""
        return acceptance(t.stats for repeats in self.timings for t in repeats if t.stats)


def take_turns(
    arms: Mapping[str, Callable[[Job], Found]], job: Job, repeats: int, warm: bool = True,
    pause: Callable[[], None] = lambda: None,
) -> Iterator[tuple[str, Found]]:  # fmt: skip
    """Runs a job `repeats` times through every arm, in the order A B C, C B A, ...; yields what each run gave.

    pause: called before every turn, for chips that must cool down. Every arm first runs the job once without being
    booked: kernels are built, files are read. Where the sampling is not greedy each repeat has a seed of its own, so
    that no single text decides.
    """
    if warm:
        for arm in arms.values():
            arm(job)
    for turn in range(repeats):
        pause()
        for name in list(arms) if turn % 2 == 0 else list(arms)[::-1]:
            yield name, arms[name](replace(job, seed=job.seed + turn * SEED_STEP))


def interleave(
    arms: Mapping[str, Arm], jobs: Sequence[Job], repeats: int, warm: bool = True
) -> Iterator[dict[str, Record]]:
    """Takes turns with every job; yields all timings so far after each of them."""
    records = {name: Record() for name in arms}
    for job in jobs:
        for record in records.values():
            record.timings.append([])
        for name, timing in take_turns(arms, job, repeats, warm):
            records[name].timings[-1].append(timing)
        yield records


def speed_up(arm: Record, base: Record) -> float:
    """How much faster `arm` is than `base`.

    Of a job the median over its turns of base over arm counts, since the runs of one turn met the same machine. All
    jobs together: seconds a token of the base, each the median of the turns, over what the arm would take for them.
    """
    return _speed_up(_paired(arm, base))


def ratio(arm: Record, base: Record) -> tuple[float, float, float]:
    """The speed-up and a 95 % interval by bootstrap over the jobs and turns."""
    seconds, chance = _paired(arm, base), np.random.default_rng(0)

    def drawn() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for job in chance.integers(len(seconds), size=len(seconds)):
            theirs, mine = seconds[job]
            turns = chance.integers(len(mine), size=len(mine))
            yield theirs[turns], mine[turns]

    low, high = np.quantile([_speed_up(drawn()) for _ in range(RESAMPLES)], (0.025, 0.975))
    return _speed_up(seconds), float(low), float(high)


def _paired(arm: Record, base: Record) -> list[tuple[np.ndarray, np.ndarray]]:
    """Seconds a token of the base and of the arm, by job; each an array over the turns."""
    jobs = zip(base.timings, arm.timings, strict=True)
    return [(_seconds_per_token(theirs), _seconds_per_token(mine)) for theirs, mine in jobs]


def _speed_up(seconds: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    medians = np.array([(np.median(theirs), np.median(theirs / mine)) for theirs, mine in seconds])
    return float(medians[:, 0].sum() / (medians[:, 0] / medians[:, 1]).sum())


def _seconds_per_token(repeats: Sequence[Timing]) -> np.ndarray:
    return np.array([timing.seconds / (len(timing.tokens) - 1) for timing in repeats])


@dataclass(frozen=True)
class Difference:
    """Where an arm's greedy output first parts from the reference's.

    job, token: indices. gap: the reference's logit of its own token less that of the other's; near-ties are rounding.
    NaN where the logits are no measure: penalties or a bias stand between them and the choice.
    """

    job: int
    token: int
    gap: float

    def __str__(self) -> str:
        gap = "" if np.isnan(self.gap) else f", the two tokens' logits {self.gap:.1e} apart"
        return f"parts at token {self.token + 1}{gap}"


def differences(target: Target, jobs: Sequence[Job], expected: Record, found: Record) -> list[Difference]:
    """The first difference of every job whose greedy tokens differ in any repeat; empty = identical output."""
    parted = []
    for at, (job, one, other) in enumerate(zip(jobs, expected.timings, found.timings, strict=True)):
        reference = one[0].tokens
        for tokens in (timing.tokens for timing in other):
            first = next((i for i, (a, b) in enumerate(zip(reference, tokens, strict=False)) if a != b), None)
            if first is not None:
                before = [*job.prompt, *reference[:first]]
                gap = _logit_gap(target, before, reference[first], tokens[first]) if _is_neutral(job) else float("nan")
                parted.append(Difference(at, first, gap))
                break
    return parted


def _is_neutral(job: Job) -> bool:
    names = ("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias")
    return all(getattr(job.sampling, name) in (None, getattr(NEUTRAL, name)) for name in names)


def _logit_gap(target: Target, before: list[int], mine: int, theirs: int) -> float:
    """Of two tokens behind these; the head is run on the last row only, since a vocabulary can be large."""
    try:
        cache = target.new_cache(len(before))
        logits = target.head(target.forward(mx.array([before]), cache, 1).hidden)[0, -1]
        return float(np.array(logits[mine] - logits[theirs]))
    except RuntimeError:  # as MLX says that memory is short: no reason to lose what was measured
        return float("nan")
