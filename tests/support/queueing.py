"""TorchServe as a queue on a virtual clock: first come, first served, stop-and-wait workers; no bytes."""

from __future__ import annotations

import functools
import heapq
import itertools
import random
from collections import deque

DELAY = 0.001  # seconds that a worker waits for more
PAUSE = 0.05  # seconds until a client that was turned away comes again


class QueueingServer:
    """Workers that each take up to `batch` requests at a time, compute them one after another and answer all at once.

    A worker that finds fewer waits DELAY seconds for more. Times are normally distributed around `compute` seconds a
    request; the way there and back takes `transit` and, exponentially distributed, up to as much again and more. What
    comes to a full queue is turned away.
    """

    def __init__(self, workers, compute, transit=0.004, *, batch=8, room=1000, noise=0.15, seed=0):
        self.now = 0.0
        self.compute, self.transit, self.batch, self.room = compute, transit, batch, room
        self.workers = self.idle = workers
        self.noise = noise
        self.rng = random.Random(seed)
        self.queue = deque()
        self.done = self.turned_away = 0
        self._events = []
        self._order = itertools.count()

    def after(self, seconds, call):
        heapq.heappush(self._events, (self.now + seconds, next(self._order), call))

    def run(self, seconds):
        until = self.now + seconds
        while self._events and self._events[0][0] <= until:
            self.now, _, call = heapq.heappop(self._events)
            call()
        self.now = until

    def send(self, reply):
        """`reply(compute, before)` is called when the answer has come, both None when there was no room."""
        way = self.transit * (0.5 + 0.25 * self.rng.expovariate(1))
        self.after(way, functools.partial(self._arrive, functools.partial(self.after, way), reply))

    def set_workers(self, workers):
        self.idle += workers - self.workers
        self.workers = workers
        self._pick()

    def _arrive(self, back, reply):
        if len(self.queue) >= self.room:
            self.turned_away += 1
            back(functools.partial(reply, None, None))
            return
        self.queue.append((back, reply))
        self._pick()

    def _pick(self):
        while self.idle > 0 and self.queue:
            self.idle -= 1
            taken = [self.queue.popleft()]
            self.after(0 if len(self.queue) >= self.batch - 1 else DELAY, functools.partial(self._serve, taken))

    def _serve(self, taken):
        while self.queue and len(taken) < self.batch:
            taken.append(self.queue.popleft())
        times = [self.compute * max(0.2, self.rng.gauss(1, self.noise)) for _ in taken]
        self.after(sum(times), functools.partial(self._finish, taken, times))

    def _finish(self, taken, times):
        before = 0.0
        for (back, reply), compute in zip(taken, times, strict=True):
            back(functools.partial(reply, compute, before))
            before += compute
        self.done += len(taken)
        self.idle += 1
        self._pick()


class BulkClient:
    """Always has another request, and holds as many as its limiter allows."""

    def __init__(self, server, limiter):
        self.server, self.limiter = server, limiter
        self.in_flight = 0
        self._area = self._counted = 0.0
        self.fill()

    def fill(self):
        while self.in_flight < self.limiter.limit:
            self._count(+1)
            self.server.send(functools.partial(self._replied, self.server.now, self.in_flight))

    def measure(self, seconds):
        """Requests a second and mean number in flight, over the next so many seconds."""
        self._count(0)
        done, self._area = self.server.done, 0.0
        self.server.run(seconds)
        self._count(0)
        return (self.server.done - done) / seconds, self._area / seconds

    def _replied(self, sent_at, place, compute, before):
        now = self.server.now
        if compute is None:
            self.limiter.overloaded(now, sent_at)
            self._count(-1)
            self.server.after(PAUSE, self.fill)
            return
        self.limiter.answered(now, sent_at, self.in_flight, 1000, compute, before, place)
        self._count(-1)
        self.fill()

    def _count(self, change):
        self._area += self.in_flight * (self.server.now - self._counted)
        self._counted = self.server.now
        self.in_flight += change
