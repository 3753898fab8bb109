"""Replies held to a grammar: JSON schema, regex or lark, by llguidance; at full depth.

Drafts are proposed as ever. While the device runs the pass over them, their masks are worked out on the CPU: which
tokens may follow after 0, 1, ... drafts. They bar tokens from the target's rows before any filter, so what a reply
follows is the distribution of plain constrained decoding. Where only one text can follow, its tokens are the drafts.

The grammar holds for the answer: where the model may think first, it begins after the thought.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from mlx_mtp.errors import OptionError, PromptError, brief
from mlx_mtp.generation import checks
from mlx_mtp.generation.sampling import Override
from mlx_mtp.text.channels import ThoughtTokens
from mlx_mtp.text.json_schema import held

WORD = 32  # tokens whose bits are in one number of a mask
MOST_REASON = 500  # characters of why a grammar cannot be compiled


@dataclass(frozen=True)
class Grammar:
    """A compiled grammar. table: llguidance's of the tokenizer, compiled: as llguidance writes grammars.

    stop_tokens: may follow where the answer is complete, and nowhere else.
    """

    table: Any
    compiled: str
    vocab_size: int
    stop_tokens: frozenset[int]

    @classmethod
    def of(cls, table: Any, vocab_size: int, stop_tokens: Iterable[int], kind: str, text: Any) -> Grammar:
        """kind: 'json_schema' (text: an object), 'regex', or lark in 'grammar' or 'tools'. OptionError, with the reason
        and the place, where the text cannot be compiled."""
        from llguidance import LLMatcher

        if kind == "json_schema":
            try:
                written = held(text)
            except (TypeError, ValueError) as error:
                raise OptionError(f"json_schema is no JSON: {error}.") from None
            compiled = LLMatcher.grammar_from_json_schema(written)
        else:
            compiled = (LLMatcher.grammar_from_regex if kind == "regex" else LLMatcher.grammar_from_lark)(text)
        if reason := LLMatcher.validate_grammar(compiled, table):
            raise OptionError(f"{kind} cannot be compiled: {reason[:MOST_REASON].rstrip('. ')}.")
        return cls(table, compiled, vocab_size, frozenset(stop_tokens))


def wanted(given: Mapping[str, object]) -> tuple[str, Any] | None:
    """Which of the options is given, and its value; OptionError for several, and for one that cannot be a grammar."""
    found = {kind: value for kind, value in given.items() if value is not None}
    if len(found) > 1:
        raise OptionError(f"{' and '.join(found)} are both given; an answer can be held to one of them.")
    for kind, value in found.items():
        if kind != "json_schema":
            return kind, checks.text(kind, value)
        made: Any = getattr(value, "model_json_schema", None)  # a class of pydantic's
        value = made() if isinstance(value, type) and callable(made) else value
        if not isinstance(value, Mapping):
            raise OptionError(f"json_schema must be an object or a class of pydantic's, not {checks.shown(value)}.")
        return kind, dict(value)
    return None


class Constraint:
    """Where one reply is in its grammar. thought: None where the answer begins at once."""

    def __init__(self, grammar: Grammar, thought: ThoughtTokens | None = None) -> None:
        from llguidance import LLMatcher

        self._grammar, self._thought = grammar, thought
        self._matcher = LLMatcher(grammar.table, grammar.compiled)
        self._begun = thought is None  # whether the grammar holds
        self._thinking = thought is not None and thought.is_open

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return self._begun and bool(self._matcher.is_accepting())

    def add(self, tokens: Sequence[int]) -> None:
        """More tokens of the reply, which a stop token ends. PromptError where one may not follow."""
        for token in tokens:
            if token in self._grammar.stop_tokens:
                return
            if self._moves(token) and not self._matcher.consume_token(token):
                raise PromptError(
                    "The grammar allows no token that is left: logit_bias or a logits processor bans all of them."
                )

    def override(self, depth: int) -> Override:
        """Drafts in place of the drafter's, where only one text can follow: arrays for a round of `depth` drafts."""
        forced = self._matcher.compute_ff_tokens()[:depth] if self._begun else []
        tokens = [*forced, *[0] * (depth - len(forced))]
        return {"mask": mx.arange(depth)[None] < len(forced), "tokens": mx.array([tokens], dtype=mx.int32)}

    def __call__(self, drafts: mx.array | None, logits: mx.array) -> mx.array:
        """Logits [1, M, V], -inf for tokens that may not follow. Reads the drafts [1, K] of the round."""
        found: list[int] = [] if drafts is None else drafts.tolist()[0]  # type: ignore[index, assignment]
        bits = mx.array(self.masks(found))[..., None] >> mx.arange(WORD, dtype=mx.uint32)
        allowed = (bits & 1).reshape(len(found) + 1, -1)[:, : logits.shape[-1]]
        return mx.where(allowed[None] == 1, logits, -mx.inf)

    def masks(self, drafts: Sequence[int]) -> npt.NDArray[np.uint32]:
        """Which tokens may follow 0, 1, ... drafts: a bit each, [M, V / 32]. All of them after one that may not."""
        words = (self._grammar.vocab_size + WORD - 1) // WORD
        masks = np.full((len(drafts) + 1, words), 2**WORD - 1, dtype=np.uint32)
        before, consumed = (self._begun, self._thinking), 0
        for mask, draft in zip(masks, (*drafts, -1), strict=True):
            self._fill(mask)
            if draft < 0 or draft in self._grammar.stop_tokens or not mask[draft // WORD] >> (draft % WORD) & 1:
                break
            if self._moves(draft):
                consumed += self._matcher.consume_token(draft)
        self._matcher.rollback(consumed)
        self._begun, self._thinking = before
        return masks

    def _fill(self, mask: npt.NDArray[np.uint32]) -> None:
        """Sets the bits of what may follow; all are set before."""
        if self._thinking:
            for token in self._grammar.stop_tokens:
                mask[token // WORD] &= ~np.uint32(1 << token % WORD)
            return
        self._matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        if self._matcher.is_error():
            reason = brief(RuntimeError(self._matcher.get_error()))
            raise PromptError(f"The answer cannot be held to the grammar any further: {reason}.")
        if not self._begun and self._thought is not None:
            mask[self._thought.opening // WORD] |= np.uint32(1 << self._thought.opening % WORD)

    def _moves(self, token: int) -> bool:
        """Whether the token is the answer's; the others open, continue or close a thought."""
        thought, inside = self._thought, self._thinking
        if thought is not None and not self._begun:
            self._thinking = token != thought.closing if inside else token == thought.opening
            self._begun = not self._thinking
        return self._begun and not inside
