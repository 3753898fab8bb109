"""What callers hand in means what it says, or is refused in a sentence before anything runs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_mtp
from mlx_mtp import MLXMTPError, OptionError, PromptError, Sampling
from mlx_mtp.engine import Engine
from mlx_mtp.generation.sampling import SamplingSpec
from mlx_mtp.generation.types import NEUTRAL
from mlx_mtp.testing import MarkovDrafter, MarkovTarget

VOCABULARY = 7
TARGET = GOLDEN / "ple" / "target"


@pytest.fixture(scope="module")
def engine() -> Engine:
    """A tiny target and drafter, no tokenizer, that fail the test if anything runs."""
    table = mx.random.normal((VOCABULARY, VOCABULARY), key=mx.random.key(3))
    return Engine(MarkovTarget(table), MarkovDrafter(table), None, depth=2)


BAD_SAMPLING: list[dict[str, Any]] = [
    *({"top_k": bad} for bad in (40.0, -1, True, "4", math.inf, [4])),
    {"temperature": 10**400},
    *({"temperature": bad} for bad in (math.nan, math.inf, -0.1, 101, 1e-38, 1e-40, 5e-324, "1", True, [1], 1j)),
    *({"top_p": bad} for bad in (0, -0.1, 1.1, math.nan, 1e-40, "1", False)),
    *({"min_p": bad} for bad in (-0.1, 1.1, math.nan, 1e-39)),
    *({"repetition_penalty": bad} for bad in (0, 1e-30, -1, math.inf, math.nan, 1000)),
    *({"presence_penalty": bad} for bad in (math.nan, math.inf, 1e3)),
    *({"frequency_penalty": bad} for bad in (math.nan, -math.inf, "0")),
    {"logit_bias": {1: 10**400}},
    *({"logit_bias": bad} for bad in ({1: math.inf}, {1: math.nan}, {1: 1e39}, {1: "x"}, {"1": 1.0}, {1.5: 1.0},
                                      {True: 1.0}, {-1: 1.0}, [1], "x", {1: None})),
]  # fmt: skip


@pytest.mark.parametrize("values", BAD_SAMPLING, ids=str)
def test_sampling_refuses(values: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(values))):
        Sampling(**values)


def test_sampling_takes_numbers_of_numpy_and_keeps_plain_ones() -> None:
    found = Sampling(temperature=np.float32(0.5), top_k=np.int64(3), top_p=1, logit_bias={np.int32(2): np.float64(-1)})
    assert found == Sampling(temperature=0.5, top_k=3, top_p=1.0, logit_bias={2: -1.0})
    assert type(found.temperature) is float and type(found.top_k) is int
    assert [type(token) for token in found.logit_bias or {}] == [int]


BAD_OPTIONS: list[dict[str, Any]] = [
    *({"max_tokens": bad} for bad in (0, -1, 1.5, 2.0, True, "3", None, math.nan, math.inf)),
    *({"seed": bad} for bad in (1.5, -1, 2**64, True, "1", math.nan)),
    *({"logprobs": bad} for bad in (True, -1, VOCABULARY + 1, 1.0, "1", None)),
    *({"stop": bad} for bad in (["x"], "x", b"x", [b"x"], [""], "", 5, {"x": 1}, [None])),
    *({"sampling": bad} for bad in ({"temperature": 1.0}, 1.0, "greedy")),
    {"sampling": Sampling(logit_bias={VOCABULARY: 1.0})},
    {"sampling": Sampling(logit_bias=dict.fromkeys(range(VOCABULARY), -math.inf))},
    *({"raw": bad} for bad in (1, "yes", None)),
    *({"ignore_end": bad} for bad in (1, "yes")),
    *({"logits_processors": bad} for bad in (5, [5], "x")),
    *({"on_prefill": bad} for bad in (5, "x")),
    *({"session": bad} for bad in ("x", 5)),
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=str)
def test_requests_refuse(engine: Engine, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="|".join((next(iter(options)), "stop", "logit_bias"))):
        engine.stream([1, 2], **options)  # not iterated: refused before anything runs


@pytest.mark.parametrize(
    "prompt", [(1, 2), [np.int64(1), 2], np.array([1, 2], dtype=np.uint8), mx.array([1, 2]), range(1, 3)]
)
def test_token_ids_of_any_library(engine: Engine, prompt: Any) -> None:
    """NumPy's and MLX's are as good as Python's."""
    assert engine.generate(prompt, max_tokens=5).tokens == engine.generate([1, 2], max_tokens=5).tokens


BAD_PROMPTS = (
    None, 5, b"abc", bytearray(b"abc"), memoryview(b"abc"), {"role": "user", "content": "hi"}, {1, 2}, [1.0, 2.0],
    [True, False], [1, "2"], ["1"], [[1, 2]], [None], np.array([[1, 2]]), np.array([1.0]), np.array([], dtype=int),
    np.array([True]), np.array(1), mx.array([1.0]), mx.array(3), [], "", (), [{"content": "hi"}], [{"role": 5}],
    [{"role": "user", "content": 5}], [{"role": "user", "content": "\ud800"}], "\ud800", [{"role": "user"}, 5],
    [-1], [VOCABULARY], [2**70], Path("x"),
)  # fmt: skip


@pytest.mark.parametrize("prompt", BAD_PROMPTS)
def test_prompts_refuse(engine: Engine, prompt: Any) -> None:
    with pytest.raises(PromptError):
        engine.stream(prompt)


def test_one_message_as_a_dict_says_what_to_do(embedded: Engine) -> None:
    with pytest.raises(PromptError, match="into a list"):
        embedded.stream({"role": "user", "content": "hi"})  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    temperature=st.floats(min_value=float(np.finfo(np.float32).tiny), max_value=100.0),
    logits=st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=2, max_size=8),
    top_k=st.integers(0, 9), top_p=st.floats(1e-37, 1.0), min_p=st.floats(1e-37, 1.0),
)  # fmt: skip
def test_every_temperature_gives_a_distribution(
    temperature: float, logits: list[float], top_k: int, top_p: float, min_p: float
) -> None:
    """Whatever is accepted is a distribution that holds the best token; compared with NumPy in float64."""
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).over(NEUTRAL)
    spec = SamplingSpec.of(sampling, len(logits))
    found = spec.distribution(mx.array([[logits]]), None, spec.arrays(sampling, len(logits)))
    weights = np.array(found.probabilities, dtype=np.float64)[0, 0]
    assert np.isfinite(weights).all() and abs(weights.sum() - 1.0) < 1e-5
    tokens = np.arange(len(logits)) if found.tokens is None else np.array(found.tokens)[0, 0]
    exact = np.array(logits, dtype=np.float32).astype(np.float64)
    kept = set(tokens[weights > 0])
    assert any(exact[token] == exact.max() for token in kept)
    with np.errstate(over="ignore", invalid="ignore"):
        likely = np.exp((exact - exact.max()) / np.float64(np.float32(temperature)))
    assert all(likely[token] > 0 for token in kept)


BAD_ENGINES: list[dict[str, Any]] = [
    *({"depth": bad} for bad in (9, -1, 1.0, True, "3", "deep", None, math.nan)),
    *({"mode": bad} for bad in ("quick", None, 5, ["fast"])),
    *({"max_context": bad} for bad in (1, 0, 10.5, True, "10", 2**40)),
]  # fmt: skip


@pytest.mark.parametrize("options", BAD_ENGINES, ids=str)
def test_engines_refuse(options: dict[str, Any]) -> None:
    table = mx.zeros((VOCABULARY, VOCABULARY))
    with pytest.raises(OptionError, match=next(iter(options))):
        Engine(MarkovTarget(table), MarkovDrafter(table), None, **options)


@pytest.mark.parametrize(
    "options",
    [{"drafter": None, "depth": 4}, {"drafter": "none", "depth": 1}, {"drafter": "lookup+none"},
     {"drafter": "lookup+lookup"}, {"drafter": "lookup+"}, {"drafter": "lookup+lookup+auto"}, {"drafter": 5},
     {"drafter": ""}, {"draft_head_bits": 5}, {"draft_head_bits": True}, {"draft_head_bits": "4"},
     {"draft_head_bits": 4, "drafter": "lookup"}, {"draft_head_bits": 4, "drafter": None},
     {"draft_head_bits": 8, "drafter": "parallel"}, {"draft_head_bits": 8, "drafter": "lookup+sequential"},
     {"on_progress": 5}, {"mode": "quick"}, {"model": 5}, {"model": ""}, {"model": b"x"}],
    ids=str,
)  # fmt: skip
def test_load_refuses(options: dict[str, Any]) -> None:
    with pytest.raises(MLXMTPError) as refused:
        mlx_mtp.load(**options)
    assert "lookup+" in str(refused.value) or any(name in str(refused.value) for name in options)


def test_null_in_generation_config_is_not_given(tmp_path: Path) -> None:
    """do_sample with temperature null is transformers' default of 1, not greedy."""
    folder = Path(shutil.copytree(TARGET, tmp_path / "target", copy_function=shutil.copyfile))
    own = {"do_sample": True, "temperature": None, "top_k": 5, "top_p": None, "min_p": None}
    (folder / "generation_config.json").write_text(json.dumps(own))
    defaults = mlx_mtp.load(folder, drafter=None).defaults
    assert (defaults.temperature, defaults.top_k, defaults.top_p) == (1.0, 5, 1.0)


@pytest.mark.parametrize(
    "call",
    [lambda chat: chat.send(5), lambda chat: chat.send(b"x"), lambda chat: chat.send("half a pair \ud800"),
     lambda chat: chat.send(""), lambda chat: chat.send("  \n"), lambda chat: chat.set_system(5),
     lambda chat: chat.send("x", max_tokens=1.5)],
)  # fmt: skip
def test_chats_refuse(embedded: Engine, call: Any) -> None:
    chat = embedded.chat(system="Be brief.")
    with pytest.raises(MLXMTPError):
        call(chat)
    assert chat.messages == [{"role": "system", "content": "Be brief."}]
