"""Messages as chat templates take them, put together from those of any interface."""

from __future__ import annotations

from typing import Any

from mlx_mtp.serving.errors import RequestError

Messages = list[dict[str, Any]]


class Conversation:
    """Whether a template takes these roles in this order is its own affair."""

    def __init__(self, system: str = "") -> None:
        self.messages: Messages = [{"role": "system", "content": system}] if system else []
        self._called = dict[str, str]()  # id of a call -> name of its tool

    def add(self, role: str, text: str, **more: object) -> None:
        """A message; of more fields those that are not empty."""
        self.messages.append({"role": "system" if role == "developer" else role, "content": text, **filled(**more)})

    def call(self, number: str, name: str, arguments: dict[str, Any]) -> None:
        """A call of a tool in the last message."""
        made = {"id": number, "type": "function", "function": {"name": name, "arguments": arguments}}
        self.messages[-1].setdefault("tool_calls", []).append(made)
        self._called[number] = name

    def answer(self, number: str, text: str, place: str, name: str | None = None) -> None:
        """A tool's answer, with the name of the tool; RequestError where no earlier message has the call."""
        if not (name := name or self._called.get(number)):
            raise RequestError(f"{place}: '{number[:100]}' names no call of a tool that came before.", param=place)
        self.messages.append({"role": "tool", "name": name, "tool_call_id": number, "content": text})


def filled(**fields: object) -> dict[str, Any]:
    """Those that are not empty."""
    return {name: value for name, value in fields.items() if value}
