"""A checkpoint's chat template: messages to ids, thinking on or off, what it drops, and the token that ends a turn.

What a template does is found out by rendering with and without, never by reading it. What it leaves out of a system
turn, of tools, of calls of tools or of any message is refused; two fields are without effect where a template has no
place for them, as most leave them out on purpose: `name`, and `reasoning_content` (the thoughts of earlier turns).
The text beside a tool call is the third: some formats have only room for the call.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from mlx_mtp.errors import PromptError, brief
from mlx_mtp.text.channels import THOUGHTS

Message = Mapping[str, Any]
Tools = Sequence[Mapping[str, Any]]
QUESTION: list[Message] = [{"role": "user", "content": "?"}]
ANSWER = "answer"


class Dropped(PromptError):
    """Something that the template would leave out in silence. part: the field it came in, "messages" or "tools"."""

    def __init__(self, what: str, part: str) -> None:
        super().__init__(f"Expected no {what}: this checkpoint's chat template has no place for it; leave it out.")
        self.part = part


class ChatTemplate:
    """The template side of a Tokenizer; wrapped: what mlx-lm or transformers loads."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self._kept: set[tuple[object, ...]] = set()  # kinds of parts that were seen to arrive in the prompt

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works; mlx-lm's wrapper knows of templates in Python too."""
        return bool(getattr(self._wrapped, "has_chat_template", getattr(self._wrapped, "chat_template", None)))

    def chat(
        self, messages: Sequence[Message], thinking: bool = False, tools: Tools | None = None, effort: str | None = None
    ) -> list[int]:
        """Ids of a conversation up to where the reply begins; PromptError where the template refuses, or drops, any.

        thinking: whether a checkpoint that can shall think first: the one default, for every command and for training.
        tools: declarations in OpenAI's form. effort: a level for templates that know `reasoning_effort`, None = theirs.
        """
        found, options = _checked(messages), self._options(thinking, tools, effort)
        ids: list[int] = self._rendered(found, options, tokenize=True)
        self._refuse_dropped(found, options)
        return ids

    def conversation(self, messages: Sequence[Message]) -> str:
        """A whole conversation as text to learn from: its last reply after just what a prompt ends in, and its end."""
        found, options = _checked(messages), self._options()
        text = str(self._rendered(found, options, prompt=False))
        self._refuse_dropped(found, options)
        if len(found) < 2 or found[-1]["role"] != "assistant":
            return text
        asked, reply = self._text(found[:-1], options), found[-1]["content"].strip()
        at = text.rfind(reply) if reply else -1
        return text if asked is None or at < 0 or text.startswith(asked) else asked + text[at:]

    @cached_property
    def can_think(self) -> bool:
        """Whether the template can ask for thoughts, or opens them by itself."""
        on, off = (self._text(QUESTION, self._options(thinking)) for thinking in (True, False))
        return on != off or any(self.writes(opening) for opening, _ in THOUGHTS)

    def writes(self, marker: str) -> bool:
        return marker in str(getattr(self._wrapped, "chat_template", None) or "")

    def reply(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
        """A reply that calls tools (names, arguments), as the template writes it into a conversation; None where it
        refuses."""
        made = [{"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": dict(arguments)}}
                for i, (name, arguments) in enumerate(calls)]  # fmt: skip
        said = [*QUESTION, {"role": "assistant", "content": "", "tool_calls": made}]
        tools = [{"type": "function", "function": {
            "name": name, "description": "", "parameters": {"type": "object", "properties": {}}}} for name, _ in calls]
        options = self._options(tools=tools)
        asked, whole = self._text(QUESTION, options), self._text(said, options, prompt=False)
        return None if asked is None or whole is None else whole[len(os.path.commonprefix([asked, whole])) :]

    def turn_end(self) -> int | None:
        """The special token with which it ends a reply, None where it writes plain text or nothing."""
        said = [*QUESTION, {"role": "assistant", "content": ANSWER}]
        _, found, rest = (self._text(said, self._options(), prompt=False) or "").rpartition(ANSWER)
        rest = rest.lstrip()
        if not found or not rest:
            return None
        first = int(self._wrapped.encode(rest, add_special_tokens=False)[0])
        return first if first in self._added and rest.startswith(str(self._added[first])) else None

    @property
    def _added(self) -> Mapping[int, Any]:
        """Tokens that no text is cut into, by their ids."""
        return getattr(self._wrapped, "added_tokens_decoder", None) or {}

    @cached_property
    def _is_jinja(self) -> bool:
        """Whether it takes any variable; a renderer written in Python takes only those that it knows."""
        return self._text(QUESTION, {"thinking": False, "reasoning_effort": "low"}) is not None

    def _options(self, thinking: bool = False, tools: Tools | None = None, effort: str | None = None) -> dict[str, Any]:
        """Variables of the template. The switch is always given: mlx-lm sets it to on where it is not."""
        options: dict[str, Any] = {"enable_thinking": bool(thinking)}
        if self._is_jinja:
            options["thinking"] = bool(thinking)
            if effort is not None:
                options["reasoning_effort"] = effort
        return options | ({"tools": list(tools)} if tools else {})

    def _text(self, messages: Sequence[Message], options: Mapping[str, Any], prompt: bool = True) -> str | None:
        """The conversation as text, None where the template refuses. prompt: up to where a reply begins."""
        try:
            return str(self._rendered(messages, options, prompt))
        except PromptError:
            return None

    def _rendered(
        self, messages: Sequence[Message], options: Mapping[str, Any], prompt: bool = True, tokenize: bool = False
    ) -> Any:
        if not self.has_chat_template:
            raise PromptError("Expected a checkpoint with a chat template, found none; pass a plain prompt or --raw.")
        whole = {"tokenize": tokenize, "add_generation_prompt": prompt, **options}
        if not hasattr(self._wrapped, "eos_token_ids"):
            whole["return_dict"] = False  # mlx-lm's wrapper says so by itself
        try:
            return self._wrapped.apply_chat_template(list(messages), **whole)
        except Exception as error:  # a template may raise anything, most often jinja's TemplateError
            raise PromptError(
                f"Expected messages that this checkpoint's chat template takes, found others ({brief(error)}); "
                "use the roles system, user and assistant in turns."
            ) from error

    def _refuse_dropped(self, messages: list[Message], options: Mapping[str, Any]) -> None:
        """Raises Dropped where the prompt stays the same without a part. Each kind of part is tried until it is seen
        to arrive: a tokenizer's first conversations cost a few renderings more."""
        whole = None
        for kind, dropped, said, changed in _without(messages, options):
            if kind in self._kept:
                continue
            whole = self._text(messages, options) if whole is None else whole
            if whole is not None and self._text(said, changed) == whole:
                raise dropped
            self._kept.add(kind)


def _without(
    messages: list[Message], options: Mapping[str, Any]
) -> Iterator[tuple[tuple[object, ...], Dropped, list[Message], Mapping[str, Any]]]:
    """Every part: its kind, the error if it is dropped, and what lacks it or says something else there."""
    if tools := options.get("tools"):
        yield ("tools", len(tools) > 1), Dropped("tools", "tools"), messages, {**options, "tools": tools[:-1] or None}
    for i, message in enumerate(messages):
        role, calls = message["role"], message.get("tool_calls")
        if calls:
            # Without the last call: one that follows another has its own place or none.
            kind, what, other = (role, "calls", len(calls) > 1), "tool_calls", {"tool_calls": list(calls)[:-1]}
        elif message["content"]:
            kind, what, other = (role, "content", i == 0), f"{role} message", {"content": message["content"] + " ~"}
            what += " after another message" if role == "system" and i else ""
        else:
            continue
        yield kind, Dropped(what, "messages"), [*messages[:i], {**message, **other}, *messages[i + 1 :]], options


def _checked(messages: Sequence[Message]) -> list[Message]:
    """Messages with a role and a text each, parts of text as lines of one; PromptError for anything else."""
    found: list[Message] = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise PromptError(
                f"Expected messages as {{'role': ..., 'content': ...}}, found another at place {i}; "
                "give each a role and a content."
            )
        content = message.get("content")
        if isinstance(content, (list, tuple)):
            texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
                     for part in content]  # fmt: skip
            content = None if None in texts else "\n".join(map(str, texts))
        elif content is None and message.get("tool_calls"):
            content = ""
        if not isinstance(content, str):
            raise PromptError(
                f"Expected the content of messages as text, found another at place {i}; "
                "images, sounds and files cannot be read."
            )
        found.append({**message, "content": content})
    return found
