"""The servers of a run: how many requests each one holds, and whether it is well.

A request goes to the healthy server with the smallest share of its limit in use. A server that keeps breaking is
ejected for a while that doubles, and tried again with one request; a server with another model never comes back.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from batch_client.errors import ServingError
from batch_client.limiter import Limiter

__all__ = ["Endpoint", "Pool"]

EJECT_AFTER = 3
EJECT_SECONDS = 1.0
EJECT_MOST_SECONDS = 30.0


@dataclass
class Endpoint:
    """One server and its state."""

    url: str
    limiter: Limiter
    in_flight: int = 0
    broken: int = 0
    ejected_until: float = float("-inf")
    left_out: str | None = None
    ejections: int = field(default=0)

    def has_room(self, now: float) -> bool:
        if self.left_out is not None or now < self.ejected_until:
            return False
        # After an ejection one request at a time shows whether the server is back.
        return self.in_flight < (1 if self.broken >= EJECT_AFTER else self.limiter.limit)


class Pool:
    """Hands out room for requests among the endpoints."""

    def __init__(self, urls: tuple[str, ...], in_flight: int, clock: Callable[[], float]) -> None:
        self.endpoints = [Endpoint(url.rstrip("/"), Limiter(in_flight)) for url in urls]
        self._clock = clock
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()

    @asynccontextmanager
    async def room(self) -> AsyncIterator[Endpoint]:
        """Wait for room at a server, first come, first served, and hold it for one attempt.

        Raises ServingError when every server has been left out.
        """
        async with self._turn:
            endpoint = await self._find()
            endpoint.in_flight += 1
        try:
            yield endpoint
        finally:
            endpoint.in_flight -= 1
            self._changed.set()

    async def _find(self) -> Endpoint:
        while True:
            now = self._clock()
            free = [endpoint for endpoint in self.endpoints if endpoint.has_room(now)]
            if free:
                return min(free, key=lambda endpoint: endpoint.in_flight / endpoint.limiter.limit)
            if all(endpoint.left_out is not None for endpoint in self.endpoints):
                raise ServingError("no server is left: " + "; ".join(
                    f"{endpoint.url}: {endpoint.left_out}" for endpoint in self.endpoints))
            waits = [endpoint.ejected_until - now for endpoint in self.endpoints if endpoint.ejected_until > now]
            self._changed.clear()
            try:
                async with asyncio.timeout(min(waits, default=None)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def succeeded(self, endpoint: Endpoint) -> None:
        endpoint.broken = 0
        endpoint.ejections = 0
        endpoint.limiter.succeeded()

    def overloaded(self, endpoint: Endpoint, sent_at: float) -> None:
        endpoint.limiter.overloaded(self._clock(), sent_at)

    def broke(self, endpoint: Endpoint) -> None:
        """The connection failed, or the reply was not to be trusted."""
        endpoint.broken += 1
        if endpoint.broken >= EJECT_AFTER:
            pause = min(EJECT_MOST_SECONDS, EJECT_SECONDS * 2.0**endpoint.ejections)
            endpoint.ejections += 1
            endpoint.ejected_until = self._clock() + pause

    def leave_out(self, endpoint: Endpoint, reason: str) -> None:
        """Never use this server again in this run."""
        endpoint.left_out = reason
        self._changed.set()
