"""Sessions kept between requests: whoever goes on with a conversation finds its K/V.

Only the engine's thread touches a pool; `nbytes` and `count` are plain numbers that others may read.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from mlx_mtp.generation.prefix import Session

log = logging.getLogger(__name__)

# However little they take: looking for a common beginning goes through all of them.
MOST_SESSIONS = 64
# Tokens at a prompt's end that the next turn may write otherwise: a template opens a thought there and drops it later.
PROMPT_TAIL = 16
# Tokens in common from which on copying a session's rows beats running them again.
WORTH_A_COPY = 32


@dataclass
class Kept:
    """A session, and how many tokens the last prompt that it served had."""

    session: Session
    prompt: int


class SessionPool:
    """Least recently used sessions go first. most_bytes: of all K/V kept; 0 keeps nothing."""

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.nbytes = self.count = 0
        self._kept: list[Kept] = []  # the most recently used one last

    def take(self, ids: Sequence[int]) -> Session:
        """A session that knows as much as any of the prompt `ids`; a new one where none knows enough.

        Whoever goes on from a prompt that was served gets its session, out of the pool. Another conversation that
        begins alike, with the same instructions and tools, gets a copy: the first one goes on from its own later.
        The one prompt has all of the other, or but for its end, and a turn more.
        """
        best, most = None, 0
        for kept in self._kept:
            if (common := kept.session.common(ids)) >= max(most, 1):
                best, most = kept, common
        if best is None:
            return Session()
        if most >= best.prompt or most >= best.prompt - PROMPT_TAIL and len(ids) > best.prompt + PROMPT_TAIL:
            self._kept = [kept for kept in self._kept if kept is not best]
            self._count()
            return best.session
        return best.session.fork() if most >= WORTH_A_COPY else Session()

    def keep(self, session: Session, prompt: int) -> bool:
        """Takes a session back as the most recently used one; whether anything was let go of for it.

        prompt: tokens of the prompt that it served.
        """
        self._kept += [Kept(session, prompt)] if session.ids else []
        before = len(self._kept)
        self._count()
        while self._kept and (self.nbytes > self.most_bytes or self.count > MOST_SESSIONS or not self.most_bytes):
            self._kept.pop(0)
            self._count()
        if self.most_bytes and before and not self._kept:
            log.info("One conversation's K/V take more than the %d bytes that may be kept.", self.most_bytes)
        return len(self._kept) < before

    def _count(self) -> None:
        self.nbytes, self.count = sum(kept.session.nbytes for kept in self._kept), len(self._kept)
