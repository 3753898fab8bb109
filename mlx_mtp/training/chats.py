"""Self-generated data: chats that a target has with itself, many at a time, kept with the states that it had.

A drafter meets its target's own output in use, which differs from any corpus (FastMTP, arXiv 2509.18362, section 3.2).
Every row of a batch is fed its next given token or the one that was drawn, so prompts of any length share every pass;
a reply that ends is followed by the next question, so that no pass is padding. Several chats lie in a row one after
the other, and none sees another (ChatCache): in use a chat begins with nothing before it. Loops are cut off and not
learned.

    folder/0000.npz   [R, L]: tokens, mask (GIVEN, REPLY, QUESTION), start (the place where its chat begins), best
                      int32; norm float32, log of sum exp(logits)
    folder/0000.npy   float16 [R, L, D]: states after the final norm; behind them, where a drafter reads more of the
                      target (`aux_layers`), the inputs of those layers over their sizes
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from os.path import commonprefix
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_mtp.backend.activations import logsumexp
from mlx_mtp.checkpoints.atomic import replacing_or_refused
from mlx_mtp.errors import CheckpointError, PromptError
from mlx_mtp.generation.cache import SLACK, AttentionPlan, KVCache
from mlx_mtp.generation.interfaces import Target
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.run_folder import RESUME, hashed

GIVEN, REPLY, QUESTION = range(3)
TEMPERATURES = (0.0, 1.0, 0.0, 0.7)  # of replies, by row; questions are drawn at 1
FOLLOWED = 0.3  # share of replies after which the target asks on
ROWS, LONGEST, LONGEST_QUESTION = 64, 256, 64  # rows at a time; most tokens of a reply, and of a question
GROWTH = 128  # rows of K/V by which the buffers grow: every pass reads all there are
EPS = 1e-6  # of the size that inputs of layers are divided by
LOOP, PERIOD = 48, 16  # so many tokens that repeat with at most this period are a loop
NAMES = "tokens", "mask", "start", "best", "norm"
PLACES = 256  # batches have a multiple of so many tokens of replies, so that few shapes are compiled
# Those [B, L], states [B, L, D] and replies, as replies_of makes them
Batch = tuple[np.ndarray, ...]


class ChatCache(KVCache):
    """K/V of rows that hold several chats; start [B, M] says where the chats of the rows of the next pass begin."""

    start: mx.array

    @classmethod
    def of(cls, target: Target, capacity: int, batch: int, slack: int = SLACK) -> ChatCache:
        """For a target, whose layers may store nothing."""
        own = target.new_cache(capacity, batch)
        dtype = own.keys[0].dtype if own.keys else mx.float32
        return cls(own.shapes, own.window, capacity, dtype, batch, slack)

    def plan(self, rows: int) -> AttentionPlan:
        """A pass of at most `slack` rows."""
        step = super().plan(rows)
        for kind, mask in step.masks.items():
            places = self.positions(kind, self.length + rows)
            step.masks[kind] = mask & (places[:, None, None, :] >= self.start[:, None, :, None])
        return step


@dataclass(frozen=True)
class Script:
    """What a target is given to read. prompts: ids up to where a reply begins; the target asks itself where there are
    none. first, later: ids up to where it writes a question, at the beginning of a chat and after a reply. reply: ids
    between a question and its reply; empty where there is no chat template, and texts are written. stops: end either.
    """

    prompts: Sequence[Sequence[int]]
    first: list[int]
    later: list[int]
    reply: list[int]
    stops: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], stops: set[int]) -> Script:
        """Read off what the chat template makes of short chats."""

        def said(*contents: str) -> list[int]:
            roles = ("user", "assistant", "user")
            return tokenizer.chat([{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)])

        try:
            one, other = said("Apples"), said("zebra")
        except PromptError:
            one = other = []
        if one == other:  # no template, or a tokenizer that knows no word
            text = tokenizer.opening([]) or sorted(stops)[:1] or [0]
            return cls(prompts, text, [], [], frozenset(stops))
        first, reply = list(commonprefix([one, other])), list(commonprefix([one[::-1], other[::-1]]))[::-1]
        whole, spoken = said("Apples", "Yes", "Apples"), tokenizer.encode("Yes", special=False)
        start = len(one) + len(spoken)
        later = whole[start : len(whole) - (len(one) - len(first))]
        known = whole[:start] == [*one, *spoken]  # else no question is asked on
        return cls(prompts, first, later if known else [], reply, frozenset(stops))

    def follows(self, random: np.random.Generator) -> bool:
        """Whether the target asks on after a reply."""
        return bool(self.later) and random.random() < FOLLOWED

    def begin(self, random: np.random.Generator) -> tuple[list[int], bool]:
        """Ids that a chat begins with, and whether the target then writes a question."""
        if self.prompts:
            return list(self.prompts[int(random.integers(len(self.prompts)))]), False
        return list(self.first), bool(self.reply)


class _Row:
    """One row of a batch, and where its chat stands."""

    def __init__(
        self, script: Script, random: np.random.Generator, temperature: float, avoided: frozenset[Any]
    ) -> None:
        self.script, self.random, self.temperature, self.avoided = script, random, temperature, avoided
        self.given, self.asks = script.begin(random)
        self.start = 0  # the place where its chat begins
        self.said: list[int] = []
        self.known = False  # the question is one of those held out: what follows is not learned

    @property
    def heat(self) -> float:
        """The temperature of what it writes now."""
        return 1.0 if self.asks else self.temperature

    def put(self, drawn: int, place: int, tokens: np.ndarray, mask: np.ndarray, start: np.ndarray) -> None:
        """The token at `place` of a row's arrays [L]: the next given one, or the one that was drawn."""
        start[place] = self.start
        if self.given:
            tokens[place] = self.given.pop(0)
            return
        self.said.append(drawn)
        tokens[place], mask[place] = drawn, QUESTION if self.asks else GIVEN if self.known else REPLY
        if drawn in self.script.stops:
            self._turn(drawn, place)
        elif loops(self.said):
            mask[max(0, place + 1 - LOOP + PERIOD) : place + 1] = GIVEN
            self._turn(None, place)
        elif len(self.said) >= (LONGEST_QUESTION if self.asks else LONGEST):
            self._turn(None, place)

    def _turn(self, stop: int | None, place: int) -> None:
        """The question or the reply has ended at `place`, by itself or cut off."""
        goes_on = self.asks or self.script.follows(self.random)
        if self.asks:
            self.known = tuple(self.said) in self.avoided
            self.given, self.asks = list(self.script.reply), False
        else:
            self.known = False
            if goes_on:
                self.given, self.asks = list(self.script.later), True
            else:
                self.start, (self.given, self.asks) = place + 1, self.script.begin(self.random)
        if goes_on and self.given[:1] == [stop]:
            self.given.pop(0)
        self.said = []


def loops(said: list[int]) -> bool:
    """Whether the last tokens repeat with a short period."""
    tail = said[-LOOP:]
    return len(tail) == LOOP and any(tail[period:] == tail[:-period] for period in range(1, PERIOD + 1))


def write_chats(
    target: Target, script: Script, folder: Path, *, tokens: int, length: int, seed: int,
    avoided: frozenset[Any] = frozenset(), aux_layers: Sequence[int] = (),
) -> Iterator[tuple[int, int]]:  # fmt: skip
    """Writes at least so many tokens into `folder`, what is there already aside; yields how many of how many there are.

    avoided: questions of the chats held out, which are not learned from where the target asks them again. aux_layers:
    whose inputs are kept too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-tokens // (ROWS * length))
    rows = max(2, -(-tokens // (shards * length)))  # as many in each
    for number in range(shards):
        file = folder / f"{number:04}.npz"
        if not file.exists():
            arrays = yield from _shard(target, script, rows, length, (seed, number), avoided, shards, aux_layers)
            with replacing_or_refused(file.with_suffix(".npy"), RESUME) as fresh:
                np.save(fresh, arrays.pop("states"))
            with replacing_or_refused(file, RESUME) as fresh:
                np.savez_compressed(fresh, **arrays)


def _shard(
    target: Target, script: Script, rows: int, length: int, seed: tuple[int, int], avoided: frozenset[Any], shards: int,
    aux_layers: Sequence[int],
) -> Generator[tuple[int, int], None, dict[str, Any]]:  # fmt: skip
    """The arrays of shard seed[1] of so many; yields as write_chats does."""
    random, cache = np.random.default_rng(seed), ChatCache.of(target, min(length, GROWTH), rows)
    chats = [_Row(script, random, TEMPERATURES[i % len(TEMPERATURES)], avoided) for i in range(rows)]

    def one_pass(tokens: mx.array, start: mx.array, heat: mx.array, key: mx.array, memory: Any) -> Any:
        inner = cache.around(memory)
        inner.start = start
        states = target.forward(tokens, inner, 1).of_layers(aux_layers)
        inner.advance(1)
        logits, (key, draw) = target.head(states.hidden)[:, 0], mx.random.split(key)
        best = mx.argmax(logits, axis=-1)
        drawn = mx.random.categorical(logits / mx.maximum(heat, 0.01)[:, None], key=draw)
        kept = mx.concatenate([states.hidden, *(mx.fast.rms_norm(state, None, EPS) for state in states.aux)], axis=-1)
        found = mx.where(heat > 0, drawn, best), best, logsumexp(logits), kept[:, 0].astype(mx.float16)
        return found, key, inner.arrays

    compiled, key, memory = mx.compile(one_pass), mx.random.key(int(random.integers(1 << 31))), cache.arrays
    tokens, mask, start = np.zeros((3, rows, length), np.int32)
    drawn: Any = [0] * rows
    kept: list[Any] = []
    for place in range(length):
        if place == cache.capacity:
            cache = cache.around(memory)
            cache.grow(place + GROWTH)
            memory, cache = cache.arrays, cache.layout()  # nothing else may hold the buffers: they are written in place
        for i, row in enumerate(chats):
            row.put(drawn[i], place, tokens[i], mask[i], start[i])
        heat = mx.array([row.heat for row in chats])
        put, began = (mx.array(part[:, place : place + 1]) for part in (tokens, start))
        found, key, memory = compiled(put, began, heat, key, memory)
        mx.eval(found, key, memory)
        drawn, kept = found[0].tolist(), [*kept, found[1:]]
        yield (seed[1] * length + place + 1) * rows, shards * rows * length
    best, norm, states = (np.stack([np.array(one) for one in part], axis=1) for part in zip(*kept, strict=True))
    return {"tokens": tokens, "mask": mask, "start": start, "best": best.astype(np.int32), "norm": norm,
            "states": states}  # fmt: skip


def replies_of(mask: np.ndarray, parts: int = 1) -> np.ndarray:
    """Where the tokens of replies are in a mask [B, L], int32 [B, R / B]: for every one of so many equal parts of the
    rows, the numbers of its own B / parts * L places, in order, and 0 for want of more."""
    pieces = mask.reshape(parts, -1) == REPLY
    rows = len(mask) // parts
    most = -(-max(1, pieces.sum(axis=1).max()) // PLACES) * PLACES
    found = np.zeros((parts, rows, -(-most // rows)), np.int32)
    for piece, into in zip(pieces, found.reshape(parts, -1), strict=True):
        there = np.flatnonzero(piece)
        into[: len(there)] = there
    return found.reshape(len(mask), -1)


class Chats:
    """What write_chats left in a folder. Raises CheckpointError for a file that is not whole."""

    def __init__(self, folder: Path) -> None:
        found: list[list[np.ndarray]] = []
        self._states: list[np.ndarray] = []
        for file in sorted(folder.glob("*.npz")):
            try:
                with np.load(file) as arrays:
                    found.append([arrays[name] for name in NAMES])
                self._states.append(np.load(file.with_suffix(".npy"), mmap_mode="r"))
            except Exception as error:  # zipfile and NumPy raise what they like
                raise CheckpointError(f"{file}: not chats of this trainer ({error}); delete it.") from error
        self.tokens, self.mask, *self._others = map(np.concatenate, zip(*found, strict=True))
        self._rows = [(i, row) for i, states in enumerate(self._states) for row in range(len(states))]

    @property
    def name(self) -> str:
        """A hash of what there is to learn."""
        return hashed((self.tokens.tobytes(), self.mask.tobytes()))

    @property
    def width(self) -> int:
        """Numbers that are kept of a token's states."""
        return int(self._states[0].shape[2])

    @property
    def size(self) -> np.ndarray:
        """Root mean square of every number that is kept, [width], over the first shard."""
        return np.asarray(np.sqrt(np.square(self._states[0], dtype=np.float32).mean(axis=(0, 1))))

    def rows(self, which: Sequence[int], parts: int = 1) -> Batch:
        """Rows as the losses take them, in so many equal parts."""
        states = np.stack([self._states[shard][row] for shard, row in (self._rows[i] for i in which)])
        arrays = [array[list(which)] for array in (self.tokens, self.mask, *self._others)]
        return *arrays, states, replies_of(arrays[1], parts)

    def batches(self, batch_size: int, seed: int, parts: int = 1) -> Callable[[int], Batch]:
        """Batches as a pure function of the step; an epoch visits every row once, but for those left over."""
        each = max(1, len(self.tokens) // batch_size)

        def batch(step: int) -> Batch:
            epoch, index = divmod(step, each)
            order = np.random.default_rng((seed, epoch)).permutation(len(self.tokens))
            return self.rows(order[index * batch_size : (index + 1) * batch_size].tolist(), parts)

        return batch

    def frequent(self, count: int, vocabulary: int) -> np.ndarray:
        """The ids that are most often written, int32 [count] in rising order."""
        counts = np.bincount(self.tokens[self.mask != GIVEN], minlength=vocabulary)
        return np.sort(np.argsort(-counts, kind="stable")[:count]).astype(np.int32)

    def questions(self) -> frozenset[tuple[int, ...]]:
        """What the target asked itself."""
        found: set[tuple[int, ...]] = set()
        for tokens, mask in zip(self.tokens.tolist(), self.mask.tolist(), strict=True):
            runs = groupby(zip(tokens, mask, strict=True), lambda place: place[1])
            found |= {tuple(token for token, _ in run) for kind, run in runs if kind == QUESTION}
        return frozenset(found)

    def prompts(self, most: int) -> list[list[int]]:
        """What stands in front of the first reply of the rows, for measuring."""
        starts = [(row, int(np.argmax(mask == REPLY))) for row, mask in enumerate(self.mask)]
        return [self.tokens[row, :start].tolist() for row, start in starts if start][:most]
