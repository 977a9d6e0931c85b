"""How many bytes of source records are held at a time. Whoever has the lower rank is served first, so that early output
chunks finish first.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools

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
        self._arrivals = itertools.count()
        self._waiting: list[tuple[int, int, int, asyncio.Future[None]]] = []  # a heap: rank, arrival, bytes, turn

    async def take(self, nbytes: int, rank: int = 0) -> Lease:
        """Wait for room, behind all of a lower rank and those of the same that came before, however little they want.

        Raises ValueError for more than the whole budget.
        """
        if nbytes > self.most:
            raise ValueError(f"{nbytes} bytes asked of a budget of {self.most}")
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._arrivals), nbytes, turn))
        self._grant()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._grant()  # to those who were behind it
            else:
                self._give_back(nbytes)
            raise
        return Lease(self, nbytes)

    def _give_back(self, nbytes: int) -> None:
        self.used -= nbytes
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            _, _, nbytes, turn = self._waiting[0]
            if not turn.done():  # cancelled otherwise
                if self.used + nbytes > self.most:
                    return
                self.used += nbytes
                turn.set_result(None)
            heapq.heappop(self._waiting)
