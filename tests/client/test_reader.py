"""What a source gives is what zarr gives, in every layout; and decoded chunks are not copied."""

import re
from dataclasses import replace

import numcodecs
import numpy as np
import pytest
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec, TransposeCodec
from zarr.core.buffer.cpu import NDBuffer

from batch_client import zarrstore
from batch_client.buckets import open_store
from batch_client.errors import DataError, MismatchError
from batch_client.reader import open_source
from batch_client.storage import Blob, MemoryStore
from batch_client.zarrstore import LEAST_KEPT_BYTES, PieceBuffer
from support.runs import records_of, source_of

COUNT, CHUNK = 105, 10  # the last chunk is half full
WRITTEN = 85  # the last two chunks are missing
TRANSPOSED = TransposeCodec(order=(1, 0))
LAYOUTS = {
    "compressed": {},
    "plain": {"compressors": None},
    "big-endian": {"dtype": ">f4", "compressors": None},
    "shards": {"shards": (40, 6)},
    "a shard a chunk": {"shards": (10, 6)},
    "transposed": {"filters": [TRANSPOSED]},
    "transposed in shards": {"filters": [TRANSPOSED], "shards": (40, 6)},
    "shards, a big-endian index first": {
        "filters": [], "compressors": None, "chunks": (40, 6),
        "serializer": ShardingCodec(chunk_shape=(10, 6), codecs=(BytesCodec(),), index_location="start",
                                    index_codecs=(BytesCodec(endian="big"), Crc32cCodec()))},
    "two chunks a record": {"chunks": (CHUNK, 3)},
    "fill value": {"fill_value": 3.5},
    "Zarr 2": {"zarr_format": 2},
    "Zarr 2, Fortran order": {"zarr_format": 2, "order": "F", "compressors": None},
    "Zarr 2, big-endian": {"zarr_format": 2, "dtype": ">f4", "compressors": None},
}
RANGES = [(0, 10), (10, 20), (20, 60), (40, 80), (80, 90), (100, 105), (3, 7), (5, 25), (0, 105), (15, 105)]


@pytest.mark.parametrize("least", [1, LEAST_KEPT_BYTES], ids=["kept", "copied"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
async def test_records_are_what_zarr_gives_in_every_layout(layout, least, tmp_path, monkeypatch):
    monkeypatch.setattr(zarrstore, "LEAST_KEPT_BYTES", least)
    options = {"shape": (COUNT, 6), "chunks": (CHUNK, 6), "dtype": "float32", **layout}
    array = zarr.create_array(tmp_path / "in.zarr", **options)
    array[:WRITTEN] = records_of(WRITTEN, (6,), np.float32)
    source = await open_source(open_store(str(tmp_path / "in.zarr")), None)
    for start, stop in RANGES:
        rows = await source.read(start, stop, allow_missing=True)
        np.testing.assert_array_equal(rows.records.joined(), array[start:stop])
        for piece in rows.records.arrays:
            assert piece.dtype == np.dtype(np.float32)
            assert piece.flags.c_contiguous
            assert piece.flags.aligned


@pytest.mark.parametrize(("attributes", "packing"), [
    ({}, None), ({"scale_factor": 1.0, "add_offset": 0.0}, None), ({"units": "K", "_FillValue": -1}, None),
    ({"scale_factor": 0.5}, (0.5, 0.0)), ({"add_offset": 100}, (1.0, 100.0)),
    ({"scale_factor": [0.5]}, (0.5, 0.0)), ({"scale_factor": 10**400}, None), ({"scale_factor": "half"}, None),
])
async def test_numbers_that_stand_for_others_are_known(tmp_path, attributes, packing):
    zarr.create_array(tmp_path / "in.zarr", data=np.zeros((4, 2), np.int16), attributes=attributes)
    assert (await open_source(open_store(str(tmp_path / "in.zarr")), None)).packing == packing


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("dtype", "encoding", "missing"), [
    ("float32", {"_FillValue": -999.0}, -999.0), ("float32", {}, None), ("float32", {"_FillValue": None}, None),
    ("float64", {"dtype": "int16", "_FillValue": -32768, "scale_factor": 0.5}, -32768.0), ("uint8", {}, None),
])
async def test_the_number_that_xarray_writes_for_missing_values_is_known(
        tmp_path, zarr_format, dtype, encoding, missing):
    data = xarray.Dataset({"x": (("record", "place"), np.ones((4, 2), dtype))})
    data.to_zarr(tmp_path / "in.zarr", encoding={"x": encoding}, zarr_format=zarr_format, consolidated=False)
    assert (await open_source(open_store(str(tmp_path / "in.zarr")), "x")).missing == missing


@pytest.mark.parametrize(("attributes", "missing"), [
    ({"missing_value": -1}, -1.0), ({"_FillValue": 255}, 255.0), ({}, None), ({"_FillValue": 10**400}, None),
    ({"_FillValue": -9, "missing_value": None}, -9.0), ({"_FillValue": [-9]}, -9.0), ({"_FillValue": "none"}, None),
    ({"_FillValue": True}, None), ({"missing_value": [1, 2]}, None),
])
@pytest.mark.parametrize("zarr_format", [2, 3])
async def test_a_fill_value_that_only_absent_chunks_have_marks_nothing(tmp_path, zarr_format, attributes, missing):
    zarr.create_array(tmp_path / "in.zarr", data=np.zeros((4, 2), np.int16), attributes=attributes, fill_value=7,
                      zarr_format=zarr_format)
    assert (await open_source(open_store(str(tmp_path / "in.zarr")), None)).missing == missing


def in_shards(**options):
    codec = ShardingCodec(**{"chunk_shape": (50, 28), "codecs": (BytesCodec(), BloscCodec()),
                             "index_location": "start", **options})
    return {"compressors": None, "filters": [], "chunks": (100, 28), "serializer": codec}


BLOSC = {
    "Zarr 2": {"zarr_format": 2, "compressors": numcodecs.Blosc()},
    "Zarr 2, as a filter": {"zarr_format": 2, "compressors": None, "filters": [numcodecs.Blosc()]},
    "Zarr 3": {"compressors": BloscCodec()},
    "shards": {"compressors": BloscCodec(), "shards": (100, 28)},
    "shards, index first": in_shards(),
    "shards, a big-endian index first": in_shards(index_codecs=(BytesCodec(endian="big"), Crc32cCodec())),
    "shards, transposed, index first": {**in_shards(chunk_shape=(4, 4)), "filters": [TRANSPOSED]},
}


@pytest.mark.filterwarnings("ignore:Combining a `sharding_indexed` codec")  # zarr's: it is slow
@pytest.mark.parametrize("layout", BLOSC.values(), ids=BLOSC)
async def test_no_part_of_a_blosc_chunk_is_taken_for_all_of_it(layout, tmp_path):
    """Images often do not get smaller; Blosc keeps those as they are, and reads past the end of what was cut off."""
    images = np.random.default_rng(0).integers(0, 256, (300, 28), np.uint8)
    array = zarr.create_array(tmp_path / "in.zarr", **{"chunks": (50, 28), "shape": (300, 28), "dtype": "u1", **layout})
    array[:] = images
    source = await open_source(open_store(str(tmp_path / "in.zarr")), None)
    np.testing.assert_array_equal((await source.read(0, 300)).records.joined(), images)
    chunk = next(path for path in (tmp_path / "in.zarr").rglob("*0") if path.is_file())
    whole = chunk.read_bytes()
    for kept in (len(whole) - 1, len(whole) - 100, len(whole) // 2, 17, 15, 12, 8, 1):
        chunk.write_bytes(whole[:kept])
        for step in (50, 300):  # parts of shards, and whole ones
            with pytest.raises(DataError, match="can't be decoded") as caught:
                await read_in_steps(source, step)
            # A size out of an index that was cut off itself is nobody's.
            assert all(int(number) < 10_000 for number in re.findall(r"\d+", str(caught.value).partition("decoded")[2]))


def images_in(folder, layout):
    images = np.random.default_rng(0).integers(0, 256, (300, 28), np.uint8)
    zarr.create_array(folder, **{"chunks": (50, 28), "shape": (300, 28), "dtype": "u1", **layout})[:] = images
    return next(path for path in folder.rglob("*0") if path.is_file())


@pytest.mark.parametrize("layout", ["Zarr 2", "Zarr 2, as a filter", "Zarr 3"])
async def test_a_blosc_chunk_has_as_many_bytes_as_it_says(layout, tmp_path):
    chunk = images_in(tmp_path / "in.zarr", BLOSC[layout])
    source = await open_source(open_store(str(tmp_path / "in.zarr")), None)
    whole = chunk.read_bytes()
    chunk.write_bytes(whole + b"x")
    with pytest.raises(DataError, match=f"has {len(whole) + 1} bytes, wanted {len(whole)}"):
        await source.read(0, 300)


NOTHING = bytes(2 * 16)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in zarr
@pytest.mark.parametrize("damaged", [
    lambda shard: shard[:-16],  # with what is left of the index, a chunk is another's
    lambda shard: shard[:-32] + NOTHING,
    lambda shard: shard[:-16] + (2**64 - 1).to_bytes(8, "little") + shard[-8:],
], ids=["cut", "zeros", "half absent"])
async def test_an_index_without_a_checksum_leads_to_no_other_bytes(damaged, tmp_path):
    shard = images_in(tmp_path / "in.zarr", in_shards(index_codecs=(BytesCodec(),), index_location="end"))
    source = await open_source(open_store(str(tmp_path / "in.zarr")), None)
    assert (await source.read(0, 300)).records.joined().any()
    shard.write_bytes(damaged(shard.read_bytes()))
    low = 100 * int(shard.parent.name)
    for start in (low + 50, low):  # a part of the shard, and all of it
        with pytest.raises(DataError, match="can't be decoded"):
            await source.read(start, low + 100)


async def test_shards_whose_index_can_not_be_checked_are_refused(tmp_path):
    images_in(tmp_path / "in.zarr", in_shards(index_codecs=(TransposeCodec(order=(2, 1, 0)), BytesCodec())))
    with pytest.raises(DataError, match="the index of its shards has the codecs transpose, bytes, so that nothing"):
        await open_source(open_store(str(tmp_path / "in.zarr")), None)


async def read_in_steps(source, step):
    for start in range(0, source.geometry.count, step):
        await source.read(start, start + step)


async def stored_memory(store: MemoryStore, key: str) -> np.ndarray:
    blob = await store.get(key)
    return np.frombuffer(blob.data, np.uint8)


@pytest.mark.parametrize(("start", "stop", "kept"), [
    (10, 20, [1]), (11, 20, [1]), (12, 20, []),  # nine tenths keep all of it, eight do not
    (14, 36, [2]), (0, 105, [*range(10)]),  # the last chunk is stored whole, and half of it is no record
])
async def test_chunks_of_which_nearly_all_is_wanted_are_not_copied(start, stop, kept, monkeypatch):
    monkeypatch.setattr(zarrstore, "LEAST_KEPT_BYTES", 15)  # half a chunk
    store = source_of(records_of(COUNT), (CHUNK, 3), compressors=None)
    records = (await (await open_source(store, None)).read(start, stop)).records
    shared = [chunk for chunk in range(11) for piece in records.arrays
              if np.shares_memory(piece, await stored_memory(store, f"c/{chunk}/0"))]
    assert shared == kept
    np.testing.assert_array_equal(records.joined(), records_of(COUNT)[start:stop])


class Rewritten(MemoryStore):
    """Somebody writes other metadata as soon as it was read."""

    async def get(self, key, start=None, stop=None):
        blob = await super().get(key, start, stop)
        if key.endswith("zarr.json"):
            self.objects[key] = self.objects[key].replace(b'"uint8"', b'"int8"')
        return blob


class AzuresStore(MemoryStore):
    """Azure's List Blobs has ETags without the quotes of Get Blob."""

    async def list(self, prefix):
        async for meta in super().list(prefix):
            yield replace(meta, etag=meta.etag.strip('"'))


async def test_an_etag_is_the_same_with_quotes_and_without():
    store = AzuresStore()
    store.objects = source_of(records_of(COUNT), (CHUNK, 3)).objects
    source = await open_source(store, None)
    etags = (await source.read(0, COUNT)).etags

    async def pinned():
        yield etags

    await source.require_unchanged(pinned())
    store.objects["c/0/0"] += b"changed"
    with pytest.raises(MismatchError, match="chunk c/0/0 changed since it was scored"):
        await source.require_unchanged(pinned())


async def nothing_read():
    for etags in ():
        yield etags


async def test_the_metadata_that_is_pinned_is_what_chunks_are_decoded_by():
    store = source_of(records_of(COUNT), (CHUNK, 3))
    was = (await open_source(store, None)).metadata_digest
    rewritten = Rewritten()
    rewritten.objects = store.objects
    source = await open_source(rewritten, None)
    assert source.geometry.dtype == np.uint8
    assert source.metadata_digest == was
    with pytest.raises(MismatchError, match="its Zarr metadata changed while it was being scored"):
        await source.require_unchanged(nothing_read())


async def test_small_chunks_are_copied_into_one_array():
    store = source_of(records_of(COUNT), (CHUNK, 3), compressors=None)
    assert len((await (await open_source(store, None)).read(0, 105)).records.arrays) == 1


@given(st.lists(st.tuples(st.integers(1, 9), st.sampled_from(["chunk", "fill", "part of a chunk", "two halves"]))))
def test_a_piece_buffer_has_what_was_set_whatever_was_set(runs):
    count = sum(size for size, _ in runs)
    wanted = np.arange(count * 4, dtype=np.int32).reshape(count, 4)
    buffer = PieceBuffer.empty((count, 4), np.dtype(np.int32))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarrstore, "LEAST_KEPT_BYTES", 3 * 16)
        at = 0
        for size, kind in runs:
            rows, at = slice(at, at + size), at + size
            match kind:
                case "chunk":
                    buffer[rows, slice(0, 4)] = NDBuffer(wanted[rows].copy())
                case "fill":
                    wanted[rows] = 7
                    buffer[rows, slice(0, 4)] = 7
                case "part of a chunk":
                    chunk = np.concatenate([wanted[rows], wanted[rows]])
                    buffer[rows, slice(0, 4)] = NDBuffer(chunk)[slice(0, size)]
                case "two halves":
                    buffer[rows, slice(0, 2)] = NDBuffer(wanted[rows, :2].copy())
                    buffer[rows, slice(2, 4)] = NDBuffer(wanted[rows, 2:].copy())
    np.testing.assert_array_equal(buffer.pieces().joined(), wanted)


def test_what_is_set_in_a_part_of_a_piece_buffer_is_not_lost(monkeypatch):
    monkeypatch.setattr(zarrstore, "LEAST_KEPT_BYTES", 1)
    buffer, wanted = PieceBuffer.empty((4, 4), np.dtype(np.int32)), np.arange(16, dtype=np.int32).reshape(4, 4)
    buffer[slice(0, 2)][slice(0, 2), slice(0, 4)] = NDBuffer(wanted[:2])
    buffer[slice(2, 4), slice(0, 4)] = NDBuffer(wanted[2:])
    np.testing.assert_array_equal(buffer.pieces().joined(), wanted)


@pytest.mark.parametrize(("shape", "chunks", "dtype"), [
    ((COUNT,), (CHUNK,), np.int64), ((COUNT, 2, 3, 4), (CHUNK, 2, 3, 4), np.uint8), ((COUNT, 5), (CHUNK, 5), np.bool_),
    ((COUNT, 4), (CHUNK, 7), np.float64), ((COUNT, 0), (CHUNK, 1), np.uint8), ((7, 3), (CHUNK, 3), np.uint8),
])
async def test_records_of_any_shape_are_read(shape, chunks, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(zarrstore, "LEAST_KEPT_BYTES", 1)
    wanted = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    array = zarr.create_array(tmp_path / "in.zarr", shape=shape, chunks=chunks, dtype=dtype)
    array[...] = wanted
    source = await open_source(open_store(str(tmp_path / "in.zarr")), None)
    for start, stop in ((0, len(wanted)), (0, 5), (3, 7)):
        np.testing.assert_array_equal((await source.read(start, stop)).records.joined(), wanted[start:stop])


class _OddStore(MemoryStore):
    """Gives bytes that begin at an odd address, as the body of a small reply may."""

    async def get(self, key, start=None, stop=None):
        blob = await super().get(key, start, stop)
        if blob is None:
            return None
        moved = np.empty(blob.data.nbytes + 1, np.uint8)
        moved = moved[1 - moved.ctypes.data % 2:][:blob.data.nbytes]
        moved[:] = np.frombuffer(blob.data, np.uint8)
        return Blob(moved.data, blob.etag)


async def test_a_chunk_at_an_odd_address_is_copied_to_a_better_one(monkeypatch):
    monkeypatch.setattr(zarrstore, "LEAST_KEPT_BYTES", 1)
    records = records_of(COUNT, (6,), np.float32)
    store = _OddStore("memory://odd")
    store.objects = source_of(records, (CHUNK, 6), compressors=None).objects
    rows = await (await open_source(store, None)).read(10, 20)
    np.testing.assert_array_equal(rows.records.joined(), records[10:20])
    assert rows.records.joined().flags.aligned
    assert (await stored_memory(store, "c/1/0")).ctypes.data % 2 == 1  # it was at one
