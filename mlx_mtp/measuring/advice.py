"""What to do about a diagnosis, in plain words: each piece of advice is something that its reader can do.

What the depth control does by itself, and what is only good to know, is in the doctor's tables. Nothing is claimed that
was neither measured in this run nor by a source named beside the rule; numbers of other people's machines are said to
be that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# A token of a pass is dear from this share of a one-token pass on: a draft that is accepted less often than that loses
# time, whatever the depth. M1 and M2 with affine 4-bit weights: 65 to 80 %.
DEAR_TOKEN = 0.5
ONE_READ = 5  # tokens that Metal's kernels for short passes hold in one read of the weights
# From this share of a one-token pass on, the draft step is what limits the speed.
DEAR_DRAFT = 0.25
# Times of one and the same pass lie closer together than this on a machine with nothing else to do.
SCATTERED = 0.15
M3 = 15  # the first GPU generation whose kernels read affine quantised weights once for several tokens


def advise(found: dict[str, Any]) -> list[dict[str, str]]:
    """Everything worth saying about what diagnosis.py measured, what matters most first: topic and text."""
    said = [*_figures(found), *_drafting(found), *_weights(found)]
    return [{"topic": topic, "text": text} for topic, text in said]


def _figures(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Why they are worse than they could be."""
    here, cpu = found["machine"], found["machine"]["device"] == "cpu"
    if found["scatter"] >= SCATTERED:
        yield "noise", (
            f"Times of one and the same pass scatter by {found['scatter']:.0%}: something else is running, so take "
            "every figure here as rough and run this again on an idle machine."
        )
    if here["low_power_mode"]:
        yield "power", "Low Power Mode is on and slows everything down. Switch it off before comparing speeds."
    if not here["compile_works"]:
        compiler = "It needs g++ on the path and a folder 'mlx' of your own in the temporary directory (TMPDIR). "
        yield "compile", (
            "mx.compile does not work, so every round is built anew in Python and its operations are not fused. "
            f"{compiler if cpu else ''}Unset MLX_DISABLE_COMPILE if it is set."
        )


def _drafting(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What drafts would give, by the measured times, and whether the drafter is run as it should be."""
    paying = [choice for choice in found["choices"] if choice["depth"]]
    check = found["convention"]
    if found["pair"]["family"] is None:
        yield "drafter", (
            "No drafter is loaded, so every token costs a pass. Name one with --drafter, or take --drafter lookup, "
            "which needs no weights and pays on text that repeats itself."
        )
    elif found["mode"] == "exact" and not found["exactness"]["possible"]:
        yield "exact mode", "No pass of several tokens gives the same bits here: take --mode fast for drafts."
    elif not paying:
        highest = f"{found['choices'][-1]['acceptance']:.0%}"
        yield "outlook", f"Drafting does not pay here even where {highest} of the drafts are accepted: take --depth 0."
    else:
        good = len(paying) < len(found["choices"])
        one = paying[0] if good else paying[len(paying) // 2]
        yield "outlook", (
            f"Drafting pays{' only with a good drafter' if good else ''}: from {one['acceptance']:.0%} acceptance on "
            f"{one['speed_up']:.2f} times plain decoding with depth {one['depth']}. "
            "--depth auto finds the depth by itself, 0 included."
        )
    if check and check["better"] not in (None, check["used"]):  # gemma4.md, 2.4
        yield "convention", (
            f"Convention {check['better']} of the query position fits this assistant better than {check['used']}, with "
            f"which it is run: {check['share_a']:.0%} (A) and {check['share_b']:.0%} (B) of the first drafts were "
            f"accepted at {check['tokens']} places. In Python, set engine.drafter.convention = "
            f"Convention.{check['better']} (mlx_mtp.drafters.assistant) before the first reply."
        )


def _weights(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Weights in whose place others would do better (performance.md, A1; B: 1.19 to 1.5 after 4 bits)."""
    here, pair, kinds = found["machine"], found["pair"], found["pair"]["quantisation"]
    each = (found["verify"][ONE_READ - 1]["ratio"] - 1.0) / (ONE_READ - 1)
    if each >= DEAR_TOKEN and kinds and sum(kind["bytes"] for kind in kinds) > 0.5 * pair["bytes"]:
        measured = f"each further token of a pass adds {each:.0%} of a one-token pass"
        if here["metal"] and kinds[0]["mode"] == "affine" and (here["gpu_generation"] or 0) < M3:
            yield "passes", (
                f"This chip re-reads affine quantised weights for every token, expect little: {measured}. Weights in "
                "mxfp8 or mxfp4 are read once for several tokens on every chip (1.7 and 1.4 times as fast with 4 on "
                "someone's M2 Pro); M3 and later do so for affine ones too."
            )
        elif here["device"] == "cpu":
            yield "passes", f"A CPU computes quantised products token by token: {measured}. Take weights that are not."
    share = (found["draft_step_milliseconds"] or 0.0) / found["verify"][0]["milliseconds"]
    if share >= DEAR_DRAFT and here["device"] == "gpu" and pair["drafter_bytes"] and not pair["drafter_quantisation"]:
        yield "draft", (
            f"A draft costs {share:.0%} of a one-token pass, which is much: `mlx-mtp convert` stores the drafter in 4 "
            "bits, which changes proposals only, not the answer."
        )
