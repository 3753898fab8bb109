"""JSON bodies as schemas: what every interface's are made of, and how they are read and refused.

A field is honoured, refused with a sentence, or in a schema's `ignored` because no reply could differ by it; null means
"not given". The tables in docs/server.md have every field.
"""

from __future__ import annotations

import re
from functools import reduce
from operator import getitem
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError, model_validator
from pydantic.functional_validators import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from mlx_mtp.serving.body import parsed, shown, strict
from mlx_mtp.serving.errors import RequestError

# Marks where Anthropic's API, which clients of many servers write for too, shall cache; no reply could differ by them.
CACHING = frozenset({"cache_control", "prompt_cache_breakpoint"})
Element = TypeVar("Element")
UNKNOWN, UNSUPPORTED = "unknown_field", "unsupported_value"


def fault(message: str, code: str | None = None) -> PydanticCustomError:
    """What is wrong with a field, in a message of our own."""
    return PydanticCustomError("fault", "{message}", {"message": message, "code": code})


def only(*neutral: object, because: str) -> AfterValidator:
    """A field that may be there as long as it asks for nothing special."""

    def check(value: object) -> object:
        if any(value == one and type(value) is type(one) for one in neutral):
            return value
        raise fault(f"another value than the usual one is not supported, as {because}; leave it out", UNSUPPORTED)

    return AfterValidator(check)


class Schema(BaseModel):
    """A JSON object: its types as they are, and no field that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid")
    ignored: ClassVar[frozenset[str]] = CACHING

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: object) -> object:
        """Without what is null or has no effect."""
        if not isinstance(value, dict):
            return value
        return {name: item for name, item in value.items() if item is not None and name not in cls.ignored}


class ModelBody(Schema):
    """A request to a model; the one that is served, where it names none."""

    model: str | None = None


def _whole(value: object) -> object:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # JSON knows one kind of number


def parsed_arguments(value: object) -> object:
    """Arguments of a call that came as a string of JSON."""
    try:
        return strict(value or "{}") if isinstance(value, str) else value
    except ValueError as error:
        raise fault(f"should be a JSON object in a string ({error})") from None


Whole = Annotated[int, BeforeValidator(_whole)]
Tokens = Annotated[Whole, Field(ge=1, le=2**63 - 1)]
ToolName = Annotated[str, Field(pattern=r"^[\w.\-/]{1,128}$")]
Arguments = Annotated[dict[str, Any], BeforeValidator(parsed_arguments)]


def parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


Several = Annotated[list[Element], FailFast()]
Parts = Annotated[list[Element], FailFast(), BeforeValidator(parts)]
Stops = Annotated[Several[Annotated[str, Field(min_length=1)]], Field(max_length=16)]


class Part(Schema):
    """A part of a message; this server reads no images, sounds, documents or files."""

    type: Literal["text"]
    text: str
    refusal: ClassVar[str] = ""  # only an assistant's part may be one


class JsonSchema(Schema):
    """A schema that an answer keeps to, whatever `strict` says."""

    name: Annotated[str, Field(pattern=r"^[\w.\-]{1,64}$")] = "answer"
    description: str = ""
    schema_: Annotated[dict[str, Any], Field(alias="schema")] = {}
    strict: bool = True


Body = TypeVar("Body", bound=ModelBody)


def read(body: bytes, schema: type[Body], dropped: list[str] | None = None) -> Body:
    """A request's body; RequestError that names the first field with a fault.

    dropped: None = unknown fields and kinds of tools are a fault; else they are left out, and their paths put into it.
    """
    value: Any = parsed(body)
    tools = 0  # so many left out
    while True:
        try:
            return schema.model_validate(value)
        except ValidationError as error:
            faults = error.errors(include_url=False)
            # A tool that is no function is one that the server itself would have to run.
            kinds: list[Any] = [one["loc"][:2] for one in faults if one["type"] == "literal_error"
                                and (one["loc"][0], *one["loc"][2:]) == ("tools", "type")]  # fmt: skip
            unknown: list[Any] = [_steps(value, one) for one in faults if one["type"] == "extra_forbidden"]
            if dropped is None or not (kinds or unknown):
                raise _refusal(value, error) from None
        for *way, name in kinds[:1] or unknown:
            dropped.append(_path([*way, name + tools if kinds else name]))
            del reduce(getitem, way, value)[name]
        tools += bool(kinds)


def _refusal(value: object, error: ValidationError) -> RequestError:
    """The first fault; before others a wrong type of something, after all an unknown field: it may be a consequence."""
    faults = error.errors(include_url=False)
    first = min(faults, key=lambda one: (one["type"] == "extra_forbidden", one["type"] != "literal_error"))
    path = _path(_steps(value, first))[:100]
    code: str | None = first.get("ctx", {}).get("code")
    if first["type"] == "extra_forbidden":
        code, message = UNKNOWN, "this server does not know the field and would have to drop it; leave it out"
    elif first["type"] == "missing":
        message = "the field is required"
    else:
        message = re.sub(r" dictionary.*", " object", first["msg"])
        message = f"{message[0].lower()}{message[1:]}, found {shown(first['input'])}"
    return RequestError(f"{path or 'body'}: {message[:800]}.", param=path or None, code=code)


def _steps(value: object, error: Any) -> list[str | int]:
    """Where an error is. pydantic puts the branches of unions in between, which are no places in the value."""
    found, here = list[str | int](), value
    for step in error["loc"]:
        inside = step in here if isinstance(here, dict) else isinstance(here, list) and step in range(len(here))
        if inside:
            here = here[step]  # type: ignore[index]
            found.append(step)
    last = error["loc"][-1:] if error["type"] == "missing" else ()
    missing = [] if list(last) == found[-1:] else list(last)  # null counts as missing, but is there
    return [*found, *missing, *([error["ctx"]["discriminator"].strip("'")] if "union_tag" in error["type"] else [])]


def _path(steps: list[str | int]) -> str:
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).removeprefix(".")
