"""doctor: advice on made-up facts, the depth table, exactness per width, and the command as a user runs it."""

import itertools
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import GOLDEN, Command, uncompiled

import mlx_mtp
from mlx_mtp.backend import blas
from mlx_mtp.checkpoints import memory
from mlx_mtp.cli import doctor
from mlx_mtp.generation import exactness
from mlx_mtp.generation.depth import LITTLE, Profile, ProfileFile
from mlx_mtp.generation.exactness import Exactness
from mlx_mtp.measuring import advice, diagnosis, machine
from mlx_mtp.measuring.diagnosis import Costs
from mlx_mtp.measuring.timing import WARM, PieceTime, timed_in_turns
from mlx_mtp.testing import MarkovTarget

# Passes of 1 to 9 rows over one row, as others measured them (performance.md, A2), and made-up ones of known kinds.
M4_PRO = (1.0, 1.03, 1.22, 1.47, 1.75, 2.07, 2.4, 2.69, 2.98)
M1_ULTRA = tuple(1.0 + 0.7 * i for i in range(9))
PADDED = (1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.1, 2.1, 2.1)

QUICK = 2
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
        "choices": diagnosis.choices(costs(ratios), range(9)), **changes,
    }  # fmt: skip


OLD = {"gpu_generation": 14, "architecture": "applegpu_g14s"}
CPU = {
    "device": "cpu", "metal": False, "gpu_generation": None, "recommended_bytes": None, "wired_limit_bytes": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("topic", "words", "found"),
    [
        ("passes", "re-reads affine quantised weights for every token", facts(OLD, ratios=M1_ULTRA)),
        ("passes", "70%", facts(OLD, ratios=M1_ULTRA)),
        ("drafter", "--drafter lookup", facts(pair={"family": None})),
        ("outlook", "does not pay here even where 90%", facts(ratios=tuple(map(float, range(1, 28, 3))))),
        ("outlook", "only with a good drafter: from 90%", facts(OLD, ratios=M1_ULTRA)),
        ("outlook", "Drafting pays: from 70%", facts(ratios=(1.0,) * 9)),
        ("draft", "mlx-mtp convert", facts(draft_step_milliseconds=10.0)),
        ("compile", "MLX_DISABLE_COMPILE", facts({"compile_works": False})),
        ("compile", "g++", facts({**CPU, "compile_works": False})),
        ("noise", "scatter by 40%", facts(scatter=0.4)),
        ("power", "Low Power Mode", facts({"low_power_mode": True})),
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
        facts({"low_power_mode": None}),
    ],
)  # fmt: skip
def test_what_nobody_can_act_on_is_no_advice(found: dict[str, Any]) -> None:
    assert [one["topic"] for one in advice.advise(found)] == ["outlook"]


@pytest.mark.parametrize("ratios", [M4_PRO, M1_ULTRA, PADDED])
def test_the_depth_table_against_enumeration(ratios: tuple[float, ...]) -> None:
    """Every way in which the drafts of a round can be accepted, with its chance."""
    measured, allowed = costs(ratios), [0, 1, 2, 3, 4, 6, 7]
    for one in diagnosis.choices(measured, allowed, acceptances=(0.0, 0.7, 1.0)):
        tokens = {depth: sum(
            math.prod(one["acceptance"] if yes else 1.0 - one["acceptance"] for yes in accepted)
            * ((*accepted, False).index(False) + 1)
            for accepted in itertools.product((True, False), repeat=depth)
        ) for depth in allowed}  # fmt: skip
        best = max(allowed, key=lambda depth: tokens[depth] / measured.round(depth) * (1.0 if depth else 1.0 + LITTLE))
        assert (one["depth"], one["tokens_per_round"]) == (best, pytest.approx(tokens[best]))
        assert one["speed_up"] == pytest.approx(tokens[best] * measured.round(0) / measured.round(best))


def test_rounds_cost_what_was_measured() -> None:
    measured = costs(M4_PRO)
    assert measured.round(0) == measured.plain and measured.round(4) == pytest.approx(measured.drafted)
    row_and_draft = measured.verify[6] - measured.verify[5] + measured.draft_step
    assert measured.round(6) - measured.round(5) == pytest.approx(row_and_draft)
    # Passes padded to 5 tokens cost the same from 1 to 5: then a draft adds its own step alone.
    assert measured.round(3, padded=5) - measured.round(2, padded=5) == pytest.approx(measured.draft_step)
    assert costs(drafted=None, draft_step=None).round(0) == 0.021


def test_turns_and_medians() -> None:
    """Without a clock: who computes when, and what is made of given times."""
    order: list[str] = []

    def build(name: str) -> mx.array:
        order.append(name)
        return mx.zeros(1)

    found = timed_in_turns([lambda: build("a"), lambda: build("b")], repeats=3)
    assert order == ["a", "b"] * (3 + WARM) and len(found) == 2
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
    assert [row["rows"] for row in found["verify"] if row["exact"]] == [1, 2, 4, 5, 7, 8, 9]
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
    monkeypatch.setattr(doctor, "diagnose", partial(diagnosis.diagnose, repeats=QUICK))
    return partial(command, "doctor")


def test_json_of_the_embedded_pair(quick: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_MTP_CACHE", str(tmp_path))
    code, out, _ = quick("--json")
    assert code == 0 and out.count("\n") == 1
    found = json.loads(out)
    times = ["plain_round", "drafted_round", "draft_step", "host_build", "host_submit"]
    assert set(found) == {
        "machine", "mode", "pair", "context", "verify", "drafted_depth", "scatter", "exactness", "choices",
        "exactness_by_capacity", "depth_reason", "advice", *(f"{name}_milliseconds" for name in times),
    }  # fmt: skip
    assert (set(found["machine"]), set(found["pair"])) == (set(HEALTHY), set(PAIR))
    assert (found["mode"], found["context"], found["pair"]["family"]) == ("fast", 200, "assistant")
    assert [row["rows"] for row in found["verify"]] == list(range(1, 10)) and found["verify"][0]["exact"]
    for row in found["verify"]:
        assert set(row) == {"rows", "milliseconds", "ratio", "exact"}
        assert row["ratio"] == pytest.approx(row["milliseconds"] / found["verify"][0]["milliseconds"])
    assert all(found[f"{name}_milliseconds"] >= 0 for name in times) and found["plain_round_milliseconds"] > 0
    assert [one["acceptance"] for one in found["choices"]] == [0.5, 0.7, 0.9]
    assert set(found["choices"][0]) == {"acceptance", "depth", "tokens_per_round", "speed_up"}
    assert set(found["exactness"]) == {"depths", "width", "possible"} and found["exactness"]["depths"][0] == 0
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
