"""Counters of what was served, in Prometheus' text form."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

from mlx_mtp.generation.types import Stats

PREFIX = "mlx_mtp_"
TEXTS = {
    "prompt_tokens_total": "Tokens of prompts taken up.",
    "cached_tokens_total": "Tokens of prompts that a kept session had and that were not run again.",
    "generated_tokens_total": "Tokens generated, those of dropped replies included.",
    "drafted_tokens_total": "Tokens drafted in finished replies.",
    "accepted_tokens_total": "Drafted tokens that are in finished replies.",
    "prefill_seconds_total": "Seconds from taking up a request to its first token, in finished replies.",
    "decode_seconds_total": "Seconds from the first to the last token, in finished replies.",
    "dropped_total": "Requests whose client left before the end.",
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
        self._counts = {name: 0.0 for name in TEXTS if name.endswith("_total")}
        self._requests = Counter[tuple[str, int]]()

    def add(self, name: str, amount: float = 1) -> None:
        """Adds to a counter."""
        with self._lock:
            self._counts[name] += amount

    def finished(self, stats: Stats) -> None:
        """One whole reply; its tokens were counted as they came."""
        self.add("cached_tokens_total", stats.prompt_tokens - stats.prefilled_tokens)
        self.add("drafted_tokens_total", stats.drafted)
        self.add("accepted_tokens_total", stats.accepted)
        self.add("prefill_seconds_total", stats.prefill_seconds)
        self.add("decode_seconds_total", stats.decode_seconds)

    def answered(self, route: str, status: int) -> None:
        """One response of a route of this server's ("other" = no such route)."""
        with self._lock:
            self._requests[route, status] += 1

    def render(self, gauges: Mapping[str, float]) -> str:
        """All of it; gauges: today's values of what is not counted."""
        with self._lock:
            requests, values = sorted(self._requests.items()), {**self._counts, **gauges}
        lines = [f"# HELP {PREFIX}requests_total HTTP responses.", f"# TYPE {PREFIX}requests_total counter"]
        for (route, status), count in requests:
            lines.append(f'{PREFIX}requests_total{{route="{route}",status="{status}"}} {count}')
        for name, value in values.items():
            kind = "counter" if name in self._counts else "gauge"
            lines += [f"# HELP {PREFIX}{name} {TEXTS[name]}", f"# TYPE {PREFIX}{name} {kind}",
                      f"{PREFIX}{name} {value:.17g}"]  # fmt: skip
        return "\n".join(lines) + "\n"
