"""JSON Schema on its way to llguidance."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# Between the parts of JSON. Answers: a space, or a new line with its indentation; a small model may write blanks for
# ever. Calls of tools: templates write them in one line.
ANSWER_SPACE, CALL_SPACE = r" ?|\n {0,32}", " ?"
# Where schemas are put together, each sees the properties of the others.
COMBINED = {
    "allOf", "anyOf", "oneOf", "$ref", "if", "additionalProperties", "unevaluatedProperties", "patternProperties",
}  # fmt: skip


def held(schema: Mapping[str, Any], space: str = ANSWER_SPACE, *, lenient: bool = False) -> str:
    """A schema in JSON, as text is held to it: an object that names its properties has no others, unless it says so.

    lenient: keywords that nothing can be held to are passed over; they are an error otherwise. TypeError or ValueError
    for what is no JSON.
    """
    return json.dumps({**_closed(schema), "x-guidance": {"whitespace_pattern": space, "lenient": lenient}})


def _closed(value: Any) -> Any:
    if isinstance(value, list):
        return [_closed(one) for one in value]
    if not isinstance(value, Mapping):
        return value
    # What these hold are values or names of the user's own, no schemas.
    found = {name: one if name in ("enum", "const", "default", "examples") else _closed(one)
             for name, one in value.items()}  # fmt: skip
    if isinstance(value.get("properties"), Mapping) and not COMBINED & set(value):
        found.setdefault("additionalProperties", False)
    return found
