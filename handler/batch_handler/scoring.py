"""Queries in, their outputs out: stacks of micro-batches through the slots of a runtime.

Rule: a query's failure is its own. A micro-batch of several online requests that the model fails on is scored
again request by request, so that only the one whose records are to blame is told so.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from batch_handler.batching import Load, Stack, gather, plan, scatter
from batch_handler.oip import STATUS_NOT_FINITE, Array
from batch_handler.runtimes import Runtime
from batch_handler.runtimes.device import CapacityError, LostDeviceError
from batch_handler.runtimes.slots import Slot
from batch_handler.runtimes.transform import ModelError
from batch_handler.signature import OutputSpec

__all__ = [
    "BUSY",
    "HEARD_SECONDS",
    "MAX_SECONDS",
    "Failure",
    "Query",
    "Score",
    "Scorer",
    "exit_process",
]

# TorchServe closes a dying worker's output without reading what is left of it: a reason needs time to be read.
HEARD_SECONDS = 0.5

# TorchServe kills the worker that holds a server batch for longer than responseTimeout, 120 s
# (serve_config/model-config.yaml), and with it all requests of that. Half of it leaves room for a busy machine.
MAX_SECONDS = 60.0

# sysexits' EX_OSERR; TorchServe only sees that the worker is gone, and starts another.
_EXIT_LOST = 71

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Query:
    """Records of one request, one array an input; `first_row` is None for an online request."""

    inputs: tuple[Array, ...]
    first_row: int | None = None

    @property
    def records(self) -> int:
        """How many records it has."""
        return int(self.inputs[0].shape[0])


@dataclass(frozen=True, eq=False)
class Score:
    """One array an output, a status a record, and the milliseconds it waited and computed."""

    outputs: tuple[Array, ...]
    status: Array
    queue_ms: float
    compute_ms: float


@dataclass(frozen=True)
class Failure:
    """Why a query has no outputs; `status` is that of its HTTP reply."""

    message: str
    status: int = 500


# What a query is told that others of its server batch leave no time for.
BUSY = Failure("other requests keep the server busy for now: ask again", 503)


@dataclass(eq=False)
class _Work:
    query: Query
    outputs: tuple[Array, ...]
    alone: bool = False  # whether it was scored again by itself
    compute: float = 0.0
    first_run: float | None = None
    failure: Failure | None = None


@dataclass(frozen=True, eq=False)
class _Issued:
    slot: Slot
    stack: Stack
    at: float


_Failed: TypeAlias = list[tuple[Stack, Exception]]


def exit_process(error: BaseException) -> None:
    """Leave without any clean-up: with a poisoned context every later result is wrong, also those of such code."""
    _log.critical("the worker ends: %s", error)
    logging.shutdown()
    time.sleep(HEARD_SECONDS)
    os._exit(_EXIT_LOST)


class Scorer:
    """A prepared runtime; not for several threads.

    `micro_batches` were issued so far; in the quickest server batch of full ones each took `micro_batch_seconds`.
    """

    def __init__(
        self,
        runtime: Runtime,
        outputs: Sequence[OutputSpec],
        micro_batch: int,
        *,
        on_lost: Callable[[BaseException], None] = exit_process,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.micro_batches = 0
        self.micro_batch_seconds = math.inf
        self._runtime = runtime
        self._outputs = tuple(outputs)
        self._micro_batch = micro_batch
        self._on_lost = on_lost
        self._now = now
        self._finished = 0.0  # when the last stack was
        self._slots = runtime.prepare(micro_batch)
        self._most = self._slots[0].places // micro_batch

    def score(self, queries: Sequence[Query]) -> list[Score | Failure]:
        """Score a server batch; one answer a query, in order."""
        begun = self._now()
        works = [self._begin(query) for query in queries]
        # A query that had no room has no records to place.
        loads = [Load(0 if work.failure else work.query.records, work.query.first_row) for work in works]
        with self._runtime.session():
            for stack, error in self._stream(plan(loads, self._micro_batch, self._most), works):
                self._isolate(stack, error, works, begun)
        return [self._answer(work, begun) for work in works]

    def _begin(self, query: Query) -> _Work:
        try:
            return _Work(query, tuple(np.empty((query.records, *spec.shape), spec.dtype) for spec in self._outputs))
        except MemoryError as error:
            return _Work(query, (), failure=_failure(error))

    def _isolate(self, stack: Stack, error: Exception, works: Sequence[_Work], begun: float) -> None:
        """Score the requests of a failed stack one by one, in smaller pieces where memory was full; each once at most,
        and within the time that a server batch has.
        """
        full = isinstance(error, CapacityError)
        for index in stack.requests:
            work = works[index]
            if work.failure is not None or work.alone:
                continue
            online = work.query.first_row is None
            if not online or (len(stack.requests) == 1 and not full):
                work.failure = _failure(error)
            elif len(works) > 1 and self._now() - begun + work.compute > MAX_SECONDS:  # it takes as long once more
                work.failure = BUSY
            else:
                work.alone = True
                self._alone(work, stack.size // 2 if full else self._micro_batch, error)

    def _alone(self, work: _Work, size: int, error: Exception) -> None:
        while size >= 1:
            failed = self._stream(plan([Load(work.query.records)], size), [work], all_or_none=True)
            if not failed:
                return
            error = failed[0][1]
            if not isinstance(error, CapacityError):
                break
            size //= 2
        work.failure = _failure(error)

    def _stream(self, stacks: Sequence[Stack], works: Sequence[_Work], *, all_or_none: bool = False) -> _Failed:
        """Fill one slot while another computes; the stacks that failed, and no more after one if that decides it."""
        failed: _Failed = []
        busy: deque[_Issued] = deque()
        began = self._finished = self._now()
        for number, stack in enumerate(stacks):
            if failed and all_or_none:
                break
            slot = self._slots[number % len(self._slots)]
            while any(issued.slot is slot for issued in busy):
                self._finish(busy.popleft(), works, failed)
            try:
                busy.append(self._issue(slot, stack, works))
            except (ModelError, CapacityError, MemoryError) as error:
                failed.append((stack, error))
            except LostDeviceError as error:
                self._on_lost(error)
                raise
            # Where issuing is computing, as on a CPU, what it took is this one's time and not the next one's.
            while busy and busy[0].slot.done:
                self._finish(busy.popleft(), works, failed)
        while busy:
            self._finish(busy.popleft(), works, failed)
        places = sum(stack.size for stack in stacks)
        if stacks and not failed and all(stack.size % self._micro_batch == 0 for stack in stacks):
            each = (self._finished - began) * self._micro_batch / places
            self.micro_batch_seconds = min(self.micro_batch_seconds, each)
        return failed

    def _issue(self, slot: Slot, stack: Stack, works: Sequence[_Work]) -> _Issued:
        at = self._now()
        for index in stack.requests:
            if works[index].first_run is None:
                works[index].first_run = at
        for number, target in enumerate(slot.inputs):
            gather(stack, [work.query.inputs[number] for work in works], target)
        self.micro_batches += -(-stack.size // self._micro_batch)
        self._runtime.run(slot, stack.size)
        return _Issued(slot, stack, at)

    def _finish(self, issued: _Issued, works: Sequence[_Work], failed: _Failed) -> None:
        try:
            results = issued.slot.wait()
        except (ModelError, CapacityError, MemoryError) as error:
            failed.append((issued.stack, error))
            return
        except LostDeviceError as error:
            self._on_lost(error)
            raise
        for number, result in enumerate(results):
            scatter(issued.stack, result, [work.outputs[number] if work.outputs else None for work in works])
        done = self._now()
        # What overlaps with the stack before is that one's time.
        elapsed = done - max(issued.at, self._finished)
        self._finished = done
        for index in issued.stack.requests:
            works[index].compute += elapsed

    def _answer(self, work: _Work, begun: float) -> Score | Failure:
        if work.failure is not None:
            return work.failure
        waited = 0.0 if work.first_run is None else work.first_run - begun
        return Score(
            outputs=work.outputs,
            status=_status(work.outputs, work.query.records),
            queue_ms=round(waited * 1e3, 3),
            compute_ms=round(work.compute * 1e3, 3),
        )


def _failure(error: Exception) -> Failure:
    message = str(error) or type(error).__name__
    return Failure(message, 507 if isinstance(error, CapacityError | MemoryError) else 500)


def _status(outputs: Sequence[Array], records: int) -> Array:
    """0 ok, 2 where a record has a float that is not finite."""
    status = np.zeros(records, np.uint8)
    for output in outputs:
        if output.dtype.kind == "f" and output.size:
            finite = np.isfinite(output).reshape(records, -1).all(axis=1)
            status[~finite] = STATUS_NOT_FINITE
    return status
