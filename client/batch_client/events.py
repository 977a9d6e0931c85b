"""What happens in a run, as frozen values; progress bars, logs and summaries subscribe. The core prints nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np

from batch_client.pieces import Pieces
from batch_client.plan import Plan

__all__ = [
    "NOT_FINITE",
    "ChunkHeld",
    "ChunkReused",
    "ChunkWritten",
    "Event",
    "Observer",
    "Published",
    "RecordFailed",
    "RecordsCast",
    "RecordsScored",
    "RequestDone",
    "RequestRetried",
    "RequestSent",
    "RunStarted",
    "ServerAway",
    "ServerBack",
    "ServerJoined",
    "ServerLeftOut",
    "SourceIsMasked",
    "SourceIsPacked",
    "Step",
    "StepBegan",
    "StepEnded",
    "Stopping",
    "observer_name",
    "timed",
    "to_all",
]


@dataclass(frozen=True)
class RunStarted:
    """Everything is known and the first record is about to be read; `done` records are proven already.

    `in_flight` is the most requests that all servers of the run together may hold, `ceiling` the records/s that the
    model alone was measured at on them, where they say so. Of the run's part there are `part_records`, `part_done` of
    them proven: all of the output where it has no parts.
    """

    plan: Plan
    output: str
    model: str
    model_digest: str
    done: int
    fingerprint: str
    in_flight: int
    ceiling: float | None
    part_records: int
    part_done: int


@dataclass(frozen=True)
class SourceIsPacked:
    """The source's attributes say that its numbers stand for others, number * `scale_factor` + `add_offset`, which
    xarray would give (https://cfconventions.org, "Packed Data"). They are scored as they are stored.
    """

    source: str
    scale_factor: float
    add_offset: float

    def __str__(self) -> str:
        """What a person is to know of it."""
        return (f"{self.source} is scored as it is stored: its scale_factor {self.scale_factor:g} and add_offset "
                f"{self.add_offset:g}, which xarray applies, are not; a model that was trained on such values needs "
                "the array written decoded, or pack with scale and mean in a --signature file")


@dataclass(frozen=True)
class SourceIsMasked:
    """The source's metadata say that the number `missing` stands for missing values, for which xarray would give NaN
    (https://cfconventions.org, "Missing data"). It is scored as a number.
    """

    source: str
    missing: float

    def __str__(self) -> str:
        """What a person is to know of it."""
        return (f"{self.source} is scored as it is stored: {self.missing:.15g}, which stands for missing values there "
                "and is NaN in xarray, is a number for the model; where there are any, write the array with NaN in "
                "their place, or with what the model was trained to see there")


@dataclass(frozen=True)
class RecordsCast:
    """Whole numbers (or bools) of the source are sent as floats, which the model's input is: unscaled, whatever the
    model was trained on.
    """

    source: str
    dtype: str
    input_name: str
    input_dtype: str

    def __str__(self) -> str:
        """What a person is to know of it."""
        return (f"{self.source}: {self.dtype} records are sent as {self.input_dtype}, as they are: a model that was "
                f"trained on scaled numbers needs an archive packed with --input {self.input_name}:{self.dtype}:SHAPE "
                "--scale NUMBER")


@dataclass(frozen=True)
class ServerLeftOut:
    """The run goes on without a server, for a reason that names it. `asked_again`: it gave no usable answer, and joins
    when it has the run's model later.
    """

    endpoint: str
    reason: str
    asked_again: bool = False


@dataclass(frozen=True)
class ServerAway:
    """Attempts at a server break one after the other, with a pause between them: it is tried again now and then."""

    endpoint: str
    reason: str


@dataclass(frozen=True)
class ServerBack:
    """A server that was away has answered a request, so many seconds after its first attempt that broke."""

    endpoint: str
    seconds: float


@dataclass(frozen=True)
class ServerJoined:
    """A server that was left out takes part, so many seconds after that. `in_flight` is the most requests that all
    servers of the run together may hold by now.
    """

    endpoint: str
    seconds: float
    in_flight: int


class Step(Enum):
    """What a part of the run may be doing, or waiting for, beside the requests themselves."""

    BUDGET = "waiting for bytes of the budget"
    READ = "reading and decoding records"
    ROOM = "waiting for room at a server"
    PAUSE = "pausing before a repetition"
    WRITE = "encoding, storing and proving an output chunk"


@dataclass(frozen=True)
class StepBegan:
    """A part of the run begins a step; others may be in the same step."""

    step: Step


@dataclass(frozen=True)
class StepEnded:
    """It is done with the step, or gave it up, after so many seconds."""

    step: Step
    seconds: float


@dataclass(frozen=True)
class RequestSent:
    """An attempt begins; a RequestDone or a RequestRetried follows, or the run ends. A probe looks for what was bad in
    one that failed.
    """

    endpoint: str
    records: int
    probe: bool = False


@dataclass(frozen=True)
class RequestDone:
    """A request was answered and its reply taken. Bytes are those of bodies and of shared memory; seconds are of this
    attempt, from sending it until its reply was found sound.
    """

    endpoint: str
    records: int
    bytes_sent: int
    bytes_received: int
    seconds: float
    compute_ms: float
    probe: bool = False


@dataclass(frozen=True)
class RequestRetried:
    """An attempt of so many seconds did not give a result. It is made again after `delay` seconds, or later where too
    few others succeed; one that failed often enough is not: its records are tried apart.
    """

    endpoint: str
    reason: str
    delay: float
    seconds: float
    probe: bool = False


@dataclass(frozen=True, eq=False)
class RecordsScored:
    """Records from number `start` of the source on have their predictions: `records` (n, *record shape), `outputs` by
    name (n, *output shape), `status` uint8 (n,). These are the run's own arrays: copy what is to be kept.
    """

    start: int
    records: Pieces
    outputs: Mapping[str, np.ndarray]
    status: np.ndarray


NOT_FINITE = "the prediction is not finite"


@dataclass(frozen=True)
class RecordFailed:
    """A record that can't be predicted: its number in the source, the last reason, how often it failed alone. Or, where
    a run requires that, whose prediction is NOT_FINITE.
    """

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
class ChunkReused:
    """An output chunk and its status row were copied from an earlier output, before the run scores anything."""

    index: int
    records: int
    bytes_written: int


@dataclass(frozen=True)
class Stopping:
    """A stop was asked for: what is in flight is finished, nothing new begins."""


@dataclass(frozen=True)
class Published:
    """The output is complete and opens; `already` when an earlier run had published it."""

    output: str
    root: str
    already: bool = False


Event = (RunStarted | SourceIsPacked | SourceIsMasked | RecordsCast | ServerLeftOut | ServerJoined | ServerAway
         | ServerBack | StepBegan | StepEnded | RequestSent | RequestDone | RequestRetried | RecordsScored
         | RecordFailed | ChunkHeld | ChunkReused | ChunkWritten | Stopping | Published)


class Observer(Protocol):
    """Anything that wants to know; called in the run's event loop, so it must be quick."""

    def __call__(self, event: Event, /) -> None: ...


def to_all(observers: Sequence[Observer]) -> Callable[[Event], None]:
    """What calls each of them with an event, in their order.

    A CancelledError out of an observer is an error of its own, as of the result of a future that was cancelled: nothing
    is awaited here, so that nobody can cancel the run. It becomes a RuntimeError, which ends the run like any other:
    as it is, it would be taken for the end of the task that emitted, and passed over.
    """
    def emit(event: Event) -> None:
        for observer in observers:
            try:
                observer(event)
            except asyncio.CancelledError as error:
                raise RuntimeError(f"observer {observer_name(observer)} raised CancelledError at "
                                   f"{type(event).__name__}: wanted one that does not, or catches it") from error
    return emit


def observer_name(observer: Observer) -> str:
    """What messages call it."""
    return getattr(observer, "__name__", type(observer).__name__)


@contextmanager
def timed(step: Step, emit: Callable[[Event], None], clock: Callable[[], float]) -> Iterator[None]:
    """Emits the beginning and the end of a step, however it ends."""
    emit(StepBegan(step))
    began = clock()
    try:
        yield
    finally:
        emit(StepEnded(step, clock() - began))
