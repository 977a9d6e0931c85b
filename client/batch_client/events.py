"""What happens in a run, as frozen values; progress bars, logs and summaries subscribe. The core prints nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from batch_client.plan import Plan

__all__ = [
    "ChunkHeld",
    "ChunkWritten",
    "Event",
    "Observer",
    "Published",
    "RecordFailed",
    "RequestDone",
    "RequestRetried",
    "RequestSent",
    "RunStarted",
    "Stopping",
]


@dataclass(frozen=True)
class RunStarted:
    """Everything is known and the first record is about to be read; `done` records are proven already."""

    plan: Plan
    output: str
    model: str
    model_digest: str
    done: int


@dataclass(frozen=True)
class RequestSent:
    """An attempt begins; a RequestDone or a RequestRetried follows, or the run ends."""

    endpoint: str
    records: int


@dataclass(frozen=True)
class RequestDone:
    """A request was answered and its reply taken. Seconds are of this attempt, from send to last byte."""

    endpoint: str
    records: int
    bytes_sent: int
    bytes_received: int
    seconds: float
    compute_ms: float


@dataclass(frozen=True)
class RequestRetried:
    """An attempt did not give a result and will be made again after `delay` seconds."""

    endpoint: str
    reason: str
    delay: float


@dataclass(frozen=True)
class RecordFailed:
    """A record that can't be predicted: its number in the source, the last reason, how often it failed alone."""

    index: int
    reason: str
    attempts: int


@dataclass(frozen=True)
class ChunkHeld:
    """A complete chunk with more failures than the run accepts: it is not written."""

    index: int
    records: int
    failed: int


@dataclass(frozen=True)
class ChunkWritten:
    """An output chunk and its status row are in the store."""

    index: int
    records: int
    failed: int
    bytes_read: int
    bytes_written: int
    adopted: bool = False


@dataclass(frozen=True)
class Stopping:
    """A stop was asked for: what is in flight is finished, nothing new begins."""

    reason: str


@dataclass(frozen=True)
class Published:
    """The output is complete and opens; `already` when an earlier run had published it."""

    output: str
    root: str
    already: bool = False


Event = (RunStarted | RequestSent | RequestDone | RequestRetried | RecordFailed | ChunkHeld | ChunkWritten | Stopping
         | Published)


class Observer(Protocol):
    """Anything that wants to know; called in the run's event loop, so it must be quick."""

    def __call__(self, event: Event) -> None: ...
