"""The round and its cache, against a plain list.

The target here reads its tokens back out of the cache and nothing else: what it answers depends on every row that the
masks show, so one slot, position or mask that is wrong anywhere changes the text.
"""

from dataclasses import dataclass, replace
from unittest import mock

import mlx.core as mx
import numpy as np
from conftest import uncompiled
from hypothesis import given, settings
from hypothesis import strategies as st

import mlx_mtp
from mlx_mtp.generation import loop
from mlx_mtp.generation.cache import FULL, SLIDING, KVCache, LayerShape
from mlx_mtp.generation.interfaces import Memory, SampleDraft, States
from mlx_mtp.generation.types import Sampling
from mlx_mtp.testing import MarkovTarget, ScriptedDrafter

VOCABULARY = 11
GREEDY = Sampling(temperature=0.0)
PROPERTY = {"deadline": None, "derandomize": True}

# The round


class SummingTarget(MarkovTarget):
    """The next token is a sum over the rows that a full and a sliding layer see, and the row's position."""

    def __init__(self, window: int) -> None:
        super().__init__(mx.zeros((VOCABULARY, VOCABULARY)))
        self.info = replace(self.info, hidden_size=3, window=window)

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        shapes = (LayerShape(FULL, 1, 1), LayerShape(SLIDING, 1, 1))
        return KVCache(shapes, self.info.window, capacity, mx.float32, batch)

    def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
        step, fresh = cache.plan(tokens.shape[1]), self.embed(tokens)[:, None]
        sums = []
        for layer, kind in enumerate((FULL, SLIDING)):
            keys, _ = cache.update(layer, fresh, fresh, step)
            sums.append((keys[:, :, None, :, 0] * step.masks[kind]).sum(axis=-1)[:, 0])
        places = step.offset[:, None] + mx.arange(tokens.shape[1])
        hidden = mx.stack([*sums, places.astype(mx.float32)], axis=-1)
        return States(hidden if keep is None else hidden[:, hidden.shape[1] - keep :])

    def head(self, hidden: mx.array) -> mx.array:
        best = (hidden[..., 0] + 3 * hidden[..., 1] + hidden[..., 2]).astype(mx.int32) % VOCABULARY
        return 9.0 * (best[..., None] == mx.arange(VOCABULARY))

    def continued(self, ids: list[int], count: int) -> list[int]:
        """What it writes, from a plain list."""
        ids = list(ids)
        for _ in range(count):
            ids.append((sum(ids) + 3 * sum(ids[-self.info.window :]) + len(ids) - 1) % VOCABULARY)
        return ids


class ListeningDrafter(ScriptedDrafter):
    """Right where `right` says so and it has heard everything; wrong for certain anywhere else."""

    reads_prompt = True
    reads_states = True

    def __init__(self, right: list[bool]) -> None:
        super().__init__([])
        self.right = mx.array(right)

    def follow(self, script: list[int]) -> None:
        self._script = mx.array([*script, *[0] * 64], dtype=mx.int32)

    def start(self, batch: int, capacity: int) -> Memory:
        return {"heard": mx.zeros((batch, capacity + 64), dtype=mx.int32), "length": mx.zeros((batch,), dtype=mx.int32)}

    def grow(self, memory: Memory, capacity: int) -> Memory:
        more = max(0, capacity + 64 - memory["heard"].shape[1])
        return {**memory, "heard": mx.pad(memory["heard"], [(0, 0), (0, more)])}

    def observe(self, memory: Memory, tokens: mx.array, states: States, accepted: mx.array) -> Memory:
        assert states.hidden.shape[1] == tokens.shape[1]
        heard = mx.slice_update(memory["heard"], tokens, memory["length"], axes=(1,))
        return {"heard": heard, "length": memory["length"] + accepted + 1}

    def rewind(self, memory: Memory, length: int, states: States | None) -> Memory:
        assert states is not None and states.hidden[0, -1, 2].item() == length - 1
        return {**memory, "length": mx.array([length], dtype=mx.int32)}

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        length, places = cache.length[:, None], mx.arange(self._script.size)
        before = places < length
        size = min(memory["heard"].shape[1], self._script.size)
        agrees = (memory["heard"][:, :size] == self._script[:size]) | ~before[:, :size]
        total = mx.where(before, self._script, 0).sum()
        knows = agrees.all() & (memory["length"] == cache.length).all() & (self._script[length] == token).all()
        knows = knows & (hidden[0, 0, 0] == total) & (hidden[0, 0, 2] == length[0, 0] - 1)
        at = mx.minimum(length + 1 + mx.arange(depth), self._script.size - 1)
        stands = knows & self.right[at % self.right.size]
        return sample.point_mass(mx.where(stands, self._script[at], (self._script[at] + 1) % VOCABULARY)), memory


@dataclass(frozen=True)
class Story:
    """A prompt and an edit of the conversation after the first reply, on one pair."""

    window: int
    depth: int
    chunk: int
    right: list[bool]
    prompt: list[int]
    budget: int
    kept: float
    added: list[int]


TOKENS = st.integers(0, VOCABULARY - 1)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    # One end of a rung of the capacity ladder is near, more often than not.
    length = draw(st.one_of(st.integers(1, 60), st.integers(200, 262), st.integers(480, 520)))
    seed = draw(st.integers(0, 99))
    return Story(
        window=draw(st.integers(1, 40)), depth=draw(st.integers(0, 8)), chunk=draw(st.sampled_from([7, 33, 80, 512])),
        right=draw(st.lists(st.booleans(), min_size=1, max_size=12)),
        prompt=np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist(), budget=draw(st.integers(1, 70)),
        kept=draw(st.floats(0.0, 1.0)), added=draw(st.lists(TOKENS, min_size=1, max_size=20)),
    )  # fmt: skip


def expected_acceptance(story: Story, prompt: int) -> int:
    """Accepted drafts that are in the reply, by hand: `right` says which places the drafter gets right."""
    emitted, accepted = 1, 0
    while emitted < story.budget:
        newest, stood = prompt + emitted - 1, 0
        while stood < story.depth and story.right[(newest + 1 + stood) % len(story.right)]:
            stood += 1
        accepted += min(stood, story.budget - emitted)
        emitted += stood + 1
    return accepted


@settings(max_examples=60, **PROPERTY)
@given(stories())
def test_any_round_is_the_plain_list(story: Story) -> None:
    target, drafter = SummingTarget(story.window), ListeningDrafter(story.right)
    engine = mlx_mtp.Engine(target, drafter, None, depth=story.depth)
    session, prompt = mlx_mtp.Session(), story.prompt
    limits = mock.patch.multiple(loop, MAX_CHUNK=story.chunk, MIN_CHUNK=1)
    with uncompiled(), limits:
        for _ in range(2):
            whole = target.continued(prompt, story.budget + story.depth + 2)
            drafter.follow(whole)
            result = engine.generate(
                prompt, max_tokens=story.budget, sampling=GREEDY, session=session, ignore_end=True
            )
            assert result.tokens == whole[len(prompt) : len(prompt) + story.budget]
            assert result.stats.accepted == expected_acceptance(story, len(prompt))
            said = [*prompt, *result.tokens]
            prompt = [*said[: int(story.kept * len(said))], *story.added]
