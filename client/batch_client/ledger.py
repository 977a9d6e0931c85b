"""What is proven: one row for each output chunk that is in the store, in create-only segments.

`_run/spec.json` says what the run is; `_run/ledger/<writer>/<seq>.json` hold rows. A row is written after its chunks,
so what a row says is true; what no row says is scored again, and the create-only write of the chunk compares.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from batch_client.errors import MismatchError, StorageError
from batch_client.layout import LEDGER_PREFIX, SPEC_KEY
from batch_client.spec import RunIdentity, canonical_json
from batch_client.storage import Store, child_url

__all__ = ["ChunkProof", "Ledger", "Row", "read_rows"]

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
    """What is proven of one unit: its objects, the ETags of the source chunks it was read from, counts by status."""

    unit: int
    chunks: tuple[ChunkProof, ...]
    source: Mapping[str, str | None]
    ok: int
    failed: int
    not_finite: int

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

    async def pin(self, identity: RunIdentity) -> None:
        """Make this output that of `identity`, or find that it is already.

        Raises MismatchError when it belongs to another run, or holds something that is no output of ours.
        """
        await check_place(self._store, identity)
        if not await self._store.create(SPEC_KEY, identity.to_json()):
            await check_place(self._store, identity)

    async def add(self, row: Row) -> None:
        """Note that a unit's chunks are stored; written at once with others, or after a while."""
        self._rows.append(row)
        if len(self._rows) >= FLUSH_ROWS or self._clock() - self._flushed_at >= FLUSH_SECONDS:
            await self.flush()

    async def flush(self) -> None:
        """Write all rows that are not written yet."""
        async with self._lock:
            rows, self._rows = self._rows, []
            self._flushed_at = self._clock()
            if not rows:
                return
            key = f"{LEDGER_PREFIX}{self._writer}/{self._seq:06d}.json"
            self._seq += 1
            body = canonical_json({"rows": [row.to_value() for row in rows]})
            # Only this writer writes under its name, so an object that exists already is this very write,
            # repeated by the storage library after a lost answer.
            await self._store.create(key, body)


async def check_place(store: Store, identity: RunIdentity) -> None:
    """Raises MismatchError unless the output is empty or belongs to `identity`. Writes nothing."""
    spec = await store.get(SPEC_KEY)
    if spec is not None:
        identity.require_same(bytes(spec.data), store.url)
        return
    async for meta in store.list(""):
        raise MismatchError(f"{store.url} is not empty ({meta.key}) and is no output of batch-client: "
                            "choose another OUTPUT")


async def read_rows(store: Store) -> dict[int, Row]:
    """All proven units, of all writers. A unit with several rows (two clients, or a lost answer) has one meaning:
    their objects are equal.

    Raises StorageError for a segment that can't be read, MismatchError for rows that contradict each other.
    """
    keys = [meta.key async for meta in store.list(LEDGER_PREFIX) if meta.size <= LARGEST_SEGMENT]
    rows: dict[int, Row] = {}
    for start in range(0, len(keys), READS_AT_ONCE):
        for row in await _read_segments(store, keys[start:start + READS_AT_ONCE]):
            known = rows.setdefault(row.unit, row)
            if known.chunks != row.chunks:
                raise MismatchError(f"{store.url}: two writers proved different bytes for output chunk {row.unit}: "
                                    "the output can't be trusted; score it again at another place")
    return rows


async def _read_segments(store: Store, keys: Iterable[str]) -> list[Row]:
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
