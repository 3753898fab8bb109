"""Seeded faults: is each of them caught by the tests?

Puts one fault at a time into a scratch copy of the tree, runs the tests that should notice, and says "caught", and by
which test, or "NOT caught". A selection of tests that finds none, or of which one is skipped, is an error: it notices
nothing.

    python tools/mutations.py                 all of them, after the same tests passed on the unchanged copy
    python tools/mutations.py ring window     only those whose name holds one of the words
    python tools/mutations.py --list

Exit code 0 when all were caught; 1 when one was not, when a source text is no longer there exactly once, when the
tests fail without any fault, or when they are not all run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("mlx_mtp", "cli", "benchmarks", "tests", "pyproject.toml")
PATIENCE = 600
SKIPPED = "skipped without an excuse"


@dataclass(frozen=True)
class Fault:
    """`old` in `file` becomes `new`; `tests` are pytest's arguments, of which a `-k` goes with the file before it."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


ENUMERATION = ("tests/test_sampling.py", "-k", "enumeration")
CACHE = ("tests/test_cache.py",)
EXACT = ("tests/test_exact.py", "-k", "device or probe or traced")
LOOP = ("tests/conformance.py", "-k", "ple and lookup and every_depth")
CONSTRAINT = ("tests/test_constraint.py", "-k", "masks or thoughts")
CALLS = ("tests/test_call_grammar.py", "-k", "template_writes")
REPLY = ("tests/test_reply.py", "-k", "like_a_search or every_depth")
FAULTS = (
    Fault("acceptance, token by token: q / p in place of p / q", "mlx_mtp/generation/acceptance.py",
          "Odds(mx.minimum(before.at(drafts) / q.at(drafts), 1.0)",
          "Odds(mx.minimum(q.at(drafts) / before.at(drafts), 1.0)", ENUMERATION),
    Fault("acceptance, greedy: a draft after a wrong one is accepted", "mlx_mtp/generation/acceptance.py",
          "accepted = mx.cumprod(agrees, axis=1).sum(axis=1)", "accepted = agrees.sum(axis=1)", LOOP),
    Fault("acceptance: one random key for two draws", "mlx_mtp/generation/acceptance.py",
          "mx.random.uniform(shape=(batch, depth), key=keys[0])",
          "mx.random.uniform(shape=(batch, depth), key=keys[1])",
          ("tests/test_sampling.py", "-k", "rounds_follow")),
    Fault("residual: p in place of p - q", "mlx_mtp/generation/acceptance.py",
          "excess = mx.maximum(before.probabilities - q.on(before), 0.0)", "excess = before.probabilities",
          ENUMERATION),
    Fault("block verification: the excess without the block's weight", "mlx_mtp/generation/acceptance.py",
          "weight[:, :depth, None] * before.probabilities - q.on(before)", "before.probabilities - q.on(before)",
          ENUMERATION),
    Fault("block verification: every draft by itself", "mlx_mtp/generation/acceptance.py",
          "mx.minimum(weights[-1] * ratio[:, i], 1.0)", "mx.minimum(ratio[:, i], 1.0)", ENUMERATION),
    Fault("sampled: greedy in place of the distribution", "mlx_mtp/generation/sampling.py",
          "greedy=not filtered,", "greedy=True,", ("tests/test_sampling.py", "-k", "rounds_follow")),
    Fault("penalties: a draft does not count for the next but one", "mlx_mtp/generation/sampling.py",
          "mx.concatenate([start, start + mx.cumsum(found, axis=1)], axis=1)",
          "mx.concatenate([start, start + found], axis=1)",
          ("tests/test_sampling.py", "-k", "penalties")),
    Fault("training: a chat sees the one before it in its row", "mlx_mtp/training/chats.py",
          "mask & (places[:, None, None, :] >= self.start[:, None, :, None])", "mask",
          ("tests/test_chats.py", "-k", "targets_and_so")),
    Fault("training: a drafter sees the chat before", "mlx_mtp/drafters/layers.py",
          "return start[:, None, :, None] == start[:, None, None, :]", "return start[:, None, :, None] >= 0",
          ("tests/test_objectives.py", "-k", "see_each")),
    Fault("ring: rows in the slots of their neighbours", "mlx_mtp/generation/cache.py",
          "step.slots[kind] = queries % ring", "step.slots[kind] = (queries + 1) % ring", CACHE),
    Fault("ring: half the slack", "mlx_mtp/generation/cache.py",
          "min(self.capacity, self.window + self.slack)", "min(self.capacity, self.window + self.slack // 2)",
          ("tests/test_cache.py", "-k", "plain_list")),
    Fault("ring: a rolled-back session trusts rows that are gone", "mlx_mtp/generation/prefix.py",
          "+ cache.slots(SLIDING) > newest", "+ cache.slots(SLIDING) > newest - 8",
          ("tests/test_session.py", "-k", "ring")),
    Fault("positions: slots one too old", "mlx_mtp/generation/cache.py",
          "return newest - (newest - slots) % self.slots(kind)",
          "return newest - 1 - (newest - 1 - slots) % self.slots(kind)", CACHE),
    Fault("positions: the last rows rotated as if they were the first", "mlx_mtp/generation/cache.py",
          "AttentionPlan(self.offset + (total - rows), masks", "AttentionPlan(self.offset, masks",
          ("tests/test_gemma4.py",)),
    Fault("positions: the drafter asks from one place later", "mlx_mtp/drafters/assistant.py",
          "return length - self.convention.value, shared", "return length, shared",
          ("tests/test_drafters.py", "-k", "four_steps")),
    Fault("masks: a window of one more", "mlx_mtp/generation/cache.py",
          "(keys > rows - window)", "(keys >= rows - window)", CACHE),
    Fault("masks: a full layer sees one row of the future", "mlx_mtp/generation/cache.py",
          "return keys <= rows if window", "return keys <= rows + 1 if window", CACHE),
    Fault("roll-back: rejected rows are kept", "mlx_mtp/generation/round.py",
          "cache.advance(output[0][:, -1] + 1)", "cache.advance(rows.shape[1])", LOOP),
    Fault("roll-back: the drafter continues from the last row's state", "mlx_mtp/generation/round.py",
          "mx.take_along_axis(states.hidden, accepted[:, None, None], axis=1)", "states.hidden[:, -1:]",
          ("tests/test_properties.py", "-k", "round")),
    Fault("roll-back: the drafter hears of no accepted draft", "mlx_mtp/generation/round.py",
          "states, accepted)\n                tree", "states, accepted * 0)\n                tree",
          ("tests/test_properties.py", "-k", "round")),
    Fault("cache length: buffers grow eight rows too late", "mlx_mtp/generation/loop.py",
          "if rows > state.cache.capacity:", "if rows > state.cache.capacity + 8:",
          ("tests/test_properties.py", "-k", "round")),
    Fault("cache length: a kept conversation begins one row late", "mlx_mtp/generation/prefix.py",
          "mx.array([length - (back or 0)], dtype=mx.int32)", "mx.array([length], dtype=mx.int32)",
          ("tests/conformance.py", "-k", "ple and sessions")),
    Fault("exact mode: the canonical width forced where the probe says no", "mlx_mtp/generation/exactness.py",
          "    return Exactness((0,), None)\n", "    return Exactness(tuple(range(CANONICAL)), CANONICAL)\n", EXACT),
    Fault("exact mode: a prefill that differs by family", "mlx_mtp/generation/loop.py",
          "wants_all = self.exact is not None or ", "wants_all = ", EXACT),
    Fault("exact mode: one capacity is asked about for all", "mlx_mtp/generation/exactness.py",
          "probe(self.target, capacity)", "probe(self.target)", EXACT),
    Fault("exact mode: the K/V that several rows leave are not compared", "mlx_mtp/generation/exactness.py",
          "left += (mx.take(buffer, slots, axis=2) for buffer in (keys, values))", "pass", EXACT),
    Fault("exact mode: the pass is fused with the rest of the round", "mlx_mtp/generation/round.py",
          "apart = self._exact is not None and state.spec.greedy", "apart = False", EXACT),
    Fault("exact mode: a conversation goes on from as far as the reply came", "mlx_mtp/generation/loop.py",
          "None if self.exact else int(self._reads_states)", "int(self._reads_states)", EXACT),
    Fault("exact mode: a session knows of tokens after the end of a reply", "mlx_mtp/generation/loop.py",
          "[] if self.exact else decoding.emitted[:-1]", "decoding.emitted[:-1]", EXACT),
    Fault("exact mode: the end of a prompt is run again for its state", "mlx_mtp/generation/prefix.py",
          "return length, snapshot.states", "return length, None", EXACT),
    Fault("stop strings: what may become one is shown", "mlx_mtp/text/tokenizer.py",
          "shown, self._held = without_beginnings(self._held, self._stops)", "shown, self._held = self._held, \"\"",
          REPLY),
    Fault("stop strings: the reply is cut one token late", "mlx_mtp/generation/reply.py",
          "bisect_left(self._ends, place) + 1", "bisect_left(self._ends, place) + 2", REPLY),
    Fault("stop strings: thoughts are searched too", "mlx_mtp/generation/reply.py",
          "if not piece.answer:", "if not piece.answer and not piece.thinking:", REPLY),
    Fault("statistics: drafts that a stop cut off count as accepted", "mlx_mtp/generation/types.py",
          "min(drafted, kept), min(accepted, kept)", "min(drafted, kept), accepted",
          ("tests/test_reply.py", "-k", "accepted")),
    Fault("sessions: what came after a stop is part of the conversation", "mlx_mtp/generation/prefix.py",
          "del self.ids[length:]", "del self.ids[length + 8 :]", ("tests/test_reply.py", "-k", "fresh_run")),
    Fault("constraint: the masks are those of one draft before", "mlx_mtp/generation/constraint.py",
          "if self._moves(draft):\n                consumed",
          "if self._moves(draft) and consumed:\n                consumed",
          CONSTRAINT),
    Fault("constraint: a thought is held to the grammar", "mlx_mtp/generation/constraint.py",
          "        if self._thinking:\n            for token", "        if False:\n            for token", CONSTRAINT),
    Fault("constraint: a reply may end within a thought", "mlx_mtp/generation/constraint.py",
          "mask[token // WORD] &= ~np.uint32(1 << token % WORD)", "pass", CONSTRAINT),
    Fault("constraint: a forced draft keeps the drafter's distribution", "mlx_mtp/generation/sampling.py",
          "distribution = distribution.overridden(mask, token)", "pass", ("tests/test_constraint.py", "-k", "forced")),
    Fault("tools: a second call where one was asked for", "mlx_mtp/text/call_grammar.py",
          "if choice.several and between is not None and names:", "if between is not None and names:", CALLS),
    Fault("tools: what is required may be left out", "mlx_mtp/text/call_grammar.py",
          "first = [begin] if needed else [begin, *first]", "first = [begin, *first]", CALLS),
    Fault("sessions: a fork shares its rows", "mlx_mtp/generation/prefix.py",
          "cache.keys, cache.values = [*map(mx.array, cache.keys)], [*map(mx.array, cache.values)]", "pass",
          ("tests/test_session.py", "-k", "fork")),
    Fault("lookup: what was expected once is expected for ever", "mlx_mtp/generation/loop.py",
          "if drafter is not None:\n            memory = drafter.expect",
          "if drafter and request.prediction:\n            memory = drafter.expect",
          ("tests/test_engine.py", "-k", "prediction")),
    Fault("scoring: a token's logprob in the place of the one before", "mlx_mtp/generation/scoring.py",
          "ids[start + 1 : start + ROWS + 1]", "ids[start : start + ROWS][: len(ids) - 1 - start]",
          ("tests/test_interfaces.py", "-k", "logprobs_of_a_prompt")),
    Fault("constraint: masks know nothing of the drafts before them", "mlx_mtp/generation/constraint.py",
          "consumed += self._matcher.consume_token(draft)", "pass",
          ("tests/test_constraint.py", "-k", "enumeration and 6")),
)  # fmt: skip


def places(fault: Fault, root: Path = ROOT) -> int:
    """How often the text that a fault replaces is in its file; it must be once."""
    return (root / fault.file).read_text(encoding="utf-8").count(fault.old)


def scratch(folder: Path) -> Path:
    """A copy of the tree; the embedded model, which no fault touches, is linked."""
    assets = ROOT / "mlx_mtp" / "assets"
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            # mlx_mtp/cli may be a link into the checkout, which would bring the unchanged command line.
            skipped = shutil.ignore_patterns("__pycache__", "standard-library", *(["cli"] if name == "mlx_mtp" else []))
            shutil.copytree(source, folder / name, ignore=skipped)
        else:
            shutil.copy(source, folder / name)
    (folder / "mlx_mtp" / "cli").symlink_to(Path("..", "cli"))
    (folder / "mlx_mtp" / "assets" / "standard-library").symlink_to(assets / "standard-library")
    return folder


class NotRun(Exception):
    """A selection of tests that finds none, or does not run all that it finds."""


def run(folder: Path, tests: tuple[str, ...]) -> tuple[int, str]:
    """pytest's exit code (0 passed, 1 some failed or hung, below 0 a crash) and the test that failed.

    NotRun where pytest could not run the selection, or skipped some of it.
    """
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    report = folder / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            timeout=PATIENCE,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 1, f"nothing within {PATIENCE} s"
    check_that_all_ran(done.returncode, report, tests)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+?::.*?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed[0] if failed else f"exit code {done.returncode}"


def check_that_all_ran(code: int, report: Path, tests: tuple[str, ...]) -> None:
    """NotRun unless pytest ran at least one test of the selection and skipped none; a crash is none of its business."""
    if code > 1:  # 2 a file that cannot be read, 4 a wrong option or path, 5 no test at all
        raise NotRun(f"pytest ended with {code} for {' '.join(tests)}; are these tests still there?")
    if code < 0:
        return
    cases = list(ElementTree.parse(report).iter("testcase"))
    # tests/skips.py makes a skip a failure, which must not count as a catch.
    skipped = [case for case in cases if any(one.tag == "skipped" or SKIPPED in (one.text or "") for one in case)]
    if skipped or not cases:
        raise NotRun(f"{len(skipped)} of {len(cases)} tests of {' '.join(tests)} were skipped; they notice nothing")


def survivors(faults: list[Fault], folder: Path) -> list[Fault]:
    """Those that no test noticed."""
    missed = []
    for fault in faults:
        file = folder / fault.file
        whole = file.read_text(encoding="utf-8")
        file.write_text(whole.replace(fault.old, fault.new), encoding="utf-8")
        try:
            code, test = run(folder, fault.tests)
        finally:
            file.write_text(whole, encoding="utf-8")
        print(f"{'caught    ' if code else 'NOT caught'}  {fault.name}{f'  ({test})' if code else ''}", flush=True)
        if not code:
            missed.append(fault)
    return missed


def main() -> int:
    """Runs the faults that were asked for; the exit code."""
    parser = argparse.ArgumentParser(description="Seeded faults: is each of them caught by the tests?")
    parser.add_argument("words", nargs="*", help="only faults whose name holds one of these words")
    parser.add_argument("--list", action="store_true", help="only name the faults")
    asked = parser.parse_args()
    faults = [fault for fault in FAULTS if not asked.words or any(word in fault.name for word in asked.words)]
    if stale := [fault for fault in faults if places(fault) != 1]:
        for fault in stale:
            print(f"{fault.name}: expected its text once in {fault.file}, found it {places(fault)} times")
        return 1
    if asked.list:
        print(*(fault.name for fault in faults), sep="\n")
        return 0
    with tempfile.TemporaryDirectory(prefix="mlx-mtp-mutations-") as place:
        folder = scratch(Path(place))
        try:
            for tests in dict.fromkeys(fault.tests for fault in faults):
                if run(folder, tests)[0]:
                    print(f"{' '.join(tests)} fails without any fault; mend that first")
                    return 1
            missed = survivors(faults, folder)
        except NotRun as error:
            print(error)
            return 1
    print(f"{len(faults) - len(missed)} of {len(faults)} faults caught")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
