"""Our `Store` as a zarr store: zarr reads through it, and what it read (keys, ETags, absences) is written down; and
the buffer that keeps what zarr decodes.

Reading only: chunks and metadata of an output are written by `writer.py` and `publish.py`, create-only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from zarr.abc.store import (
    ByteRequest,
    OffsetByteRequest,
    RangeByteRequest,
    SuffixByteRequest,
)
from zarr.abc.store import (
    Store as ZarrStore,
)
from zarr.core.buffer import Buffer, BufferPrototype, NDArrayLike, cpu

from batch_client.errors import MismatchError, StorageError
from batch_client.pieces import Pieces
from batch_client.storage import Blob, Store, child_url

__all__ = ["PieceBuffer", "ReadRecord", "ShardIndex", "SourceStore", "recording"]

# Where a Blosc chunk says how many bytes it has (README_CHUNK_FORMAT.rst of c-blosc, "Header"). Its decoder does not
# compare that with what it is given: of a chunk that was cut off it reads on in whatever memory is behind.
BLOSC_SIZE = slice(12, 16)
ABSENT = 2**64 - 1  # of a shard's index: Zarr v3 sharding codec 1.0, "Binary shard format"

METADATA = ("zarr.json", ".zarray")  # an array's own, in Zarr v3 and v2

# A piece costs its request a write, some microseconds (perf of a run); copying so many bytes costs more.
LEAST_KEPT_BYTES = 64 << 10


@dataclass
class ReadRecord:
    """What one read touched: ETag by key (None where the store gives none), keys that were absent, bytes moved;
    metadata: the documents among it that say how an array is decoded, by key.
    """

    etags: dict[str, str | None] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    metadata: dict[str, bytes] = field(default_factory=dict)
    nbytes: int = 0


# zarr fetches the chunks of one selection in tasks of its own; a context variable follows it there.
_RECORD: ContextVar[ReadRecord | None] = ContextVar("record", default=None)


@contextmanager
def recording() -> Iterator[ReadRecord]:
    """Collect what zarr reads through any SourceStore inside this block, its own tasks included."""
    record = ReadRecord()
    token = _RECORD.set(record)
    try:
        yield record
    finally:
        _RECORD.reset(token)


class PieceBuffer(cpu.NDBuffer):
    """What records are read into: decoded chunks are kept as they are, where zarr's own buffer copies them, on the
    event loop. Copied are parts of records, small pieces and fill values. Only `pieces` has all of it.
    """

    def __init__(self, array: NDArrayLike) -> None:
        super().__init__(array)
        self._kept: dict[int, np.ndarray] = {}

    def __setitem__(self, key: Any, value: Any) -> None:
        piece = value.as_numpy_array() if isinstance(value, cpu.NDBuffer) else None
        if piece is not None and self._keeps(piece):
            self._kept[key[0].indices(self.shape[0])[0]] = piece
        else:
            super().__setitem__(key, value)

    def __getitem__(self, key: Any) -> cpu.NDBuffer:  # type: ignore[override] # zarr takes any class of buffer back
        """A part of what was copied. What is set in that part is copied too: this buffer would not know of it."""
        return cpu.NDBuffer(np.asanyarray(self.as_numpy_array()[key]))

    def _keeps(self, piece: np.ndarray) -> bool:
        whole_records = (piece.shape[1:], piece.dtype) == (self.shape[1:], self.dtype)
        return whole_records and piece.nbytes >= LEAST_KEPT_BYTES and piece.flags.aligned

    def pieces(self) -> Pieces:
        """All that was set, in order. No piece keeps much more in memory than itself; it may be read-only."""
        copied, found, at = self.as_numpy_array(), [], 0
        for start, piece in sorted(self._kept.items()):
            found += [copied[at:start], piece]
            at = start + len(piece)
        return Pieces([*found, copied[at:]]).compact()


@dataclass(frozen=True)
class ShardIndex:
    """Where a shard has so many chunks: at its beginning if `leading`, or at its end, the offset and the length of
    each in this byte order (numpy's), and so many bytes of `checksum`.
    """

    chunks: int
    order: str
    checksum: int
    leading: bool

    def least_bytes(self, shard: memoryview) -> int:
        """How many bytes a shard has at least by its index. Raises ValueError for one with an empty chunk, which no
        codec writes and Blosc's decoder dies of.
        """
        size = 16 * self.chunks + self.checksum
        if shard.nbytes < size:
            return size
        start = 0 if self.leading else shard.nbytes - size
        places = np.frombuffer(shard, f"{self.order}u8", 2 * self.chunks, start).reshape(-1, 2)
        places = places[(places != ABSENT).any(axis=1)]
        if not places[:, 1].all():
            raise ValueError("the shard's index has a chunk of 0 bytes")
        # As floats, since a damaged index may have sums that no 64 bits hold.
        return int(places.sum(axis=1, dtype=float).max(initial=0)) + (0 if self.leading else size)


class SourceStore(ZarrStore):
    """A read-only zarr store over a `Store`.

    blosc: whether Blosc is the outermost codec of the objects that are read from now on; index: the one that such an
    object has where it is a shard. They say how many bytes an object has, which not all decoders check.
    """

    def __init__(self, store: Store) -> None:
        super().__init__(read_only=True)
        self.store = store
        self.blosc = False
        self.index: ShardIndex | None = None

    def __eq__(self, value: object) -> bool:
        return isinstance(value, SourceStore) and value.store is self.store

    def __hash__(self) -> int:
        return id(self.store)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        blob = await self._fetch(key, *_bounds(byte_range))
        record = _RECORD.get()
        if blob is None:
            if record is not None:
                record.missing.append(key)
            return None
        if record is not None:
            if record.etags.setdefault(key, blob.etag) != blob.etag:
                raise MismatchError(f"{child_url(self.store.url, key)}: changed while it was being read: score a "
                                    "source that stays as it is")
            record.nbytes += blob.data.nbytes
            if key.endswith(METADATA):
                record.metadata[key] = bytes(blob.data)
        if not blob.data.nbytes:
            raise ValueError(f"{key} has 0 bytes")  # which no codec writes, and Blosc's decoder dies of
        if isinstance(byte_range, RangeByteRequest):
            _require_whole(key, blob.data.nbytes, byte_range.end - byte_range.start)
        elif self.index is not None:
            await self._require_indexed(key, blob.data, self.index, whole=byte_range is None)
        elif self.blosc and byte_range is None:
            _require_whole(key, blob.data.nbytes, max(BLOSC_SIZE.stop, int.from_bytes(blob.data[BLOSC_SIZE], "little")))
        return prototype.buffer.from_array_like(np.frombuffer(blob.data, np.uint8))

    async def _fetch(self, key: str, start: int | None, stop: int | None) -> Blob | None:
        if stop is not None and stop <= (start or 0):
            raise ValueError(f"{key} has a chunk of 0 bytes")
        try:
            return await self.store.get(key, start, stop)
        except StorageError:
            # Each store has its own words for a range that an object does not have, which is no failure of the store.
            least = max(abs(start or 0), stop or 0)
            meta = await self.store.head(key) if least else None
            if meta is not None and meta.size < least:
                raise ValueError(f"{key} has {meta.size} bytes, wanted at least {least}") from None
            raise

    async def _require_indexed(self, key: str, data: memoryview, index: ShardIndex, *, whole: bool) -> None:
        """That a shard, or what was read of its end, has the chunks that its index tells of."""
        size = data.nbytes
        if not whole:
            # Where a shard was cut off, what is its end then may look like an index.
            meta = None if index.checksum else await self.store.head(key)
            if meta is None:
                return
            size = meta.size
        if size < index.least_bytes(data):
            raise ValueError(f"{key} has {size} bytes, and its index tells of more: cut off, or the index is damaged")

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def exists(self, key: str) -> bool:
        return await self.store.head(key) is not None

    @property
    def supports_writes(self) -> bool:
        return False

    @property
    def supports_deletes(self) -> bool:
        return False

    @property
    def supports_listing(self) -> bool:
        return True

    async def set(self, key: str, value: Buffer) -> None:  # noqa: ARG002 - zarr's signature
        raise PermissionError(f"{key}: this store is read-only")

    async def delete(self, key: str) -> None:
        raise PermissionError(f"{key}: this store is read-only")

    def list(self) -> AsyncIterator[str]:
        return self.list_prefix("")

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        async for meta in self.store.list(prefix):
            yield meta.key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        base = f"{prefix.rstrip('/')}/" if prefix else ""
        seen: set[str] = set()
        async for meta in self.store.list(base):
            name = meta.key[len(base):].partition("/")[0]
            if name not in seen:
                seen.add(name)
                yield name


def _require_whole(key: str, found: int, wanted: int) -> None:
    if found != wanted:
        raise ValueError(f"{key} has {found} bytes, wanted {wanted}")


def _bounds(request: ByteRequest | None) -> tuple[int | None, int | None]:
    match request:
        case None:
            return None, None
        case RangeByteRequest(start=start, end=end):
            return start, end
        case OffsetByteRequest(offset=offset):
            return offset, None
        case SuffixByteRequest(suffix=suffix):
            return -suffix, None
    raise TypeError(f"unknown byte request {request!r}")
