"""What Chat Completions and Completions share. `stats` is an extension, in each choice where there are several."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from mlx_mtp.generation.types import Event, Result
from mlx_mtp.serving.errors import RequestError
from mlx_mtp.serving.interface import Context, Form, Generation, GenerationBody, Object, identifier, now
from mlx_mtp.serving.schema import CACHING, JsonSchema, Part, Parts, Schema, Stops, Tokens, Whole
from mlx_mtp.text.tokenizer import Tokenizer
from mlx_mtp.version import __version__

# For a probability of zero, as JSON has no infinity.
LEAST = -9999.0


class ResponseFormat(Schema):
    """What an answer is: free text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def schema_of(self) -> dict[str, Any] | None:
        """What the answer is held to; RequestError where the schema is missing."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise RequestError("response_format needs json_schema with the type 'json_schema', and only there.",
                               param="response_format")  # fmt: skip
        if self.json_schema is not None:
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(Schema):
    """What a stream tells besides the reply. include_tokens: how many tokens of one pass are in a chunk."""

    ignored = frozenset({"include_obfuscation"})
    include_usage: bool = False
    include_tokens: bool = False


class Prediction(Schema):
    """What much of the reply is expected to repeat."""

    type: Literal["content"]
    content: Parts[Part]


class OpenAIBody(GenerationBody):
    ignored = CACHING | {
        "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options",
    }  # fmt: skip
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logit_bias: Annotated[
        dict[Annotated[str, Field(pattern="^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=4096),
    ] = {}
    seed: Annotated[Whole, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    stop: Annotated[Stops, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    n: Annotated[Whole, Field(ge=1, le=128)] = 1
    response_format: ResponseFormat | None = None
    prediction: Prediction | None = None

    def common(self, context: Context) -> dict[str, Any]:
        old, new = self.max_tokens, self.max_completion_tokens
        if self.stream_options and not self.stream:
            raise RequestError("stream_options are only for a request with stream true.", param="stream_options")
        if old and new and old != new:
            raise RequestError(f"max_tokens and max_completion_tokens differ ({old}, {new}); give one of them.",
                               param="max_tokens")  # fmt: skip
        bias = {int(token): added for token, added in self.logit_bias.items()}
        chosen = self.resolved(context.options, new or old, "max_completion_tokens" if new else "max_tokens", bias)
        return {
            **chosen, "seed": chosen["seed"] if self.seed is None else self.seed % 2**64,
            "stop": self.stop, "choices": self.n,
            "json_schema": self.response_format and self.response_format.schema_of(),
            "prediction": "".join(part.text for part in self.prediction.content) if self.prediction else "",
        }  # fmt: skip


def scored(tokenizer: Tokenizer | None, most: int, events: Iterable[Event]) -> list[Object]:
    """The tokens of events with their logprobs and the likeliest of their places, `most` at most, in OpenAI's form."""

    def spelled(token: int, logprob: float) -> Object:
        """bytes: None where it is no whole characters and no known byte."""
        text, data = (f"token_id:{token}", None) if tokenizer is None else tokenizer.spell(token)
        return {"token": text, "logprob": max(LEAST, logprob), "bytes": None if data is None else list(data)}

    return [
        {**spelled(token, logprob), "top_logprobs": [spelled(*other) for other in list(row.items())[:most]]}
        for event in events
        for token, logprob, row in zip(event.tokens, event.logprobs or [], event.top_logprobs or [], strict=True)
    ]


class ChoicesForm(Form):
    """Responses with a list of choices."""

    prefix: ClassVar[str]
    whole_kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    empty: ClassVar[Object]  # the part of a chunk that says nothing
    done = "data: [DONE]\n\n"

    def __init__(self, body: OpenAIBody, context: Context, asked: Generation) -> None:
        super().__init__(body, context, asked)
        self._options = body.stream_options or StreamOptions()
        self._several = asked.choices * len(asked.prompts) > 1
        self._called, self._results = Counter[int](), list[Result]()  # calls of each choice so far; finished ones
        self._frame: Object = {
            "id": identifier(f"{self.prefix}-"), "created": now(), "model": context.options.model,
            "system_fingerprint": f"mlx-mtp-{__version__}",
        }  # fmt: skip

    @abstractmethod
    def _choice(self, index: int, events: Sequence[Event]) -> Object:
        """The fields of a choice that hold a whole reply."""

    @abstractmethod
    def _parts(self, index: int, event: Event) -> Iterator[Object]:
        """The fields of a choice that hold one event; several chunks where it takes more."""

    @abstractmethod
    def _logprobs(self, index: int, events: Sequence[Event]) -> Object:
        """Of the tokens of events."""

    def whole(self, replies: Sequence[Sequence[Event]]) -> Object:
        results = [event.result for events in replies for event in events if event.result]
        choices = [
            {"index": i, **self._choice(i, events), "finish_reason": self._reason(i, result),
             "logprobs": self._scores(i, events), **self._stats(result, True)}
            for i, (events, result) in enumerate(zip(replies, results, strict=True))
        ]  # fmt: skip
        return {
            **self._frame, "object": self.whole_kind, "choices": choices, "usage": self._usage(results),
            **self._stats(results[0], False),
        }  # fmt: skip

    def chunks(self, index: int, events: Iterable[Event]) -> Iterator[Object]:
        """What events say, then why the reply ended, with the statistics."""
        for event in events:
            scores = self._scores(index, [event]) if event.tokens else None
            tokens = {"tokens": len(event.tokens)} if self._options.include_tokens else {}
            for part in self._parts(index, event):
                yield self.chunk(index, part, scores) | tokens
                scores, tokens = None, {}
            if scores:
                yield self.chunk(index, self.empty, scores)
            if event.result is not None:
                self._results.append(event.result)
                chunk = self.chunk(index, self.empty, None, self._reason(index, event.result))
                chunk["choices"][0] |= self._stats(event.result, True)
                yield chunk | self._stats(event.result, False)

    def end(self) -> Iterable[Object]:
        """The usage, where it was asked for, in a chunk of its own."""
        if self._options.include_usage:
            yield {**self._frame, "object": self.chunk_kind, "choices": [], "usage": self._usage(self._results)}

    def chunk(self, index: int, part: Object, scores: Object | None = None, reason: str | None = None) -> Object:
        found = {"index": index, **part, "logprobs": scores, "finish_reason": reason}
        usage = {"usage": None} if self._options.include_usage else {}
        return {**self._frame, "object": self.chunk_kind, "choices": [found], **usage}

    def _reason(self, index: int, result: Result) -> str:
        """Why a reply ended; one that its length ended may lack a call."""
        return "tool_calls" if self._called[index] and result.finish_reason == "stop" else result.finish_reason

    def _stats(self, result: Result, in_choice: bool) -> Object:
        return {"stats": result.stats.as_dict()} if in_choice == self._several else {}

    def _scores(self, index: int, events: Sequence[Event]) -> Object | None:
        return None if self.asked.logprobs is None else self._logprobs(index, events)

    def _usage(self, results: Sequence[Result]) -> Object:
        """Token counts; a prompt with several replies counts once."""
        stats = [result.stats for result in results]
        firsts = stats[:: self.asked.choices]
        prompt, written = sum(one.prompt_tokens for one in firsts), sum(one.tokens for one in stats)
        accepted = sum(one.accepted for one in stats)
        return {
            "prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written,
            "prompt_tokens_details": {"cached_tokens": prompt - sum(one.prefilled_tokens for one in firsts)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": accepted,
                "rejected_prediction_tokens": sum(one.drafted for one in stats) - accepted,
            },
        }  # fmt: skip
