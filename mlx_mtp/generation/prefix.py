"""What a conversation has computed: the K/V of its tokens, kept from one request to the next.

Invariant: `ids` are tokens whose K/V rows are in the cache, in order. A session that a request has acquired is empty
until that request releases it; so whatever happens to a request, a session never holds rows it does not know.

A new prompt begins where it first differs from what is there. Rolling a full layer back is a smaller length. A ring
has forgotten what its newest rows overwrote: it can only go back by its slack, and beyond that to the last snapshot, a
copy of the rings made where a prompt ended.

In exact mode a session only ever goes on from such an end of a prompt: which rows a reply leaves, and with how many
others they were computed, depends on the drafter, and so would everything after them.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_

import mlx.core as mx
from mlx.utils import tree_map

from mlx_mtp.backend import threads
from mlx_mtp.errors import OptionError
from mlx_mtp.generation.cache import SLIDING, KVCache
from mlx_mtp.generation.interfaces import Drafter, Memory, States, Target

# Most bytes of ring copies a session keeps; the newest is always kept.
SNAPSHOT_BYTES = 256_000_000

# What K/V and memory belong to: a target, a drafter, and whether passes are those of the exact mode.
Pair = tuple[Target, Drafter | None, bool]
_taking = threading.Lock()


@dataclass(frozen=True)
class Snapshot:
    """The rings as they were when the first `length` tokens, and rows up to `newest`, had been written.

    states: of the last of these tokens; None where nobody will ask.
    """

    length: int
    newest: int
    rings: dict[int, tuple[mx.array, mx.array]]
    states: States | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the copies."""
        return sum(keys.nbytes + values.nbytes for keys, values in self.rings.values())

    def restore(self, cache: KVCache) -> None:
        """Puts the rings back, into buffers that may have grown since; what was stored keeps its slot."""
        for layer, rings in self.rings.items():
            for buffers, ring in zip((cache.keys, cache.values), rings, strict=True):
                missing = buffers[layer].shape[2] - ring.shape[2]
                buffers[layer] = mx.pad(ring, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else mx.array(ring)
        cache.newest = self.newest


@dataclass
class Lease:
    """What a request takes from a session: a cache and a drafter's memory."""

    cache: KVCache
    memory: Memory


@dataclass
class Session:
    """The K/V of one conversation. Give it to `Engine.stream` and the next prompt only costs what is new in it."""

    ids: list[int] = field(default_factory=list)
    snapshots: list[Snapshot] = field(default_factory=list)
    lease: Lease | None = None
    busy: bool = False
    _pair: tuple[object, ...] = ()  # who filled it, as `_weak` writes it

    @property
    def nbytes(self) -> int:
        """Bytes of all K/V kept, snapshots included."""
        buffers = [] if self.lease is None else [*self.lease.cache.keys, *self.lease.cache.values]
        return sum(buffer.nbytes for buffer in buffers) + sum(snapshot.nbytes for snapshot in self.snapshots)

    def clear(self) -> None:
        """Forgets everything."""
        self.ids, self.snapshots, self.lease = [], [], None

    def common(self, ids: Sequence[int]) -> int:
        """How many tokens of `ids` in front are those of the session."""
        pairs = zip(self.ids, ids, strict=False)
        return next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), min(len(self.ids), len(ids)))

    def check(self, pair: Pair) -> None:
        """OptionError where another pair has filled it, or another reply has it."""
        if self.busy:
            raise OptionError("Expected a session that is free, found it in use by another reply; finish that first.")
        if self.lease is not None and not all(map(is_, self._pair, _weak(pair))):
            raise OptionError(
                "Expected a session of this engine, found one that another engine has filled (another model, drafter "
                "or mode, or the same ones loaded again); use a new session, or Chat.moved for a chat."
            )

    def fill(self, pair: Pair, lease: Lease, ids: Sequence[int]) -> None:
        """Takes over what a pair has computed elsewhere."""
        self._pair = _weak(pair)
        self.lease, self.ids, self.snapshots = lease, list(ids), []

    @threads.device_work
    def fork(self) -> Session:
        """The same once more, for a conversation that begins alike and goes another way; copies the rows.

        `mx.array` for the reason that `snapshot` gives; evaluated, since lazy arrays belong to the thread that made
        them.
        """
        other = Session(list(self.ids), list(self.snapshots), _pair=self._pair)
        if self.lease is not None:
            cache = copy.copy(self.lease.cache)
            cache.keys, cache.values = [*map(mx.array, cache.keys)], [*map(mx.array, cache.values)]
            memory = tree_map(lambda leaf: mx.array(leaf) if isinstance(leaf, mx.array) else leaf, self.lease.memory)
            mx.eval(cache.keys, cache.values, memory)
            other.lease = Lease(cache, memory)
        return other

    def acquire(self, ids: Sequence[int], back: int | None, pair: Pair) -> tuple[Lease, int, States | None] | None:
        """The cache rolled back to as many tokens of `ids` as it can, that number, and the last one's states.

        back: rows before that number which the caller runs again, for states that it then needs (and whose windows must
        be intact too); at least the last token of `ids` is left to run. None: for exact mode, where what is found
        depends on the prompts so far and on nothing else: the end of the longest prompt that `ids` begin with. pair:
        who asks. OptionError as for `check`.
        """
        with _taking:
            self.check(pair)
            self.busy = True
        lease, self._pair = self.lease, _weak(pair)
        length, states = self._reach(lease.cache, ids, back) if lease else (0, None)
        self.lease, self.ids = None, []
        self.snapshots = [snapshot for snapshot in self.snapshots if snapshot.length <= length]
        if lease is None or not length:
            return None
        lease.cache.length = mx.array([length - (back or 0)], dtype=mx.int32)
        return lease, length, states

    def _reach(self, cache: KVCache, ids: Sequence[int], back: int | None) -> tuple[int, States | None]:
        """The most tokens of `ids` whose rows are all there, after bringing old rings back if it must."""
        wanted, again = self.common(ids), back or 0
        if back is not None:
            wanted = min(wanted, len(ids) - 1)
            if again < wanted and _intact(cache, wanted - again, cache.newest):
                return wanted, None
        for snapshot in reversed(self.snapshots):
            length = snapshot.length
            if again < length <= wanted and _intact(cache, length - again, snapshot.newest):
                snapshot.restore(cache)
                return length, snapshot.states
        return 0, None

    def snapshot(self, cache: KVCache, length: int, states: States | None = None) -> None:
        """Remembers the rings where a prompt of `length` tokens ended, if they can wrap at all.

        states [B, 1, D]: of its last token, for exact mode, which comes back in any case. Costs one copy of the rings:
        MLX writes a buffer in place only where nobody else holds it. `mx.array` because an assignment to a part of an
        array changes that very Python object, outside of compiled functions.
        """
        layers = [i for i, shape in enumerate(cache.shapes) if shape.kind == SLIDING]
        if states is None and (not layers or cache.slots(SLIDING) >= cache.capacity):
            return
        rings = {i: (mx.array(cache.keys[i]), mx.array(cache.values[i])) for i in layers}
        earlier = [snapshot for snapshot in self.snapshots if snapshot.length < length]
        self.snapshots = [*earlier, Snapshot(length, cache.newest, rings, states)]
        while len(self.snapshots) > 1 and sum(snapshot.nbytes for snapshot in self.snapshots) > SNAPSHOT_BYTES:
            self.snapshots.pop(0)

    def cut(self, length: int) -> None:
        """Forgets the tokens after the first `length`: what was computed for nothing is not part of what was said."""
        del self.ids[length:]

    def release(self, lease: Lease | None = None, ids: Sequence[int] = ()) -> None:
        """Ends a request: `ids` are the tokens whose rows are in its cache. None = it came to nothing."""
        self.busy, self.lease, self.ids = False, lease, list(ids)


def _weak(pair: Pair) -> tuple[object, ...]:
    """The same, without keeping a model in memory; there is one reference to an object, so they compare by identity."""
    target, drafter, exact = pair
    return weakref.ref(target), None if drafter is None else weakref.ref(drafter), exact


def _intact(cache: KVCache, length: int, newest: int) -> bool:
    """Whether the rings still hold the window in front of row `length`, after rows up to `newest` were written."""
    if all(shape.kind != SLIDING for shape in cache.shapes):
        return True
    return max(0, length - cache.window + 1) + cache.slots(SLIDING) > newest
