"""What to do about a diagnosis, in plain words: each piece of advice is something that its reader can do.

Nothing is claimed that was neither measured in this run nor by a source named beside the rule; numbers of other
people's machines are said to be that.
"""

from __future__ import annotations

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
    here, pair, said = found["machine"], found["pair"], dict[str, str]()
    if found["scatter"] >= SCATTERED:
        said["noise"] = (
            f"Times of one and the same pass scatter by {found['scatter']:.0%}: something else is running, so take "
            "every figure here as rough and run this again on an idle machine."
        )
    if here["low_power_mode"]:
        said["power"] = "Low Power Mode is on and slows everything down. Switch it off before comparing speeds."
    if not here["compile_works"]:
        compiler = "It needs g++ on the path and a folder 'mlx' of your own in the temporary directory (TMPDIR). "
        said["compile"] = (
            "mx.compile does not work, so every round is built anew in Python and its operations are not fused. "
            f"{compiler if here['device'] == 'cpu' else ''}Unset MLX_DISABLE_COMPILE if it is set."
        )
    said |= _drafting(found)
    # performance.md, A1; B: 1.19 to 1.5 after 4 bits
    kinds, each = pair["quantisation"], (found["verify"][ONE_READ - 1]["ratio"] - 1.0) / (ONE_READ - 1)
    mostly = sum(kind["bytes"] for kind in kinds) > 0.5 * pair["bytes"]
    if each >= DEAR_TOKEN and mostly and kinds[0]["mode"] == "affine" and (here["gpu_generation"] or M3) < M3:
        said["passes"] = (
            "This chip re-reads affine quantised weights for every token, expect little: each further token of a pass "
            f"adds {each:.0%} of a one-token pass. Weights in mxfp8 or mxfp4 are read once for several tokens on every "
            "chip (1.7 and 1.4 times as fast with 4 on someone's M2 Pro); M3 and later do so for affine ones too."
        )
    share = (found["draft_step_milliseconds"] or 0.0) / found["verify"][0]["milliseconds"]
    if share >= DEAR_DRAFT and here["device"] == "gpu" and pair["drafter_bytes"] and not pair["drafter_quantisation"]:
        said["draft"] = (
            f"A draft costs {share:.0%} of a one-token pass, which is much: `mlx-mtp convert` stores the drafter in 4 "
            "bits, which changes proposals only, not the answer."
        )
    return [{"topic": topic, "text": text} for topic, text in said.items()]


def _drafting(found: dict[str, Any]) -> dict[str, str]:
    """What drafts would give, by the measured times, or why there can be none."""
    if found["pair"]["family"] is None:
        return {"drafter": (
            "No drafter is loaded, so every token costs a pass. Name one with --drafter, or take --drafter lookup, "
            "which needs no weights and pays on text that repeats itself."
        )}  # fmt: skip
    if found["mode"] == "exact" and not found["exactness"]["possible"]:
        return {"exact mode": "No pass of several tokens gives the same bits here: take --mode fast for drafts."}
    paying = [choice for choice in found["choices"] if choice["depth"]]
    if not paying:
        most = f"even where {found['choices'][-1]['acceptance']:.0%} of the drafts are accepted"
        return {"outlook": f"Drafting does not pay here {most}: take --depth 0."}
    good = len(paying) < len(found["choices"])
    one = paying[0] if good else paying[len(paying) // 2]
    return {"outlook": (
        f"Drafting pays{' only with a good drafter' if good else ''}: from {one['acceptance']:.0%} acceptance on "
        f"{one['speed_up']:.2f} times plain decoding with depth {one['depth']}. "
        "--depth auto finds the depth by itself, 0 included."
    )}  # fmt: skip
