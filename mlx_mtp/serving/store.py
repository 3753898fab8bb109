"""Responses that later requests go on from or look up, in memory: the least recently used go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from mlx_mtp.serving.body import as_json
from mlx_mtp.serving.errors import RequestError

Items = list[dict[str, Any]]


@dataclass(frozen=True)
class Stored:
    """response: as it was sent. given: input items, those of the conversation before it among them."""

    response: dict[str, Any]
    given: Items

    @property
    def conversation(self) -> Items:
        """All items, its output included."""
        return [*self.given, *self.response["output"]]


class ResponseStore:
    """From any thread. most_bytes: of all JSON that is kept."""

    def __init__(self, most_bytes: int = 64_000_000) -> None:
        self._most_bytes, self._nbytes = most_bytes, 0
        self._kept = OrderedDict[str, tuple[Stored, int]]()
        self._lock = threading.RLock()

    def keep(self, stored: Stored) -> None:
        nbytes = len(as_json([stored.response, stored.given]))
        with self._lock:
            self._kept[stored.response["id"]] = stored, nbytes
            self._nbytes += nbytes
            while self._nbytes > self._most_bytes:
                self._nbytes -= self._kept.popitem(last=False)[1][1]

    def get(self, name: str, param: str | None = None) -> Stored:
        """The response of an id; RequestError (404, or 400 where a field named it) where it is not kept."""
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name][0]
        raise RequestError(f"No response '{name[:100]}' is kept here: it was not stored, has been let go of, or was "
                           "another server's.", status=400 if param else 404, param=param,
                           code="previous_response_not_found" if param else "not_found")  # fmt: skip

    def item(self, name: str, param: str) -> dict[str, Any]:
        """An item of any response that is kept, by its id; RequestError where there is none."""
        with self._lock:
            items = [item for stored, _ in self._kept.values() for item in stored.conversation]
        for item in items:
            if item.get("id") == name:
                return item
        raise RequestError(f"{param}: no item '{name[:100]}' is kept here.", param=param, code="not_found")

    def drop(self, name: str) -> None:
        """Forgets a response; RequestError (404) where it is not kept."""
        with self._lock:
            self.get(name)
            self._nbytes -= self._kept.pop(name)[1]
