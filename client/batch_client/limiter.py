"""How many requests at once: the fewest that keep a server busy. Pure; the caller passes the times.

A queue that is never empty keeps a server busy; what waits there beyond that is latency for everybody. How long a
request waited its reply says: it took `seconds`, the model computed for `compute` of them, and the way there and back
takes what the quickest reply took. So each reply moves the limit by

    own / seconds - 1 + 1 / limit        own = OWN_COMPUTE * compute + OWN_TRANSIT * least transit

By Little's law `limit * own / seconds` requests are being served and the others wait; so the limit rests where one
waits. It is the one waiting packet of TCP Vegas (Brakmo and Peterson, 1995) in the form of Netflix's
concurrency-limits, with the server's own word for what a request takes when nothing is before it. Nothing has to be
known of workers, threads or batches. `docs/explanation/concurrency.md` has the figures behind the two factors.

A request has to be answered in time, or its reply is dropped, and the server computes it for nobody while it is sent
again. So the limit also stays within what can be answered in half that time, by the quickest pace seen: that of a
request which had so many before it, itself among them, when it was sent, and came back after so long.

A queue that is full is the server's way to say "fewer": additive increase, multiplicative decrease (Chiu and Jain,
1989). The cut is made once per round-trip, since all requests of one burst report the same overload; from then on the
limit grows by at most one a round. A request that was not answered in time says the same.
"""

from __future__ import annotations

import math

__all__ = ["REQUEST_SECONDS", "Limiter", "deadline_of"]

REQUEST_SECONDS = 300.0  # in which an attempt has to be answered at most
BEGIN = 4
CUT = 0.7
# A quarter more than there are workers: service times vary, and what is computed together is answered together.
OWN_COMPUTE = 1.25
# A worker idles while a batch is on its way, and the least of a jittering way is not the usual: a few such times have
# to be in the queue. Less left workers idle in the simulation, more only waited.
OWN_TRANSIT = 8.0
# At most twice the limit a round.
MOST_GROWTH = 1.0


def deadline_of(patience: float) -> float:
    """Seconds in which an attempt has to be answered."""
    return min(REQUEST_SECONDS, max(patience, 1.0))


class Limiter:
    """The number of requests that one endpoint may hold, between 1 and `most`. Times are in seconds of one clock.

    deadline: in which a request has to be answered.
    """

    def __init__(self, most: int, deadline: float = REQUEST_SECONDS) -> None:
        self.most = most
        self._deadline = deadline
        self._limit = float(min(most, BEGIN))
        self._full_at = self._cut_at = -math.inf
        self._records = 0
        self._transit = math.inf
        self._in_time = math.inf  # requests that are answered in time

    @property
    def limit(self) -> int:
        return int(self._limit)

    def expect(self, seconds: float) -> None:
        """A request takes about so long where none is before it: begin with what one worker answers in time."""
        self._limit = min(self._limit, max(1.0, self._deadline / 2 / seconds))

    def answered(self, now: float, sent_at: float, in_flight: int, records: int, compute: float, before: float,
                 place: int) -> None:
        """One of `in_flight` requests was answered, of so many records; it was number `place` of those in flight when
        it was sent. In its server batch the model computed for `before` seconds for others and then `compute` for this
        one; both are 0 where a server does not say.
        """
        if in_flight >= self.limit:
            self._full_at = now
        if 2 * records < self._records:
            return  # the rest of a chunk waits as long as the others and has less to do
        if records >= 2 * self._records:
            self._transit, self._in_time = math.inf, 0.0
        self._records = max(self._records, records)
        seconds = max(now - sent_at, 1e-9)
        self._in_time = max(self._in_time, self._deadline / 2 / seconds * place)
        self._move(0.0)
        compute = min(compute, seconds)
        # The last of a server batch waited for nobody behind it: what is not in the model is the way, or the queue.
        self._transit = min(self._transit, max(0.0, seconds - compute - before))
        if self._full_at < sent_at:
            return  # it was not the limit that kept others from being sent
        served = (OWN_COMPUTE * compute + OWN_TRANSIT * self._transit) / seconds
        self._move(min(served - 1.0, 0.0 if self._cut_at > -math.inf else MOST_GROWTH) + 1.0 / self._limit)

    def overloaded(self, now: float, sent_at: float) -> None:
        """A request sent at `sent_at` was turned away for lack of room, or not answered in time."""
        if sent_at > self._cut_at:
            self._move((CUT - 1.0) * self._limit)
            self._cut_at = now

    def _move(self, by: float) -> None:
        self._limit = min(float(self.most), max(1.0, min(self._limit + by, self._in_time)))
