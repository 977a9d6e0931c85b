"""How many requests at once: additive increase, multiplicative decrease. Pure; the caller passes the time.

A queue that is full is the server's way to say "fewer". Growth is by one a round of answers, as in TCP (Chiu and Jain,
1989); the cut is made once per round-trip, since all requests of one burst report the same overload.
"""

from __future__ import annotations

__all__ = ["Limiter"]

CUT = 0.7


class Limiter:
    """The number of requests that one endpoint may hold, between 1 and `most`."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._limit = float(most)
        self._cut_at = float("-inf")

    @property
    def limit(self) -> int:
        return int(self._limit)

    def succeeded(self) -> None:
        self._limit = min(float(self.most), self._limit + 1.0 / self._limit)

    def overloaded(self, now: float, sent_at: float) -> None:
        """A request sent at `sent_at` was turned away for lack of room; both times in seconds of one clock."""
        if sent_at > self._cut_at:
            self._limit = max(1.0, self._limit * CUT)
            self._cut_at = now
