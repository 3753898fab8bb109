"""Counters in Prometheus' text form.

What it does: adds up what was served. What it does not do: time anything itself, or keep a history.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping

PREFIX = "mlx_mtp_"
COUNTERS = {
    "prompt_tokens_total": "Tokens of prompts taken up.",
    "cached_tokens_total": "Tokens of prompts that a kept session had and that were not run again.",
    "generated_tokens_total": "Tokens generated, those of dropped replies included.",
    "drafted_tokens_total": "Tokens drafted in finished replies.",
    "accepted_tokens_total": "Drafted tokens that are in finished replies.",
    "prefill_seconds_total": "Seconds from taking up a request to its first token, in finished replies.",
    "decode_seconds_total": "Seconds from the first to the last token, in finished replies.",
    "dropped_total": "Requests whose client left before the end.",
}
GAUGES = {
    "queue_length": "Requests that wait.",
    "running": "Requests that run.",
    "session_bytes": "Bytes of K/V kept between requests.",
    "sessions": "Conversations whose K/V are kept.",
    "active_memory_bytes": "Bytes MLX holds in arrays.",
}


class Metrics:
    """Counts from any thread; `render` gives the text."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(COUNTERS, 0.0)
        self._requests: dict[tuple[str, int], int] = defaultdict(int)

    def add(self, name: str, amount: float) -> None:
        """Adds to one of COUNTERS."""
        with self._lock:
            self._counts[name] += amount

    def answered(self, route: str, status: int) -> None:
        """One response of a route of this server's ("other" = no such route)."""
        with self._lock:
            self._requests[route, status] += 1

    def render(self, gauges: Mapping[str, float]) -> str:
        """All of it; gauges: today's values of GAUGES."""
        with self._lock:
            requests, counts = sorted(self._requests.items()), dict(self._counts)
        lines = [*_head("requests_total", "HTTP responses.", "counter")]
        for (route, status), count in requests:
            lines.append(f'{PREFIX}requests_total{{route="{route}",status="{status}"}} {count}')
        for name, value in counts.items():
            lines += [*_head(name, COUNTERS[name], "counter"), f"{PREFIX}{name} {value:.17g}"]
        for name, value in gauges.items():
            lines += [*_head(name, GAUGES[name], "gauge"), f"{PREFIX}{name} {value:.17g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, text: str, kind: str) -> tuple[str, str]:
    return f"# HELP {PREFIX}{name} {text}", f"# TYPE {PREFIX}{name} {kind}"
