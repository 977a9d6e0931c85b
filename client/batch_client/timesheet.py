"""For each instant of a run, what was waited for: an observer that keeps the account `bottleneck.py` judges.

What begins and ends is counted; the time between two events belongs to what the counts say. So the account has a fixed
size, and adds up to the run.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable

from batch_client.bottleneck import Totals, Waiting
from batch_client.events import (
    Event,
    RecordFailed,
    RequestDone,
    RequestRetried,
    RequestSent,
    RunStarted,
    ServerJoined,
    Step,
    StepBegan,
    StepEnded,
)

__all__ = ["Timesheet"]

# More in flight are counted as this many: what matters is whether the servers have enough.
MOST_LEVELS = 1024
# A way is judged over at least so many seconds, and over so many times the requests that may come back at once.
SPAN_SECONDS, SPAN_ROUNDS = 10.0, 4
# An end that waits longer for the store, as for one that is away, is not what a short run has.
LONG_END_SECONDS = 1.0
# A server that computes less than this share of the most that it was seen to has workers that wait for requests.
IDLE = 0.5


class Timesheet:
    """Call it with every event; `totals` may be asked at any time. `clock` and `cpu` give seconds."""

    def __init__(self, clock: Callable[[], float], cpu: Callable[[], float]) -> None:
        self._clock = clock
        self._cpu = cpu
        self._began: float | None = None
        self._cpu_began = self._cpu_at = 0.0
        self._at = 0.0
        self._most = 1
        self._steps: Counter[Step] = Counter()
        self._in_flight = self._probes = 0
        self._waited: defaultdict[tuple[Waiting, int], float] = defaultdict(float)
        # Since nothing is in flight: the end, unless another request follows.
        self._since: defaultdict[tuple[Waiting, int], float] = defaultdict(float)
        self._sent = self._requests = self._granted = self._failed = self._attempts = 0
        self._request_seconds = self._compute_seconds = self._wasted_seconds = 0.0
        self._ways: dict[str, _Way] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._began = self._at = self._clock()
            self._cpu_began = self._cpu()
            self._most = min(event.in_flight, MOST_LEVELS)
        self._advance()
        self._cpu_at = self._cpu()  # as of the last event, like all else: who asks later may have computed since
        match event:
            case StepBegan():
                self._steps[event.step] += 1
            case StepEnded():
                self._steps[event.step] -= 1
                self._granted += event.step is Step.ROOM
            case RequestSent():
                self._probes += event.probe
                self._send()
            case RequestRetried() | RequestDone():
                self._in_flight -= 1
                self._probes -= event.probe
                self._answered(event)
            case RecordFailed():
                self._failed += 1
            case ServerJoined():
                self._most = min(event.in_flight, MOST_LEVELS)

    def totals(self) -> Totals:
        """The sums up to the last event."""
        waited = defaultdict(float, self._waited)
        for (waiting, in_flight), seconds in self._since.items():
            stored = waiting in (Waiting.READ, Waiting.WRITE) and seconds > LONG_END_SECONDS
            kept = stored or waiting is Waiting.REST
            waited[waiting if kept else Waiting.ENDS, in_flight] += seconds
        return Totals(
            seconds=0.0 if self._began is None else self._at - self._began,
            waited=waited,
            in_flight=self._most,
            requests=self._requests,
            request_seconds=self._request_seconds,
            compute_seconds=self._compute_seconds,
            least_overhead=sum(way.seconds for way in self._ways.values()) / max(self._requests, 1),
            wasted_seconds=self._wasted_seconds,
            cpu_seconds=0.0 if self._began is None else self._cpu_at - self._cpu_began,
            attempts=self._attempts,
            failed=self._failed,
        )

    def _send(self) -> None:
        for key, seconds in self._since.items():
            self._waited[key] += seconds
        self._since.clear()
        self._sent += 1
        self._granted = 0
        self._in_flight += 1

    def _answered(self, event: RequestRetried | RequestDone) -> None:
        self._attempts += 1
        if event.probe:
            return  # where nothing else was under way, its time is that of failures already
        if isinstance(event, RequestRetried):
            self._wasted_seconds += event.seconds
            return
        self._requests += 1
        self._request_seconds += event.seconds
        compute = min(event.compute_ms / 1e3, event.seconds)
        self._compute_seconds += compute
        if event.endpoint not in self._ways:
            self._ways[event.endpoint] = _Way(self._began or 0.0, self._most * SPAN_ROUNDS)
        self._ways[event.endpoint].add(self._at, compute, event.seconds - compute)

    def _advance(self) -> None:
        if self._began is None:
            return
        now = self._clock()
        account = self._waited if self._in_flight or not self._sent else self._since
        waiting = self._waiting()
        # What looks for bad records says nothing of how many requests the servers need.
        level = 0 if waiting is Waiting.REST else min(self._in_flight, MOST_LEVELS)
        account[waiting, level] += now - self._at
        self._at = now

    def _waiting(self) -> Waiting:
        if not self._sent:
            return Waiting.ENDS
        if self._probes and self._probes == self._in_flight:
            return Waiting.REST
        if self._in_flight and self._steps[Step.ROOM]:
            return Waiting.SERVERS
        if self._steps[Step.ROOM] or (self._steps[Step.PAUSE] and not self._in_flight):
            # Who was let in and has not sent yet is busy with its request.
            return Waiting.CLIENT if self._granted else Waiting.REST
        for step, waiting in ((Step.READ, Waiting.READ), (Step.BUDGET, Waiting.BUDGET), (Step.WRITE, Waiting.WRITE)):
            if self._steps[step]:
                return waiting
        return Waiting.SERVERS if self._in_flight else Waiting.CLIENT


class _Way:
    """The way to a server and back: the shortest time that a request took there beyond its computing.

    A queue that always stands looks the same as a longer way. So a way is taken to be longer than it was only over a
    span in which its server computed much less than it can: there nothing has to queue.
    """

    def __init__(self, now: float, span_requests: int) -> None:
        self._span_requests = span_requests
        self._least = self._current = float("inf")
        self._busiest = self._settled = 0.0
        self._open(now)

    def _open(self, now: float) -> None:
        self._began = now
        self._requests = 0
        self._computed = 0.0
        self._span_least = float("inf")

    @property
    def seconds(self) -> float:
        """What all requests so far were on the way, together."""
        return self._settled + (self._requests * min(self._current, self._span_least) if self._requests else 0.0)

    def add(self, now: float, compute: float, beyond: float) -> None:
        """A request that was answered `now`: seconds in the model, and beyond that."""
        self._requests += 1
        self._computed += compute
        self._span_least = min(self._span_least, beyond)
        if now - self._began >= SPAN_SECONDS and self._requests >= self._span_requests:
            busy = self._computed / (now - self._began)
            self._busiest = max(self._busiest, busy)
            self._least = min(self._least, self._span_least)
            self._current = self._span_least if busy < IDLE * self._busiest else self._least
            self._settled += self._requests * self._current
            self._open(now)
