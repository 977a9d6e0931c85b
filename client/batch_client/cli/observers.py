"""What a person or a log sees of a run: a progress bar, or JSON lines. Both only listen to events."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import structlog
from tqdm import tqdm

from batch_client.cli.stream import PatientStream
from batch_client.events import (
    ChunkHeld,
    ChunkWritten,
    Event,
    Published,
    RecordFailed,
    RequestDone,
    RequestRetried,
    RequestSent,
    RunStarted,
    ServerLeftOut,
    Stopping,
)

__all__ = ["LogLines", "ProgressBar"]

# A bar that goes to a file or a log collector is a line now and then.
REDRAW_SECONDS = 0.2
LINE_SECONDS = 10.0


class ProgressBar:
    """tqdm on standard error: records, rate, time left, requests in flight, failures, retries."""

    def __init__(self, stream: PatientStream) -> None:
        self._stream = stream
        self._bar: Any = None
        self._in_flight = self._failed = self._retries = 0

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._bar = tqdm(
                    total=event.plan.count, initial=event.done, unit=" records", unit_scale=True, file=self._stream,
                    desc=event.model, dynamic_ncols=self._stream.isatty(),
                    mininterval=REDRAW_SECONDS if self._stream.isatty() else LINE_SECONDS)
            case ServerLeftOut():
                self._stream.write(f"\ngoing on without a server: {' '.join(event.reason.split())}\n")
            case RequestSent():
                self._in_flight += 1
            case RequestDone():
                self._in_flight -= 1
            case RequestRetried():
                self._in_flight -= 1
                self._retries += 1
            case RecordFailed():
                self._failed += 1
            case ChunkWritten() | ChunkHeld():
                self._advance(event.records)
            case Stopping():
                self._stream.write("\nstopping: finishing the output chunks that are begun, for 12 s at most "
                                   "(again to stop at once)\n")

    def _advance(self, records: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"in flight {self._in_flight}, failed {self._failed}, retries {self._retries}", refresh=False)
            self._bar.update(records)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class LogLines:
    """One JSON line on standard error for what an operator wants to find later; requests that went well are not."""

    def __init__(self, stream: PatientStream) -> None:
        self._log = structlog.wrap_logger(
            # A line is one piece: where the stream has to drop some, what is left is lines.
            structlog.WriteLogger(stream),  # type: ignore[arg-type] # it only writes and flushes
            processors=[structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso"),
                        structlog.processors.JSONRenderer()])

    def __call__(self, event: Event) -> None:
        match event:
            case RunStarted():
                self._log.info("run started", output=event.output, model=event.model, digest=event.model_digest,
                               records=event.plan.count, done=event.done, chunks=event.plan.unit_count)
            case ServerLeftOut():
                self._log.warning("server left out", **_values(event))
            case RequestRetried():
                self._log.warning("request retried", **_values(event))
            case RecordFailed():
                self._log.warning("record failed", **_values(event))
            case ChunkHeld():
                self._log.warning("chunk held back", **_values(event))
            case ChunkWritten():
                self._log.info("chunk written", **_values(event))
            case Stopping():
                self._log.warning("stopping", reason=event.reason)
            case Published():
                self._log.info("published", **_values(event))

    def close(self) -> None:
        """Nothing is held back."""


def _values(event: Event) -> dict[str, Any]:
    return {field.name: getattr(event, field.name) for field in fields(event)}
