"""Counters of what was served, in Prometheus' text form."""

from __future__ import annotations

import threading
from itertools import groupby

PREFIX = "mlx_mtp_"
TEXTS = {
    "requests_total": "HTTP responses.",
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
    """Counts from any thread; `render` gives the text. A name may have labels: `requests_total{status="200"}`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = {name: 0.0 for name in TEXTS if name.endswith("_total") and name != "requests_total"}

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._counts[name] = self._counts.get(name, 0) + amount

    def render(self, **gauges: float) -> str:
        """All of it; gauges: today's values of what is not counted."""
        with self._lock:
            values = sorted((self._counts | gauges).items())
        lines = []
        for name, group in groupby(values, key=lambda item: item[0].partition("{")[0]):
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP {PREFIX}{name} {TEXTS[name]}", f"# TYPE {PREFIX}{name} {kind}"]
            lines += [f"{PREFIX}{label} {value:.17g}" for label, value in group]
        return "\n".join(lines) + "\n"
