"""The servers of a run: how many requests each one holds, and whether it is well.

A request goes to the healthy server with the smallest share of its limit in use. A server without room rests for a
moment; one that keeps breaking, or failing on zeros while there is another, is ejected for a while that doubles, and
tried again with one request; one that is left out gets nothing, until `agreement.py` finds that it has the run's model
after all.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from batch_client.errors import BatchClientError, MismatchError, ServingError
from batch_client.events import Event, ServerAway, ServerBack, ServerJoined, ServerLeftOut
from batch_client.limiter import Limiter, deadline_of
from batch_client.retry import full_jitter

__all__ = ["Endpoint", "Pool", "Room"]

EJECT_AFTER = 3
EJECT_SECONDS = 1.0
EJECT_MOST_SECONDS = 30.0
# Why a server is left out that may have the run's model later: it is not up, or has not said its token yet.
_OF_ABSENT = ServingError
AWAY_AFTER = 2  # ejections without an answer between them: what breaks for a second is not worth a word


@dataclass(eq=False)
class Endpoint:
    """One server and its state; times are of the pool's clock.

    lane: the name under which it takes bulk requests, None for the model's own.
    shared_memory: the folder in which it finds the records of requests, None to send them.
    refused_token: one that it has just turned down: whichever request is next asks for another.
    shared_outputs: whether it is asked to put large outputs there too. outputs_held: requests under way that were.
    """

    url: str
    limiter: Limiter
    lane: str | None = None
    shared_memory: Path | None = None
    shared_outputs: bool = True
    outputs_held: int = 0
    in_flight: int = 0
    broken: int = 0
    broken_since: float = 0.0
    ejections: int = 0
    turned_away: int = 0
    refused_token: str | None = None
    refused_since: float | None = None
    rests_until: float = float("-inf")
    other_model: str | None = None
    left_out: BatchClientError | None = None
    left_out_at: float = 0.0

    @property
    def is_absent(self) -> bool:
        """Whether it was left out because it gave no usable answer, and may have one later."""
        return isinstance(self.left_out, _OF_ABSENT)

    @property
    def on_trial(self) -> bool:
        """After an ejection one request at a time shows whether the server is back."""
        return self.broken >= EJECT_AFTER

    def is_up(self, now: float) -> bool:
        """Neither left out nor at rest."""
        return self.left_out is None and now >= self.rests_until

    def has_room(self, now: float) -> bool:
        return self.is_up(now) and self.in_flight < (1 if self.on_trial else self.limiter.limit)


# Waits for room at a server and holds it for one attempt; `at` as in `Pool.room`.
Room = Callable[..., AbstractAsyncContextManager[Endpoint]]


class Pool:
    """Hands out room for requests, each to be answered within `deadline` seconds, among the endpoints."""

    def __init__(self, urls: tuple[str, ...], in_flight: int, clock: Callable[[], float], rng: random.Random,
                 patience: float = math.inf) -> None:
        self.deadline = deadline_of(patience)
        self.endpoints = [Endpoint(url, Limiter(in_flight, self.deadline)) for url in urls]
        self._clock = clock
        self._rng = rng
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._absence = asyncio.Event()
        self._emit: Callable[[Event], None] = lambda _: None
        self._asks_again = False

    @property
    def usable(self) -> int:
        """How many servers are not left out."""
        return sum(endpoint.left_out is None for endpoint in self.endpoints)

    def tell(self, emit: Callable[[Event], None], *, asks_again: bool = False) -> None:
        """Call `emit` with what happens to servers from now on, and first for those that are left out already.
        `asks_again`: somebody asks the absent ones, so that they may be taken back.
        """
        self._emit, self._asks_again = emit, asks_again
        for endpoint in self.endpoints:
            self._say_left_out(endpoint)

    def _say_left_out(self, endpoint: Endpoint) -> None:
        if endpoint.left_out is not None:
            again = self._asks_again and endpoint.is_absent
            self._emit(ServerLeftOut(endpoint.url, str(endpoint.left_out), asked_again=again))

    @asynccontextmanager
    async def room(self, turn: AbstractAsyncContextManager[object] | None = None,
                   at: str = "") -> AsyncIterator[Endpoint]:
        """Wait for room at a server, first come, first served, and hold it for one attempt; `turn` is for `alone`.
        `at` is the URL of the one to ask, unless it rests, is on trial or is left out.

        Raises the first server's reason when every server has been left out.
        """
        async with turn or self._turn:
            endpoint = await self._enter(at)
        try:
            yield endpoint
        finally:
            endpoint.in_flight -= 1
            self._changed.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[Room]:
        """Keep all other requests of this run off the servers: what fails in here failed by itself.

        Gives what `room` is inside: it must be used for every attempt while the block lasts.
        """
        async with self._turn:
            while any(endpoint.in_flight for endpoint in self.endpoints):
                self._changed.clear()
                await self._changed.wait()
            yield partial(self.room, nullcontext())

    async def _enter(self, at: str) -> Endpoint:
        while True:
            now = self._clock()
            wanted = [endpoint for endpoint in self.endpoints
                      if endpoint.url == at and endpoint.is_up(now) and not endpoint.on_trial]
            free = [endpoint for endpoint in wanted or self.endpoints if endpoint.has_room(now)]
            if free:
                endpoint = min(free, key=lambda endpoint: endpoint.in_flight / endpoint.limiter.limit)
                endpoint.in_flight += 1
                return endpoint
            reasons = [endpoint.left_out for endpoint in self.endpoints if endpoint.left_out is not None]
            if len(reasons) == len(self.endpoints):
                raise type(reasons[0])("no server is left: " + "; ".join(map(str, reasons))) from reasons[0]
            waits = [endpoint.rests_until - now for endpoint in self.endpoints if endpoint.rests_until > now]
            self._changed.clear()
            try:
                async with asyncio.timeout(min(waits, default=None)):
                    await self._changed.wait()
            except TimeoutError:
                continue

    def answered(self, endpoint: Endpoint, sent_at: float, records: int, compute: float, before: float,
                 place: int) -> None:
        """It answered a request of so many records that was sent at `sent_at`; the rest: see `Limiter`."""
        if endpoint.ejections >= AWAY_AFTER:
            self._emit(ServerBack(endpoint.url, self._clock() - endpoint.broken_since))
        endpoint.broken = endpoint.ejections = endpoint.turned_away = 0
        endpoint.other_model = endpoint.refused_since = None
        endpoint.limiter.answered(self._clock(), sent_at, endpoint.in_flight, records, compute, before, place)

    def overloaded(self, endpoint: Endpoint, sent_at: float) -> None:
        """It had no room for a request sent at `sent_at`: fewer at once, and a pause with full jitter for all."""
        endpoint.limiter.overloaded(self._clock(), sent_at)
        self._rest(endpoint, sent_at)

    def refused(self, endpoint: Endpoint, sent_at: float) -> float:
        """It turned down the token of a request sent at `sent_at`: a pause for all, in which there may come another.
        Gives the seconds since the first refusal after its last success.
        """
        now = self._clock()
        if endpoint.refused_since is None:
            endpoint.refused_since = now
        self._rest(endpoint, sent_at)
        return now - endpoint.refused_since

    def _rest(self, endpoint: Endpoint, sent_at: float) -> None:
        """Once for all requests that were under way together."""
        if sent_at >= endpoint.rests_until:
            endpoint.rests_until = self._clock() + full_jitter(endpoint.turned_away, self._rng)
            endpoint.turned_away += 1

    def broke(self, endpoint: Endpoint, sent_at: float, reason: str) -> None:
        """The connection failed, or the reply was not to be trusted. Requests that were under way together count once
        for an ejection.
        """
        if endpoint.broken == 0:
            endpoint.broken_since = self._clock()
        endpoint.broken += 1
        if endpoint.on_trial and sent_at >= endpoint.rests_until:
            pause = min(EJECT_MOST_SECONDS, EJECT_SECONDS * 2.0**endpoint.ejections)
            endpoint.ejections += 1
            endpoint.rests_until = self._clock() + pause
            if endpoint.ejections == AWAY_AFTER:
                self._emit(ServerAway(endpoint.url, reason))

    def late(self, endpoint: Endpoint, sent_at: float, reason: str) -> None:
        """It did not answer in time: it has too much to do, or has broken."""
        endpoint.limiter.overloaded(self._clock(), sent_at)
        self.broke(endpoint, sent_at, reason)

    def sick(self, url: str, sent_at: float, reason: str) -> None:
        """It fails on zeros, or on trial: as good as broken, if there is another to ask."""
        if self.usable > 1:
            self.broke(next(endpoint for endpoint in self.endpoints if endpoint.url == url), sent_at, reason)

    def strange(self, endpoint: Endpoint, other_model: str) -> None:
        """A sound reply named another model. One may be a bit that flipped in the name; two alike are the truth."""
        if endpoint.other_model == other_model:
            self.leave_out(endpoint, MismatchError(f"{endpoint.url}: {other_model}"))
        endpoint.other_model = other_model

    def without_model(self, endpoint: Endpoint, lane: str | None, reason: str) -> None:
        """It has no model of the name that a request asked for, which was that of its `lane`, or the model's own.

        A lane may be withdrawn, or a proxy may not know it: the model's own name is the one that has to be there.
        """
        if lane is None:
            self.leave_out(endpoint, ServingError(f"{endpoint.url}: {reason}"))
        else:
            endpoint.lane = None

    def leave_out(self, endpoint: Endpoint, reason: BatchClientError) -> None:
        """Use this server no more. That is told once for each kind of reason, for good or not, and not of the last one,
        whose reason ends the run.
        """
        if endpoint.left_out is None:
            endpoint.left_out_at = self._clock()
        elif not endpoint.is_absent or isinstance(reason, _OF_ABSENT):
            return
        endpoint.left_out = reason
        if self.usable:
            self._say_left_out(endpoint)
        self._changed.set()
        self._absence.set()

    def take_back(self, endpoint: Endpoint) -> None:
        """Use a server again that was left out, as a new one but for the requests that it may hold."""
        endpoint.left_out, endpoint.shared_outputs = None, True
        endpoint.broken = endpoint.ejections = endpoint.turned_away = 0
        endpoint.other_model = endpoint.refused_since = endpoint.refused_token = None
        endpoint.rests_until = float("-inf")
        self._emit(ServerJoined(endpoint.url, self._clock() - endpoint.left_out_at,
                                sum(one.limiter.most for one in self.endpoints if one.left_out is None)))
        self._changed.set()

    async def absent(self) -> list[Endpoint]:
        """Those that were left out because they gave no usable answer, and may have one later, once there are some."""
        while not (found := [endpoint for endpoint in self.endpoints if endpoint.is_absent]):
            self._absence.clear()
            await self._absence.wait()
        return found
