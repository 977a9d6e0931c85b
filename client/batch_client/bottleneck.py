"""What limited a run, from how long what was waited for. Pure arithmetic over totals; no clock, no I/O.

Every instant of a run belongs to what was waited for at it (`timesheet.py` keeps the account). Where requests wait for
room, the servers are. Where none waits while records are read or chunks are written, that is, unless the servers have
all they can use: N* requests in flight, above which a request only queues there. N* is the knee of the asymptotic
bounds of operational analysis (Denning and Buzen, "The Operational Analysis of Queueing Network Models", ACM Computing
Surveys 10(3), 1978), found from what was seen; see `knee`. The time of the servers is divided between the model and the
wire as a request that does not queue divides its own; but where the model's ceiling is known, it computed for at least
the share of it that the run reached, however long the way to its servers is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

__all__ = ["Bottleneck", "Limit", "Totals", "Waiting", "find_bottleneck", "knee"]

# The event loop is one thread: above this share of its time it is what everything else waits for.
LOOP_IS_BUSY = 0.85
# Requests that queue at the servers, on average while there are any: below this they were not seen to have enough.
BACKLOG = 0.5
# Of the model's ceiling: below this share the model is slower in the run than it was alone.
NEAR_CEILING = 0.85
# In flight, of the most that may be: at and above this share more could be asked for.
ALL_TAKEN = 0.9


class Waiting(Enum):
    """What is waited for at an instant."""

    SERVERS = "requests wait for room, or everything that may be held is at the servers"
    REST = "requests wait, and no server takes any, or those that are under way look for bad records"
    READ = "records are read"
    BUDGET = "requests in flight hold all bytes that may be held"
    WRITE = "output chunks are stored"
    CLIENT = "nothing but the client itself"
    ENDS = "before the first request, or after the last reply"


class Limit(Enum):
    """What a run can be limited by; the value is the word of `run --json`."""

    MODEL = "model"
    WIRE = "wire"
    IN_FLIGHT = "in-flight"
    READING = "reading"
    WRITING = "writing"
    CLIENT = "client"
    FAILURES = "failures"
    ENDS = "start and end"

    @property
    def phrase(self) -> str:
        """As a sentence has it after “limited by”."""
        return _PHRASES[self]


@dataclass(frozen=True)
class Totals:
    """A run in a handful of sums; all times are in seconds.

    waited: time by what was waited for and by how many requests were in flight meanwhile; it adds up to the run.
    in_flight: the most requests that may be in flight. requests, request_seconds, compute_seconds: of attempts that
    gave a result, from send to last byte, and in the model as the servers say (0 where they do not). least_overhead:
    the shortest time that a request took beyond its computing, averaged where it differs between servers or changes
    during the run (`timesheet.py`). wasted_seconds: of attempts without a result. Probes, which look for the reason of
    one, are in none of these. cpu_seconds: of the thread of the event loop. attempts: all that ended, probes too.
    failed: records that were found to fail by themselves.
    """

    seconds: float
    waited: Mapping[tuple[Waiting, int], float]
    in_flight: int
    requests: int
    request_seconds: float
    compute_seconds: float
    least_overhead: float
    wasted_seconds: float
    cpu_seconds: float
    attempts: int
    failed: int = 0


@dataclass(frozen=True)
class Bottleneck:
    """What limited a run: what was seen, the next thing to turn, and the share of the run's time by what was waited for
    (they add up to 1).
    """

    limit: Limit
    evidence: str
    advice: str
    shares: Mapping[Limit, float]


_PHRASES = {
    Limit.MODEL: "the model", Limit.WIRE: "the wire", Limit.IN_FLIGHT: "the requests in flight",
    Limit.READING: "reading", Limit.WRITING: "writing", Limit.CLIENT: "the client",
    Limit.FAILURES: "failures", Limit.ENDS: "start and end",
}
_ADVICE = {
    Limit.MODEL: "add workers, GPUs or endpoints",
    Limit.WIRE: "add workers or endpoints, or run the client nearer to servers that are elsewhere",
    Limit.IN_FLIGHT: "raise --in-flight",
    Limit.READING: "raise --in-flight, which reads more output chunks at once, go nearer to INPUT, or store it in "
                   "larger chunks",
    Limit.WRITING: "raise --in-flight, which stores more output chunks at once, or go nearer to OUTPUT",
    Limit.CLIENT: "share the run among clients with --part",
    Limit.FAILURES: "see why in what was retried (--log json) and in the servers' logs",
    Limit.ENDS: "nothing to turn in so short a run",
}
_FAILED_RECORDS = ("records that fail are looked for one by one: mend them, or leave them out with --records; other "
                   "failures are in the servers' logs")
_MORE_BYTES = "raise --max-bytes-in-flight"
_NO_CEILING = "find its quickest settings (bench --save), or add workers, GPUs or endpoints"
_SHARED = "run longer, or give the client and the store other cores than the model's"
# A client's own queue and that of others look alike.
_OTHER_CLIENTS = "other clients that use these servers have the rest of what they can do; where there are none, "


def find_bottleneck(totals: Totals, of_ceiling: float | None = None) -> Bottleneck | None:
    """What limited a run; None for one that sent nothing. of_ceiling: its speed as a share of the model's alone, where
    that is known.
    """
    if not totals.attempts or not sum(totals.waited.values()):
        return None
    reached = of_ceiling or 0.0
    shares = _shares(totals, reached)
    limit = max(shares, key=lambda limit: shares[limit])
    if totals.cpu_seconds >= LOOP_IS_BUSY * totals.seconds:
        limit = Limit.CLIENT
    elif limit in (Limit.MODEL, Limit.WIRE) and _could_hold_more(totals):
        limit = Limit.IN_FLIGHT
    return Bottleneck(limit, _evidence(limit, totals, shares, reached), _advice(limit, totals, of_ceiling), shares)


def knee(totals: Totals) -> float:
    """N*: requests in flight above which a request only queues. Infinite if no backlog was seen at the servers.

    Without a queue the requests would have been at the servers for A = Σ (compute + least overhead) seconds, and the
    wasted ones. With at most N* of those in flight getting on at a time, A = ∫ min(in flight, N*) dt, which has one
    solution.
    """
    active = totals.compute_seconds + totals.requests * totals.least_overhead + totals.wasted_seconds
    levels: dict[int, float] = {}
    for (_, in_flight), seconds in totals.waited.items():
        levels[in_flight] = levels.get(in_flight, 0.0) + seconds
    if _backlog(totals) < BACKLOG:
        return float("inf")
    reached, above = 0.0, sum(levels.values())
    for number in range(max(levels, default=0)):
        # The time with more than `number` in flight is what one place more adds to the integral.
        above -= levels.get(number, 0.0)
        if reached + above >= active and above > 0:
            return number + (active - reached) / above
        reached += above
    return float("inf")


def _advice(limit: Limit, totals: Totals, of_ceiling: float | None) -> str:
    if limit is Limit.READING and _seconds(totals, Waiting.BUDGET) > _seconds(totals, Waiting.READ):
        return _MORE_BYTES
    if limit is Limit.FAILURES and totals.failed:
        return _FAILED_RECORDS
    if limit is Limit.MODEL:
        if of_ceiling is None:
            # A server that does not say how long it computes is none of ours, and `bench` can't measure it.
            return _NO_CEILING if totals.compute_seconds > 0 else _ADVICE[limit]
        if of_ceiling < NEAR_CEILING:
            return _OTHER_CLIENTS + _SHARED if _backlog(totals) >= BACKLOG else _SHARED
    return _ADVICE[limit]


def _backlog(totals: Totals) -> float:
    """Requests that queued at the servers, on average while there were any in flight (Little's law)."""
    busy = sum(seconds for (_, in_flight), seconds in totals.waited.items() if in_flight)
    queued = totals.request_seconds - totals.compute_seconds - totals.requests * totals.least_overhead
    return max(0.0, queued) / busy if busy else 0.0


def _shares(totals: Totals, of_ceiling: float) -> dict[Limit, float]:
    most = knee(totals)
    # What more in flight would have changed is among the servers' time.
    seconds: dict[Limit, float] = {limit: 0.0 for limit in Limit if limit is not Limit.IN_FLIGHT}
    stage = {Waiting.READ: Limit.READING, Waiting.BUDGET: Limit.READING, Waiting.WRITE: Limit.WRITING,
             Waiting.CLIENT: Limit.CLIENT, Waiting.REST: Limit.FAILURES, Waiting.ENDS: Limit.ENDS}
    servers = 0.0
    for (waiting, in_flight), elapsed in totals.waited.items():
        fed = _fed(in_flight, most) if waiting not in (Waiting.REST, Waiting.ENDS) else 0.0
        if waiting is Waiting.SERVERS:
            fed = 1.0
        else:
            seconds[stage[waiting]] += elapsed * (1 - fed)
        servers += elapsed * fed
    wasted = totals.wasted_seconds / max(totals.wasted_seconds + totals.request_seconds, 1e-9)
    model = max(_model_share(totals), min(1.0, of_ceiling))
    seconds[Limit.FAILURES] += servers * wasted
    seconds[Limit.MODEL] += servers * (1 - wasted) * model
    seconds[Limit.WIRE] += servers * (1 - wasted) * (1 - model)
    whole = sum(seconds.values())
    return {limit: value / whole for limit, value in seconds.items()}


def _fed(in_flight: int, most: float) -> float:
    """How much of what the servers can use they have. Where requests take no time but to queue, N* is 0."""
    return 1.0 if in_flight and in_flight >= most else in_flight / most if most else 0.0


def _model_share(totals: Totals) -> float:
    """Of the time of a request that does not queue, what the model has; all of it where servers do not say."""
    overhead = totals.requests * totals.least_overhead
    if totals.compute_seconds <= 0:
        return 1.0
    return totals.compute_seconds / (totals.compute_seconds + overhead)


def _could_hold_more(totals: Totals) -> bool:
    """Whether the servers had no backlog although all places in flight were taken while they were waited for."""
    places = {in_flight: seconds for (waiting, in_flight), seconds in totals.waited.items()
              if waiting is Waiting.SERVERS}
    time = sum(places.values())
    taken = sum(in_flight * seconds for in_flight, seconds in places.items())
    return _backlog(totals) < BACKLOG and taken >= ALL_TAKEN * totals.in_flight * time > 0


def _seconds(totals: Totals, waiting: Waiting) -> float:
    return sum(seconds for (waited, _), seconds in totals.waited.items() if waited is waiting)


def _evidence(limit: Limit, totals: Totals, shares: Mapping[Limit, float], of_ceiling: float) -> str:
    if limit is Limit.CLIENT and totals.cpu_seconds >= LOOP_IS_BUSY * totals.seconds:
        return f"its event loop computed for {_percent(totals.cpu_seconds / totals.seconds)} of the time"
    if limit is Limit.IN_FLIGHT:
        return f"all {totals.in_flight} places in flight were taken, and nothing queued at the servers"
    share = f"{_percent(shares[limit])} of the time"
    if limit in (Limit.MODEL, Limit.WIRE):
        servers = shares[Limit.MODEL] + shares[Limit.WIRE]
        waited = f"the servers were waited for during {_percent(servers)} of the time"
        if totals.compute_seconds <= 0:
            return f"{waited}, and do not say how long they computed"
        if of_ceiling > _model_share(totals):
            return f"{waited}, and the run had {_percent(of_ceiling)} of the model's ceiling"
        return f"{waited}, and {_percent(_model_share(totals))} of a request that does not queue there is the model"
    return {
        Limit.READING: f"the servers had too little to do while records were read, {share}",
        Limit.WRITING: f"the servers had too little to do while output chunks were stored, {share}",
        Limit.CLIENT: f"nothing was read, asked or stored for {share}",
        Limit.FAILURES: f"requests gave no result, looked for the reason, or found no server that took them, for "
                        f"{share}",
        Limit.ENDS: f"{share} was before the first request or after the last reply",
    }[limit]


def _percent(share: float) -> str:
    return f"{share * 100:.0f} %"
