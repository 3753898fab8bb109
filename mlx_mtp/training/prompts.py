"""Prompts out of a user's documents: what the target is asked when it writes the data that a drafter learns from."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_mtp.errors import DataError, PromptError
from mlx_mtp.generation.interfaces import TargetInfo
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.training.data import Document

CUT = 3  # a text is an opening of a third of its piece; the target writes the rest
ROOM = 8  # least tokens of a reply in a row
FEWEST = 4


def prompts_of(
    documents: Iterable[Document], tokenizer: Tokenizer, length: int, info: TargetInfo | None = None
) -> list[list[int]]:
    """Token ids of prompts: conversations up to the last reply, and the openings of texts, for rows of `length`.

    DataError where the chat template or the target (`info`) does not take one of them, or a row does not.
    """
    found: list[list[int]] = []
    for document in documents:
        if document.messages is not None:
            asked = [_question(document.module, list(document.messages), tokenizer)]
        else:  # no piece is begun whose half is not there
            ids = tokenizer.encode(document.text or "")
            starts = range(0, max(1, len(ids) - length // 2), length)
            asked = [ids[start : start + max(1, min(length, len(ids) - start) // CUT)] for start in starts]
        for ids in filter(None, asked):
            if info is not None and len(ids) + ROOM > length:
                raise DataError(
                    f"{document.module}: the prompt has {len(ids)} tokens and a row of --length {length} has room for "
                    f"{length - ROOM}; shorten it or raise --length."
                )
            if info is not None and max(ids) >= info.vocab_size:
                raise DataError(
                    f"{document.module}: token {max(ids)} is not among the target's {info.vocab_size}; "
                    "use the tokenizer that belongs to the target."
                )
            found.append(ids)
    return found


def _question(where: str, messages: list[dict[str, str]], tokenizer: Tokenizer) -> list[int]:
    """A conversation up to the last thing asked."""
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages or messages[-1]["role"] != "user" or not messages[-1]["content"].strip():
        raise DataError(f"{where}: there is no prompt of the user; write one.")
    try:
        return tokenizer.chat(messages)
    except PromptError as error:
        raise DataError(f"{where}: {error}") from error
