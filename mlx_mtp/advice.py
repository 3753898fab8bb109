"""What to do about a diagnosis, in plain words.

What it does: pure functions of measured facts (diagnosis.Diagnosis), one a piece of advice. What it does not do:
measure anything, or claim anything that was neither measured in this run nor by a source named beside the rule.

Numbers of other people's machines are said to be that. "Rows" are the tokens that one pass over the target checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mlx_mtp import blas
from mlx_mtp.diagnosis import Diagnosis, Quantisation

# A row is dear from this share of a one-row pass on: a draft that stands less often than that loses time, whatever the
# depth. M1 and M2 with affine 4-bit weights: 65 to 80 %.
DEAR_ROW = 0.5
# Rows Metal's kernels for few rows hold in one read of the weights; a leap behind them is one of so many usual steps.
ONE_READ, LEAP = 5, 2.0
# From this share of a one-row pass on, the draft step is what limits the speed.
DEAR_DRAFT = 0.25
# The host limits the speed where Python takes more than this share of a pipelined round.
BUSY_HOST = 0.5
FULL_MEMORY = 0.8
# Times of one and the same pass lie closer together than this on a machine with nothing else to do.
SCATTERED = 0.15
M3 = 15  # the first GPU generation whose kernels read affine quantised weights once for several rows
GIGABYTE = 1e9


@dataclass(frozen=True)
class Advice:
    """One finding: what it is about, and what it means or what to do."""

    topic: str
    text: str


def advise(found: Diagnosis) -> list[Advice]:
    """Everything worth saying, what matters most first."""
    said = ((topic, rule(found)) for topic, rule in RULES)
    return [Advice(topic, text) for topic, text in said if text]


def drafter_absent(found: Diagnosis) -> str | None:
    """Nothing to draft with."""
    if found.pair.family is not None:
        return None
    return (
        "No drafter is loaded, so every token costs a pass. Name one with --drafter, or take --drafter lookup, which "
        "needs no weights and pays on text that repeats itself."
    )


def outlook(found: Diagnosis) -> str | None:
    """What drafting would give, by the measured times."""
    if found.pair.family is None or (found.mode == "exact" and not found.exactness.possible):
        return None
    paying = [choice for choice in found.choices if choice.depth]
    if not paying:
        return (
            f"Drafting does not pay here even where {found.choices[-1].acceptance:.0%} of the drafts stand: plain "
            "decoding (--depth 0) is as fast."
        )
    if len(paying) < len(found.choices):
        first = paying[0]
        return (
            f"Drafting pays only with a good drafter: from {first.acceptance:.0%} acceptance on "
            f"({_drafts(first.depth)}, {first.speed_up:.2f} times plain). --depth auto goes back to plain decoding "
            "where it does not."
        )
    middle = paying[len(paying) // 2]
    return (
        f"Drafting pays: about {middle.speed_up:.2f} times plain decoding at {middle.acceptance:.0%} acceptance with "
        f"{_drafts(middle.depth)} a round. --depth auto finds the depth by itself."
    )


def dear_rows(found: Diagnosis) -> str | None:
    """Verify cost nearly linear in the rows (performance.md, A1 and A2)."""
    row, here, pair = _row_share(found), found.machine, found.pair
    if row < DEAR_ROW or padded_rows(found):
        return None
    measured = f"each further row adds {row:.0%} of a one-row pass"
    main = _main_quantisation(found)
    if here.metal and main and main.mode == "affine" and _generation(found) < M3:
        return (
            f"This chip re-reads affine quantised weights for every row, expect little: {measured}. Weights in mxfp8 "
            "or mxfp4 are read once for several rows on every chip (1.7 and 1.4 times as fast at 4 rows on someone's "
            "M2 Pro); M3 and later do so for affine ones too."
        )
    if pair.mixture:
        return (
            f"The rows of a pass choose experts of their own, and each is read for itself: {measured}. Short drafts "
            "are all that can pay."
        )
    if here.device == "cpu" and main:
        return f"MLX's CPU device computes quantised products row by row: {measured}. Take weights that are not."
    return f"Rows are dear here: {measured}. Only a drafter that is nearly always right can pay."


def padded_rows(found: Diagnosis) -> str | None:
    """Two rows cost as much as eight: dense half precision in front of M3 (performance.md, A1)."""
    two, eight = found.costs.ratio(2), found.costs.ratio(8)
    if two < 1.0 + DEAR_ROW or eight > 1.25 * two:
        return None
    text = (
        f"A pass of 2 rows costs {two:.1f} times one row, and 8 rows cost hardly more ({eight:.1f}): draft deep or not "
        "at all."
    )
    if found.machine.metal and _generation(found) < M3 and not _main_quantisation(found):
        text += " On chips before M3 MLX pads few rows of unquantised weights to a whole tile."
    return text


def second_read(found: Diagnosis) -> str | None:
    """Row 6 is where kernels for few rows start over (performance.md, A1 and A2)."""
    costs = found.costs
    one_read = found.machine.metal and (_generation(found) >= M3 or _floating_mode(found))
    usual = (costs.ratio(ONE_READ) - 1.0) / (ONE_READ - 1)
    leap = costs.ratio(ONE_READ + 1) - costs.ratio(ONE_READ)
    if not one_read or leap < LEAP * max(usual, 0.03):
        return None
    return (
        f"Row {ONE_READ + 1} starts a second read of the weights: it adds {leap:.0%} of a one-row pass where those "
        f"before it add {usual:.0%}. {ONE_READ - 1} drafts a round are the most that fit one read."
    )


def dear_draft(found: Diagnosis) -> str | None:
    """The drafter beside the target (performance.md, B: 1.19 to 1.5 times after 4 bits)."""
    step = found.costs.draft_step
    if step is None or step < DEAR_DRAFT * found.costs.verify[0]:
        return None
    share = f"A draft costs {step / found.costs.verify[0]:.0%} of a one-row pass, which is much"
    if found.machine.device == "gpu" and not found.pair.drafter_quantisation and found.pair.drafter_bytes:
        return share + ": `mlx-mtp convert` stores the drafter in 4 bits, which changes proposals only, not the answer."
    return share + ": a smaller drafter, or fewer drafts a round, would be faster."


def busy_host(found: Diagnosis) -> str | None:
    """Python in the way."""
    costs = found.costs
    wall = costs.drafted or costs.plain
    if costs.build < BUSY_HOST * wall:
        return None
    return (
        f"Python takes {1e3 * costs.build:.1f} ms to build a round that lasts {1e3 * wall:.1f} ms: the device may wait "
        "for it. So small a model is bound by the host, not by its drafter."
    )


def no_compile(found: Diagnosis) -> str | None:
    """mx.compile is off or fails."""
    if found.machine.compile_works:
        return None
    text = "mx.compile does not work, so every round is built anew in Python and its operations are not fused."
    if found.machine.device == "cpu":
        text += " It needs g++ on the path, and a folder 'mlx' of your own in the temporary directory (TMPDIR)."
    return text + " Unset MLX_DISABLE_COMPILE if it is set."


def slow_blas(found: Diagnosis) -> str | None:
    """The reference BLAS of MLX's Linux wheel (performance.md, G)."""
    here = found.machine
    if here.device != "cpu" or (here.blas != blas.REFERENCE and not here.mlx_imported_too_early):
        return None
    cost = (
        "Float products run in MLX's bundled reference BLAS, which took 37 ms where OpenBLAS took 2.4 (8 rows, a "
        "2048 x 2048 matrix, two EPYC cores): "
    )
    if here.mlx_imported_too_early:
        return cost + "a fast one is installed, so import mlx_mtp before mlx."
    return cost + "install OpenBLAS (apt-get install libopenblas0-pthread, or mkl from PyPI)."


def little_memory(found: Diagnosis) -> str | None:
    """Weights near or beyond what may be used (performance.md, A5)."""
    usable, needed = found.machine.usable_bytes, found.pair.bytes + found.pair.drafter_bytes
    if usable is None or needed < FULL_MEMORY * usable:
        return None
    whose = "Metal recommends" if found.machine.recommended_bytes else "this machine has"
    sizes = f"The weights take {needed / GIGABYTE:.1f} GB of the {usable / GIGABYTE:.1f} GB that {whose}"
    if needed > usable:
        return sizes + ": they will be read from disk again and again. Take fewer bits or a smaller model."
    return sizes + ", which leaves little for the context: bound it with --max-context, or take fewer bits."


def not_wired(found: Diagnosis) -> str | None:
    """Weights that macOS may page out (performance.md, A5)."""
    wired, needed = found.machine.wired_limit_bytes, found.pair.bytes + found.pair.drafter_bytes
    recommended = found.machine.recommended_bytes or 0
    if wired is None or wired >= needed or needed > recommended:
        return None
    return (
        f"MLX keeps at most {wired / GIGABYTE:.1f} GB resident (the wired limit) and the weights take "
        f"{needed / GIGABYTE:.1f} GB: macOS may page them out. Small models do not feel it; others saw models of "
        "100 GB decode 40 to 150 times slower. mx.set_wired_limit raises it on macOS 15 and later."
    )


def scattered(found: Diagnosis) -> str | None:
    """A busy machine."""
    scatter = found.costs.scatter
    if scatter < SCATTERED:
        return None
    return (
        f"Times of one and the same pass scatter by {scatter:.0%}: something else is running, so take every figure "
        "here as rough and run this again on an idle machine."
    )


def low_power(found: Diagnosis) -> str | None:
    """A slowed machine."""
    if not found.machine.low_power_mode:
        return None
    return "Low Power Mode is on: every time above is slower than it need be. Switch it off before comparing speeds."


def exact_mode(found: Diagnosis) -> str | None:
    """What bit-equal output costs here, or that it cannot be had."""
    exact, costs = found.exactness, found.costs
    if not exact.possible:
        return (
            "Exact mode decodes plainly here: no way was found to give a row the same bits whatever travels with it. "
            "Mode 'fast' drafts; its law is the target's own up to kernel rounding."
        )
    if exact.width:
        return (
            f"Rows differ in their last bits with the width of a pass, so exact mode fills every pass to {exact.width} "
            f"rows: {costs.ratio(exact.width):.2f} times a one-row pass for each, plain decoding included."
        )
    missing = [str(width) for width in range(2, len(costs.verify) + 1) if width not in exact.equal_widths]
    if not missing:
        return "Exact mode costs nothing here: passes of 1 to 8 rows give the same bits."
    return f"Exact mode leaves out passes of {', '.join(missing)} rows, whose bits differ from those of one row."


def convention(found: Diagnosis) -> str | None:
    """Where the assistant's query stands (gemma4.md, 2.4)."""
    check = found.convention
    if check is None:
        return None
    shares = f"first drafts stood in {check.share_a:.0%} (A) and {check.share_b:.0%} (B) of {check.tokens} places"
    if check.better is None:
        return f"Both conventions of the assistant's query position fit: {shares}, no more apart than chance."
    if check.better == check.used:
        return f"The assistant is run with the query position that fits it, convention {check.used}: {shares}."
    return (
        f"Convention {check.better} of the query position fits this assistant better than {check.used}, with which it "
        f"is run: {shares}. Please report it; in Python, engine.drafter.convention = Convention.{check.better} "
        "(mlx_mtp.drafters.assistant) before the first reply changes it."
    )


def old_mlx(found: Diagnosis) -> str | None:
    """Kernels for few rows came with 0.32.0 and 0.32.1, residency on macOS 27 with 0.32.2 (performance.md, A1, A5)."""
    version = tuple(int(part) for part in re.findall(r"\d+", found.machine.mlx)[:3])
    if not found.machine.metal or version >= (0, 32, 2):
        return None
    return (
        f"MLX {found.machine.mlx} lacks what later ones have: fast passes of few rows over unquantised weights "
        "(0.32.1) and residency on macOS 27 (0.32.2). Update it: pip install -U mlx."
    )


def not_a_gpu(found: Diagnosis) -> str | None:
    """Figures of a CPU."""
    if found.machine.device != "cpu":
        return None
    return "MLX computes on the CPU here, in float32: nothing above says how fast this pair is on a Mac's GPU."


RULES: tuple[tuple[str, Callable[[Diagnosis], str | None]], ...] = (
    ("drafter", drafter_absent), ("noise", scattered), ("outlook", outlook), ("rows", dear_rows),
    ("rows", padded_rows), ("rows", second_read), ("draft", dear_draft), ("host", busy_host), ("compile", no_compile),
    ("BLAS", slow_blas), ("memory", little_memory), ("memory", not_wired), ("power", low_power),
    ("exact mode", exact_mode), ("convention", convention), ("MLX", old_mlx), ("device", not_a_gpu),
)  # fmt: skip


def _row_share(found: Diagnosis) -> float:
    """What a further row adds, up to ONE_READ rows, in one-row passes."""
    return (found.costs.ratio(ONE_READ) - 1.0) / (ONE_READ - 1)


def _drafts(count: int) -> str:
    return f"{count} draft{'' if count == 1 else 's'}"


def _generation(found: Diagnosis) -> int:
    return found.machine.gpu_generation or 0


def _main_quantisation(found: Diagnosis) -> Quantisation | None:
    """How most of the target is stored, if most of it is quantised."""
    kinds = found.pair.quantisation
    return kinds[0] if kinds and sum(kind.bytes for kind in kinds) > 0.5 * found.pair.bytes else None


def _floating_mode(found: Diagnosis) -> bool:
    main = _main_quantisation(found)
    return main is not None and main.mode != "affine"
