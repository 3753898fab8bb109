"""What to do about a diagnosis, in plain words.

Pure functions of measured facts (diagnosis.Diagnosis), one a piece of advice, each something that its reader can do;
what the depth control does by itself, and what is only good to know, is in the doctor's tables. Nothing is claimed that
was neither measured in this run nor by a source named beside the rule; numbers of other people's machines are said to
be that. "Rows" are the tokens that one pass over the target checks.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from mlx_mtp.backend import blas
from mlx_mtp.measuring.diagnosis import Diagnosis, Quantisation

# A row is dear from this share of a one-row pass on: a draft that is accepted less often than that loses time, whatever
# the depth. M1 and M2 with affine 4-bit weights: 65 to 80 %.
DEAR_ROW = 0.5
ONE_READ = 5  # rows that Metal's kernels for few rows hold in one read of the weights
# From this share of a one-row pass on, the draft step is what limits the speed.
DEAR_DRAFT = 0.25
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
            f"Drafting does not pay here even where {found.choices[-1].acceptance:.0%} of the drafts are accepted: "
            "plain decoding (--depth 0) is as fast."
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
    """Weights whose verify cost is nearly linear in the rows, where others would do better (performance.md, A1, A2)."""
    here, main = found.machine, _main_quantisation(found)
    row = (found.costs.ratio(ONE_READ) - 1.0) / (ONE_READ - 1)
    if row < DEAR_ROW or main is None:
        return None
    measured = f"each further row adds {row:.0%} of a one-row pass"
    if here.metal and main.mode == "affine" and (here.gpu_generation or 0) < M3:
        return (
            f"This chip re-reads affine quantised weights for every row, expect little: {measured}. Weights in mxfp8 "
            "or mxfp4 are read once for several rows on every chip (1.7 and 1.4 times as fast at 4 rows on someone's "
            "M2 Pro); M3 and later do so for affine ones too."
        )
    if here.device == "cpu":
        return f"MLX's CPU device computes quantised products row by row: {measured}. Take weights that are not."
    return None


def dear_draft(found: Diagnosis) -> str | None:
    """A drafter in full precision that takes much beside the target (performance.md, B: 1.19 to 1.5 after 4 bits)."""
    step, pair = found.costs.draft_step, found.pair
    if step is None or step < DEAR_DRAFT * found.costs.verify[0]:
        return None
    if found.machine.device != "gpu" or pair.drafter_quantisation or not pair.drafter_bytes:
        return None
    return (
        f"A draft costs {step / found.costs.verify[0]:.0%} of a one-row pass, which is much: `mlx-mtp convert` stores "
        "the drafter in 4 bits, which changes proposals only, not the answer."
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
    """Exact mode without drafts."""
    if found.exactness.possible or found.mode != "exact":
        return None
    return (
        "Exact mode decodes plainly here: no way was found to give a row the same bits whatever travels with it. "
        "--mode fast drafts; its distribution is the target's own up to kernel rounding."
    )


def convention(found: Diagnosis) -> str | None:
    """An assistant run with the wrong position of its query (gemma4.md, 2.4)."""
    check = found.convention
    if check is None or check.better in (None, check.used):
        return None
    return (
        f"Convention {check.better} of the query position fits this assistant better than {check.used}, with which it "
        f"is run: {check.share_a:.0%} (A) and {check.share_b:.0%} (B) of the first drafts were accepted at "
        f"{check.tokens} places. Please report it; in Python, engine.drafter.convention = Convention.{check.better} "
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


RULES: tuple[tuple[str, Callable[[Diagnosis], str | None]], ...] = (
    ("drafter", drafter_absent), ("noise", scattered), ("outlook", outlook), ("rows", dear_rows), ("draft", dear_draft),
    ("compile", no_compile), ("BLAS", slow_blas), ("memory", little_memory), ("power", low_power),
    ("exact mode", exact_mode), ("convention", convention), ("MLX", old_mlx),
)  # fmt: skip


def _drafts(count: int) -> str:
    return f"{count} draft{'' if count == 1 else 's'}"


def _main_quantisation(found: Diagnosis) -> Quantisation | None:
    """How most of the target is stored, if most of it is quantised."""
    kinds = found.pair.quantisation
    return kinds[0] if kinds and sum(kind.bytes for kind in kinds) > 0.5 * found.pair.bytes else None
