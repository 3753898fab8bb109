"""doctor: advice on made-up facts, the depth table, exactness per width, and the command as a user runs it."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import GOLDEN, Command, uncompiled

import mlx_mtp
from mlx_mtp.backend import blas
from mlx_mtp.checkpoints import memory
from mlx_mtp.checkpoints.checkpoint import Checkpoint
from mlx_mtp.cli import doctor
from mlx_mtp.drafters.assistant import Convention
from mlx_mtp.drafters.lookup import Lookup, LookupFirst
from mlx_mtp.generation import exactness
from mlx_mtp.generation.depth import LITTLE, FixedDepth, Profile, ProfileFile
from mlx_mtp.generation.exactness import Exactness
from mlx_mtp.generation.loop import Decoder, GenerationRequest
from mlx_mtp.generation.sampling import DraftSampler
from mlx_mtp.loading import EMBEDDED
from mlx_mtp.measuring import advice, diagnosis, machine
from mlx_mtp.measuring.diagnosis import Costs, Curve, Effort
from mlx_mtp.measuring.timing import PieceTime, timed_in_turns
from mlx_mtp.testing import MarkovTarget

# Passes of 1 to 8 rows over one row, as others measured them (performance.md, A2), and made-up ones of known kinds.
M4_PRO = (1.0, 1.03, 1.22, 1.47, 1.75, 2.07, 2.4, 2.69)
M1_ULTRA = tuple(1.0 + 0.7 * i for i in range(8))
PADDED = (1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.1, 2.1)

QUICK = Effort(repeats=2, warm=1, pipelined=2, turns=1)
FOUR_BITS = {"bits": 4, "group_size": 64, "mode": "affine", "bytes": 15_000_000_000}
HEALTHY = {
    "name": "Apple M5 Max", "system": "Darwin 26.2", "cores": 16, "device": "gpu", "metal": True,
    "architecture": "applegpu_g17s", "gpu_generation": 17, "memory_bytes": 64_000_000_000,
    "recommended_bytes": 48_000_000_000, "wired_limit_bytes": 30_000_000_000, "mlx": "0.32.4", "mlx_lm": "0.32.2",
    "mlx_mtp": "0.1.0", "blas": "Accelerate", "mlx_imported_too_early": False, "compile_works": True,
    "low_power_mode": False,
}  # fmt: skip
PAIR = {
    "path": "/models/gemma", "bytes": 16_000_000_000, "quantisation": [FOUR_BITS], "mixture": False,
    "family": "assistant", "drafter_bytes": 300_000_000, "drafter_quantisation": [], "max_depth": 8,
}  # fmt: skip


def costs(ratios: tuple[float, ...] = M4_PRO, **changes: Any) -> Costs:
    found = Costs(
        context=200, verify=tuple(0.02 * ratio for ratio in ratios), plain=0.021, drafted_depth=4,
        drafted=0.02 * ratios[4] + 0.006, draft_step=0.001, build=0.001, submit=0.002, scatter=0.02,
    )  # fmt: skip
    return replace(found, **changes)


def facts(
    here: dict[str, Any] | None = None, pair: dict[str, Any] | None = None, ratios: tuple[float, ...] = M4_PRO,
    **changes: Any,
) -> dict[str, Any]:  # fmt: skip
    """A healthy M5 Max with a 4-bit target, but for the changes."""
    return {
        "machine": HEALTHY | (here or {}), "mode": "fast", "pair": PAIR | (pair or {}), "context": 200,
        "verify": [{"rows": m, "milliseconds": 20 * ratio, "ratio": ratio} for m, ratio in enumerate(ratios, 1)],
        "draft_step_milliseconds": 1.0, "scatter": 0.02, "exactness": {"possible": True},
        "choices": diagnosis.choices(costs(ratios).curve(), range(9)), "convention": None, **changes,
    }  # fmt: skip


OLD = {"gpu_generation": 14, "architecture": "applegpu_g14s"}
CPU = {
    "device": "cpu", "metal": False, "gpu_generation": None, "recommended_bytes": None, "wired_limit_bytes": None,
}  # fmt: skip
CHECK = {"tokens": 192, "share_a": 0.9, "share_b": 0.6, "only_a": 60, "only_b": 2, "used": "B", "better": "A"}


@pytest.mark.parametrize(
    ("topic", "words", "found"),
    [
        ("passes", "re-reads affine quantised weights for every token", facts(OLD, ratios=M1_ULTRA)),
        ("passes", "70%", facts(OLD, ratios=M1_ULTRA)),
        ("passes", "token by token", facts(CPU, ratios=M1_ULTRA)),
        ("drafter", "--drafter lookup", facts(pair={"family": None})),
        ("outlook", "does not pay here even where 90%", facts(ratios=tuple(map(float, range(1, 25, 3))))),
        ("outlook", "only with a good drafter: from 90%", facts(OLD, ratios=M1_ULTRA)),
        ("outlook", "Drafting pays: from 70%", facts(ratios=(1.0,) * 8)),
        ("draft", "mlx-mtp convert", facts(draft_step_milliseconds=10.0)),
        ("compile", "MLX_DISABLE_COMPILE", facts({"compile_works": False})),
        ("compile", "g++", facts({**CPU, "compile_works": False})),
        ("noise", "scatter by 40%", facts(scatter=0.4)),
        ("power", "Low Power Mode", facts({"low_power_mode": True})),
        ("convention", "Convention A of the query position fits", facts(convention=CHECK)),
    ],
)  # fmt: skip
def test_advice_names_what_was_measured(topic: str, words: str, found: dict[str, Any]) -> None:
    texts = [one["text"] for one in advice.advise(found) if one["topic"] == topic]
    assert any(words in text for text in texts), texts


@pytest.mark.parametrize(
    "found",
    [
        facts(),
        facts(ratios=M1_ULTRA),  # dear passes on a chip that reads weights once: nothing to choose
        facts(OLD, {"quantisation": []}, ratios=PADDED),
        facts(OLD, {"quantisation": [FOUR_BITS | {"mode": "mxfp4"}]}, ratios=M1_ULTRA),
        facts(CPU, {"quantisation": []}, ratios=M1_ULTRA),
        facts(pair={"drafter_quantisation": [FOUR_BITS]}, draft_step_milliseconds=10.0),  # it is stored in few bits
        facts(CPU, {"drafter_bytes": 0}, draft_step_milliseconds=10.0),  # lookup has no weights
        facts(convention=CHECK | {"used": "A"}),
        facts(convention=CHECK | {"better": None}),
        facts({"low_power_mode": None}),
    ],
)  # fmt: skip
def test_what_nobody_can_act_on_is_no_advice(found: dict[str, Any]) -> None:
    assert [one["topic"] for one in advice.advise(found)] == ["outlook"]


@pytest.mark.parametrize("ratios", [M4_PRO, M1_ULTRA, PADDED])
def test_the_depth_table_against_enumeration(ratios: tuple[float, ...]) -> None:
    """Every way in which the drafts of a round can be accepted, with its chance."""
    curve, allowed = costs(ratios).curve(), [0, 1, 2, 3, 4, 6, 7]
    for one in diagnosis.choices(curve, allowed, (0.0, 0.7, 1.0)):
        tokens = {depth: sum(
            math.prod(one["acceptance"] if yes else 1.0 - one["acceptance"] for yes in accepted)
            * ((*accepted, False).index(False) + 1)
            for accepted in itertools.product((True, False), repeat=depth)
        ) for depth in allowed}  # fmt: skip
        best = max(allowed, key=lambda depth: tokens[depth] / curve.at(depth) * (1.0 if depth else 1.0 + LITTLE))
        assert (one["depth"], one["tokens_per_round"]) == (best, pytest.approx(tokens[best]))
        assert one["speed_up"] == pytest.approx(tokens[best] * curve.at(0) / curve.at(best))


def test_the_curve_goes_through_what_was_measured() -> None:
    measured = costs(M4_PRO)
    curve = measured.curve()
    assert curve.at(0) == measured.plain and curve.at(4) == pytest.approx(measured.drafted)
    row_and_draft = measured.verify[6] - measured.verify[5] + measured.draft_step
    assert curve.at(6) - curve.at(5) == pytest.approx(row_and_draft)
    # Passes padded to 5 tokens cost the same from 1 to 5: then a draft adds its own step alone.
    padded = measured.curve(padded=5)
    assert padded.at(3) - padded.at(2) == pytest.approx(measured.draft_step)
    assert costs(drafted=None, draft_step=None).curve() == Curve({0: 0.021})


def test_turns_and_medians() -> None:
    """Without a clock: who computes when, and what is made of given times."""
    order: list[str] = []

    def build(name: str) -> mx.array:
        order.append(name)
        return mx.zeros(1)

    found = timed_in_turns([lambda: build("a"), lambda: build("b")], repeats=3, warm=2)
    assert order == ["a", "b"] * 5 and len(found) == 2
    timing = PieceTime.of([(1.0, 5.0, 10.0), (3.0, 4.0, 20.0), (2.0, 6.0, 30.0)])
    assert (timing.build, timing.submit, timing.device) == (2.0, 5.0, 20.0)
    assert timing.scatter == pytest.approx(1.0)


def test_exactness_per_width(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target without a product, whose rows are equal on any BLAS, but for one bit in passes of some widths."""
    target = MarkovTarget(mx.random.normal((50, 50), key=mx.random.key(0)))
    head = target.head
    engine = mlx_mtp.Engine(target, None, None)
    assert exactness.probe(target).equal_widths == tuple(range(2, 10))
    odd: tuple[int, ...] = (3, 6)

    def uneven(hidden: mx.array) -> mx.array:
        logits, rows = head(hidden), hidden.shape[1]
        return logits * (1.0 + 2.0**-22 * mx.arange(1, rows + 1)[:, None]) if rows in odd else logits

    monkeypatch.setattr(target, "head", uneven)
    found = diagnosis.diagnose(engine, QUICK)
    assert found["exactness"]["depths"] == (0, 1, 3, 4, 6, 7, 8)
    assert [row["rows"] for row in found["verify"] if row["exact"]] == [1, 2, 4, 5, 7, 8]
    assert found["exactness_by_capacity"] == []  # of use in exact mode alone
    odd = tuple(range(1, 10))
    assert exactness.probe(target) == Exactness((0,), None)


def test_a_probe_that_the_engine_has_made_is_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = mlx_mtp.load(GOLDEN / "keqv" / "target", drafter=GOLDEN / "keqv" / "assistant_tied", mode="exact", depth=0)
    assert engine.exactness is not None and not engine.exactness.found  # nothing is probed before the first request
    engine.generate([5, 6], max_tokens=2)
    assert list(engine.exactness.found) == [256]
    real = exactness.probe
    monkeypatch.setattr(exactness, "probe", lambda t, size: real(t, size) if size > 256 else pytest.fail("twice"))
    found = diagnosis.diagnose(engine, QUICK)
    assert found["exactness"]["depths"] == engine.exactness.at(256).depths and found["mode"] == "exact"
    assert found["exactness_by_capacity"][0] == {"capacity": 256, **found["exactness"]}
    assert found["convention"] is None  # no tokenizer, no text to compare on


@pytest.fixture(scope="module")
def engine() -> mlx_mtp.Engine:
    """The embedded pair."""
    return mlx_mtp.load(depth=0)


def test_what_is_loaded(engine: mlx_mtp.Engine) -> None:
    pair = diagnosis.describe_pair(engine.target, engine.drafter)
    for size, folder in ((pair["bytes"], "target"), (pair["drafter_bytes"], "assistant")):
        weights = Checkpoint.open(EMBEDDED / folder).weights()
        assert size == sum(w.size for w in weights.values()) * 4  # float16 in the file, float32 on a CPU
    assert pair["path"] == str(EMBEDDED / "target")
    assert (pair["family"], pair["max_depth"], pair["mixture"], pair["quantisation"]) == ("assistant", 8, False, [])
    assert diagnosis.family_name(LookupFirst(engine.drafter)) == "lookup+assistant"
    assert diagnosis.describe_pair(engine.target, None)["family"] is None
    assert diagnosis.describe_pair(engine.target, Lookup())["drafter_bytes"] == 0


def test_quantisation_as_found_and_experts() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(64, 256, bias=False), nn.Linear(64, 32, bias=False)
            self.norm = nn.RMSNorm(64)

    class Holder(MarkovTarget):
        def modules(self) -> list[nn.Module]:
            return [small]

    small = Small()
    small.wide = small.wide.to_quantized(32, 4, "mxfp4")
    small.narrow = small.narrow.to_quantized(32, 8)
    pair = diagnosis.describe_pair(Holder(mx.zeros((4, 4))), None)
    assert pair["quantisation"] == [
        {"bits": 4, "group_size": 32, "mode": "mxfp4", "bytes": 256 * 64 // 2 + 256 * 2},
        {"bits": 8, "group_size": 32, "mode": "affine", "bytes": 32 * 64 + 2 * 4 * 32 * 2},
    ]
    assert pair["bytes"] == sum(kind["bytes"] for kind in pair["quantisation"]) + 4 * 64
    moe = mlx_mtp.load(GOLDEN / "moe" / "target", drafter=None)
    assert diagnosis.describe_pair(moe.target, None)["mixture"]


def test_conventions_are_compared_on_the_replies_of_the_target(
    engine: mlx_mtp.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against single prefills of every beginning of the reply; A is made a bad position, so that the two differ."""
    def position(self: Convention, length: mx.array) -> mx.array:
        return length + 3000 if self is Convention.A else length - 1

    monkeypatch.setattr(Convention, "position", position)
    assert engine.tokenizer is not None
    assistant: Any = engine.drafter
    prompts = [engine.tokenizer.encode(text) for text in ("import os\n\ndef main(", "class Queue:\n")]
    decoder, right = Decoder(engine.target, assistant, FixedDepth(0)), []
    found = diagnosis.compare_conventions(decoder, assistant, prompts, (), 10)
    drafters = [type(assistant)(assistant.model, convention=convention) for convention in Convention]
    for drafter in drafters:
        drafter.attach(engine.target)
    for ids in prompts:
        reply = engine.generate(ids, max_tokens=11, ignore_end=True).tokens
        for at in range(10):
            state = decoder.prefill(GenerationRequest(ids=ids + reply[:at], budget=1), 4)
            decoder.rounds.first(state)
            sample = DraftSampler(state.spec, {}, {}, mx.random.split(state.key, 1))
            drafts = [one.draft({}, state.token, state.hidden, state.cache, 1, sample)[0] for one in drafters]
            right.append(tuple(draft.item() == reply[at + 1] for draft in drafts))
    a, b = (sum(column) for column in zip(*right, strict=True))
    assert (found["tokens"], found["used"], found["share_a"], found["share_b"]) == (20, "B", a / 20, b / 20) and b > 4
    assert (found["only_a"], found["only_b"]) == (right.count((True, False)), right.count((False, True)))
    assert found["only_a"] != found["only_b"] and found["better"] in (None, "B")


def test_facts_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [machine.generation_of(name) for name in ("applegpu_g13s", "applegpu_g17d", "x86_64", "sm_90", "")] == [
        13, 17, None, None, None,
    ]  # fmt: skip
    for settings, low in (("In use:\n standby  1\n lowpowermode         1\n", True), (" lowpowermode  0\n", False),
                          (" powermode            2\n", False), (" powermode            1\n", True), ("womp 1", None)):
        monkeypatch.setattr(machine, "pmset", lambda *_, settings=settings: settings)
        here = machine.describe()
        assert here["low_power_mode"] is low
    assert here["device"] == ("gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu")
    assert here["memory_bytes"] > 2**28 and here["cores"] >= 1
    assert here["metal"] == (here["recommended_bytes"] is not None) == (here["wired_limit_bytes"] is not None)
    monkeypatch.setattr(blas, "name", lambda: blas.TOO_LATE)
    assert machine.describe()["mlx_imported_too_early"]
    with uncompiled():
        assert not machine.compile_works()


def test_facts_of_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """What MLX's Metal device says, in its words; the wired limit is read by setting it, and put back."""
    limits = [7_000_000]
    info = {"device_name": "Apple M3 Max", "architecture": "applegpu_g15s", "memory_size": 64 * 2**30,
            "max_recommended_working_set_size": 48 * 2**30}  # fmt: skip
    for place, name, value in (
        (mx, "device_info", lambda: info), (mx, "default_device", lambda: mx.Device(mx.gpu)),
        (mx.metal, "is_available", lambda: True), (memory, "CGROUP_FILES", ()),  # of the container this runs in
        (mx, "set_wired_limit", lambda limit: (limits[-1], limits.append(limit))[0]),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, value)
    here = machine.describe()
    assert (here["name"], here["architecture"], here["gpu_generation"]) == ("Apple M3 Max", "applegpu_g15s", 15)
    assert (here["device"], here["metal"]) == ("gpu", True)
    assert (here["memory_bytes"], here["recommended_bytes"]) == (64 * 2**30, 48 * 2**30)
    assert here["wired_limit_bytes"] == 7_000_000 == limits[-1]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, command: Command) -> Command:
    """`mlx-mtp doctor ARGS`, every measurement taken twice."""
    monkeypatch.setattr(doctor, "diagnose", partial(diagnosis.diagnose, effort=QUICK))
    return partial(command, "doctor")


def test_json_of_the_embedded_pair(quick: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(diagnosis, "COMPARED_TOKENS", 8)
    code, out, _ = quick("--json")
    assert code == 0 and out.count("\n") == 1
    found = json.loads(out)
    times = ["plain_round", "drafted_round", "draft_step", "host_build", "host_submit"]
    assert set(found) == {
        "machine", "mode", "pair", "context", "verify", "drafted_depth", "scatter", "exactness", "choices",
        "exactness_by_capacity", "convention", "depth_reason", "advice", *(f"{name}_milliseconds" for name in times),
    }  # fmt: skip
    assert (set(found["machine"]), set(found["pair"])) == (set(HEALTHY), set(PAIR))
    assert (found["mode"], found["context"], found["pair"]["family"]) == ("fast", 200, "assistant")
    assert [row["rows"] for row in found["verify"]] == list(range(1, 9)) and found["verify"][0]["exact"]
    for row in found["verify"]:
        assert set(row) == {"rows", "milliseconds", "ratio", "exact"}
        assert row["ratio"] == pytest.approx(row["milliseconds"] / found["verify"][0]["milliseconds"])
    assert all(found[f"{name}_milliseconds"] >= 0 for name in times) and found["plain_round_milliseconds"] > 0
    assert [one["acceptance"] for one in found["choices"]] == [0.5, 0.7, 0.9]
    assert set(found["choices"][0]) == {"acceptance", "depth", "tokens_per_round", "speed_up"}
    assert set(found["exactness"]) == {"depths", "width", "possible"} and found["exactness"]["depths"][0] == 0
    assert set(found["convention"]) == set(CHECK) and 8 <= found["convention"]["tokens"] <= 32
    assert found["depth_reason"] == "Not enough rounds yet to say whether drafting pays."
    assert "outlook" in {one["topic"] for one in found["advice"]}
    assert all(set(one) == {"topic", "text"} for one in found["advice"])


def test_the_report_without_drafter(quick: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    target = str(GOLDEN / "unified" / "target")
    monkeypatch.setenv("COLUMNS", "40")
    code, out, err = quick("--model", target, "--drafter", "none")
    assert code == 0 and "Traceback" not in err
    assert max(map(len, out.splitlines())) <= 40
    for words in ("machine", "passes over the target", "exactness", "lookup", mlx_mtp.__version__):
        assert words in out


def test_forget(quick: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It drops what was learned, says of what, and runs no model; nothing to drop is no error."""
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    monkeypatch.setattr(doctor, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    for more, words in (((), "target | auto"), (("--json",), '{"forgotten": ["target | auto"]}')):
        ProfileFile(tmp_path / "depth.json", "target | auto").save(Profile([1.0, 1.2], 0.1, [1.0], [1.0]))
        code, out, err = quick("--forget", *more)
        assert (code, err) == (0, "") and words in out and not (tmp_path / "depth.json").exists()
    code, out, err = quick("--forget")
    assert (code, err) == (0, "") and out.startswith("Nothing was learned")
    (tmp_path / "depth.json").mkdir()
    code, out, err = quick("--forget")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "remove" in err


def test_curves_are_straight_between_and_beyond_measurements() -> None:
    curve = Curve({0: 10.0, 2: 12.0, 4: 16.0})
    assert [curve.at(d) for d in (0, 1, 2, 3, 4, 6)] == [10.0, 11.0, 12.0, 14.0, 16.0, 20.0]
    assert [Curve({0: 10.0, 2: 12.0, 4: 8.0}).at(d) for d in (0, 1, 2, 3, 4, 8)] == [10.0, 11.0, 12.0, 12.0, 12.0, 12.0]
