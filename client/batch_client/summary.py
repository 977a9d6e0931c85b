"""What a run was, in numbers: an observer that counts, and the summary that `--json` prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from batch_client.bottleneck import Bottleneck, find_bottleneck
from batch_client.events import (
    ChunkReused,
    ChunkWritten,
    Event,
    Published,
    RecordsScored,
    RequestDone,
    RequestRetried,
    RunStarted,
    ServerJoined,
)
from batch_client.figures import significant
from batch_client.forecast import Answer, FirstAnswers, forecast
from batch_client.ledger import LedgerView
from batch_client.manifest import Manifest
from batch_client.prepare import Prepared
from batch_client.spec import RunSpec
from batch_client.timesheet import Timesheet

__all__ = ["RunSummary", "Tally", "peak_memory"]

STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class RunSummary:
    """A finished run. `records` is the size of the output, `scored` what this run computed of it and `reused` what it
    copied from an earlier output, `failed` and `not_finite` its records without a prediction and with one that is NaN
    or infinite, `missing_chunks` source chunks that were taken as the fill value for it; seconds are from the first
    read to publication (0 where it was published before), `in_flight` is the limit that was found for each endpoint, 0
    for one that was left out to the end, whose reasons are `left_out`; bytes are of records read from and chunks
    written to storage, peak memory is that of this process, its imports included.

    `limited_by` is a value of `bottleneck.Limit` and `advice` the next thing to turn, `time_shares` the run's time by
    what was waited for; None and empty where nothing was scored. `ceiling_records_per_s` is what the model alone was
    measured at on the servers of the run, None where they do not say, and where one joined later.

    `forecast_seconds` is what `plan --calibrate` would have forecast for these records from the run's first seconds,
    `forecast_error` how far that was off: 0.1 is a tenth too long. None for runs too short for a forecast.
    """

    records: int
    scored: int
    reused: int
    failed: int
    not_finite: int
    missing_chunks: int
    seconds: float
    records_per_s: float
    output: str
    root: str
    published: bool
    already_published: bool
    model: str
    model_digest: str
    fingerprint: str
    requests: int
    retries: int
    in_flight: tuple[int, ...]
    left_out: tuple[str, ...]
    bytes_read: int
    bytes_written: int
    peak_memory_bytes: int
    limited_by: str | None
    advice: str
    time_shares: Mapping[str, float]
    ceiling_records_per_s: float | None
    percent_of_ceiling: float | None
    forecast_seconds: float | None
    forecast_error: float | None

    def to_value(self) -> dict[str, Any]:
        return asdict(self)


def peak_memory() -> int:
    """Peak resident bytes of this process; 0 where the system does not say."""
    if sys.platform == "linux":
        # Not getrusage: its peak survives exec, so it is at least that of whatever started this process.
        with suppress(OSError):
            # The name of the process is in it, in whatever encoding.
            lines = STATUS.read_text("ascii", errors="replace").splitlines()
            return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
        return 0
    if sys.platform == "win32":
        return 0
    import resource  # noqa: PLC0415 - does not exist on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


class Tally:
    """Counts events. `clock` and `cpu` give seconds, of the run and of the event loop's thread."""

    def __init__(self, clock: Callable[[], float], cpu: Callable[[], float]) -> None:
        self._clock = clock
        self._timesheet = Timesheet(clock, cpu)
        self._first = FirstAnswers(clock())
        self._scored = self._requests = self._retries = self._read = self._written = self._reused = 0
        self._published = Published("", "")
        self._joined = False

    def __call__(self, event: Event) -> None:
        self._timesheet(event)
        match event:
            case RunStarted():
                self._first = FirstAnswers(self._clock())
            case ServerJoined():
                self._joined = True
            case RequestDone():
                self._requests += 1
            case RecordsScored():
                self._first.add(Answer(self._clock(), len(event.status)))
            case RequestRetried():
                self._retries += 1
            case ChunkReused():
                self._reused += event.records
                self._written += event.bytes_written
            case ChunkWritten():
                self._scored += event.records
                self._read += event.bytes_read
                self._written += event.bytes_written
            case Published():
                self._published = event

    def summary(self, spec: RunSpec, prepared: Prepared, counted: LedgerView | Manifest) -> RunSummary:
        """The figures so far; `counted` is the whole output, whoever scored it."""
        contract = prepared.contract
        totals = self._timesheet.totals()
        seconds = totals.seconds  # up to the last event, as in a report
        rate = self._scored / seconds if seconds > 0 else 0.0
        # Of the servers that the run began with: what all can do is not known once there are more.
        ceiling = None if self._joined else contract.ceiling
        found = find_bottleneck(totals, None if ceiling is None else rate / ceiling)
        expected = forecast(self._first.answers, self._scored) if self._first.enough(self._clock()) else None
        return RunSummary(
            records=prepared.plan.count,
            scored=self._scored,
            reused=self._reused,
            failed=counted.failed,
            not_finite=counted.not_finite,
            missing_chunks=counted.missing_chunks,
            seconds=round(seconds, 3),
            records_per_s=significant(rate),
            output=spec.output,
            root=self._published.root,
            published=bool(self._published.root),
            already_published=self._published.already,
            model=contract.name,
            model_digest=contract.digest,
            fingerprint=contract.fingerprint,
            requests=self._requests,
            retries=self._retries,
            in_flight=tuple(0 if endpoint.left_out else endpoint.limiter.limit for endpoint in prepared.pool.endpoints),
            left_out=tuple(str(endpoint.left_out) for endpoint in prepared.pool.endpoints if endpoint.left_out),
            bytes_read=self._read,
            bytes_written=self._written,
            peak_memory_bytes=peak_memory(),
            limited_by=None if found is None else found.limit.value,
            advice="" if found is None else found.advice,
            time_shares={} if found is None else _rounded(found),
            ceiling_records_per_s=ceiling,
            percent_of_ceiling=None if ceiling is None or found is None else round(100 * rate / ceiling, 1),
            forecast_seconds=None if expected is None else round(expected.seconds, 3),
            forecast_error=None if expected is None else round(expected.seconds / seconds - 1, 4),
        )


def _rounded(found: Bottleneck) -> dict[str, float]:
    return {limit.value: round(share, 4) for limit, share in found.shares.items()}
