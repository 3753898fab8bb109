"""What to do about a diagnosis, in plain words.

Pure functions of the object that diagnosis.py measures, one a piece of advice, each something that its reader can do;
what the depth control does by itself, and what is only good to know, is in the doctor's tables. Nothing is claimed that
was neither measured in this run nor by a source named beside the rule; numbers of other people's machines are said to
be that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Diagnosis = dict[str, Any]

# A token of a pass is dear from this share of a one-token pass on: a draft that is accepted less often than that loses
# time, whatever the depth. M1 and M2 with affine 4-bit weights: 65 to 80 %.
DEAR_TOKEN = 0.5
ONE_READ = 5  # tokens that Metal's kernels for short passes hold in one read of the weights
# From this share of a one-token pass on, the draft step is what limits the speed.
DEAR_DRAFT = 0.25
# Times of one and the same pass lie closer together than this on a machine with nothing else to do.
SCATTERED = 0.15
M3 = 15  # the first GPU generation whose kernels read affine quantised weights once for several tokens


def advise(found: Diagnosis) -> list[dict[str, str]]:
    """Everything worth saying, what matters most first: topic and text."""
    return [{"topic": topic, "text": text} for topic, rule in RULES.items() if (text := rule(found))]


def drafter_absent(found: Diagnosis) -> str | None:
    """Nothing to draft with."""
    if found["pair"]["family"] is not None:
        return None
    return (
        "No drafter is loaded, so every token costs a pass. Name one with --drafter, or take --drafter lookup, which "
        "needs no weights and pays on text that repeats itself."
    )


def noise(found: Diagnosis) -> str | None:
    """A busy machine, or a slowed one."""
    if found["scatter"] >= SCATTERED:
        return (
            f"Times of one and the same pass scatter by {found['scatter']:.0%}: something else is running, so take "
            "every figure here as rough and run this again on an idle machine."
        )
    if found["machine"]["low_power_mode"]:
        return "Low Power Mode is on: every time above is slower than it need be. Switch it off before comparing."
    return None


def outlook(found: Diagnosis) -> str | None:
    """What drafting would give, by the measured times."""
    if found["pair"]["family"] is None or (found["mode"] == "exact" and not found["exactness"]["possible"]):
        return None
    paying = [choice for choice in found["choices"] if choice["depth"]]
    if not paying:
        return (
            f"Drafting does not pay here even where {found['choices'][-1]['acceptance']:.0%} of the drafts are "
            "accepted: plain decoding (--depth 0) is as fast."
        )
    if len(paying) < len(found["choices"]):
        from_on = f"from {paying[0]['acceptance']:.0%} acceptance on"
        return f"Drafting pays only with a good drafter, {from_on}: {_promise(paying[0])}. --depth auto finds out."
    return f"Drafting pays: {_promise(paying[len(paying) // 2])}. --depth auto finds the depth by itself."


def _promise(choice: dict[str, Any]) -> str:
    return f"about {choice['speed_up']:.2f} times plain decoding at {choice['acceptance']:.0%}, depth {choice['depth']}"


def dear_tokens(found: Diagnosis) -> str | None:
    """Weights whose verify cost is nearly linear in the tokens, where others would do better (performance.md, A1)."""
    here, pair = found["machine"], found["pair"]
    each = (found["verify"][ONE_READ - 1]["ratio"] - 1.0) / (ONE_READ - 1)
    kinds = pair["quantisation"]
    if each < DEAR_TOKEN or not kinds or sum(kind["bytes"] for kind in kinds) <= 0.5 * pair["bytes"]:
        return None
    measured = f"each further token of a pass adds {each:.0%} of a one-token pass"
    if here["metal"] and kinds[0]["mode"] == "affine" and (here["gpu_generation"] or 0) < M3:
        return (
            f"This chip re-reads affine quantised weights for every token, expect little: {measured}. Weights in mxfp8 "
            "or mxfp4 are read once for several tokens on every chip (1.7 and 1.4 times as fast with 4 on someone's "
            "M2 Pro); M3 and later do so for affine ones too."
        )
    if here["device"] == "cpu":
        return f"MLX's CPU device computes quantised products token by token: {measured}. Take weights that are not."
    return None


def dear_draft(found: Diagnosis) -> str | None:
    """A drafter in full precision that takes much beside the target (performance.md, B: 1.19 to 1.5 after 4 bits)."""
    step, pair = found["draft_step_milliseconds"], found["pair"]
    share = (step or 0.0) / found["verify"][0]["milliseconds"]
    stored = pair["drafter_bytes"] and not pair["drafter_quantisation"]
    if share < DEAR_DRAFT or found["machine"]["device"] != "gpu" or not stored:
        return None
    return (
        f"A draft costs {share:.0%} of a one-token pass, which is much: `mlx-mtp convert` stores the drafter in 4 "
        "bits, which changes proposals only, not the answer."
    )


def no_compile(found: Diagnosis) -> str | None:
    """mx.compile is off or fails."""
    if found["machine"]["compile_works"]:
        return None
    text = "mx.compile does not work, so every round is built anew in Python and its operations are not fused."
    if found["machine"]["device"] == "cpu":
        text += " It needs g++ on the path, and a folder 'mlx' of your own in the temporary directory (TMPDIR)."
    return text + " Unset MLX_DISABLE_COMPILE if it is set."


def convention(found: Diagnosis) -> str | None:
    """An assistant run with the wrong position of its query (gemma4.md, 2.4)."""
    check = found["convention"]
    if check is None or check["better"] in (None, check["used"]):
        return None
    return (
        f"Convention {check['better']} of the query position fits this assistant better than {check['used']}, with "
        f"which it is run: {check['share_a']:.0%} (A) and {check['share_b']:.0%} (B) of the first drafts were accepted "
        f"at {check['tokens']} places. In Python, set engine.drafter.convention = Convention.{check['better']} "
        "(mlx_mtp.drafters.assistant) before the first reply."
    )


RULES: dict[str, Callable[[Diagnosis], str | None]] = {
    "drafter": drafter_absent, "noise": noise, "outlook": outlook, "passes": dear_tokens, "draft": dear_draft,
    "compile": no_compile, "convention": convention,
}  # fmt: skip
