"""One prompt decoded and timed by this engine, by stock mlx-lm and by mlx-vlm: the same weights, the same precision.

Stop tokens are ignored, and a run is timed from its first token to its last: (N - 1) / (t_N - t_1).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_mtp.checkpoints.unpacking import unpack
from mlx_mtp.engine import Engine
from mlx_mtp.generation.types import NEUTRAL, Sampling, Stats

# Between the seeds of one job's turns, far enough apart that jobs numbered 0, 1, 2, ... share none.
SEED_STEP = 100_003


@dataclass(frozen=True)
class DecodeJob:
    """One prompt to decode: token ids, how many new tokens, how they are drawn."""

    prompt: Sequence[int]
    tokens: int
    sampling: Sampling = NEUTRAL
    seed: int = 0

    def of_turn(self, turn: int) -> DecodeJob:
        """The same with this turn's seed: where tokens are drawn, no single text decides."""
        return replace(self, seed=self.seed + turn * SEED_STEP)


@dataclass(frozen=True)
class TimedRun:
    """One decoding: the tokens, seconds from the first to the last, bytes at the peak, this engine's statistics.

    first_seconds: from the request to the first token. joules: of the whole run, None where nobody measured them.
    held_bytes: in use before the run, the weights of all configurations among them; 0 where nobody looked.
    """

    tokens: list[int]
    seconds: float
    peak_bytes: int = 0
    stats: Stats | None = None
    first_seconds: float = 0.0
    joules: float | None = None
    held_bytes: int = 0

    @property
    def seconds_per_token(self) -> float:
        """(t_N - t_1) / (N - 1)."""
        return self.seconds / (len(self.tokens) - 1)


Decode = Callable[[DecodeJob], TimedRun]


def with_engine(engine: Engine) -> Decode:
    """This engine as it was loaded."""

    def run(job: DecodeJob) -> TimedRun:
        # No seed with depth auto: it would fix the depth.
        seed = None if engine.depth == "auto" else job.seed
        result = engine.generate(job.prompt, max_tokens=job.tokens, sampling=job.sampling, seed=seed, ignore_end=True)
        stats = result.stats
        return TimedRun(result.tokens, stats.decode_seconds, stats.peak_memory_bytes, stats, stats.prefill_seconds)

    return run


def with_mlx_lm(folder: Path) -> Decode:
    """mlx-lm's own plain loop."""
    from mlx_lm.generate import generate_step, generation_stream
    from mlx_lm.sample_utils import make_logits_processors, make_sampler

    model = mlx_lm_model(folder)

    def run(job: DecodeJob) -> TimedRun:
        s = job.sampling
        sampler = make_sampler(s.temperature or 0.0, s.top_p or 1.0, s.min_p or 0.0, top_k=s.top_k or 0)
        # A penalty is over everything so far, as this engine takes it.
        penalty = None if s.repetition_penalty == 1.0 else s.repetition_penalty
        processors = make_logits_processors(None, penalty, len(job.prompt) + job.tokens)
        mx.random.seed(job.seed)
        steps = generate_step(
            mx.array(list(job.prompt)), model, max_tokens=job.tokens, sampler=sampler, logits_processors=processors
        )
        return _timed(steps, generation_stream)

    return run


def mlx_lm_model(folder: Path) -> Any:
    """mlx-lm's own model of a checkpoint."""
    from mlx_lm.utils import load_model

    return _as_here(load_model(folder)[0])


def _as_here(model: Any) -> Any:
    """In float32 on a CPU, unpacked where this engine unpacks: as this engine computes there."""
    if mx.default_device() == mx.Device(mx.cpu):
        model.set_dtype(mx.float32)
        unpack(model)
    return model


def with_mlx_vlm(target: Path, assistant: Path | None, depth: int) -> Decode:
    """mlx-vlm's MTP (or, without an assistant, plain) of a Gemma 4 pair; raises ImportError without mlx-vlm."""
    from mlx_vlm.generate.ar import generate_step, generation_stream
    from mlx_vlm.speculative.drafters import load_drafter

    model, extra = _as_here(_mlx_vlm_model(target)), {}
    if assistant:
        drafter, kind = load_drafter(str(assistant))
        extra = {"draft_model": _as_here(drafter), "draft_kind": kind, "draft_block_size": depth + 1}

    def run(job: DecodeJob) -> TimedRun:
        s = job.sampling
        mx.random.seed(job.seed)
        steps = generate_step(
            mx.array([job.prompt]), model, None, None, max_tokens=job.tokens, temperature=s.temperature,
            top_k=s.top_k, top_p=s.top_p, min_p=s.min_p, **extra,
        )  # fmt: skip
        return _timed(steps, generation_stream)

    return run


def _mlx_vlm_model(target: Path) -> Any:
    """mlx-vlm always builds a vision tower: a checkpoint without one gets a tiny one that is never run."""
    from mlx_vlm.utils import load_model

    config = json.loads((target / "config.json").read_text())
    if config.get("vision_config"):
        return load_model(target, strict=False)
    tiny = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    tiny |= dict.fromkeys(("hidden_size", "intermediate_size", "head_dim"), 32)
    with tempfile.TemporaryDirectory() as folder:
        for file in target.glob("*.safetensors*"):
            (Path(folder) / file.name).symlink_to(file.resolve())
        config["vision_config"] = {"model_type": "gemma4_vision", **tiny}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return load_model(Path(folder), strict=False)


def _timed(steps: Iterable[tuple[Any, Any]], stream: Any) -> TimedRun:
    """Another engine's tokens; what it has submitted beyond its last is waited for untimed, so that no other pays."""
    mx.reset_peak_memory()
    found, first, began = [], 0.0, time.perf_counter()
    for token, _ in steps:
        found.append(int(token))
        first = first or time.perf_counter()
    seconds = time.perf_counter() - first
    mx.synchronize(stream)
    return TimedRun(found, seconds, mx.get_peak_memory(), None, first - began)
