"""The engine and its loop beyond what every pair promises (conformance.py): rounds in flight, limits, waiting."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN, uncompiled
from families import config_of, written
from greedy import lively, same_or_tie

import mlx_mtp
from mlx_mtp.drafters.lookup import Lookup
from mlx_mtp.generation.depth import FixedDepth
from mlx_mtp.generation.loop import Decoder, GenerationRequest
from mlx_mtp.generation.prefix import Session
from mlx_mtp.generation.types import Stats
from mlx_mtp.testing import ScriptedDrafter

IDS = np.random.default_rng(2).integers(3, 128, 20).tolist()


@pytest.fixture(scope="module")
def plain() -> mlx_mtp.Engine:
    return lively("ple")


@pytest.fixture(scope="module")
def expected(plain: mlx_mtp.Engine) -> list[int]:
    return plain.generate(IDS, max_tokens=60, ignore_end=True).tokens


def scripted(plain: mlx_mtp.Engine, script: list[int], depth: int, **options) -> mlx_mtp.Engine:
    return mlx_mtp.Engine(plain.target, ScriptedDrafter(script), plain.tokenizer, depth=depth, **options)


def test_no_round_for_nothing(plain: mlx_mtp.Engine, expected: list[int]) -> None:
    """The first token waits for no round, and after a round that may be the last there is none in flight."""
    engine, stats = scripted(plain, IDS + expected, 4), Stats()
    chunks = Decoder(engine.target, engine.drafter, FixedDepth(4)).decode(GenerationRequest(ids=IDS, budget=20), stats)
    assert next(chunks).tokens == expected[:1]
    assert stats.rounds == 0
    assert [token for chunk in chunks for token in chunk.tokens] == expected[1:20]
    assert stats.rounds == 4  # of 5 tokens each, all of whose drafts are accepted


def test_compiled_rounds_are_bounded(plain: mlx_mtp.Engine, expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server meets every top_k there is: old graphs go, and coming back to one changes nothing."""
    monkeypatch.setattr("mlx_mtp.generation.round.MOST_COMPILED", 2)
    engine = scripted(plain, IDS + expected, 1)
    runs = [engine.generate(IDS, max_tokens=4, seed=1, sampling=mlx_mtp.Sampling(temperature=1.0, top_k=k)).tokens
            for k in (2, 3, 4, 5, 2)]  # fmt: skip
    assert runs[0] == runs[-1]
    assert [key[2].top_k for key in engine._decoder.rounds._compiled] == [5, 2]


def test_context_is_respected(plain: mlx_mtp.Engine, expected: list[int]) -> None:
    engine = scripted(plain, IDS + expected, 4, max_context=len(IDS) + 10)
    result = engine.generate(IDS, max_tokens=100, ignore_end=True)
    assert (result.tokens, result.finish_reason) == (expected[:10], "length")
    with pytest.raises(mlx_mtp.PromptError, match="shorter than the context"):
        engine.generate(IDS + expected[:10])


def test_embedded_pair_drafts_well_and_exactly(embedded: mlx_mtp.Engine) -> None:
    plain = mlx_mtp.Engine(embedded.target, None, None)
    ids = embedded.tokenizer.encode("def main():\n    parser = ")
    expected, found = (engine.generate(ids, max_tokens=100, ignore_end=True) for engine in (plain, embedded))
    same_or_tie(plain, ids, expected.tokens, found.tokens)
    assert found.stats.tokens_per_round > 1.5


def test_a_round_traced_again_does_not_follow_a_cache_that_grew() -> None:
    """Without mx.compile every round is built anew; the first request grows from one rung of the ladder to the next."""
    engine = lively("ple", GOLDEN / "ple" / "assistant_tied", depth=3)
    ids = (IDS * 13)[:240]
    expected = engine.generate(ids, max_tokens=24, ignore_end=True).tokens
    engine = mlx_mtp.Engine(engine.target, engine.drafter, None, depth=3)
    with uncompiled():
        found = [engine.generate(ids, max_tokens=24, ignore_end=True).tokens for _ in range(2)]
    for tokens in found:
        same_or_tie(engine, ids, expected, tokens)


# The device is waited for once a round and nowhere else, counted by what waits; `host_syncs` says the same

READS = (
    "item", "tolist", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__", "__dlpack__",
    "__repr__", "__format__",
)  # fmt: skip
WAITS = ("eval", "synchronize", "save", "savez", "save_safetensors", "save_gguf")
CONVERSIONS = ("array", "asarray", "asanyarray", "ascontiguousarray", "copy", "stack", "concatenate")


class Waits:
    """Patches all of them for as long as `monkeypatch` lives; `seen` names each wait in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for owner, names in ((mx.array, READS), (mx, WAITS), (np, CONVERSIONS)):
            for name in names:
                monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name), owner is np))

    def _counted(self, name: str, real: Callable[..., Any], reads_buffers: bool) -> Callable[..., Any]:
        def counted(*args: Any, **options: Any) -> Any:
            if not reads_buffers or _holds(args):
                self.seen.append(name)
            return real(*args, **options)

        return counted

    def begin(self, done: int, total: int) -> None:
        """For `on_prefill`: what the prompt's passes waited for does not count."""
        self.seen.clear()


def _holds(value: Any) -> bool:
    """Whether an array of MLX is among the arguments."""
    return isinstance(value, mx.array) or (isinstance(value, tuple | list) and any(map(_holds, value)))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Waits:
    return Waits(monkeypatch)


@pytest.fixture(scope="module")
def drafters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path | None]:
    folder, assistant = tmp_path_factory.mktemp("drafters"), GOLDEN / "ple" / "assistant_tied"
    parallel = written(folder / "parallel", config_of("parallel_heads", 32, 128, 2))
    sequential = written(folder / "sequential", config_of("sequential_modules", 32, 128, 2))
    return {"none": None, "assistant": assistant, "parallel": parallel, "sequential": sequential, "lookup": "lookup",
            "lookup+assistant": f"lookup+{assistant}"}  # fmt: skip


def counted(engine: mlx_mtp.Engine, waits: Waits, ids: list[int], **options: Any) -> mlx_mtp.Result:
    """A short reply, after a look at every wait after its prompt."""
    # Rounds of every size are compiled before: `mx.compile` runs them once to see them, and waits for nothing.
    result = engine.generate(ids, max_tokens=24, ignore_end=True, on_prefill=waits.begin, **options)
    assert result.stats.rounds > 5
    assert len(waits.seen) == result.stats.host_syncs <= result.stats.rounds + 2, waits.seen
    return result


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": mlx_mtp.Sampling(temperature=1.0, top_k=40, top_p=0.9, min_p=0.01), "seed": 1},
    "penalties": {"sampling": mlx_mtp.Sampling(repetition_penalty=1.2, frequency_penalty=0.2)},
}


@pytest.mark.parametrize("depth", [2, "auto"])
@pytest.mark.parametrize("drafter", ["none", "assistant", "parallel", "sequential", "lookup", "lookup+assistant"])
def test_one_wait_a_round_for_every_family(
    drafter: str, depth: int | str, drafters: dict[str, Path | None], waits: Waits
) -> None:
    """Greedy and sampled, in a session and where buffers grow."""
    named = drafters[drafter]
    engine, session = lively("ple", named, depth=depth if named else "auto"), mlx_mtp.Session()
    ids = [5, 6, 7, 8] * 58
    for options in OPTIONS.values() if depth == 2 and drafter == "assistant" else [OPTIONS["greedy"]]:
        ids = [*ids, *counted(engine, waits, ids, session=session, **options).tokens]
    assert len(ids) >= 256


@pytest.mark.parametrize("variant", ["keqv", "moe"])
def test_one_wait_a_round_for_other_targets(variant: str, waits: Waits) -> None:
    folder = GOLDEN / variant
    engine = mlx_mtp.load(folder / "target", drafter=folder / "assistant_centroid", depth=3)
    counted(engine, waits, [5, 6, 7, 8] * 3)


def test_a_prediction_is_for_one_request(plain: mlx_mtp.Engine, expected: list[int]) -> None:
    """Its tokens or its text; the same reply in fewer passes, and the next one knows nothing of it."""
    engine = mlx_mtp.Engine(plain.target, Lookup(), plain.tokenizer, depth=4)
    session, options = Session(), {"max_tokens": 30, "ignore_end": True}
    free = engine.generate(IDS, **options)
    helped = engine.generate(IDS, prediction=expected, session=session, **options)
    for result in (free, helped):
        same_or_tie(plain, IDS, expected[:30], result.tokens)
    onward = [*IDS, *helped.tokens]
    alone, after = (engine.generate(onward, session=its, **options) for its in (None, session))
    same_or_tie(plain, onward, alone.tokens, after.tokens)
    assert after.stats.prefilled_tokens < 5
    assert 2 * helped.stats.rounds < free.stats.rounds and 2 * after.stats.rounds > alone.stats.rounds
    with pytest.raises(mlx_mtp.OptionError, match="token of prediction"):
        engine.generate(IDS, prediction=[-1])
    for wrong, words in (("x", "must be token ids"), (5, "a text or a list"), (b"x", "a text or a list"),
                         ([1] * 100_000, "no reply has more")):  # fmt: skip
        with pytest.raises(mlx_mtp.OptionError, match=f"prediction .*{words}"):
            engine.generate(IDS, prediction=wrong)
    for tool in ({"function": 5}, {"function": {"name": 5}}, {"function": {"name": "f", "parameters": [1]}}):
        with pytest.raises(mlx_mtp.OptionError, match="tools must declare functions"):
            engine.generate(IDS, tools=[tool])
