"""The only composer: opens the parts, owns the tasks, and sees a run from its first check to its last object.

    plan → read → slice → score → assemble → write → ledger → publish

Units of work are begun lazily and in order; a byte budget bounds what is read ahead, the pool bounds what is in flight.
Everything that can refuse a run is asked before the first object is written.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import numpy as np

from batch_client.assemble import UnitAssembler
from batch_client.budget import ByteBudget, Lease
from batch_client.contract import ModelContract, fetch_contract
from batch_client.endpoint import Endpoint, Pool
from batch_client.errors import BatchClientError, DataError, MismatchError, ServingError, StoppedError
from batch_client.events import ChunkWritten, Event, Observer, Published, RunStarted, Stopping
from batch_client.layout import OutputLayout
from batch_client.ledger import Ledger, check_place, read_rows
from batch_client.plan import Geometry, Plan, Span, Unit, make_plan
from batch_client.publish import is_published, publish
from batch_client.reader import Source, open_source
from batch_client.scorer import Scorer
from batch_client.serving import Servers, open_servers
from batch_client.spec import RunIdentity, RunSpec
from batch_client.storage import Store, open_store
from batch_client.summary import RunSummary, Tally
from batch_client.writer import ChunkWriter

__all__ = ["Services", "execute", "plan_run", "serving"]

# What a stop may take: work in flight is finished within this, the rest is left for the resume.
DRAIN_SECONDS = 12.0
# Assembled chunks held at a time, beside the byte budget of the records.
OUTPUT_BYTES = 64 << 20


@dataclass(frozen=True)
class Services:
    """The parts of the world that a run touches; a simulation passes others."""

    servers: Servers
    source_store: Store
    output_store: Store
    clock: Callable[[], float] = time.monotonic
    rng: random.Random = field(default_factory=random.Random)


@asynccontextmanager
async def serving(spec: RunSpec) -> AsyncIterator[Services]:
    """Everything that `spec` names, open: stores, and servers to score with.

    Raises what opening them raises.
    """
    source_store = open_store(spec.input, anonymous=spec.anonymous)
    output_store = open_store(spec.output, anonymous=spec.anonymous)
    # A source that can't be scored should not wait for a server to start.
    await open_source(source_store, spec.array)
    async with open_servers(spec) as servers:
        yield Services(servers, source_store, output_store)


@dataclass(frozen=True)
class _Prepared:
    source: Source
    contract: ModelContract
    plan: Plan
    identity: RunIdentity
    pool: Pool


async def plan_run(spec: RunSpec, services: Services) -> Plan:
    """What `spec` would do; sends one metadata request a server and writes nothing."""
    return (await _prepare(spec, services)).plan


async def execute(spec: RunSpec, services: Services, observers: tuple[Observer, ...] = (),
                  stop: asyncio.Event | None = None) -> RunSummary:
    """Run `spec` to its end: an output published, or an error that says why not.

    `stop` may be set at any time: work in flight is finished, proven and left for the same run to go on from.

    Raises the errors of `errors.py`; StoppedError after `stop`.
    """
    tally = Tally(services.clock)

    def emit(event: Event) -> None:
        for observer in (tally, *observers):
            observer(event)

    prepared = await _prepare(spec, services)
    await check_place(services.output_store, prepared.identity)
    root = await is_published(services.output_store)
    if root is not None:
        emit(Published(spec.output, root, already=True))
        return tally.summary(spec, prepared.contract, prepared.plan)
    layout = await OutputLayout.open(prepared.plan, spec.codec)
    run = _Run(spec, services, prepared, layout, emit, stop or asyncio.Event())
    root = await run.to_the_end()
    emit(Published(spec.output, root))
    return tally.summary(spec, prepared.contract, prepared.plan)


async def _prepare(spec: RunSpec, services: Services) -> _Prepared:
    source = await open_source(services.source_store, spec.array)
    pool = Pool(services.servers.urls, spec.in_flight, services.clock)
    contract = await _agree(services, pool)
    geometry = _checked(source, contract)
    plan = make_plan(spec, geometry, contract.input_dtype, contract.outputs, contract.micro_batch)
    return _Prepared(source, contract, plan, _identity(spec, source, contract, plan), pool)


async def _agree(services: Services, pool: Pool) -> ModelContract:
    """The first server's contract is the run's; servers that can't be reached or differ are left out."""
    agreed: ModelContract | None = None
    problems: list[BatchClientError] = []
    for endpoint in pool.endpoints:
        try:
            contract = await fetch_contract(services.servers, endpoint.url)
        except BatchClientError as error:
            problems.append(error)
            pool.leave_out(endpoint, str(error))
            continue
        if agreed is None:
            agreed = contract
        elif contract != agreed:
            _leave_out_other(pool, endpoint, contract, agreed)
    if agreed is None:
        raise problems[0] if problems else ServingError("no endpoint was given")
    return agreed


def _leave_out_other(pool: Pool, endpoint: Endpoint, found: ModelContract, wanted: ModelContract) -> None:
    pool.leave_out(endpoint, f"its model is {found.digest} with numerics {found.fingerprint}, "
                             f"this run's is {wanted.digest} with {wanted.fingerprint}")


def _checked(source: Source, contract: ModelContract) -> Geometry:
    """The source's geometry, once it is clear that the model takes its records."""
    found = source.geometry
    if _squeezed(found.record_shape) != _squeezed(contract.input_shape):
        raise DataError(f"{source.url}: a record has shape {found.record_shape}, model {contract.name} takes "
                        f"{contract.input_shape}: score another array, or pack the model for these records")
    if not np.can_cast(found.dtype, contract.input_dtype, "safe"):
        raise DataError(f"{source.url}: records are {found.dtype}, model {contract.name} takes {contract.input_dtype}, "
                        "which can't hold them all: convert the array, or pack the model for this dtype")
    return found


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _identity(spec: RunSpec, source: Source, contract: ModelContract, plan: Plan) -> RunIdentity:
    return RunIdentity(
        source=source.url,
        source_metadata=source.metadata_digest,
        source_shape=source.geometry.shape,
        source_dtype=str(source.geometry.dtype),
        start=plan.start,
        stop=plan.stop,
        grid_records=plan.grid_records,
        chunk_records=plan.chunk_records,
        micro_batch=plan.micro_batch,
        codec=spec.codec,
        model=contract.name,
        model_digest=contract.digest,
        fingerprint=contract.fingerprint,
        outputs=tuple((output.name, str(output.dtype), output.shape) for output in plan.outputs),
        allow_missing=spec.allow_missing,
    )


class _Run:
    """One execution: the tasks and what they share."""

    def __init__(self, spec: RunSpec, services: Services, prepared: _Prepared, layout: OutputLayout,
                 emit: Callable[[Event], None], stop: asyncio.Event) -> None:
        self._spec = spec
        self._store = services.output_store
        self._source = prepared.source
        self._plan = prepared.plan
        self._contract = prepared.contract
        self._identity = prepared.identity
        self._emit = emit
        self._stop = stop
        self._writer = ChunkWriter(self._store, layout)
        self._layout = layout
        self._ledger = Ledger(self._store, f"{services.rng.getrandbits(64):016x}", services.clock)
        self._budget = ByteBudget(spec.max_bytes_in_flight)
        self._scorer = Scorer(
            transport=services.servers.transport, tokens=services.servers.tokens, pool=prepared.pool,
            contract=prepared.contract,
            patience=spec.patience, clock=services.clock, rng=services.rng, emit=emit)
        self._places = asyncio.Semaphore(self._units_at_once(len(services.servers.urls)))

    def _units_at_once(self, servers: int) -> int:
        requests_a_unit = -(-self._plan.chunk_records // self._plan.request_records)
        for_requests = -(-self._spec.in_flight * servers // requests_a_unit) + 2
        return max(2, min(for_requests, OUTPUT_BYTES // self._plan.unit_bytes_out))

    async def to_the_end(self) -> str:
        """Score what no ledger row proves, then publish. Returns the root hash."""
        await self._ledger.pin(self._identity)
        done = await read_rows(self._store)
        records_done = sum(self._plan.unit(index).count for index in done)
        self._emit(RunStarted(self._plan, self._spec.output, self._contract.name, self._contract.digest, records_done))
        try:
            await self._score_all(set(done))
        finally:
            # What is stored is stored, whatever happened since: prove it, so that a resume need not repeat it.
            await self._ledger.flush()
        rows = await read_rows(self._store)
        return await publish(self._store, self._layout, self._plan, self._identity, rows)

    async def _score_all(self, done: set[int]) -> None:
        watcher = asyncio.ensure_future(self._stop.wait())
        work = asyncio.ensure_future(self._units(done))
        try:
            await asyncio.wait({watcher, work}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self._emit(Stopping("asked to stop"))
                await asyncio.wait({work}, timeout=DRAIN_SECONDS)
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
        finally:
            watcher.cancel()
            work.cancel()
        if not _finished(work):
            raise StoppedError("stopped before the end; what is finished is kept: the same command goes on from there")

    async def _units(self, done: set[int]) -> bool:
        """Whether all units were begun and finished."""
        async with asyncio.TaskGroup() as tasks:
            for unit in self._plan.units():
                if unit.index in done:
                    continue
                await self._places.acquire()
                if self._stop.is_set():
                    return False
                tasks.create_task(self._unit_in_its_place(unit))
        return True

    async def _unit_in_its_place(self, unit: Unit) -> None:
        try:
            await self._unit(unit)
        finally:
            self._places.release()

    async def _unit(self, unit: Unit) -> None:
        assembler = UnitAssembler(unit, self._plan.outputs)
        etags: dict[str, str | None] = {}
        bytes_read = 0
        async with asyncio.TaskGroup() as tasks:
            carried: np.ndarray | None = None
            for start, stop in self._plan.blocks(unit):
                lease = await self._budget.take((stop - start) * self._plan.source.record_bytes)
                try:
                    rows = await self._source.read(start, stop, allow_missing=self._spec.allow_missing)
                    self._pin(etags, rows.etags)
                    bytes_read += rows.nbytes
                    carried = self._slice(unit, start, rows.data, carried, lease, assembler, tasks)
                finally:
                    lease.release()
        row, adopted = await self._writer.write(assembler, etags)
        await self._ledger.add(row)
        self._emit(ChunkWritten(unit.index, unit.count, row.failed, bytes_read,
                                sum(chunk.size for chunk in row.chunks), adopted))

    def _pin(self, pins: dict[str, str | None], etags: Mapping[str, str | None]) -> None:
        """Add what a read saw; a source chunk that two reads saw with different ETags changed under the run."""
        for key, etag in etags.items():
            if pins.setdefault(key, etag) != etag:
                raise MismatchError(f"{self._source.url}: chunk {key} changed while it was being scored: "
                                    "score a source that stays as it is, into a new OUTPUT")

    def _slice(self, unit: Unit, start: int, data: np.ndarray, carried: np.ndarray | None, lease: Lease,
               assembler: UnitAssembler, tasks: asyncio.TaskGroup) -> np.ndarray | None:
        """Begin a request for each whole span at hand; returns the records that wait for the next block."""
        data = data.reshape(len(data), *self._contract.input_shape)
        first = start - (0 if carried is None else len(carried))
        stop = start + len(data)
        for span in self._plan.requests(first, stop):
            if span.stop == stop and stop < unit.stop and (span.first_row + span.count) % self._plan.request_records:
                # Copied, so that the block's bytes can be given back while these wait.
                rest = data[max(span.start, start) - start:].copy()
                return rest if carried is None or span.start >= start else np.concatenate([carried, rest])
            rows = data[max(span.start - start, 0):span.stop - start]
            if carried is not None and span.start < start:
                rows = np.concatenate([carried, rows])
            tasks.create_task(self._score(span, rows, lease.hold(), assembler))
        return None

    async def _score(self, span: Span, rows: np.ndarray, lease: Lease, assembler: UnitAssembler) -> None:
        try:
            wire = np.ascontiguousarray(rows, dtype=self._contract.input_dtype.newbyteorder("<"))
            scored = await self._scorer.score(span, wire)
            assembler.place(span, scored.outputs, scored.status)
        finally:
            lease.release()


def _finished(work: asyncio.Future[bool]) -> bool:
    """The result of the units' task, False if it was cut short; of errors that came together the first is raised."""
    if work.cancelled():
        return False
    error = work.exception()
    first = error
    while isinstance(first, BaseExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, BatchClientError):
        raise first
    return work.result()
