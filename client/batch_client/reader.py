"""Record range → records, whole chunks or shards, with what was read written down.

A source is any Zarr v2 or v3 array: sharded or not, chunked along any axis. zarr decodes; its CPU-heavy codecs run in
threads. How many bytes may be held is the caller's business (`budget.py`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import lzma
import math
import struct
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from zarr.api import asynchronous as zarr_async
from zarr.core.array import AsyncArray
from zarr.core.group import AsyncGroup
from zarr.errors import ContainsGroupError, GroupNotFoundError, NodeTypeValidationError

from batch_client.errors import DataError, MismatchError, StorageError, in_one_line
from batch_client.pieces import Pieces
from batch_client.plan import Geometry
from batch_client.storage import Store, child_url
from batch_client.stringset import StringSet
from batch_client.zarrstore import PieceBuffer, ShardIndex, SourceStore, recording

__all__ = ["Block", "ETags", "Source", "open_source"]

# What zarr, numcodecs, numpy and the codecs of the standard library raise for metadata or chunks that can't be
# understood; gzip and bz2 say it by an OSError, zstd by a MemoryError or SystemError where a broken frame claims a size
# that can't be, and what a store says is mapped before (`buckets.py`).
UNREADABLE = (ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, EOFError, OSError, MemoryError,
              SystemError, zlib.error, lzma.LZMAError)

SHOWN = 20  # names of a group's arrays


@dataclass(frozen=True)
class Block:
    """Records of a source, (*record shape) each: arrays in C order and native bytes.

    etags: ETag of each chunk object that was read, by key: "" where the store gives none, None where the object is
    absent. nbytes: bytes moved from the store.
    """

    records: Pieces
    etags: Mapping[str, str | None]
    nbytes: int


class ETags:
    """The objects of a source and their ETags at one time, in sixteen bytes an object."""

    def __init__(self) -> None:
        self._keys, self._pairs = StringSet(), StringSet()

    def add(self, key: str, etag: str) -> None:
        self._keys.add(key)
        self._pairs.add(_pair(key, etag))

    def has(self, key: str, etag: str | None) -> bool:
        """Whether an object had this ETag; None is for an object that was absent."""
        return key not in self._keys if etag is None else _pair(key, etag) in self._pairs


def _pair(key: str, etag: str) -> str:
    # Azure's listings have an ETag without the quotes that it has in replies, and so in ledgers.
    return key + "\n" + etag.removeprefix("W/").strip('"')


class Source:
    """An open source array.

    `packing` is the scale factor and the offset that its attributes name, None where they change nothing; `missing` the
    number that they say stands for missing values, None where there is none.
    """

    def __init__(self, store: Store, path: str, array: AsyncArray[Any], metadata: Mapping[str, bytes]) -> None:
        """metadata: the documents that `array` was opened by, by key."""
        self._metadata_keys = sorted(metadata)
        self.url = child_url(store.url, path)
        self._store = store
        self._prefix = f"{path.strip('/')}/" if path else ""
        documents = [metadata[key] for key in self._metadata_keys]
        self.metadata_digest = _digest(documents)
        # How chunks are decoded, whatever number of records there is and whatever is noted of them.
        self.encoding_digest = _digest([_encoding(document) for document in documents])
        self._array = array
        grid = array.shards or array.chunks
        beside = (-(-size // piece) for size, piece in zip(array.shape[1:], grid[1:], strict=True) if size)
        self.packing = _packing(array.attrs)
        self.missing = _missing(array)
        self.geometry = Geometry(shape=array.shape, dtype=np.dtype(array.dtype), chunk_records=grid[0],
                                 chunk_objects=math.prod(beside))

    async def read(self, start: int, stop: int, *, allow_missing: bool = False) -> Block:
        """Records [start, stop).

        Raises DataError when a chunk object is absent (unless `allow_missing`, which takes the array's fill value) or
        can't be decoded, StorageError when the store fails or this machine can't read so much at once.
        """
        with recording() as record:
            try:
                out = await self._select(start, stop)
            except UNREADABLE as error:
                raise await self._undecodable(start, stop, error) from error
        if record.missing and not allow_missing:
            raise DataError(
                f"{self.url}: chunk {record.missing[0]} (among records {start} to {stop - 1}) is missing from the "
                "store: restore it or choose other records; if it means the fill value, as where writers leave out "
                "chunks of nothing else, run takes it so with --allow-missing")
        etags = {key: etag or "" for key, etag in record.etags.items()} | dict.fromkeys(record.missing)
        return Block(out.pieces().each(_native), etags, record.nbytes)

    async def _select(self, start: int, stop: int) -> PieceBuffer:
        out = PieceBuffer.empty((stop - start, *self.geometry.record_shape), self.geometry.dtype, self._array.order)
        await self._array.get_orthogonal_selection((slice(start, stop),), out=out)
        return out

    async def _undecodable(self, start: int, stop: int, error: Exception) -> DataError | StorageError:
        """What can't be decoded of records [start, stop), whose error this is: the input chunks are read one by one.
        Where each of them can be, they are sound.
        """
        size = self.geometry.chunk_records
        for first in range(start - start % size, stop, size):
            low, high = max(first, start), min(first + size, stop)
            with recording() as record:
                try:
                    await self._select(low, high)
                except UNREADABLE as again:
                    # Where a record is in several, it is not known which.
                    which = f"chunk {next(iter(record.etags))}" if len(record.etags) == 1 else "the chunk"
                    return DataError(f"{self.url}: records {low} to {high - 1} can't be decoded "
                                     f"({in_one_line(again)}): restore {which} or leave it out with --records")
        return StorageError(f"{self.url}: records {start} to {stop - 1} could not be read together "
                            f"({in_one_line(error)}), and each of their chunks can: this machine is short of memory or "
                            "threads: run the same command again, where there are more")

    async def etags(self) -> ETags:
        """The ETags of all objects of the array now; "" where the store gives none."""
        found = ETags()
        async for meta in self._store.list(self._prefix):
            found.add(meta.key, meta.etag or "")
        return found

    async def require_unchanged(self, pinned: AsyncIterator[Mapping[str, str | None]]) -> None:
        """Raises MismatchError when the metadata or a chunk object is not what was scored.

        pinned: ETags by key, as `read` gave them.
        """
        if _digest(await _documents(self._store, self._metadata_keys)) != self.metadata_digest:
            raise MismatchError(f"{self.url}: its Zarr metadata changed while it was being scored: "
                                "score a source that stays as it is, into a new OUTPUT")
        now = await self.etags()
        async for etags in pinned:
            for key, etag in etags.items():
                if not now.has(key, etag):
                    raise MismatchError(f"{self.url}: chunk {key} changed since it was scored: "
                                        "score a source that stays as it is, into a new OUTPUT")


async def open_source(store: Store, array: str | None) -> Source:
    """Open the array at a store's root, or the one named `array` in the group there.

    Raises DataError when there is none, or it can't be scored (no record axis, a dtype that is no plain number).
    """
    where = child_url(store.url, array or "")
    zarr_store = SourceStore(store)
    with recording() as record:
        try:
            node = await zarr_async.open_array(store=zarr_store, path=array or "", mode="r")
            return _scorable(zarr_store, array or "", node, record.metadata)
        except (FileNotFoundError, GroupNotFoundError, ContainsGroupError, NodeTypeValidationError) as error:
            raise DataError(await _nothing_there(zarr_store, where, array)) from error
        except (*UNREADABLE, AttributeError) as error:  # the latter for documents and attributes that are no object
            raise DataError(f"{where}: its Zarr metadata can't be read ({in_one_line(error)})") from error


def _scorable(zarr_store: SourceStore, path: str, node: AsyncArray[Any], metadata: Mapping[str, bytes]) -> Source:
    where = child_url(zarr_store.store.url, path)
    if not node.shape:
        raise DataError(f"{where}: a single value; wanted an array with records along axis 0")
    if not all(piece for size, piece in zip(node.shape, node.shards or node.chunks, strict=True) if size):
        raise DataError(f"{where}: has chunks of length 0 in its Zarr metadata; wanted at least 1")
    dtype = np.dtype(node.dtype)
    if dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise DataError(f"{where}: dtype {dtype} can't be scored; wanted bool, integers or floats up to 64 bits")
    outermost = _outermost(node)
    zarr_store.blosc = outermost["name"] in ("blosc", "numcodecs.blosc")
    if outermost["name"] == "sharding_indexed":
        zarr_store.index = _shard_index(where, node.shards or node.chunks, outermost["configuration"])
    return Source(zarr_store.store, path, node, metadata)


_ORDERS = {"little": "<", "big": ">"}


def _shard_index(where: str, shard: Sequence[int], sharding: Mapping[str, Any]) -> ShardIndex:
    """The index of shards of this shape, by their codec's configuration."""
    first, *checksum = sharding["index_codecs"]
    order = _ORDERS.get(first.get("configuration", {}).get("endian", ""))
    names = [codec["name"] for codec in (first, *checksum)]
    if order is None or names not in (["bytes"], ["bytes", "crc32c"]):
        raise DataError(f"{where}: the index of its shards has the codecs {', '.join(names)}, so that nothing would "
                        "tell of a shard that was cut off; wanted bytes, of a byte order, and crc32c")
    return ShardIndex(chunks=math.prod(shard) // math.prod(sharding["chunk_shape"]), order=order,
                      checksum=4 * len(checksum), leading=sharding["index_location"] == "start")


def _outermost(node: AsyncArray[Any]) -> dict[str, Any]:
    """The codec that chunk objects are written by in the end, as Zarr v3's metadata has it; "" where v2 has none."""
    described = node.metadata.to_dict()
    if "codecs" in described:
        return dict(described["codecs"][-1])
    codecs = [codec for codec in (*(described["filters"] or ()), described["compressor"]) if codec]
    return {"name": codecs[-1]["id"] if codecs else ""}


# Of Zarr's two formats: https://zarr-specs.readthedocs.io, core v3.0 "Array metadata", and v2 "Metadata".
_ENCODING = ("zarr_format", "data_type", "dtype", "chunk_grid", "chunks", "chunk_key_encoding", "dimension_separator",
             "codecs", "compressor", "filters", "order", "fill_value", "storage_transformers")


async def _documents(store: Store, keys: list[str]) -> list[bytes]:
    documents = []
    for key in keys:
        blob = await store.get(key)
        if blob is None:
            raise StorageError(f"{child_url(store.url, key)}: vanished while it was being read")
        documents.append(bytes(blob.data))
    return documents


def _encoding(document: bytes) -> bytes:
    """What of a metadata document, which zarr has read, says how chunks are found and decoded."""
    described = json.loads(document)
    kept = {name: described[name] for name in _ENCODING if name in described}
    return json.dumps(kept | {"shape": described.get("shape", [])[1:]}, sort_keys=True).encode()


def _digest(documents: list[bytes]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document)
    return "sha256:" + digest.hexdigest()


async def _nothing_there(store: SourceStore, where: str, array: str | None) -> str:
    try:
        group: AsyncGroup = await zarr_async.open_group(store=store, mode="r")
        names = sorted([name async for name, node in group.members(max_depth=None) if isinstance(node, AsyncArray)])
    except (*UNREADABLE, AttributeError):
        names = None
    if names == []:
        return f"{where}: this is a group without arrays: name the place of an array"
    if names:
        found = f"the group has {', '.join(names[:SHOWN])}"
        return f"{where}: no such array; {found}: name one with --array" if array else (
            f"{where}: this is a group; {found}: name one with --array, or as {child_url(where, names[0])}")
    return f"{where}: no Zarr array there (no zarr.json and no .zarray): name the place of an array or of a group"


_LARGEST = float(np.finfo(np.float64).max)


def _packing(attributes: Mapping[str, Any]) -> tuple[float, float] | None:
    factor, offset = _number(attributes.get("scale_factor", 1)), _number(attributes.get("add_offset", 0))
    return None if factor is None or offset is None or (factor, offset) == (1, 0) else (factor, offset)


def _missing(array: AsyncArray[Any]) -> float | None:
    """The number that stands for missing values (https://cfconventions.org, "Missing data"), as xarray writes it."""
    attributes = array.attrs
    said = [attributes.get("missing_value"), attributes.get("_FillValue")]
    if array.metadata.zarr_format == 2 and "_ARRAY_DIMENSIONS" in attributes:
        # Of others' arrays it means chunks that are not there.
        said.append(np.asarray(array.metadata.fill_value).item())
    return next((number for number in map(_number, said) if number is not None), None)


def _number(value: Any) -> float | None:
    """What an attribute gives, as xarray takes it; None for what is no finite number."""
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, str):  # a _FillValue of floats in Zarr 3: a double, in base 64
        try:
            (value,) = struct.unpack("<d", base64.b64decode(value))
        except (ValueError, struct.error):
            return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and -_LARGEST <= value <= _LARGEST else None


def _native(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("="))
