"""What is proven: one row for each output chunk that is in the store, in create-only segments.

`_run/spec.json` says what the run is; `_run/ledger/<writer>/<seq>.json` hold rows; `_run/failed/…` list the records
that failed. A row is written after its chunks, so what a row says is true; what no row says is scored again, and the
create-only write of the chunk compares.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from batch_client.errors import MismatchError, StorageError, one_error
from batch_client.events import RecordFailed
from batch_client.jsontext import canonical_json, parse_json
from batch_client.layout import FAILED_PREFIX, LEDGER_PREFIX, SPEC_KEY
from batch_client.spec import RunIdentity
from batch_client.storage import Blob, Store, child_url, put_same

__all__ = ["ChunkProof", "Ledger", "LedgerView", "Row", "check_place", "rows_from_json"]

FLUSH_ROWS = 64
FLUSH_SECONDS = 10.0
# Segments read at a time: on an object store it is the answers that take long, and a segment is small, some 20 KB. One
# whose units have thousands of source chunks each is not, so bytes are bounded too.
READS_AT_ONCE = 64
READ_BYTES = 64 << 20
LARGEST_SEGMENT = 64 << 20
# Rows that are held at a time when they are read again in the order of the units.
BLOCK_UNITS = 1024


class ChunkProof(NamedTuple):
    """One stored object: its key below the output, its size in bytes, the SHA-256 of its bytes (hex)."""

    key: str
    size: int
    sha256: str


class Row(NamedTuple):
    """What is proven of one unit: its objects, the ETags of the source chunks it was read from ("" where the store
    gives none, None for an absent chunk), its records by status.
    """

    unit: int
    chunks: tuple[ChunkProof, ...]
    source: Mapping[str, str | None]
    ok: int
    failed: int
    not_finite: int

    @property
    def records(self) -> int:
        return self.ok + self.failed + self.not_finite

    @property
    def missing_chunks(self) -> int:
        """Source chunks that were not there and were taken as the fill value."""
        return sum(etag is None for etag in self.source.values())

    def to_value(self) -> dict[str, Any]:
        return self._asdict()

    @classmethod
    def from_value(cls, value: Any) -> Row:
        """Raises ValueError, KeyError or TypeError for what `to_value` would not have made."""
        chunks = tuple([ChunkProof(str(key), int(size), str(sha256)) for key, size, sha256 in value["chunks"]])
        return cls(int(value["unit"]), chunks, dict(value["source"]), int(value["ok"]), int(value["failed"]),
                   int(value["not_finite"]))


def rows_from_json(data: bytes | memoryview) -> list[Row]:
    """Rows of a ledger segment or of a part of the manifest. Raises ValueError, KeyError or TypeError."""
    return [Row.from_value(value) for value in parse_json(data)["rows"]]


class LedgerView:
    """What all writers have proven of an output of `units` chunks; `refresh` reads the segments that are new.

    Rows are not kept: eight bytes a unit say that it is proven and with which objects, and an index says which segments
    have a unit's row. Who needs the rows themselves has them read again, in the order of the units.
    """

    def __init__(self, store: Store, units: int) -> None:
        self.records = self.failed = self.not_finite = self.missing_chunks = 0
        self._store = store
        self._count = 0
        # A hash of each proven unit's objects, 0 where nothing is proven.
        self._hashes = np.zeros(units, np.int64)
        self._segments: dict[str, int] = {}
        self._blocks: dict[int, list[str]] = {}

    def __len__(self) -> int:
        """How many units are proven."""
        return self._count

    def __contains__(self, unit: int) -> bool:
        return bool(self._hashes[unit])

    async def refresh(self) -> None:
        """Raises StorageError for a segment that can't be read, MismatchError for rows that contradict each other."""
        fresh = {}
        async for meta in self._store.list(LEDGER_PREFIX):
            if meta.key not in self._segments:
                if meta.size > LARGEST_SEGMENT:
                    raise StorageError(f"{child_url(self._store.url, meta.key)}: {meta.size} bytes, no ledger segment "
                                       "is that large")
                fresh[meta.key] = meta.size
        async for key, rows in _read_segments(self._store, fresh):
            for row in rows:
                self.add(row)
            for block in {row.unit // BLOCK_UNITS for row in rows}:
                self._blocks.setdefault(block, []).append(key)
            self._segments[key] = fresh[key]

    def add(self, row: Row) -> None:
        """A unit with several rows (two clients, a lost answer) has one meaning: their objects are equal."""
        if not 0 <= row.unit < len(self._hashes):
            raise MismatchError(f"{self._store.url}: its ledger has a row for output chunk {row.unit}, and the run has "
                                f"{len(self._hashes)}: the output can't be trusted; score it again at another place")
        # Python's hash of strings is 64 bits and keyed: two proofs that differ are not taken for equal by chance.
        found, known = hash(row.chunks) or 1, int(self._hashes[row.unit])
        if not known:
            self._hashes[row.unit] = found
            self._count += 1
            self.records += row.records
            self.failed += row.failed
            self.not_finite += row.not_finite
            self.missing_chunks += row.missing_chunks
        elif found != known:
            raise MismatchError(f"{self._store.url}: two writers proved different bytes for output chunk {row.unit}: "
                                "the output can't be trusted; score it again at another place")

    async def rows(self) -> AsyncIterator[Row]:
        """A row for each proven unit, in order, read again a block of units at a time.

        All rows must be in segments that `refresh` has seen. Raises StorageError where one is not found again.
        """
        for block in range(-(-len(self._hashes) // BLOCK_UNITS)):
            # In the order of their names: of a unit's rows all clients take the same one.
            segments = {key: self._segments[key] for key in sorted(self._blocks.get(block, ()))}
            found: dict[int, Row] = {}
            async for _, rows in _read_segments(self._store, segments):
                for row in rows:
                    if row.unit // BLOCK_UNITS == block:
                        self.add(row)
                        found.setdefault(row.unit, row)
            start = block * BLOCK_UNITS
            proven = np.flatnonzero(self._hashes[start:start + BLOCK_UNITS]) + start
            for unit in proven.tolist():
                if unit not in found:
                    raise StorageError(f"{self._store.url}: the ledger row of output chunk {unit} is not found again: "
                                       "run the same command again, and what is missing is proven again")
                yield found[unit]


class Ledger:
    """One client's own segments of an output's ledger."""

    def __init__(self, store: Store, writer: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._writer = writer
        self._clock = clock
        self._rows: list[Row] = []
        self._seq = 0
        self._flushed_at = clock()
        self._lock = asyncio.Lock()

    async def pin(self, identity: RunIdentity) -> bool:
        """Make this output that of `identity`; False if it was already.

        Raises MismatchError when it belongs to another run, or holds something that is no output of ours.
        """
        await check_place(self._store, identity)
        if await self._store.create(SPEC_KEY, identity.to_json()):
            return True
        await check_place(self._store, identity)
        if await self._store.head(SPEC_KEY) is None:
            raise StorageError(f"{child_url(self._store.url, SPEC_KEY)}: the store says that it exists and has none")
        return False

    async def add(self, row: Row) -> None:
        """Note that a unit's chunks are stored; written at once with others, or after a while."""
        self._rows.append(row)
        if len(self._rows) >= FLUSH_ROWS or self._clock() - self._flushed_at >= FLUSH_SECONDS:
            await self.flush()

    async def flush(self) -> None:
        """Write all rows that are not written yet."""
        async with self._lock:
            rows, self._flushed_at = list(self._rows), self._clock()
            if not rows:
                return
            body = canonical_json({"rows": [row.to_value() for row in rows]})
            # Only this writer writes under its name. Other bytes there are an earlier flush whose answer was lost.
            while not await put_same(self._store, f"{LEDGER_PREFIX}{self._writer}/{self._seq:06d}.json", body):
                self._seq += 1
            self._seq += 1
            del self._rows[:len(rows)]

    async def list_failures(self, unit: int, failures: Sequence[RecordFailed]) -> None:
        """Write the dead letters of a unit: each record's number, reason and how often it failed alone."""
        body = canonical_json({"unit": unit, "records": [asdict(failure) for failure in failures]})
        await self._store.create(f"{FAILED_PREFIX}{unit:08d}-{self._writer}.json", body)


async def check_place(store: Store, identity: RunIdentity) -> None:
    """Raises MismatchError unless the output is empty or belongs to `identity`. Writes nothing."""
    spec = await store.get(SPEC_KEY)
    if spec is None:
        found = await anext(store.list(""), None)
        if found is None:
            return
        # Another client may have begun this very run in between.
        spec = await store.get(SPEC_KEY)
        if spec is None:
            raise MismatchError(f"{store.url} is not empty ({found.key}) and is no output of batch-client: "
                                "choose another OUTPUT")
    identity.require_same(bytes(spec.data), store.url)


async def _read_segments(store: Store, sizes: Mapping[str, int]) -> AsyncIterator[tuple[str, list[Row]]]:
    """Each segment's key and rows, in the order of `sizes`, whose values are bytes."""
    for keys in _batches(sizes):
        with one_error():
            async with asyncio.TaskGroup() as tasks:
                pending = [(key, tasks.create_task(store.get(key))) for key in keys]
        for key, task in pending:
            yield key, _rows_of(store, key, task.result())


def _batches(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    batch: list[str] = []
    nbytes = 0
    for key, size in sizes.items():
        if batch and (len(batch) == READS_AT_ONCE or nbytes + size > READ_BYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(key)
        nbytes += size
    if batch:
        yield batch


def _rows_of(store: Store, key: str, blob: Blob | None) -> list[Row]:
    try:
        return [] if blob is None else rows_from_json(blob.data)
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{child_url(store.url, key)}: this ledger segment can't be read ({error}); "
                           "remove it, and its chunks are scored and compared again") from error
