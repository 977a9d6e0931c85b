"""The only composer: owns the tasks, and sees a run from its first check to its last object.

    plan → read → cut → score → assemble → write → ledger → publish

Units of work are begun lazily; a byte budget bounds what is read ahead, the pool bounds what is in flight.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress

import numpy as np

from batch_client.agreement import ask_again
from batch_client.assemble import UnitAssembler
from batch_client.budget import ByteBudget, Lease
from batch_client.errors import (
    STOPPED,
    STOPPED_AT_ONCE,
    DataError,
    StoppedError,
    StorageError,
    one_error,
)
from batch_client.events import (
    NOT_FINITE,
    ChunkHeld,
    ChunkReused,
    ChunkWritten,
    Event,
    Observer,
    Published,
    RecordFailed,
    RecordsScored,
    RunStarted,
    Step,
    Stopping,
    timed,
    to_all,
)
from batch_client.exchange import Exchange
from batch_client.figures import counted
from batch_client.layout import FAILED_PREFIX, OutputLayout
from batch_client.ledger import FLUSH_SECONDS, Ledger, LedgerView, Row
from batch_client.occupant import check_occupant
from batch_client.pieces import Pieces
from batch_client.place import Begun, begin, check_place
from batch_client.plan import Plan, Span, Unit
from batch_client.prepare import Prepared, Services, prepare
from batch_client.publish import publish
from batch_client.removal import remove_output
from batch_client.reuse import copy_chunks, reusable_rows
from batch_client.scorer import HopelessError, Scorer
from batch_client.spec import RunSpec
from batch_client.storage import Store, child_url
from batch_client.stream import UnitStream
from batch_client.summary import RunSummary, Tally
from batch_client.writer import ChunkWriter
from batch_handler.oip import STATUS_NOT_FINITE

__all__ = ["DRAIN_SECONDS", "execute", "plan_run"]

# What a stop may take: work in flight is finished within this, the rest is left for the resume.
DRAIN_SECONDS = 12.0
# Failures beyond the accepted ones after which it is the model, not the records: no use in taking apart the rest.
HOPELESS = 1000
COPIES_AT_ONCE = 16  # of a reused output's chunks; on an object store it is the answers that take long


async def plan_run(spec: RunSpec, services: Services, observers: tuple[Observer, ...] = ()) -> Plan:
    """What `spec` would do; sends one metadata request a server and writes nothing. Observers hear of servers that a
    run would go on without.

    Raises what `execute` would raise before it writes.
    """
    prepared = await prepare(spec, services)
    prepared.pool.tell(to_all(observers))
    prepared.tell_of_numbers(to_all(observers))
    _, manifest = await check_occupant(spec, services.output_store, prepared)
    if manifest is None:
        await _reusable(spec, services, prepared)
        await OutputLayout.open(prepared.plan, spec.codec)
    return prepared.plan


async def execute(spec: RunSpec, services: Services, observers: tuple[Observer, ...] = (),
                  stop: asyncio.Event | None = None) -> RunSummary:
    """Run `spec` to its end: an output published (or a part done), or an error that says why not.

    `stop` may be set at any time: work in flight is finished, proven and left for the same run to go on from.

    Raises the errors of `errors.py`; StoppedError after `stop`.
    """
    tally = Tally(services.clock, services.cpu)
    emit = to_all((tally, *observers))
    stop = stop or asyncio.Event()
    prepared = await prepare(spec, services)
    prepared.tell_of_numbers(emit)
    output = services.output_store
    replaces, manifest = await check_occupant(spec, output, prepared)
    if manifest is not None:  # whatever has become of what it reused
        emit(Published(spec.output, manifest.root, already=True))
        return tally.summary(spec, prepared, manifest)
    reusable = await _reusable(spec, services, prepared)
    layout = await OutputLayout.open(prepared.plan, spec.codec)  # before anything is deleted: zarr may refuse it
    if replaces:
        read = (services.source_store, services.reuse_store)
        await remove_output(output, kept=[store for store in read if store is not None])
        await check_place(output, prepared.identity)
    if stop.is_set():
        raise StoppedError(STOPPED_AT_ONCE)
    name = f"{services.rng.getrandbits(64):016x}"
    begun = await begin(output, prepared.identity, name)
    run = _Run(spec, services, prepared, layout, begun, name, emit, stop)
    root = await run.to_the_end(reusable)
    if root is not None:
        emit(Published(spec.output, root))
    return tally.summary(spec, prepared, run.view)


async def _reusable(spec: RunSpec, services: Services, prepared: Prepared) -> AsyncIterator[Row] | None:
    if services.reuse_store is None:
        return None
    return await reusable_rows(services.reuse_store, prepared, require_finite=spec.require_finite)


class _Run:
    """One execution: the tasks and what they share."""

    def __init__(self, spec: RunSpec, services: Services, prepared: Prepared, layout: OutputLayout, begun: Begun,
                 name: str, emit: Callable[[Event], None], stop: asyncio.Event) -> None:
        self._spec = spec
        self._services = services
        self._store = services.output_store
        self._prepared = prepared
        self._plan = prepared.plan
        self._layout = layout
        self._emit = emit
        self._stop = stop
        self._writer = ChunkWriter(self._store, layout, exact=spec.exact)
        self._first = begun.first
        self._ledger = Ledger(self._store, begun.generation, name, services.clock)
        self.view = LedgerView(self._store, prepared.plan.unit_count, begun.generation)
        self._look_at = services.clock() + FLUSH_SECONDS
        self._look: asyncio.Task[None] | None = None
        self._writing: dict[int, int] = {}
        self._held: dict[int, int] = {}
        self._found: dict[int, list[RecordFailed]] = {}  # of units that are being scored
        self._giving_up = asyncio.Lock()
        self._budget = ByteBudget(spec.max_bytes_in_flight)
        exchange = Exchange(
            servers=services.servers, pool=prepared.pool, contract=prepared.contract, exact=spec.exact,
            patience=spec.patience, clock=services.clock, rng=services.rng, emit=emit)
        self._scorer = Scorer(exchange, prepared.plan.micro_batch, emit, spec.max_failed + HOPELESS)
        self._places = asyncio.Semaphore(self._plan.units_at_once(spec.in_flight * len(services.servers.urls)))
        self._under_way = asyncio.Event()

    @property
    def failed(self) -> int:
        """Failures of everything proven by anyone, being written or held back here."""
        here = self._writing | self._held
        proven = self.view.failed + (self.view.not_finite if self._spec.require_finite else 0)
        return proven + sum(here[index] for index in here if index not in self.view)

    async def to_the_end(self, reusable: AsyncIterator[Row] | None) -> str | None:
        """Score what no ledger row proves, then publish. Returns the root hash, None if other parts are not done."""
        await self.view.refresh()
        if len(self.view):  # of an earlier life: told before more is scored that could not be published
            await self._require_unchanged()
        contract, pool = self._prepared.contract, self._prepared.pool
        try:
            if self._services.reuse_store is not None and reusable is not None:
                await self._reuse(self._services.reuse_store, reusable)
            mine = self._plan.part(self._spec.part)
            self._emit(RunStarted(self._plan, self._spec.output, contract.name, contract.digest, self.view.records,
                                  contract.fingerprint, self._spec.in_flight * pool.usable, contract.ceiling,
                                  self._plan.records_in(mine), self._plan.records_in(self.view.proven(mine))))
            pool.tell(self._emit, asks_again=True)
            await self._score_all()
        except asyncio.CancelledError:
            raise  # at once: what is stored without a proof is scored again and compared
        except BaseException:
            # What is stored is stored, whatever happened since: prove it, so that a resume need not repeat it.
            with suppress(StorageError):  # what ends the run is what to tell
                await self._ledger.flush()
            raise
        await self._ledger.flush()
        await self.view.refresh()
        # Another client may have proven what was held back here.
        self._held = {index: failed for index, failed in self._held.items() if index not in self.view}
        if self._held:
            raise self._too_many()
        if len(self.view) < self._plan.unit_count and self._spec.part is not None:
            return None
        # Parts and other clients count for themselves while they run; what is published counts together.
        if self.failed > self._spec.max_failed:
            raise self._too_many()
        if self.view.missing_chunks and not self._spec.allow_missing:
            raise DataError(f"{self.view.missing_chunks:,} missing input chunks were taken as the fill value by a "
                            "client with --allow-missing: publish with that flag, or restore them and score again at "
                            "another place")
        await self._require_unchanged()
        return await publish(self._store, self._layout, self._plan, self._prepared.identity, self.view)

    async def _require_unchanged(self) -> None:
        await self._prepared.source.require_unchanged(row.source async for row in self.view.rows())

    async def _reuse(self, old: Store, rows: AsyncIterator[Row]) -> None:
        mine = self._plan.part(self._spec.part)
        places = asyncio.Semaphore(COPIES_AT_ONCE)
        with one_error():
            async with asyncio.TaskGroup() as tasks:
                async for row in rows:
                    if self._stop.is_set():
                        return
                    if row.unit not in mine:
                        continue  # another client's part
                    self._look_at_others(tasks)
                    if row.unit not in self.view:
                        await places.acquire()
                        # An object, and what is at its place already.
                        nbytes = 2 * max(chunk.size for chunk in row.chunks)
                        lease = await self._budget.take(min(nbytes, self._budget.most))
                        tasks.create_task(self._copy(old, row, places, lease))
                if self._look is not None:
                    self._look.cancel()

    async def _copy(self, old: Store, row: Row, places: asyncio.Semaphore, lease: Lease) -> None:
        try:
            await copy_chunks(old, self._store, row)
            self.view.add(row)
            await self._ledger.add(row)
            self._emit(ChunkReused(row.unit, row.records, sum(chunk.size for chunk in row.chunks)))
        finally:
            lease.release()
            places.release()

    async def _score_all(self) -> None:
        watcher = asyncio.ensure_future(self._stop.wait())
        work = asyncio.ensure_future(self._units())
        asker = asyncio.ensure_future(ask_again(
            self._services.servers, self._prepared.pool, self._prepared.contract, exact=self._spec.exact))
        try:
            await asyncio.wait({watcher, work, asker}, return_when=asyncio.FIRST_COMPLETED)
            if watcher.done() and not work.done():
                self._emit(Stopping())
                await asyncio.wait({work}, timeout=DRAIN_SECONDS)
        finally:
            for task in (watcher, work, asker):
                task.cancel()
            await asyncio.wait({watcher, work, asker})
        with one_error():
            finished = not work.cancelled() and work.result()
            if not asker.cancelled():
                asker.result()  # it ends by an error alone: a bug, or an observer's
        if not finished and self._stop.is_set():
            raise StoppedError(STOPPED)

    async def _units(self) -> bool:
        """Whether all units were begun and finished."""
        async with asyncio.TaskGroup() as tasks:
            for rank, unit in enumerate(self._order()):
                await self._places.acquire()
                if self._stop.is_set():
                    return False
                self._look_at_others(tasks)
                if unit.index in self.view:
                    self._places.release()
                    continue
                tasks.create_task(self._unit_in_its_place(unit, rank))
                # Ten units that are read at once share the machine: the servers would wait for the first as for all.
                await self._under_way.wait()
            if self._look is not None:
                self._look.cancel()  # which may be long, and finds nothing that is left to begin
        return True

    def _order(self) -> Iterator[Unit]:
        """Units of this part that are not proven; who joins others begins somewhere else, so that they meet late."""
        mine = self._plan.part(self._spec.part)
        offset = 0 if self._first or not mine else self._services.rng.randrange(len(mine))
        for units in (mine[offset:], mine[:offset]):
            yield from map(self._plan.unit, self.view.unproven(units))

    def _look_at_others(self, tasks: asyncio.TaskGroup) -> None:
        """Now and then, beside the work: with many clients the ledger is long, and listing it slow."""
        if self._services.clock() >= self._look_at and (self._look is None or self._look.done()):
            self._look = tasks.create_task(self._refresh())

    async def _refresh(self) -> None:
        began = self._services.clock()
        await self.view.refresh()
        now = self._services.clock()
        self._look_at = now + max(FLUSH_SECONDS, 10 * (now - began))

    async def _unit_in_its_place(self, unit: Unit, rank: int) -> None:
        try:
            await self._unit(unit, rank)
        finally:
            self._places.release()
            self._under_way.set()

    async def _unit(self, unit: Unit, rank: int) -> None:
        assembler = UnitAssembler(unit, self._plan.outputs)
        failures = self._found[unit.index] = []
        stream = UnitStream(self._prepared.source, self._plan, unit, self._budget, self._spec.allow_missing,
                            rank, self._timed)
        async with asyncio.TaskGroup() as tasks:
            async for span, records, lease in stream.spans():
                tasks.create_task(self._score(span, records, lease, assembler, failures))
                del records  # the task's alone, while the stream waits for the budget
        if self._spec.require_finite:
            for place in np.flatnonzero(assembler.status == STATUS_NOT_FINITE):
                failures.append(RecordFailed(unit.start + int(place), NOT_FINITE, 1))
                self._emit(failures[-1])
        if failures:
            await self._list(unit.index, failures)
        del self._found[unit.index]
        if not await self._accept(unit, assembler):
            return
        with self._timed(Step.WRITE):
            row, adopted = await self._writer.write(assembler, stream.etags)
            self.view.add(row)
            self._writing.pop(unit.index, None)  # the view counts it now
            await self._ledger.add(row)
        self._emit(ChunkWritten(unit.index, unit.count, row.failed, stream.nbytes,
                                sum(chunk.size for chunk in row.chunks), adopted))

    async def _list(self, unit: int, failures: Sequence[RecordFailed]) -> None:
        await self._ledger.list_failures(unit, sorted(failures, key=lambda failure: failure.index))

    async def _list_what_was_found(self, more: Sequence[RecordFailed]) -> None:
        """Write the dead letters of all units that are being scored, before the first error ends them."""
        async with self._giving_up:
            for failure in more:
                found = self._found[self._plan.unit_of(failure.index)]
                if failure not in found:
                    found.append(failure)
            for unit, found in list(self._found.items()):
                if found:
                    await self._list(unit, found)

    async def _score(self, span: Span, records: Pieces, lease: Lease, assembler: UnitAssembler,
                     failures: list[RecordFailed]) -> None:
        self._under_way.set()
        try:
            scored = await self._scorer.score(span, records)
            assembler.place(span, scored.outputs, scored.status)
            failures.extend(scored.failures)
            self._emit(RecordsScored(span.start, records, scored.outputs, scored.status))
        except HopelessError as error:
            await self._list_what_was_found(error.failures)
            where = child_url(self._store.url, FAILED_PREFIX)
            raise DataError(f"{error}; those that were found are listed in {where}") from error
        finally:
            lease.release()

    def _timed(self, step: Step) -> AbstractContextManager[None]:
        return timed(step, self._emit, self._services.clock)

    async def _accept(self, unit: Unit, assembler: UnitAssembler) -> bool:
        """Whether a unit is to be written: its failures are within what the run accepts. If not it is held back, so
        that nothing has to be overwritten when more are accepted later.
        """
        failed = assembler.failures(require_finite=self._spec.require_finite)
        if not failed:
            return True
        if unit.index in self.view:  # another client has proven it, whose failures count already, if it had any
            return False
        if self.failed + failed <= self._spec.max_failed:
            self._writing[unit.index] = failed
            return True
        self._held[unit.index] = failed
        self._emit(ChunkHeld(unit.index, unit.count, failed))
        if self.failed > self._spec.max_failed + HOPELESS:
            await self._list_what_was_found(())
            raise self._too_many()
        return False

    def _too_many(self) -> DataError:
        failed, where = self.failed, child_url(self._store.url, FAILED_PREFIX)
        # A chunk that is proven has its records as they were; only what is held back is read again.
        mended = ("mend the source" if not self.view.failed else
                  "mend the source and score it into a new OUTPUT, or with --overwrite")
        return DataError(
            f"{counted(failed, 'record')} failed, --max-failed allows {self._spec.max_failed}: they are listed in "
            f"{where}; output chunks held back: {len(self._held)}; accept them with --max-failed {failed}, or {mended}")
