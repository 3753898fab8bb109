"""Public fakes for tests of engines and drafters."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from mlx_mtp.generation.cache import KVCache
from mlx_mtp.generation.interfaces import Drafter, Memory, SampleDraft, States, Target, TargetInfo


class ScriptedDrafter(Drafter):
    """Proposes what a script says follows, and is right and wrong at known places.

    script: script[i] is the token for absolute position i; where it is the prompt and the target's own continuation,
    the draft for position i is accepted if and only if right[i % len(right)] and all before it in the round are.
    Where not right, and beyond the script's end, another token is proposed. So for a new target, or a loop of your own:

        expected = plain.generate(prompt, max_tokens=60, ignore_end=True).tokens
        drafter = ScriptedDrafter([*prompt, *expected], right=[True, True, False])
        result = Engine(target, drafter, tokenizer, depth=depth).generate(prompt, max_tokens=60, ignore_end=True)
        assert result.tokens == expected
        assert result.stats.accepted == sum(drafter.accepted(len(prompt), 60, depth))
    """

    def __init__(self, script: Sequence[int], right: Sequence[bool] = (True,)) -> None:
        self._right = [right[i % len(right)] for i in range(len(script))]
        proposals = [token if holds else int(token == 0) for token, holds in zip(script, self._right, strict=True)]
        self._script = mx.array([*proposals, *[0] * 64], dtype=mx.int32)

    def accepted(self, prompt: int, tokens: int, depth: int) -> list[int]:
        """Drafts accepted in each round of a greedy reply of `tokens` tokens after a prompt of `prompt` tokens.

        As `Stats` counts them: what the budget cuts off the last round was not accepted. ValueError where the script
        ends before the reply.
        """
        end = prompt + tokens
        if len(self._right) < end:
            raise ValueError(f"expected a script of {end} tokens, found {len(self._right)}")
        rounds, at = [], prompt + 1  # the prompt's own pass gives the first token
        while at < end:
            drafts = self._right[at : min(at + depth, end)]
            rounds.append(drafts.index(False) if False in drafts else len(drafts))
            at += rounds[-1] + 1
        return rounds

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        """The script's tokens after `token`, whose position is the committed length."""
        places = cache.length[:, None] + 1 + mx.arange(depth, dtype=mx.int32)
        return sample.point_mass(self._script[mx.minimum(places, self._script.size - 1)]), memory


class MarkovTarget(Target):
    """A target whose next-token logits depend on the last token alone: table [V, V]; its distribution is known."""

    def __init__(self, table: mx.array, max_context: int = 1 << 20) -> None:
        self.table = table
        self.path = None
        self.info = TargetInfo(
            vocab_size=table.shape[0], hidden_size=1, max_context=max_context, window=1, readable={},
            storing_layers={}, attention_heads=1,
        )  # fmt: skip

    def new_cache(self, capacity: int, batch: int = 1) -> KVCache:
        """A cache that only counts."""
        return KVCache((), 1, capacity, mx.float32, batch)

    def embed(self, tokens: mx.array) -> mx.array:
        """The ids themselves, [B, M, 1]."""
        return tokens[..., None].astype(mx.float32)

    def forward(self, tokens: mx.array, cache: KVCache, keep: int | None = None) -> States:
        """The ids as states."""
        return States(self.embed(tokens if keep is None else tokens[:, tokens.shape[1] - keep :]))

    def head(self, hidden: mx.array) -> mx.array:
        """The table's rows."""
        return self.table[hidden[..., 0].astype(mx.int32)]

    def logits(self, tokens: mx.array) -> mx.array:
        """The table's rows."""
        return self.table[tokens]


class MarkovDrafter(ScriptedDrafter):
    """Drafts from a table [V, V] of its own, by whatever sampling is asked for."""

    def __init__(self, table: mx.array) -> None:
        super().__init__([])
        self.table = table

    def draft(
        self, memory: Memory, token: mx.array, hidden: mx.array, cache: KVCache, depth: int, sample: SampleDraft
    ) -> tuple[mx.array, Memory]:
        """A chain through the table."""
        drafts = [token]
        for _ in range(depth):
            drafts.append(sample(self.table[drafts[-1]]))
        return mx.concatenate(drafts[1:], axis=1), memory
