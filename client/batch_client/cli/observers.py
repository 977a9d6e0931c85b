"""What a person or a log sees of a run: a progress bar, or JSON lines. Both only listen to events."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import structlog
from tqdm import tqdm

from batch_client.cli.stream import PatientStream
from batch_client.events import (
    ChunkHeld,
    ChunkReused,
    ChunkWritten,
    Event,
    Published,
    RecordFailed,
    RecordsCast,
    RequestDone,
    RequestRetried,
    RequestSent,
    RunStarted,
    ServerAway,
    ServerBack,
    ServerJoined,
    ServerLeftOut,
    SourceIsMasked,
    SourceIsPacked,
    Stopping,
)

__all__ = ["LogLines", "ProgressBar", "new_bar"]

# A bar that goes to a file or a log collector is a line now and then.
REDRAW_SECONDS = 0.2
LINE_SECONDS = 10.0


def new_bar(stream: PatientStream, what: str, total: int | None, done: int = 0, unit: str = " records") -> Any:
    """A bar on a terminal, a line now and then elsewhere."""
    is_terminal = stream.isatty()
    return tqdm(total=total, initial=done, unit=unit, unit_scale=True, file=stream, desc=what,
                dynamic_ncols=is_terminal, mininterval=REDRAW_SECONDS if is_terminal else LINE_SECONDS)


class ProgressBar:
    """tqdm on standard error: records, rate, time left, requests in flight, failures, retries."""

    def __init__(self, stream: PatientStream) -> None:
        self._stream = stream
        self._bar: Any = None
        self._in_flight = self._failed = self._retries = 0

    def __call__(self, event: Event) -> None:
        match event:
            case ChunkReused():
                if self._bar is None:
                    self._bar = new_bar(self._stream, "copying", None)
                self._bar.update(event.records)
            case RunStarted():
                self.close()  # that of copying
                self._bar = new_bar(self._stream, event.model, event.part_records, event.part_done)
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
            case (SourceIsPacked() | SourceIsMasked() | RecordsCast() | ServerLeftOut() | ServerJoined() | ServerAway()
                  | ServerBack() | Stopping()):
                # A line of its own, below what is there of the bar.
                self._stream.write(f"\n{' '.join(_said(event).split())}\n")

    def _advance(self, records: int) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(
                f"in flight {self._in_flight}, failed {self._failed}, retries {self._retries}", refresh=False)
            self._bar.update(records)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _said(event: SourceIsPacked | SourceIsMasked | RecordsCast | ServerLeftOut | ServerJoined | ServerAway | ServerBack
          | Stopping) -> str:
    match event:
        case SourceIsPacked() | SourceIsMasked() | RecordsCast():
            return str(event)
        case ServerLeftOut():
            again = "; it is asked again while the run goes on" if event.asked_again else ""
            return f"going on without a server: {event.reason}{again}"
        case ServerJoined():
            return f"{event.endpoint} takes part from now on"
        case ServerAway():
            return f"{event.endpoint} gives no sound answer ({event.reason}): it is tried again while the run goes on"
        case ServerBack():
            return f"{event.endpoint} answers again, after {event.seconds:.0f} s"
        case Stopping():
            from batch_client.pipeline import DRAIN_SECONDS  # slow to import, and there since the run began

            return (f"stopping: finishing the output chunks that are begun, for {DRAIN_SECONDS:g} s at most "
                    "(again to stop at once)")


# What JSON lines are written for: the level, and what the event is called there.
_LINES: dict[type[Event], tuple[str, str]] = {
    RunStarted: ("info", "run started"),
    SourceIsPacked: ("warning", "source is packed"),
    SourceIsMasked: ("warning", "source is masked"),
    RecordsCast: ("warning", "records are cast"),
    ServerLeftOut: ("warning", "server left out"),
    ServerJoined: ("info", "server joined"),
    ServerAway: ("warning", "server away"),
    ServerBack: ("info", "server back"),
    RequestRetried: ("warning", "request retried"),
    RecordFailed: ("warning", "record failed"),
    ChunkHeld: ("warning", "chunk held back"),
    ChunkReused: ("info", "chunk reused"),
    ChunkWritten: ("info", "chunk written"),
    Stopping: ("warning", "stopping"),
    Published: ("info", "published"),
}


class LogLines:
    """One JSON line on standard error for what an operator wants to find later; requests that went well are not."""

    def __init__(self, stream: PatientStream) -> None:
        self._log = structlog.wrap_logger(
            # A line is one piece: where the stream has to drop some, what is left is lines.
            structlog.WriteLogger(stream),  # type: ignore[arg-type] # it only writes and flushes
            processors=[structlog.processors.add_log_level, structlog.processors.TimeStamper(fmt="iso"),
                        structlog.processors.JSONRenderer()])

    def __call__(self, event: Event) -> None:
        if line := _LINES.get(type(event)):
            level, name = line
            getattr(self._log, level)(name, **_values(event))

    def close(self) -> None:
        """Nothing is held back."""


def _values(event: Event) -> dict[str, Any]:
    if isinstance(event, RunStarted):
        return {"output": event.output, "model": event.model, "digest": event.model_digest,
                "records": event.plan.count, "done": event.done, "chunks": event.plan.unit_count}
    return {field.name: getattr(event, field.name) for field in fields(event)}
