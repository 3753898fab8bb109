"""Between text and tokens: prompts to ids, ids to text as they come, stop strings.

What it does: wraps mlx-lm's tokenizer and streaming detokeniser. What it does not do: run a model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_mtp.channels import THOUGHTS, overlap
from mlx_mtp.errors import CheckpointError, PromptError, brief

# Tokens at a prompt's end in which a template may open a thought.
THOUGHT_TAIL = 16
Prompt = str | Sequence[int] | Sequence[dict[str, str]]


class Tokenizer:
    """A checkpoint's tokenizer: `encode`, `decode`, the chat template and a streaming detokeniser."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped

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
        """Text to ids; `special` puts the beginning-of-sequence token in front where the checkpoint does."""
        ids: list[int] = self._wrapped.encode(text, add_special_tokens=special)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Ids to text, special tokens spelled out."""
        text: str = self._wrapped.decode(list(ids))
        return text

    def spell(self, token: int) -> tuple[str, bytes | None]:
        """A token as it reads inside a text, and its bytes; None where it is a part of a character.

        A token that stands for one byte has its bytes even so.
        """
        # Behind another token, as many tokenizers drop the space in front of a text's first one.
        front = self.encode("a", special=False)[-1:]
        text = self.decode([*front, token])[len(self.decode(front)) :]
        if byte := re.fullmatch(r"<0x([0-9A-F]{2})>", str(self._wrapped.convert_ids_to_tokens(token))):
            return text, bytes.fromhex(byte[1])
        return text, None if "\ufffd" in text else text.encode()

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        thinking: bool | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Messages to ids through the checkpoint's chat template, ready for the reply.

        thinking: whether a checkpoint that can shall think first, None = what its template does. tools: declarations
        in OpenAI's form. PromptError where the template refuses the messages.
        """
        if not self.has_chat_template:
            raise PromptError("Expected a checkpoint with a chat template, found none; pass a plain prompt or --raw.")
        # Always given: where it is not, mlx-lm asks every checkpoint that can think to do so.
        options: dict[str, Any] = {"enable_thinking": thinking}
        if tools:
            options["tools"] = list(tools)
        try:
            ids: list[int] = self._wrapped.apply_chat_template(list(messages), add_generation_prompt=True, **options)
        except Exception as error:  # a template may raise anything, most often jinja's TemplateError
            raise PromptError(
                f"Expected messages that this checkpoint's chat template takes, found others ({brief(error)}); "
                "use the roles system, user and assistant in turns."
            ) from error
        return ids

    def opened_thought(self, ids: Sequence[int]) -> str | None:
        """The marker of a thought that a prompt has opened and not closed, None where it has not."""
        end = self.decode(ids[-THOUGHT_TAIL:])
        return next((opening for opening, closing in THOUGHTS if end.rfind(opening) > end.rfind(closing)), None)

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return bool(self._wrapped.has_chat_template)

    @property
    def can_think(self) -> bool:
        """Whether the chat template can ask for thoughts, or opens them by itself."""
        template = str(getattr(self._wrapped, "chat_template", None) or "")
        return "enable_thinking" in template or any(opening in template for opening, _ in THOUGHTS)

    @cached_property
    def longest_token(self) -> int:
        """Most characters that one token stands for."""
        return max(map(len, self._wrapped.get_vocab()))

    @property
    def end_tokens(self) -> set[int]:
        """Ids that end a reply, as the tokenizer sees it."""
        return set(self._wrapped.eos_token_ids)

    def stream(self) -> Any:
        """A fresh detokeniser: add_token(id), last_segment, finalize()."""
        detokenizer = self._wrapped.detokenizer
        detokenizer.reset()
        return detokenizer


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer | None, raw: bool = False) -> list[int]:
    """Any prompt to token ids: a list of ids as it is, messages by template, a string as one user message.

    raw: a string is continued as it stands, without the chat template. Raises PromptError for an empty prompt.
    """
    if not prompt:
        raise PromptError("Expected a prompt, found an empty one; write at least one character or token id.")
    if not isinstance(prompt, str) and isinstance(prompt[0], int):
        return [int(token) for token in prompt]  # type: ignore[arg-type]
    if tokenizer is None:
        raise PromptError("Expected token ids, found text; this checkpoint has no tokenizer: use --tokens 1,2,3.")
    if isinstance(prompt, str):
        if raw or not tokenizer.has_chat_template:
            return tokenizer.encode(prompt)
        return tokenizer.chat([{"role": "user", "content": prompt}])
    return tokenizer.chat(prompt)  # type: ignore[arg-type]


class StopStrings:
    """Cuts a stream of text before the first stop string; holds back what might become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.hit = False

    def feed(self, text: str) -> str:
        """Text that is safe to show now; after `hit` nothing follows."""
        if self.hit:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            # The one that is complete first, the longest of these: so that it does not matter how the text was cut.
            self.hit = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """What was held back, once nothing can follow."""
        shown, self._held = ("" if self.hit else self._held), ""
        return shown
