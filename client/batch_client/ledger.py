"""What is proven: one row for each output chunk that is in the store, in create-only segments.

`_run/ledger/<generation>/<writer>/<seq>.json` hold rows; `_run/failed/…` list the records that failed. A row is written
after its chunks, so what a row says is true; what no row says is scored again, and the create-only write of the chunk
compares.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import NamedTuple

import msgspec
import numpy as np

from batch_client.errors import MismatchError, StorageError, one_error
from batch_client.events import RecordFailed
from batch_client.jsontext import canonical_json
from batch_client.layout import FAILED_PREFIX, LEDGER_PREFIX
from batch_client.place import require_generation
from batch_client.storage import Blob, Store, child_url, put_same

__all__ = ["FLUSH_SECONDS", "ChunkProof", "Ledger", "LedgerView", "Row", "row_json", "rows_from_json", "segment_of"]

FLUSH_ROWS = 64
FLUSH_SECONDS = 10.0
FLUSH_SOURCE_CHUNKS = 50_000  # some 5 MB of keys and ETags
# Segments read at a time: on an object store it is the answers that take long, and a segment is small, some 20 KB. One
# whose units have thousands of source chunks each is not, so bytes are bounded too.
READS_AT_ONCE = 64
READ_BYTES = 64 << 20
LARGEST_SEGMENT = 64 << 20
# Units that are looked at together; so many rows are held when they are read again in the order of the units.
BLOCK_UNITS = 1024


class ChunkProof(NamedTuple):
    """One stored object: its key below the output, its size in bytes, the SHA-256 of its bytes (hex)."""

    key: str
    size: int
    sha256: str


class Row(msgspec.Struct, frozen=True):
    """What is proven of one unit: its objects, the ETags of the source chunks it was read from ("" where the store
    gives none, None for an absent chunk), its records by status.
    """

    unit: int
    chunks: tuple[ChunkProof, ...]
    source: dict[str, str | None]
    ok: int
    failed: int
    not_finite: int

    @property
    def records(self) -> int:
        return self.ok + self.failed + self.not_finite

    @property
    def missing_chunks(self) -> int:
        """Source chunks that were not there and were taken as the fill value."""
        return list(self.source.values()).count(None)


class _Rows(msgspec.Struct):
    rows: Sequence[Row]


# Five times as quick to read as json with checks of types in Python, twelve times as quick to write.
_DECODER = msgspec.json.Decoder(_Rows)
_ENCODER = msgspec.json.Encoder(order="sorted")


def row_json(row: Row) -> bytes:
    """As `canonical_json` would spell it."""
    return _ENCODER.encode(row)


def rows_from_json(data: bytes | memoryview) -> Sequence[Row]:
    """Rows of a ledger segment or of a part of the manifest. Raises ValueError."""
    try:
        return _DECODER.decode(data).rows
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def segment_of(rows: Sequence[Row]) -> bytes:
    """The bytes of a ledger segment: its rows, and what shows that they are still those that were written."""
    text = _ENCODER.encode(_Rows(rows))[:-1]
    return text + _seal(text)


def _seal(text: bytes | memoryview) -> bytes:
    """The end of a segment that begins with `text`."""
    return b',"sha256":"%b"}' % hashlib.sha256(text).hexdigest().encode()


def _require_sealed(segment: memoryview) -> None:
    length = len(_seal(b""))
    if segment[-length:] != _seal(segment[:-length]):
        raise ValueError("its SHA-256 is that of other bytes")


class LedgerView:
    """What all writers of one generation have proven of an output of `units` chunks; `refresh` reads the segments that
    are new.

    Rows are not kept: eight bytes a unit say that it is proven and with which objects, and an index says which segments
    have a unit's row. Who needs the rows themselves has them read again, in the order of the units.
    """

    def __init__(self, store: Store, units: int, generation: str) -> None:
        self.records = self.failed = self.not_finite = self.missing_chunks = 0
        self._store = store
        self._generation = generation
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

    def proven(self, units: range) -> np.ndarray:
        """The numbers of those of these units that are proven."""
        return np.flatnonzero(self._hashes[units.start:units.stop]) + units.start

    def unproven(self, units: range) -> Iterator[int]:
        """The numbers of those of these units that are not proven, found some at a time: there may be millions."""
        for start in range(units.start, units.stop, BLOCK_UNITS):
            yield from (np.flatnonzero(self._hashes[start:min(start + BLOCK_UNITS, units.stop)] == 0) + start).tolist()

    async def refresh(self) -> None:
        """Raises MismatchError for a segment that can't be read, for rows that contradict each other, and where
        `require_current` does.
        """
        await self.require_current()
        fresh = {}
        async for meta in self._store.list(f"{LEDGER_PREFIX}{self._generation}/"):
            if meta.key not in self._segments:
                if meta.size > LARGEST_SEGMENT:
                    raise MismatchError(f"{child_url(self._store.url, meta.key)}: {meta.size} bytes, no ledger segment "
                                        "is that large: remove it, and its chunks are scored and compared again")
                fresh[meta.key] = meta.size
        async for key, rows in _read_segments(self._store, fresh):
            for row in rows:
                self.add(row)
            for block in {row.unit // BLOCK_UNITS for row in rows}:
                self._blocks.setdefault(block, []).append(key)
            self._segments[key] = fresh[key]

    async def require_current(self) -> None:
        """Raises MismatchError when the output was removed, or is being removed, since this view was made."""
        await require_generation(self._store, self._generation)

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
            for unit in self.proven(range(block * BLOCK_UNITS, (block + 1) * BLOCK_UNITS)).tolist():
                if unit not in found:
                    raise StorageError(f"{self._store.url}: the ledger row of output chunk {unit} is not found again: "
                                       "run the same command again, and what is missing is proven again")
                yield found[unit]

    async def segments_of(self, unit: int) -> dict[str, Sequence[Row]]:
        """The segments that prove a unit, by their keys, with all their rows."""
        block = {key: self._segments[key] for key in sorted(self._blocks.get(unit // BLOCK_UNITS, ()))}
        return {key: rows async for key, rows in _read_segments(self._store, block)
                if any(row.unit == unit for row in rows)}


class Ledger:
    """One client's own segments of an output's ledger; `writer` is a name that no other client has."""

    def __init__(self, store: Store, generation: str, writer: str, clock: Callable[[], float]) -> None:
        self._store = store
        self._generation = generation
        self._prefix = f"{LEDGER_PREFIX}{generation}/{writer}/"
        self._writer = writer
        self._clock = clock
        self._rows: list[Row] = []
        self._source_chunks = 0
        self._seq = 0
        self._flushed_at = clock()
        self._lock = asyncio.Lock()

    async def add(self, row: Row) -> None:
        """Note that a unit's chunks are stored; written at once with others, or after a while."""
        self._rows.append(row)
        self._source_chunks += len(row.source)
        # A record that failed may not fail again after a kill, and a chunk that is there and not proven is compared.
        if (row.failed or len(self._rows) >= FLUSH_ROWS or self._source_chunks >= FLUSH_SOURCE_CHUNKS
                or self._clock() - self._flushed_at >= FLUSH_SECONDS):
            await self.flush()

    async def flush(self) -> None:
        """Write all rows that are not written yet. Raises MismatchError when the output was removed meanwhile."""
        async with self._lock:
            self._flushed_at = self._clock()
            while rows := self._next_segment():
                await require_generation(self._store, self._generation)
                body = segment_of(rows)
                # Only this writer writes under its name. Other bytes there are an earlier flush whose answer was lost.
                while not await put_same(self._store, f"{self._prefix}{self._seq:06d}.json", body):
                    self._seq += 1
                self._seq += 1
                del self._rows[:len(rows)]
                self._source_chunks -= sum(len(row.source) for row in rows)

    def _next_segment(self) -> list[Row]:
        """The first rows that are not written yet: at least one, and others as long as there is room."""
        room = FLUSH_SOURCE_CHUNKS
        rows: list[Row] = []
        for row in self._rows[:FLUSH_ROWS]:
            room -= len(row.source)
            if rows and room < 0:
                break
            rows.append(row)
        return rows

    async def list_failures(self, unit: int, failures: Sequence[RecordFailed]) -> None:
        """Write the dead letters of a unit: each record's number, reason and how often it failed alone."""
        body = canonical_json({"unit": unit, "records": [asdict(failure) for failure in failures]})
        await self._store.create(f"{FAILED_PREFIX}{unit:08d}-{self._writer}.json", body)


async def _read_segments(store: Store, sizes: Mapping[str, int]) -> AsyncIterator[tuple[str, Sequence[Row]]]:
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


def _rows_of(store: Store, key: str, blob: Blob | None) -> Sequence[Row]:
    if blob is None:
        return []
    try:
        _require_sealed(blob.data)
        return rows_from_json(blob.data)
    except ValueError as error:
        raise MismatchError(f"{child_url(store.url, key)}: this ledger segment can't be read ({error}); "
                            "remove it, and its chunks are scored and compared again") from error
