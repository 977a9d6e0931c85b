"""How many bytes of source records are held at a time. First come, first served, so that early chunks finish first."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["ByteBudget", "Lease"]


class Lease:
    """Bytes taken from a budget, given back when the last of its holders lets go. It begins with one holder."""

    def __init__(self, budget: ByteBudget, nbytes: int) -> None:
        self._budget = budget
        self._nbytes = nbytes
        self._holders = 1

    def hold(self) -> Lease:
        self._holders += 1
        return self

    def release(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            self._budget._give_back(self._nbytes)  # noqa: SLF001 - a lease is its budget's other half


class ByteBudget:
    """At most `most` bytes at a time; a request above `most` would wait for ever and is refused."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    async def take(self, nbytes: int) -> Lease:
        """Wait for room. Raises ValueError for more than the whole budget."""
        if nbytes > self.most:
            raise ValueError(f"{nbytes} bytes asked of a budget of {self.most}")
        if self._waiting or self.used + nbytes > self.most:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((nbytes, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._give_back(nbytes)
                else:
                    self._waiting.remove((nbytes, turn))
                raise
        else:
            self.used += nbytes
        return Lease(self, nbytes)

    def _give_back(self, nbytes: int) -> None:
        self.used -= nbytes
        while self._waiting and self.used + self._waiting[0][0] <= self.most:
            size, turn = self._waiting.popleft()
            if not turn.done():
                self.used += size
                turn.set_result(None)
