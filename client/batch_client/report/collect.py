"""Events → what a report shows, in a space that does not grow with the run."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from batch_client.bottleneck import Bottleneck, find_bottleneck
from batch_client.events import (
    NOT_FINITE,
    ChunkHeld,
    ChunkReused,
    ChunkWritten,
    Event,
    Published,
    RecordFailed,
    RecordsScored,
    RequestDone,
    RequestRetried,
    RunStarted,
    ServerAway,
    ServerJoined,
    ServerLeftOut,
)
from batch_client.report.sketches import EvenSample, LogHistogram, Timeline
from batch_client.report.thumbnail import thumbnail
from batch_client.timesheet import Timesheet

__all__ = ["SCORED", "Report", "ReportData", "Sample", "ServerCounts"]

# Names in the timeline: records that have their prediction; all others are reasons of retries.
SCORED = "records"
MOST_SCORES = 4096
# Of one event, to find its scores: they are looked for in the run's event loop.
MOST_SCORED_BYTES = 16 << 20
MOST_SAMPLES = 16
MOST_VALUES = 10
# Reasons and servers beyond these many share a line.
MOST_NAMES = 12
OTHERS = "others"


@dataclass(frozen=True)
class Sample:
    """One record and its prediction: `values` are the first of its first output, `top` the place of the highest of all
    where there are several; `picture` is a PNG, None for a record that is none.
    """

    index: int
    status: int
    values: tuple[float, ...]
    top: int | None
    highest: float
    picture: bytes | None


@dataclass
class ServerCounts:
    """What one server did."""

    requests: int = 0
    records: int = 0
    retries: int = 0
    outages: int = 0


@dataclass(frozen=True)
class ReportData:
    """All that a page needs. `ending` says why a run is not published, "" for one that is. `records` are those of the
    whole run, `done` those proven before it began, `reused` those among them that it copied from an earlier output,
    `stored` those of the chunks that it scored. Seconds are from the first read to the last event, and to the last
    prediction; `latency` is of answered requests, in seconds; `left_out` has the first reasons for servers that the run
    went on without to its end; `scores` are the highest value of the output `score_name` of evenly spaced records that
    have one.
    """

    input: str
    started: RunStarted | None
    published: Published | None
    ending: str
    seconds: float
    last_prediction: float
    reused: int
    stored: int
    held: int
    requests: int
    retries: int
    bytes_read: int
    bytes_written: int
    bottleneck: Bottleneck | None
    timeline: Timeline
    latency: LogHistogram
    servers: Mapping[str, ServerCounts]
    left_out: Sequence[str]
    left_out_count: int
    statuses: Sequence[int]
    score_name: str
    scores: np.ndarray
    samples: Sequence[Sample]


class Report:
    """An observer that gathers what a report shows; `input_url` is the array's, `clock` and `cpu` give seconds."""

    def __init__(self, input_url: str, clock: Callable[[], float] = time.monotonic,
                 cpu: Callable[[], float] = time.thread_time) -> None:
        self._input = input_url
        self._clock = clock
        self._timesheet = Timesheet(clock, cpu)
        self._started: RunStarted | None = None
        self._published: Published | None = None
        self._began = self._last_prediction = 0.0
        self._counts: Counter[str] = Counter()
        self._timeline = Timeline()
        self._latency = LogHistogram()
        self._servers: dict[str, ServerCounts] = {}
        self._left_out: dict[str, str] = {}
        self._reasons: set[str] = set()
        self._statuses = np.zeros(256, np.int64)
        self._score_name: str | None = None
        self._scores: EvenSample[float] = EvenSample(MOST_SCORES)
        self._samples: EvenSample[Sample] = EvenSample(MOST_SAMPLES)

    @property
    def has_something_to_say(self) -> bool:
        """Whether a run began, or was found published."""
        return self._started is not None or self._published is not None

    @property
    def found_published(self) -> bool:
        """Whether the output was published before this run, which therefore scored nothing."""
        return self._started is None and self._published is not None

    def __call__(self, event: Event) -> None:
        self._timesheet(event)
        match event:
            case RunStarted():
                self._started, self._began = event, self._clock()
            case ServerLeftOut():
                self._left_out[event.endpoint] = event.reason
            case ServerJoined():
                self._joined(event)
            case ServerAway():
                self._server(event.endpoint).outages += 1
            case RecordsScored():
                self._scored(event)
            case RequestDone():
                self._done(event)
            case RequestRetried():
                self._retried(event)
            case ChunkReused() | ChunkWritten() | ChunkHeld() | RecordFailed():
                self._counts.update(_counted(event))
            case Published():
                self._published = event

    def data(self, ending: str = "") -> ReportData:
        """What was gathered; `ending` says why the run ended before it was published."""
        totals = self._timesheet.totals()
        ok, failed, not_finite = self._statuses[:3]
        return ReportData(
            input=self._input,
            started=self._started,
            published=self._published,
            ending=ending,
            seconds=totals.seconds,
            last_prediction=self._last_prediction,
            reused=self._counts["reused"],
            stored=self._counts["stored"],
            held=self._counts["held"],
            requests=self._counts["requests"],
            retries=self._counts["retries"],
            bytes_read=self._counts["read"],
            bytes_written=self._counts["written"],
            bottleneck=find_bottleneck(totals, self._of_ceiling(totals.seconds)),
            timeline=self._timeline,
            latency=self._latency,
            servers=self._servers,
            left_out=list(self._left_out.values())[:MOST_NAMES],
            left_out_count=len(self._left_out),
            # Of requests that were still taken apart when the run gave up there is no answer.
            statuses=[int(ok), max(int(failed), self._counts["failed"]), int(not_finite)],
            score_name=self._score_name or "",
            scores=_finite(self._scores.items),
            samples=sorted(self._samples.items, key=lambda sample: sample.index),
        )

    def _joined(self, event: ServerJoined) -> None:
        self._left_out.pop(event.endpoint, None)
        if self._started is not None:  # what the servers can do was that of the others
            self._started = replace(self._started, ceiling=None)

    def _of_ceiling(self, seconds: float) -> float | None:
        if self._started is None or self._started.ceiling is None or seconds <= 0:
            return None
        return self._counts["stored"] / seconds / self._started.ceiling

    def _done(self, event: RequestDone) -> None:
        self._counts.update(requests=1)
        self._latency.add(event.seconds)
        server = self._server(event.endpoint)
        server.requests += 1
        server.records += event.records

    def _retried(self, event: RequestRetried) -> None:
        self._counts.update(retries=1)
        self._server(event.endpoint).retries += 1
        # A reason begins with what kind it is; the rest are the server's own words.
        self._timeline.add(self._clock() - self._began, _bounded(event.reason.partition(":")[0], self._reasons))

    def _server(self, url: str) -> ServerCounts:
        name = url if url in self._servers or len(self._servers) < MOST_NAMES else OTHERS
        return self._servers.setdefault(name, ServerCounts())

    def _scored(self, event: RecordsScored) -> None:
        count = len(event.status)
        self._last_prediction = self._clock() - self._began
        self._timeline.add(self._last_prediction, SCORED, count)
        self._statuses += np.bincount(event.status, minlength=256)
        if self._score_name is None:
            self._score_name = _score_output(event.outputs)
            if self._score_name:
                self._scores = EvenSample(_most_scores(event.outputs[self._score_name]))
        for row in self._samples.take(count):
            self._samples.items.append(_sample(event, row, self._score_name or next(iter(event.outputs))))
        if self._score_name:
            rows = self._scores.take(count)
            # Views: nothing but the few highest values is copied or cast.
            chosen = slice(rows.start, rows.stop, rows.step)
            array = event.outputs[self._score_name][chosen]
            highest = array.max(axis=tuple(range(1, array.ndim)), initial=-np.inf).astype(np.float64)
            self._scores.items.extend(np.where(event.status[chosen] == 0, highest, np.nan).tolist())


def _bounded(name: str, names: set[str]) -> str:
    if name not in names and len(names) >= MOST_NAMES:
        return OTHERS
    names.add(name)
    return name


def _score_output(outputs: Mapping[str, np.ndarray]) -> str:
    """The first output of floats, "" if there is none."""
    return next((name for name, array in outputs.items() if array.dtype.kind == "f"), "")


def _most_scores(array: np.ndarray) -> int:
    """How many scores are kept, and so how many records of one event are looked at; at least two."""
    return min(MOST_SCORES, max(2, MOST_SCORED_BYTES // max(1, array.nbytes // max(1, len(array)))))


def _sample(event: RecordsScored, row: int, output: str) -> Sample:
    values = event.outputs[output][row].ravel()
    finite = values.size > 0 and bool(np.isfinite(values).all())
    return Sample(
        index=event.start + row,
        status=int(event.status[row]),
        values=tuple(values[:MOST_VALUES].astype(np.float64).tolist()),
        top=int(values.argmax()) if finite and values.size > 1 else None,
        highest=float(values.max()) if finite else float("nan"),
        picture=thumbnail(event.records[row]),
    )


def _counted(event: ChunkReused | ChunkWritten | ChunkHeld | RecordFailed) -> dict[str, int]:
    match event:
        case ChunkReused():
            return {"reused": event.records, "written": event.bytes_written}
        case ChunkWritten():
            return {"stored": event.records, "read": event.bytes_read, "written": event.bytes_written}
        case ChunkHeld():
            return {"held": 1}
        case RecordFailed():
            return {"failed": event.reason != NOT_FINITE}


def _finite(values: list[float]) -> np.ndarray:
    found = np.asarray(values, np.float64)
    return found[np.isfinite(found)]
