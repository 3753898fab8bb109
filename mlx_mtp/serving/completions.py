"""OpenAI's Completions: texts or token ids to go on with, or to fill the middle of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field, PlainValidator

from mlx_mtp.generation.types import Event
from mlx_mtp.serving.interface import Context, Generation, Object
from mlx_mtp.serving.openai import ChoicesForm, OpenAIBody, scored
from mlx_mtp.serving.schema import Whole, fault, only


def _prompts(value: object) -> list[str | list[int]]:
    """A string, token ids, or a list of these."""
    several = isinstance(value, list) and bool(value) and all(isinstance(one, (str, list)) for one in value)
    found: Any = value if several else [value]
    for one in found:
        if not one or not (isinstance(one, str) or (isinstance(one, list) and all(type(t) is int for t in one))):
            raise fault("should be a string or a list of token ids, or a list of these, none of them empty")
    if len(found) > 128:
        raise fault("should be at most 128 prompts")
    return list(found)


class CompletionBody(OpenAIBody):
    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: bool = False
    suffix: str = ""
    best_of: Annotated[Any, only(1, because="every reply that is written is returned")] = None

    def generation(self, context: Context) -> Generation:
        return Generation(prompts=self.prompt, echo=self.echo, suffix=self.suffix or None, logprobs=self.logprobs,
                          **self.common(context))  # fmt: skip


class CompletionForm(ChoicesForm):
    """A text a choice."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    empty: ClassVar[Object] = {"text": ""}

    def __init__(self, body: CompletionBody, context: Context, asked: Generation) -> None:
        super().__init__(body, context, asked)
        self._offsets = Counter[int]()  # characters of each choice's tokens so far

    def _choice(self, index: int, events: Sequence[Event]) -> Object:
        return {"text": "".join(event.content for event in events)}

    def _parts(self, index: int, event: Event) -> Iterator[Object]:
        if event.content:
            yield {"text": event.content}

    def _logprobs(self, index: int, events: Sequence[Event]) -> Object:
        """The older form: lists side by side; offsets count characters. Nothing is known of a text's first token."""
        found, offsets = scored(self._context.tokenizer, self.asked.logprobs or 0, events), []
        first = int(self.asked.echo and index not in self._offsets)
        for token in found:
            offsets.append(self._offsets[index])
            self._offsets[index] += len(token["token"])
        tops = [{top["token"]: top["logprob"] for top in reversed(token["top_logprobs"])} for token in found[first:]]
        return {
            "tokens": [token["token"] for token in found],
            "token_logprobs": [*[None] * first, *(token["logprob"] for token in found[first:])],
            "top_logprobs": [*[None] * first, *tops] if self.asked.logprobs else None,
            "text_offset": offsets,
        }
