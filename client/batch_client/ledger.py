"""What is proven: one row for each output chunk that is in the store, in create-only segments.

`_run/spec.json` says what the run is; `_run/ledger/<writer>/<seq>.json` hold rows; `_run/failed/…` list the records
that failed. A row is written after its chunks, so what a row says is true; what no row says is scored again, and the
create-only write of the chunk compares.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from batch_client.errors import MismatchError, StorageError, one_error
from batch_client.events import RecordFailed
from batch_client.layout import FAILED_PREFIX, LEDGER_PREFIX, SPEC_KEY
from batch_client.spec import RunIdentity, canonical_json
from batch_client.storage import Store, child_url, put_same

__all__ = ["ChunkProof", "Ledger", "LedgerView", "Row", "check_place"]

FLUSH_ROWS = 64
FLUSH_SECONDS = 10.0
READS_AT_ONCE = 16
LARGEST_SEGMENT = 64 << 20


@dataclass(frozen=True)
class ChunkProof:
    """One stored object: its key below the output, its size in bytes, the SHA-256 of its bytes (hex)."""

    key: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Row:
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

    def to_value(self) -> dict[str, Any]:
        return {
            "unit": self.unit,
            "chunks": [[chunk.key, chunk.size, chunk.sha256] for chunk in self.chunks],
            "source": dict(self.source),
            "ok": self.ok,
            "failed": self.failed,
            "not_finite": self.not_finite,
        }

    @classmethod
    def from_value(cls, value: Any) -> Row:
        """Raises ValueError, KeyError or TypeError for what `to_value` would not have made."""
        chunks = tuple(ChunkProof(str(key), int(size), str(sha256)) for key, size, sha256 in value["chunks"])
        return cls(int(value["unit"]), chunks, dict(value["source"]), int(value["ok"]), int(value["failed"]),
                   int(value["not_finite"]))


class LedgerView:
    """All rows that have been read so far, of all writers; `refresh` reads the segments that are new."""

    def __init__(self, store: Store) -> None:
        self.rows: dict[int, Row] = {}
        self._store = store
        self._seen: set[str] = set()

    async def refresh(self) -> None:
        """Raises StorageError for a segment that can't be read, MismatchError for rows that contradict each other."""
        fresh = []
        async for meta in self._store.list(LEDGER_PREFIX):
            if meta.key not in self._seen:
                if meta.size > LARGEST_SEGMENT:
                    raise StorageError(f"{child_url(self._store.url, meta.key)}: {meta.size} bytes, no ledger segment "
                                       "is that large")
                fresh.append(meta.key)
        for start in range(0, len(fresh), READS_AT_ONCE):
            keys = fresh[start:start + READS_AT_ONCE]
            for row in await _read_segments(self._store, keys):
                self.add(row)
            self._seen.update(keys)

    def add(self, row: Row) -> None:
        """A unit with several rows (two clients, a lost answer) has one meaning: their objects are equal."""
        known = self.rows.setdefault(row.unit, row)
        if known.chunks != row.chunks:
            raise MismatchError(f"{self._store.url}: two writers proved different bytes for output chunk {row.unit}: "
                                "the output can't be trusted; score it again at another place")


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


async def _read_segments(store: Store, keys: Iterable[str]) -> list[Row]:
    with one_error():
        async with asyncio.TaskGroup() as tasks:
            pending = [(key, tasks.create_task(store.get(key))) for key in keys]
    rows: list[Row] = []
    for key, task in pending:
        blob = task.result()
        try:
            value = json.loads(bytes(blob.data)) if blob is not None else {"rows": []}
            rows.extend(Row.from_value(item) for item in value["rows"])
        except (ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{child_url(store.url, key)}: this ledger segment can't be read ({error}); "
                               "remove it, and its chunks are scored and compared again") from error
    return rows
