"""Storage that is busy, breaks, loses answers, or holds a source that is damaged or changes."""

import asyncio

import numpy as np
import obstore
import pytest
import zarr
from obstore.exceptions import GenericError
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from batch_client import buckets
from batch_client.errors import DataError, StorageError
from batch_client.reader import open_source
from batch_client.storage import MemoryStore
from support.cli import run_cli
from support.faults import (
    FULL,
    QUICK,
    RAISES,
    Client,
    Scale,
    each_scale,
    images_of,
    open_output,
    opened,
    run,
    s3_store,
    spoilt,
    write_source,
)
from support.proxy import Fault, FaultProxy

ALWAYS = 50.0  # a mean of faults for each request
BUSY = [Fault("busy", 0.2)]
BROKEN = [Fault("reset", 0.04), Fault("cut", 0.06, "GET"), Fault("cut", 0.3, "GET", "list-type"),
          Fault("lost", 0.15, "PUT"), Fault("late", 0.02, seconds=0.3)]


@pytest.mark.parametrize(("scale", "faults"), [
    pytest.param(QUICK, BUSY + BROKEN, id="quick"),
    pytest.param(FULL, BUSY, id="full-busy", marks=pytest.mark.chaos),
    pytest.param(FULL, BROKEN, id="full-broken", marks=pytest.mark.chaos)])
def test_storage_that_fails(scale, faults, s3, sources, undisturbed, moody_server, s3_environ, output):
    wanted = undisturbed(scale).root
    with FaultProxy(s3.endpoint_url, *faults, seed=5) as proxy:
        environ = {**s3_environ, "AWS_ENDPOINT_URL": proxy.url}
        with Client(sources(scale), output, scale, moody_server.flags, environ) as client:
            summary = client.finish()
        adopted = [event["index"] for event in client.events("chunk written") if event["adopted"]]
        calls, injected = len(proxy.seen), proxy.injected
    assert summary["root"] == wanted
    assert set(injected) == {fault.kind for fault in faults}
    if "busy" in injected:
        assert injected["busy"] > 0.15 * calls
    if "lost" in injected:
        assert adopted, "no object was found there already, so no answer to a write was lost"
    run_cli(["verify", "--deep", output], s3_environ, check=True)


@pytest.mark.parametrize("kind", ["reset", "lost"])
async def test_writes_and_removals_whose_connection_is_lost(kind, s3, s3_environ, output):
    """Four of each in a row, two of them reset; obstore repeats neither after an RST."""
    store = opened(output, s3_environ)
    with FaultProxy(s3.endpoint_url, Fault(kind, ALWAYS, "PUT", most=4), Fault(kind, ALWAYS, "POST", most=8)) as proxy:
        disturbed = opened(output, s3_environ | {"AWS_ENDPOINT_URL": proxy.url})
        await disturbed.create("lost", b"bytes")
        assert proxy.injected[kind] == 4
        assert (await store.get("lost")).data == b"bytes"
        await disturbed.delete("lost")
        assert proxy.injected[kind] == 8
    assert await store.get("lost") is None


async def test_reads_wait_for_a_store_that_was_there(s3, s3_environ, output):
    """One that restarts is away for longer than obstore asks it again; one that never answered may be a wrong name."""
    with FaultProxy(s3.endpoint_url) as proxy:
        environ = s3_environ | {"AWS_ENDPOINT_URL": proxy.url}
        store = opened(output, environ)
        await store.create("a", b"bytes")
        proxy.down = True
        async with asyncio.timeout(buckets.RETRY_SECONDS / 2):
            with pytest.raises(StorageError, match="check the network"):
                await opened(output, environ).get("a")
        asyncio.get_running_loop().call_later(6, setattr, proxy, "down", False)
        blob, meta, keys = await asyncio.gather(store.get("a"), store.head("a"), listed(store))
        assert proxy.down is False
        assert (blob.data, meta.size, keys) == (b"bytes", 5, ["a"])


async def test_a_long_listing_may_be_cut_again_and_again(monkeypatch, s3, s3_environ, output):
    """Each page is progress, after which the store has its time anew."""
    monkeypatch.setattr(obstore, "list", cut_after(obstore.list, pause=0.4))
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 1)
    store = opened(output, s3_environ)
    for number in range(6):
        await store.create(f"{number}", b"")
    assert await listed(store) == [f"{number}" for number in range(6)]


def cut_after(real, pause):
    """A listing that gives one object, waits, and loses its connection, as long as there is more."""
    async def cut(inner, prefix=None, offset=None):
        async for batch in real(inner, prefix=prefix, offset=offset):
            for meta in batch:
                yield [meta]
                await asyncio.sleep(pause)
                raise GenericError("Error performing list in 1ms - HTTP error: error decoding list response body")
    return cut


async def test_a_store_that_stays_away_is_given_up(monkeypatch, s3, s3_environ, output):
    monkeypatch.setattr(buckets, "RETRY_SECONDS", 1)
    with FaultProxy(s3.endpoint_url) as proxy:
        store = opened(output, s3_environ | {"AWS_ENDPOINT_URL": proxy.url})
        await store.create("a", b"bytes")
        proxy.down = True
        for call in (store.get("a"), store.head("a"), listed(store), store.create("b", b""), store.delete("a")):
            with pytest.raises(StorageError, match="check the network"):
                await call


async def listed(store):
    return [meta.key async for meta in store.list("")]


def new_source(environ, name, **options):
    """A source that a test may damage: QUICK's images."""
    url = f"s3://data/faults/{name}.zarr"
    write_source(url, environ, images_of(QUICK.records), QUICK.source_chunk, **options)
    return url, s3_store(url, environ)


def assert_nothing_opens(output, environ):
    with pytest.raises(FileNotFoundError):
        open_output(output, environ)


def test_a_source_chunk_that_is_corrupt(moody_server, s3_environ, output):
    url, store = new_source(s3_environ, "corrupt", compressors=[Crc32cCodec()])
    body = bytearray(obstore.get(store, "c/20/0/0").bytes().to_bytes())
    body[1000] ^= 4
    obstore.put(store, "c/20/0/0", bytes(body))
    said = run(url, output, QUICK, moody_server.flags, s3_environ, code=65)
    assert "records 1280 to 1343 can't be decoded" in said
    assert "restore chunk c/20/0/0 or" in said
    assert_nothing_opens(output, s3_environ)


def test_a_source_chunk_that_is_missing(moody_server, s3_environ, output):
    url, store = new_source(s3_environ, "missing")
    obstore.delete(store, "c/20/0/0")
    said = run(url, output, QUICK, moody_server.flags, s3_environ, code=65)
    assert "chunk c/20/0/0" in said
    assert_nothing_opens(output, s3_environ)


def test_a_source_chunk_that_changes_mid_run(moody_server, s3_environ, output):
    url, store = new_source(s3_environ, "changed")
    with Client(url, output, QUICK, moody_server.flags, s3_environ) as client:
        client.until(lambda: any(event["index"] == 0 for event in client.events("chunk written")))
        body = obstore.get(store, "c/0/0/0").bytes().to_bytes()
        obstore.put(store, "c/0/0/0", body[::-1])
        assert "chunk c/0/0/0 changed since it was scored" in client.finish(78)
    assert_nothing_opens(output, s3_environ)


REUSE = {"quick": Scale("reuse", 1600, 16, 16, 16, 0), "full": FULL}


@each_scale
def test_reuse_scores_only_what_is_new(scale, moody_server, s3_environ, output):
    scale = REUSE[scale.name]
    chunk, url = scale.output_chunk, f"{output}.zarr"
    images = images_of(scale.records)
    images = spoilt(images, {50 * chunk + 5: RAISES})
    changed, appended = [3, 40, 94], range(95, 100)
    array = write_source(url, s3_environ, images[:95 * chunk], scale.source_chunk)
    first = run(url, f"{output}-old", scale, moody_server.flags, s3_environ, "--max-failed", "1")
    assert first["failed"] == 1
    rng = np.random.default_rng(2)
    for unit in changed:
        fresh = rng.integers(4, 256, (chunk, 12, 12), dtype=np.uint8)
        array[unit * chunk:(unit + 1) * chunk] = images[unit * chunk:(unit + 1) * chunk] = fresh
    array.resize((100 * chunk, 12, 12))
    array[95 * chunk:] = images[95 * chunk:]
    with Client(url, f"{output}-new", scale, moody_server.flags, s3_environ, "--max-failed", "1",
                "--reuse", f"{output}-old") as client:
        summary = client.finish()
        scored = sorted(event["index"] for event in client.events("chunk written"))
    assert scored == sorted([*changed, 50, *appended])
    assert (summary["scored"], summary["records"]) == (9 * chunk, 100 * chunk)
    fresh = run(url, f"{output}-fresh", scale, moody_server.flags, s3_environ, "--max-failed", "1")
    assert fresh["scored"] == fresh["records"] == 100 * chunk
    assert summary["root"] == fresh["root"] != first["root"]
    np.testing.assert_array_equal(zarr.open_array(array.store, mode="r")[:], images)
    run_cli(["verify", "--deep", f"{output}-new"], s3_environ, check=True)


DAMAGED = {  # of a shard of two chunks, which begins with its index
    "cut off": (15, lambda shard: shard[:-110]),
    "nearly gone": (0, lambda shard: shard[:20]),
    "lengths of 0": (0, lambda shard: bytes(32) + shard[32:]),
    "a place behind the end": (0, lambda shard: (2**63 + 5).to_bytes(8, "little") + shard[8:]),
    "a place that 64 bits do not hold": (0, lambda shard: (2**64 - 10).to_bytes(8, "little") + shard[8:]),
}


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in zarr
@pytest.mark.parametrize(("start", "damaged"), DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("place", ["in memory", "on disk", "s3"])
async def test_a_range_that_an_object_does_not_have_is_the_datas_fault(place, start, damaged, tmp_path, request):
    """A store's failure would be tried again, for ever."""
    if place == "in memory":
        store = MemoryStore()
    elif place == "on disk":
        store = buckets.open_store(str(tmp_path / "copy.zarr"))
    else:
        store = opened(request.getfixturevalue("output"), request.getfixturevalue("s3_environ"))
    codec = ShardingCodec(chunk_shape=(10, 10), codecs=(BytesCodec(),), index_codecs=(BytesCodec(),),
                          index_location="start")
    array = zarr.create_array(tmp_path / "in.zarr", shape=(20, 10), chunks=(20, 10), dtype="u1", serializer=codec,
                              compressors=None)
    array[:] = 7
    for key in ("zarr.json", "c/0/0"):
        blob = (tmp_path / "in.zarr" / key).read_bytes()
        await store.create(key, damaged(blob) if key == "c/0/0" else blob)
    source = await open_source(store, None)
    for low, high in ((start, start + 5), (0, 20)):  # a part of the shard, and all of it
        with pytest.raises(DataError, match=r"can't be decoded \(ValueError: .*c/0/0"):
            await source.read(low, high)
