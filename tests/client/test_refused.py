"""What a run refuses: sources that can't be scored, missing and damaged chunks; and what a plan refuses with it."""

import asyncio
import json
import warnings
from dataclasses import replace

import click
import numpy as np
import pytest
import zarr
from zarr.storage import MemoryStore as ZarrMemory

from batch_client import pipeline
from batch_client.cli.options import SERVER_OPTIONS, server_options
from batch_client.cli.run import _sentence
from batch_client.errors import DataError, MismatchError, StoppedError, StorageError, UsageError
from batch_client.events import ChunkWritten, RequestSent
from batch_client.pipeline import execute, plan_run
from batch_client.prepare import open_services
from batch_client.publish import published_manifest
from batch_client.replay import replay
from batch_client.report import Report
from batch_client.report.page import render
from batch_client.spec import Records, RunSpec
from batch_client.storage import MemoryStore
from batch_client.transport import HttpReply
from batch_client.zarrstore import PieceBuffer
from support.runs import records_of, refused, services, source_of, spec
from support.simulated import Breaking, SimulatedServer
from support.virtual import virtually
from support.world import CHUNK, RECORDS, World


async def test_a_plan_refuses_what_its_run_would_refuse_before_it_writes():
    source, server = source_of(records_of(20), (10, 3)), SimulatedServer()
    taken, foreign = MemoryStore("memory://out"), MemoryStore("memory://out")
    await execute(spec(), services(server, source, taken))
    foreign.objects["notes.txt"] = b"mine"
    for wanted, output, reused, options in [
        ("belongs to another run: codec", taken, None, {"codec": "zstd"}),
        ("belongs to another run: start", taken, None, {"records": Records(10, 20)}),
        ("is not empty (notes.txt)", foreign, None, {}),
        ("is no published output", MemoryStore("memory://out"), MemoryStore("memory://old"), {"reuse": "x"}),
        ("no chunk of it can be reused: codec", MemoryStore("memory://new"), taken, {"reuse": "x", "codec": "zstd"}),
    ]:
        before = dict(output.objects)
        for go in (plan_run, execute):
            with pytest.raises(MismatchError) as error:
                await go(spec(**options), replace(services(server, source, output), reuse_store=reused))
            assert wanted in str(error.value)
            assert output.objects == before
    for options in ({}, {"overwrite": True, "codec": "zstd"}):
        assert (await plan_run(spec(**options), services(server, source, taken))).count == 20
    for go in (plan_run, execute):
        with pytest.raises(MismatchError, match="nothing was deleted"):
            await go(spec(overwrite=True), services(server, source, foreign))
    taken.objects["_run/manifest.json"] = b"{"
    for go in (plan_run, execute):
        with pytest.raises(MismatchError, match="can't be read"):
            await go(spec(), services(server, source, taken))


async def test_sources_that_can_not_be_scored_are_refused_before_anything_is_written():
    good, wide = source_of(records_of(20), (10, 3)), source_of(records_of(20, (4,)), (10, 4))
    for kind, wanted, source, options in [
        (DataError, "no Zarr array there", MemoryStore("memory://source"), {}),
        (DataError, "a record has shape (4,), model toy takes (3,): score another array, or pack the model", wide, {}),
        (DataError, "records are float64", source_of(records_of(20, dtype=np.float64), (10, 3)), {}),
        (UsageError, "INPUT memory://out/in is in OUTPUT memory://out", MemoryStore("memory://out/in"), {}),
        (DataError, "complex64 can't be scored", source_of(records_of(20).astype(np.complex64), (10, 3)), {}),
        (UsageError, "over --max-bytes-in-flight", good, {"max_bytes_in_flight": 8}),
    ]:
        assert (await refused(kind, wanted, source, **options)).objects == {}


async def test_records_with_their_axes_in_another_order_are_said_not_to_be_transposed():
    await refused(DataError, "a record has shape (4, 4, 3), model toy takes (3, 4, 4): axes in another order, and "
                  "records are reshaped, not transposed: transpose in the model that is packed (such as "
                  "x.permute(0, 3, 1, 2)), or write the array in the model's order",
                  source_of(records_of(20, (4, 4, 3)), (10, 4, 4, 3)), SimulatedServer((3, 4, 4)))


async def test_a_group_names_its_arrays():
    store = ZarrMemory()
    group = await zarr.api.asynchronous.open_group(store=store, mode="w")
    await (await group.create_group("test")).create_array(name="images", shape=(4, 3), chunks=(2, 3), dtype="uint8")
    await group.create_array(name="images", shape=(4, 3), chunks=(2, 3), dtype="uint8")
    await group.create_group("empty")
    source = MemoryStore("memory://source")
    async for key in store.list():
        source.objects[key] = (await store.get(key, zarr.core.buffer.default_buffer_prototype())).to_bytes()
    await refused(DataError, "the group has images, test/images: name one with --array", source)
    await refused(DataError, "no such array; the group has images, test/images", source, array="pictures")
    alone = MemoryStore("memory://source")
    alone.objects["zarr.json"] = source.objects["empty/zarr.json"]
    await refused(DataError, "this is a group without arrays: name the place of an array", alone)


NO_CHUNK = """{"zarr_format": 2, "shape": [8, 4], "chunks": [0, 4], "dtype": "|u1", "order": "C", "compressor": null,
               "filters": null, "fill_value": 0}"""


@pytest.mark.parametrize(("name", "document", "said"), [
    ("zarr.json", "[]", "its Zarr metadata can't be read ("),
    ("zarr.json", "null", "its Zarr metadata can't be read ("),
    (".zarray", NO_CHUNK, "has chunks of length 0"),
])
async def test_metadata_that_no_array_has_is_the_sources_fault(name, document, said):
    source = MemoryStore("memory://source")
    source.objects[name] = document.encode()
    await refused(DataError, said, source)


@pytest.mark.parametrize(("chunks", "damaged", "named"), [
    ((10, 3), "c/1/0", "restore chunk c/1/0 or"), ((10, 2), "c/1/1", "restore the chunk or"),  # one of two
])
async def test_a_chunk_that_can_not_be_decoded_is_named_with_its_records(chunks, damaged, named):
    source = source_of(records_of(40), chunks)
    source.objects[damaged] = source.objects[damaged][:5]
    await refused(DataError, "records 10 to 19 can't be decoded (", source)
    await refused(DataError, named, source)


async def test_of_a_chunk_that_can_not_be_decoded_the_records_that_were_asked_for_are_named():
    source = source_of(records_of(40), (10, 3))
    source.objects["c/2/0"] = source.objects["c/2/0"][:5]
    await refused(DataError, "records 20 to 24 can't be decoded (", source, records=Records(15, 25))


@pytest.mark.parametrize("error", [MemoryError("no room"), RuntimeError("can't start new thread")])
async def test_sound_chunks_that_could_not_be_read_together_are_not_the_sources_fault(error, monkeypatch):
    def empty(shape, *rest):
        if shape[0] > 10:
            raise error
        return whole(shape, *rest)

    whole = PieceBuffer.empty
    monkeypatch.setattr(PieceBuffer, "empty", empty)
    source = source_of(records_of(40), (10, 3))
    said = f"could not be read together ({type(error).__name__}: {error}), and each of their chunks can"
    await refused(StorageError, said, source)
    # The control: one of them is damaged.
    source.objects["c/1/0"] = source.objects["c/1/0"][:5]
    await refused(DataError, "records 10 to 19 can't be decoded (", source)


@pytest.mark.parametrize("name", ["gzip", "zlib", "bz2", "lzma"])
async def test_a_damaged_chunk_is_named_whichever_codec_says_so(name):
    codec = {"name": f"numcodecs.{name}", "configuration": {}}
    if name == "gzip":
        codec = {"name": "gzip", "configuration": {"level": 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's: these codecs are in no specification yet
        source = source_of(records_of(40), (10, 3), compressors=[codec])
        good = source.objects["c/1/0"]
        source.objects["c/1/0"] = good[:10] + bytes(byte ^ 0xFF for byte in good[10:])
        await refused(DataError, "can't be decoded", source)


# A zstd frame (RFC 8878) whose header claims a content of 2^62 bytes, and one of 2^63 - 1.
HUGE, HUGEST = (bytes.fromhex("28b52ffd c0 00") + size.to_bytes(8, "little") for size in (2**62, 2**63 - 1))


@pytest.mark.parametrize(("codec", "content"), [
    ("zstd", HUGE), ("zstd", HUGEST), ("zstd", b""), ("blosc", b""), ("bytes", b""), ("numcodecs.fletcher32", b"xx")])
async def test_a_chunk_that_decoders_die_of_is_named(codec, content):
    """An empty one is a segmentation fault of Blosc's; the others are no ValueErrors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr's: not all of these codecs are in a specification yet
        compressors = () if codec == "bytes" else [{"name": codec, "configuration": {}}]
        source = source_of(records_of(40), (10, 3), compressors=compressors)
        source.objects["c/1/0"] = content
        await refused(DataError, "records 10 to 19 can't be decoded (", source)


async def test_a_missing_chunk_is_no_data_unless_the_user_says_so():
    records = records_of(40)
    source = source_of(records, (10, 3))
    del source.objects["c/2/0"]
    output = await refused(DataError, "chunk c/2/0 (among records", source, chunk_records=10)
    assert not [key for key in output.objects if key.endswith("zarr.json")]
    summary = await execute(spec(allow_missing=True), services(SimulatedServer(), source))
    assert (summary.records, summary.missing_chunks) == (40, 1)
    assert " 1 missing input chunk taken as the fill value, " in _sentence(summary)


async def test_a_run_that_met_a_missing_chunk_goes_on_with_the_fill_value():
    source = source_of(records_of(400), (10, 3))
    whole = MemoryStore("memory://out")
    missing = source.objects.pop("c/30/0")
    await execute(spec(allow_missing=True, chunk_records=10), services(SimulatedServer(), source, whole))
    output = await refused(DataError, "missing from the store", source, chunk_records=10, in_flight=1)
    summary = await execute(spec(allow_missing=True, chunk_records=10), services(SimulatedServer(), source, output))
    assert 0 < summary.scored < 400
    assert summary.missing_chunks == 1
    # One who does not accept them is told, whoever else did.
    del output.objects["_SUCCESS"]
    with pytest.raises(DataError, match="1 missing input chunks were taken as the fill value by a client"):
        await execute(spec(chunk_records=10), services(SimulatedServer(), source, output))
    await execute(spec(allow_missing=True, chunk_records=10), services(SimulatedServer(), source, output))
    assert output.objects["y/c/30/0"] == whole.objects["y/c/30/0"]
    assert summary.root == (await published_manifest(whole)).root
    source.objects["c/30/0"] = missing
    with pytest.raises(MismatchError, match="c/30/0 is another one than was scored"):
        await replay(spec(chunk_records=10), services(SimulatedServer(), source, output), 40)


async def test_integers_that_a_float_would_round_are_refused():
    wide, narrow = [source_of(records_of(20, dtype=dtype), (10, 3)) for dtype in (np.int64, np.int32)]
    server = SimulatedServer((3,), np.float64)
    await refused(DataError, "records are int64, model toy takes float64, which can't hold them all", wide, server)
    assert (await execute(spec(), services(server, narrow))).records == 20


def test_all_flags_for_servers_are_known_to_verify():
    @click.command()
    @server_options
    def command(**_):
        """Takes nothing else."""

    assert {parameter.name for parameter in command.params} == set(SERVER_OPTIONS)


@virtually
async def test_a_published_output_says_what_is_bad_in_it_when_it_is_asked_for_again():
    records = np.ones((10 * CHUNK, 3), np.uint8)
    records[2] = 255
    world = World(1, server=Breaking(), records=records, source=source_of(records, (CHUNK, 3)))
    await world.live(max_failed=1)
    again = await world.live()
    assert _sentence(again).startswith("memory://out was published already: 80 records, 1 failed, root sha256:")
    assert ", 1 failed, 3 not finite, root" in _sentence(replace(again, not_finite=3))
    assert " 80 records, root" in _sentence(replace(again, failed=0))


@virtually
async def test_what_was_found_bad_is_listed_where_there_is_too_much_of_it(monkeypatch):
    monkeypatch.setattr(pipeline, "HOPELESS", 20)
    records = np.full((10 * CHUNK, 3), 255, np.uint8)
    records[:2 * CHUNK] = 1
    records[2] = 255
    world = World(1, server=Breaking(seconds=0.01), records=records, source=source_of(records, (CHUNK, 3)))
    create = world.output.create

    async def slow(key, data):
        await asyncio.sleep(0.1 if key.startswith("_run/failed/") else 0.0)
        return await create(key, data)

    monkeypatch.setattr(world.output, "create", slow)
    report = Report("memory://source", lambda: 0.0, lambda: 0.0)
    with pytest.raises(DataError, match=r"2\d records failed alone, .*; those that were found are listed in "
                                        r"memory://out/_run/failed/$") as caught:
        await execute(world.spec(), world.services(), (report,))
    letters = [json.loads(data) for key, data in world.output.objects.items() if key.startswith("_run/failed/")]
    listed = [failure["index"] for letter in letters for failure in letter["records"]]
    assert len(listed) == len(set(listed)) == int(str(caught.value).split()[0]) > 20
    assert f"<dt>records scored: failed</dt><dd>{len(listed)}</dd>" in render(report.data("too many"))
    assert set(listed) <= {2, *range(2 * CHUNK, 10 * CHUNK)}
    assert all(failure["index"] // CHUNK == letter["unit"] for letter in letters for failure in letter["records"])


@pytest.mark.parametrize(("kind", "options", "wanted"), [
    (UsageError, {"records": Records(30, 40)}, "--records 30:40"),
    (UsageError, {"max_bytes_in_flight": 8}, "raise that to at least 30"),
    (UsageError, {"chunk_records": 7}, "--chunk-records 7: wanted a multiple of the source's 10 records a chunk"),
    (DataError, {"input": "none.zarr"}, "the source has no records"),
])
async def test_what_needs_no_model_is_refused_before_a_server_starts(kind, options, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    zarr.create_array("in.zarr", shape=(20, 3), chunks=(10, 3), dtype=np.uint8)
    zarr.create_array("none.zarr", shape=(0, 3), chunks=(10, 3), dtype=np.uint8)
    wrong = RunSpec(**{"input": "in.zarr", "output": "out", "archive": "no such model.mar"} | options)
    with pytest.raises(kind) as error:
        async with open_services(wrong):
            pytest.fail("a server was started")
    assert wanted in str(error.value)


@virtually
async def test_a_source_that_changed_between_two_lives_is_told_before_more_is_scored():
    world = World(1)
    stop = asyncio.Event()
    services = world.services()

    def stop_soon(event):
        if isinstance(event, ChunkWritten):
            stop.set()

    with pytest.raises(StoppedError):
        await execute(world.spec(), services, (stop_soon,), stop)
    assert any("ledger" in key for key in world.output.objects)
    world.source.objects["c/0/0"] = world.source.objects["c/1/0"]
    events = []
    with pytest.raises(MismatchError, match="chunk c/0/0 changed since it was scored"):
        await execute(world.spec(), services, (events.append,))
    assert not any(isinstance(event, RequestSent) for event in events)


@virtually
async def test_a_mended_source_is_advised_only_where_it_is_read_again():
    """A record that failed in a chunk that is proven stays failed there."""
    class Fussy(SimulatedServer):
        def answer(self, body, header_length):
            bad = any(bytes(world.records[index]) in body[header_length:] for index in (3, 70))
            return HttpReply(500, {}, b'{"error": "x"}') if bad else super().answer(body, header_length)

    records = np.arange(RECORDS * 3, dtype=np.uint8).reshape(RECORDS, 3)
    world = World(1, server=Fussy(seconds=0.01), records=records)
    with pytest.raises(DataError, match=r"; accept them with --max-failed 2, or mend the source$"):
        await world.live()
    with pytest.raises(DataError, match=r"held back: 1.* or mend the source and score it into a new OUTPUT, or with "
                                        r"--overwrite$"):
        await world.live(max_failed=1)
