"""What a source gives is what zarr gives, in every layout; and decoded chunks are not copied."""

import numpy as np
import pytest
import zarr
from zarr.codecs import TransposeCodec

from batch_client import zarrstore
from batch_client.reader import open_source
from batch_client.storage import Blob, MemoryStore, open_store
from batch_client.zarrstore import LEAST_KEPT_BYTES
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


async def stored_memory(store: MemoryStore, key: str) -> np.ndarray:
    blob = await store.get(key)
    return np.frombuffer(blob.data, np.uint8)


@pytest.mark.parametrize(("start", "stop", "kept"), [
    (10, 20, [1]), (10, 15, [1]), (100, 105, [10]),  # half a chunk keeps all of it, which is no more than twice as much
    (10, 14, []), (14, 36, [1, 2, 3]), (14, 34, [1, 2]), (17, 33, [2]), (0, 105, [*range(11)]),
])
async def test_large_chunks_are_not_copied_unless_little_of_them_is_wanted(start, stop, kept, monkeypatch):
    monkeypatch.setattr(zarrstore, "LEAST_KEPT_BYTES", 15)  # half a chunk
    store = await source_of(records_of(COUNT), (CHUNK, 3), compressors=None)
    records = (await (await open_source(store, None)).read(start, stop)).records
    shared = [chunk for chunk in range(11) for piece in records.arrays
              if np.shares_memory(piece, await stored_memory(store, f"c/{chunk}/0"))]
    assert shared == kept
    np.testing.assert_array_equal(records.joined(), records_of(COUNT)[start:stop])


async def test_small_chunks_are_copied_into_one_array_unless_one_is_all_that_is_read():
    store = await source_of(records_of(COUNT), (CHUNK, 3), compressors=None)
    source = await open_source(store, None)
    assert len((await source.read(0, 105)).records.arrays) == 1
    assert np.shares_memory((await source.read(10, 20)).records.joined(), await stored_memory(store, "c/1/0"))


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


async def test_a_chunk_at_an_odd_address_is_copied_to_a_better_one():
    records = records_of(COUNT, (6,), np.float32)
    store = _OddStore("memory://odd")
    store.objects = (await source_of(records, (CHUNK, 6), compressors=None)).objects
    rows = await (await open_source(store, None)).read(10, 20)
    np.testing.assert_array_equal(rows.records.joined(), records[10:20])
    assert rows.records.joined().flags.aligned
    assert (await stored_memory(store, "c/1/0")).ctypes.data % 2 == 1  # it was at one
