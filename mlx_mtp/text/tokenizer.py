"""Between text and tokens: prompts to ids, ids to text as they come, stop strings; over mlx-lm's tokenizer."""

from __future__ import annotations

import re
import threading
from collections.abc import Collection, Mapping, Sequence
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

from mlx_mtp.errors import CheckpointError, OptionError, PromptError, brief, lacking
from mlx_mtp.text.call_grammar import CallGrammar, Notation, notation
from mlx_mtp.text.channels import GEMMA, THOUGHTS, CallFormat, ThoughtTokens, without_beginnings
from mlx_mtp.text.detokenizer import Detokenizer, TokenBytes
from mlx_mtp.text.template import ChatTemplate

# Tokens at a prompt's end in which a template may open a thought.
THOUGHT_TAIL = 16
# Tokens in front of what comes before, of what comes after, and of what is filled in: Qwen and CodeGemma; StarCoder and
# Granite; Code Llama.
FILL_IN = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
)  # fmt: skip
# For llguidance: tokens that are looked at once, all together. Where a string may still have n characters, those of the
# longest kind that fits are allowed at one stroke, and only longer ones are followed one by one.
IN_STRING = r'[^"\\\x00-\x1F\x7F]'
IN_SHORT_STRINGS = [f"{IN_STRING}{{1,{most}}}" for most in (1, 2, 3, 4, 6, 8, 10, 13, 16, 30)]
SLICES = [r"[\x20\x0A\x0D\x09]+", *IN_SHORT_STRINGS, f"{IN_STRING}+"]
Prompt = str | Sequence[int] | Sequence[dict[str, str]]


class Tokenizer(ChatTemplate):
    """A checkpoint's tokenizer: `encode`, `decode`, the chat template and a streaming detokeniser."""

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        self._making, self._table = threading.Lock(), cache(partial(_grammar_table, wrapped))

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer beside a checkpoint, or None where it has none."""
        if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
            return None
        from mlx_lm.tokenizer_utils import load  # slow to import, and not needed for token ids

        try:
            return cls(load(folder))
        except Exception as error:  # the tokenizer libraries raise plain Exception, OSError, ValueError, ...
            raise CheckpointError(
                f"{folder}: the tokenizer could not be read ({brief(error)}); download it again."
            ) from error

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Text to ids. `special` puts in front what the checkpoint's prompts begin with, once, be it in the text
        already; the end-of-sequence token that some tokenizers append is left out, as a prompt goes on."""
        ids: list[int] = self._wrapped.encode(text, add_special_tokens=False)
        return [*self.opening(ids), *ids] if special else ids

    def opening(self, ids: Sequence[int]) -> list[int]:
        """What the tokenizer puts in front of a text, most often the beginning-of-sequence token, as far as these
        ids do not begin with it."""
        whole = self._opening
        there = next((n for n in range(len(whole), 0, -1) if list(ids[:n]) == whole[-n:]), 0)
        return whole[: len(whole) - there]

    @cached_property
    def _opening(self) -> list[int]:
        with_it, alone = (self._wrapped.encode("a", add_special_tokens=special) for special in (True, False))
        places = (at for at in range(len(with_it)) if with_it[at : at + len(alone)] == alone)
        return list(with_it[: next(places, 0)])

    @cached_property
    def _bytes(self) -> TokenBytes:
        return TokenBytes(self._wrapped)

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens spelled out: what `stream` shows of them, so a reply's first space stays and
        an id that no token has adds nothing."""
        stream = self.stream()
        for token in ids:
            stream.add_token(token)
        stream.finalize()
        return stream.last_segment

    def spell(self, token: int) -> tuple[str, bytes | None]:
        """A token as it reads inside a text, and its bytes."""
        data = self._bytes.of(token) or b""
        return data.decode("utf-8", "replace"), data

    def fill_in(self, before: str, after: str) -> list[int] | None:
        """The prompt whose reply stands between two texts; None where the tokenizer has no tokens for that."""
        vocabulary = self._wrapped.get_vocab()
        for first, second, last in FILL_IN:
            if first in vocabulary and second in vocabulary and last in vocabulary:
                return self.encode(f"{first}{before}{second}{after}{last}")
        return None

    def opened_thought(self, ids: Sequence[int]) -> str | None:
        """The marker of a thought that a prompt has opened and not closed, None where it has not."""
        end = self.decode(ids[-THOUGHT_TAIL:])
        return next((opening for opening, closing in THOUGHTS if end.rfind(opening) > end.rfind(closing)), None)

    def thought_tokens(self, ids: Sequence[int], thinking: bool) -> ThoughtTokens | None:
        """The tokens around a thought that may come before the answer to this prompt; None where none is asked for.

        OptionError where a thought has no single tokens around it.
        """
        opened = self.opened_thought(ids)
        if opened is None and not thinking:
            return None
        for opening, closing in THOUGHTS:
            if opened == opening or (opened is None and self.writes(opening)):
                first, last = self.encode(opening, special=False), self.encode(closing, special=False)
                if len(first) == len(last) == 1:
                    return ThoughtTokens(first[0], last[0], opened is not None)
        raise OptionError(
            "This checkpoint's thoughts are not marked by tokens of their own, so an answer after them cannot be held "
            "to a grammar; leave thinking out."
        )

    def grammar_table(self, vocab_size: int, stop_tokens: Collection[int]) -> Any:
        """What llguidance knows of this tokenizer; made once, which may take seconds. OptionError where it cannot."""
        with self._making:
            return self._table(vocab_size, tuple(sorted(stop_tokens)))

    def call_format(self, tools: Sequence[Mapping[str, Any]] | None = None) -> CallFormat | None:
        """How the checkpoint writes calls of tools; None where nobody can read them.

        tools: declarations in OpenAI's form, for formats whose arguments carry no types.
        """
        opening = getattr(self._wrapped, "tool_call_start", None)  # mlx-lm's wrapper finds it in the template
        if opening is None or opening == GEMMA.opening:
            return GEMMA if self.writes(GEMMA.opening) else None
        return CallFormat(opening, self._wrapped.tool_call_end, self._wrapped.tool_parser, tools)

    def call_grammar(self) -> CallGrammar | None:
        """Calls of tools as a grammar; None where nobody can read them, or they are written in no known way."""
        found = self._call_notation
        return None if found is None else CallGrammar(found, self._parts)

    @cached_property
    def _call_notation(self) -> Notation | None:
        shape = self.call_format()
        return None if shape is None else notation(self.reply, shape.opening, shape.closing)

    def _parts(self, text: str) -> list[str | int]:
        """A text as strings and the ids of tokens that no text can spell."""
        marks = {str(token): int(number) for number, token in self._added.items() if str(token).strip()}
        if not marks:
            return [text]
        found = re.split(f"({'|'.join(map(re.escape, sorted(marks, key=len, reverse=True)))})", text)
        return [marks.get(part, part) for part in found if part]

    @cached_property
    def longest_token(self) -> int:
        """Most characters that one token stands for."""
        return max(map(len, self._wrapped.get_vocab()))

    @cached_property
    def stop_tokens(self) -> set[int]:
        """Ids that end a reply, as the tokenizer sees it: its own, and what its template ends a reply with."""
        own = getattr(self._wrapped, "eos_token_ids", None) or {getattr(self._wrapped, "eos_token_id", None)}
        return {token for token in (*own, self.turn_end()) if isinstance(token, int)}

    def stream(self) -> Detokenizer:
        return Detokenizer(self._bytes)


def _grammar_table(wrapped: Any, vocab_size: int, stop_tokens: tuple[int, ...]) -> Any:
    try:
        from llguidance.hf import from_tokenizer
    except ModuleNotFoundError as error:
        raise OptionError(lacking("Holding answers to a grammar", error.name, "schema")) from error
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    inner = wrapped._tokenizer if isinstance(wrapped, TokenizerWrapper) else wrapped
    if not stop_tokens or not getattr(inner, "is_fast", False):
        lacks = "no tokenizer.json" if stop_tokens else "no stop token"
        raise OptionError(f"This checkpoint has {lacks}, without which an answer cannot be held to a grammar.")
    return from_tokenizer(inner, n_vocab=vocab_size, eos_token=[*stop_tokens], slices=SLICES)


def prompt_ids(
    prompt: Prompt, tokenizer: Tokenizer | None, raw: bool = False, thinking: bool = False,
    tools: Sequence[Mapping[str, Any]] = (),
) -> list[int]:  # fmt: skip
    """Any prompt to token ids: a list of ids as it is, messages by template, a string as one user message.

    raw: a string is continued as it is, without the chat template. thinking, tools: as for Tokenizer.chat. Raises
    PromptError for an empty prompt, OptionError for thinking where nothing can ask for it.
    """
    if not prompt:
        raise PromptError("Expected a prompt, found an empty one; write at least one character or token id.")
    ids = not isinstance(prompt, str) and isinstance(prompt[0], int)
    if tokenizer is None and not ids:
        raise PromptError("Expected token ids, found text; this checkpoint has no tokenizer: use --tokens 1,2,3.")
    plain = ids or (isinstance(prompt, str) and (raw or tokenizer is None or not tokenizer.has_chat_template))
    if thinking and (plain or tokenizer is None or not tokenizer.can_think):
        raise OptionError(
            "Expected thinking only with messages and a chat template that knows it, found it without; leave it out."
        )
    if ids or tokenizer is None:
        return [int(token) for token in prompt]  # type: ignore[arg-type]
    if isinstance(prompt, str):
        if plain:
            return tokenizer.encode(prompt)
        prompt = [{"role": "user", "content": prompt}]
    return tokenizer.chat(prompt, thinking, tools)  # type: ignore[arg-type]


class StopStrings:
    """Cuts a stream of text before the first stop string; holds back what might become one.

    found: the one that was found. past: characters of the text fed last, up to and with its end.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.past = 0
        self.found: str | None = None

    def __bool__(self) -> bool:
        return bool(self._stops)

    def feed(self, text: str) -> str:
        """Text that is safe to show now; nothing once one was found."""
        if self.found is not None:
            return ""
        before = len(self._held)
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            # The one that is complete first, the longest of these: so that it does not matter how the text was cut.
            end, begin = min(found)
            self.found, self.past = self._held[begin:end], end - before
            shown, self._held = self._held[:begin], ""
            return shown
        shown, self._held = without_beginnings(self._held, self._stops)
        return shown

    def flush(self) -> str:
        shown, self._held = self._held, ""
        return shown
