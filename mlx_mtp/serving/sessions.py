"""Sessions kept between requests: whoever goes on with a conversation finds its K/V.

Only the engine's thread touches a pool; `nbytes` and `count` are plain numbers that others may read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from mlx_mtp.generation.prefix import Session

log = logging.getLogger(__name__)

# However little they take: looking for a common beginning goes through all of them.
MOST_SESSIONS = 64


class SessionPool:
    """Least recently used sessions go first. most_bytes: of all K/V kept; 0 keeps nothing."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = self.count = 0
        self._kept: list[Session] = []  # the most recently used one last

    def take(self, ids: Sequence[int]) -> Session:
        """The session that knows most of the prompt `ids`, out of the pool; a new one where none is worth it.

        Whoever gets a session loses what it holds beyond the common tokens. That is worth it where more is saved than
        lost: two conversations that share a short instruction do not take each other's place.
        """
        best, most = None, 1
        for session in self._kept:
            common = session.common(ids)
            if common >= most and 2 * common >= len(session.ids):
                best, most = session, common
        if best is None:
            return Session()
        self._kept = [session for session in self._kept if session is not best]
        self._count()
        return best

    def keep(self, session: Session) -> bool:
        """Takes a session back as the most recently used one; whether anything was let go of for it."""
        self._kept += [session] if session.ids else []
        before = len(self._kept)
        self._count()
        while self._kept and (self.nbytes > self.most_bytes or self.count > MOST_SESSIONS or not self.most_bytes):
            self._kept.pop(0)
            self._count()
        if self.most_bytes and before and not self._kept:
            log.info("One conversation's K/V take more than the %d bytes that may be kept.", self.most_bytes)
        return len(self._kept) < before

    def _count(self) -> None:
        self.nbytes, self.count = sum(session.nbytes for session in self._kept), len(self._kept)
