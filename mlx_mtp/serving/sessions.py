"""Sessions kept between requests: whoever goes on with a conversation finds its K/V.

Only the engine's thread touches a pool; others may read `nbytes` and `count`.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlx_mtp.generation.prefix import Session

# However little they take: looking for a common beginning goes through all of them.
MOST_SESSIONS = 64
# Tokens at a prompt's end that the next turn may write otherwise: a template opens a thought there and drops it later.
PROMPT_TAIL = 16
# Tokens in common from which on copying a session's rows beats running them again.
WORTH_A_COPY = 32


class SessionPool:
    """Least recently used sessions go first. most_bytes: of all K/V kept; 0 keeps nothing."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        # Each with the length of the last prompt that it served, the most recently used one last.
        self._kept: list[tuple[Session, int]] = []

    @property
    def nbytes(self) -> int:
        """Bytes of all K/V kept."""
        return sum(session.nbytes for session, _ in self._kept)

    @property
    def count(self) -> int:
        return len(self._kept)

    def take(self, ids: Sequence[int]) -> Session:
        """A session that knows as much as any of the prompt `ids`; a new one where none knows enough.

        Whoever goes on from a prompt that was served gets its session, out of the pool. Another conversation that
        begins alike, with the same instructions and tools, gets a copy: the first one goes on from its own later.
        The one prompt has all of the other, or but for its end, and a turn more.
        """
        best, most, served = None, 0, 0
        for session, prompt in self._kept:
            if (common := session.common(ids)) >= max(most, 1):
                best, most, served = session, common, prompt
        if best is None:
            return Session()
        if most >= served or most >= served - PROMPT_TAIL and len(ids) > served + PROMPT_TAIL:
            self._kept = [kept for kept in self._kept if kept[0] is not best]
            return best
        return best.fork() if most >= WORTH_A_COPY else Session()

    def keep(self, session: Session, prompt: int) -> bool:
        """Takes a session back as the most recently used one; whether anything was let go of for it.

        prompt: tokens of the prompt that it served.
        """
        self._kept += [(session, prompt)] if session.ids else []
        before = self.count
        while self._kept and (self.nbytes > self.most_bytes or self.count > MOST_SESSIONS or not self.most_bytes):
            self._kept.pop(0)
        return self.count < before
