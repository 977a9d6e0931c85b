"""Outputs that follow one another at a place: removed under a client, overwritten, reused; and places that overlap."""

import asyncio
import json
from dataclasses import replace

import numpy as np
import pytest
import zarr

from batch_client import pipeline, plan
from batch_client.errors import BrokenPromiseError, CredentialsError, DataError, MismatchError, UsageError
from batch_client.events import ChunkHeld
from batch_client.layout import GENERATION_KEY, MANIFEST_KEY, REMOVING_KEY, SUCCESS_KEY, OutputLayout
from batch_client.pipeline import execute, plan_run
from batch_client.place import begin
from batch_client.prepare import open_services, prepare
from batch_client.removal import contents_of, remove_output
from batch_client.spec import RunSpec
from batch_client.storage import MemoryStore
from batch_client.transport import HttpReply
from batch_client.verify import verify_output
from batch_handler.oip import decode_request
from support.runs import source_of
from support.simulated import SimulatedServer
from support.virtual import virtually
from support.world import CHUNK, World


class Interrupted(MemoryStore):
    """Calls `meanwhile` before the first object is written whose key begins with `prefix`."""

    def __init__(self, prefix, meanwhile):
        super().__init__("memory://out")
        self._prefix, self._meanwhile = prefix, meanwhile

    async def create(self, key, data):
        if key.startswith(self._prefix) and self._meanwhile is not None:
            meanwhile, self._meanwhile = self._meanwhile, None
            await meanwhile()
        return await super().create(key, data)


@pytest.mark.parametrize("prefix", ["y/c/5/", "record_status/c/11", "_run/ledger/", MANIFEST_KEY, "y/zarr.json",
                                    "zarr.json"])
@virtually
async def test_an_output_that_is_removed_under_its_client_is_not_published(prefix, root):
    world = World(1)

    async def removed():
        await remove_output(world.output)

    world.output = Interrupted(prefix, removed)
    with pytest.raises(MismatchError, match="was removed, or is being removed"):
        await world.live()
    # The one PUT that was under way lands late; of all others none follows that makes anything visible.
    left, world.output.objects = world.output.objects, {}
    assert SUCCESS_KEY not in left
    assert ("zarr.json" in left) == (prefix == "zarr.json")
    assert not any(key.startswith("_run/ledger/") for key in left) or prefix == "_run/ledger/"
    await world.live()
    await world.check(root)


@virtually
async def test_what_a_removed_outputs_client_still_writes_is_not_taken_for_the_next_ones():
    """Another run begins at the place before the first client has noticed; theirs are different models."""
    world = World(1)
    other = World(1, server=Other(digest="sha256:other", seconds=0.01), records=world.records)

    async def removed_and_begun():
        await remove_output(world.output)
        await begin(world.output, prepared.identity, "b" * 16)

    other.output = world.output = Interrupted("y/c/5/", removed_and_begun)
    prepared = await prepare(other.spec(), other.services())
    with pytest.raises(MismatchError, match="was removed, or is being removed"):
        await world.live()
    assert any("/c/" in key for key in world.output.objects)
    # Chunks that are there are the other model's: they stop the run, and no run takes them for its own.
    with pytest.raises(BrokenPromiseError, match="another run's client wrote there"):
        await other.live()
    assert SUCCESS_KEY not in other.output.objects
    await remove_output(other.output)
    summary = await other.live()
    assert summary.scored == len(other.records)
    await other.check()


class Other(SimulatedServer):
    def predict(self, records, first_row):
        return -super().predict(records, first_row)


def altered_manifest(output):
    head = json.loads(output.objects[MANIFEST_KEY])
    output.objects[MANIFEST_KEY] = json.dumps(head | {"format": 1}).encode()


def damaged_manifest(output):
    output.objects[MANIFEST_KEY] = b"{"


def removal_that_was_cut_off(output):
    del output.objects[GENERATION_KEY], output.objects[SUCCESS_KEY]
    output.objects[REMOVING_KEY] = b"0123"


@pytest.mark.parametrize("change", [altered_manifest, damaged_manifest, removal_that_was_cut_off])
@pytest.mark.parametrize("overwritten_by", ["the same run", "another run"])
@virtually
async def test_overwrite_replaces_what_another_version_published_and_what_was_half_removed(change, overwritten_by):
    world = World(1)
    mended = world.records[::-1].copy()
    objects = source_of(mended, (CHUNK, 3)).objects
    await world.live()
    change(world.output)
    # The source was mended in place meanwhile: no old chunk is any good.
    world.records, world.source.objects = mended, objects
    options = {} if overwritten_by == "the same run" else {"codec": "zstd"}
    summary = await world.live(overwrite=True, **options)
    assert summary.scored == len(world.records)
    await world.check()


@virtually
async def test_an_unfinished_run_of_a_source_that_has_changed_is_overwritten():
    world = World(1)
    good = world.source.objects.pop("c/9/0")
    with pytest.raises(DataError, match="c/9/0"):
        await world.live()
    world.source.objects["c/9/0"] = good
    first = world.source.objects["c/0/0"]
    world.records = np.concatenate([world.records[CHUNK:2 * CHUNK], world.records[CHUNK:]])
    world.source.objects["c/0/0"] = world.source.objects["c/1/0"]
    assert first != world.source.objects["c/0/0"]
    with pytest.raises(MismatchError, match="c/0/0 changed since it was scored"):
        await world.live()
    summary = await world.live(overwrite=True)
    assert summary.scored == len(world.records)
    await world.check()


@virtually
async def test_chunks_that_decode_otherwise_are_not_reused():
    records = np.random.default_rng(3).integers(0, 99, (96, 3)).astype(np.uint16)
    source = source_of(records, (CHUNK, 3))
    server = SimulatedServer(dtype=np.uint16, seconds=0.01)
    old, new = (World(seed, server=server, records=records, source=source) for seed in (1, 2))

    async def reuse():
        services = replace(new.services(), reuse_store=old.output)
        return await execute(new.spec(reuse="memory://old"), services)

    await old.live()
    old.output.url = "memory://old"
    metadata = source.objects["zarr.json"]
    described = json.loads(metadata)
    source.objects["zarr.json"] = json.dumps(described | {"attributes": {"note": "mine"}}).encode()
    assert (await reuse()).scored == 0
    new.output.objects.clear()
    assert b'"little"' in metadata
    source.objects["zarr.json"] = metadata.replace(b'"little"', b'"big"')
    with pytest.raises(MismatchError, match="no chunk of it can be reused: source_encoding"):
        await reuse()


class Failing(SimulatedServer):
    """Fails on records that begin with 255, after `patience` seconds."""

    def __init__(self, patience, **options):
        super().__init__(**options)
        self.patience = patience

    async def send(self, method, url, headers, parts, deadline):
        reply = await super().send(method, url, headers, parts, deadline)
        if reply.status == 500:
            await asyncio.sleep(self.patience)
        return reply

    def answer(self, body, header_length):
        data = decode_request(body, header_length, max_tensor_bytes=1 << 20).inputs[0].data
        bad = bool((data[:, 0] == 255).any())
        return HttpReply(500, {}, b'{"error": "bad record"}') if bad else super().answer(body, header_length)


@pytest.mark.parametrize("mended", [False, True])
@virtually
async def test_a_chunk_with_failures_that_another_client_has_proven_meanwhile_is_the_others(mended, monkeypatch):
    """Its failures count once; and if it has none any more, its bytes are no contradiction."""
    monkeypatch.setattr(pipeline, "FLUSH_SECONDS", 0.0)  # look at the others' rows before each chunk
    records = np.random.default_rng(5).integers(0, 99, (96, 3), np.uint8)
    records[1, 0] = 255
    slow = World(1, server=Failing(60, seconds=5), records=records)
    server = SimulatedServer(seconds=0.01) if mended else Failing(0, seconds=0.01)
    quick = World(2, server=server, records=records, source=slow.source)
    quick.output = slow.output
    first = asyncio.ensure_future(slow.live(max_failed=1))
    await asyncio.sleep(7)
    assert (await quick.live(max_failed=1)).published
    summary = await first
    assert (summary.failed, summary.published) == (0 if mended else 1, True)


@virtually
async def test_a_chunk_that_was_held_back_here_and_proven_without_failures_elsewhere_is_held_no_more():
    records = np.random.default_rng(5).integers(0, 99, (960, 3), np.uint8)
    records[1, 0] = 255
    failing = World(1, server=Failing(0, seconds=5), records=records)
    mended = World(2, records=records, source=failing.source)
    mended.output = failing.output
    events = []
    first = asyncio.ensure_future(execute(failing.spec(), failing.services(), (events.append,)))
    while not any(isinstance(event, ChunkHeld) for event in events):
        assert not first.done()
        await asyncio.sleep(1)
    assert (await mended.live()).published
    summary = await first
    assert (summary.failed, summary.published) == (0, True)


@virtually
async def test_a_removal_that_can_not_look_at_what_is_read_leaves_the_output_as_it_was():
    world = World(1)

    class Refusing(MemoryStore):
        async def get(self, key, start=None, stop=None):
            raise CredentialsError("the store refused the credentials")

    assert (await world.live()).published
    before = dict(world.output.objects)
    with pytest.raises(CredentialsError):
        await remove_output(world.output, kept=[Refusing()])
    assert world.output.objects == before


@virtually
async def test_an_overwrite_deletes_nothing_where_zarr_refuses_what_is_to_be_there(monkeypatch):
    world = World(1)

    async def refuse(*_):
        raise ValueError("no such array")

    assert (await world.live()).published
    before = dict(world.output.objects)
    monkeypatch.setattr(OutputLayout, "open", refuse)
    with pytest.raises(ValueError, match="no such array"):
        await world.live(overwrite=True)
    assert world.output.objects == before
    with pytest.raises(ValueError, match="no such array"):  # and `plan` says so before
        await plan_run(world.spec(overwrite=True), world.services())


async def test_an_input_in_the_output_is_refused_where_it_is_named_from_above(tmp_path):
    """INPUT is a group around OUTPUT, and its array one of OUTPUT's own, which would be overwritten."""
    zarr.create_group(tmp_path / "all")
    zarr.create_array(tmp_path / "all" / "out" / "y", data=np.zeros((4, 2)))
    output = tmp_path / "all" / "out"
    spec = RunSpec(input=tmp_path / "all", array="out/y", output=output, archive="m.mar", overwrite=True)
    with pytest.raises(UsageError, match=r"INPUT .*/all/out/y is in OUTPUT .*/all/out: the output needs a place"):
        async with open_services(spec):
            pytest.fail("it was opened")
    assert (output / "y" / "zarr.json").exists()


@pytest.mark.parametrize("again", [False, True])
@virtually
async def test_what_is_reused_is_not_overwritten_under_another_name_of_its_place(again):
    """Two URLs that nothing tells to be one place: the mark of the removal does, also one that was cut off."""
    world = World(1)
    alias = MemoryStore("memory://alias")
    assert (await world.live()).published
    alias.objects = world.output.objects
    if again:
        alias.objects[REMOVING_KEY] = b"cut off"
    before = dict(alias.objects)
    services = replace(world.services(), reuse_store=alias)
    with pytest.raises(UsageError, match="memory://alias and OUTPUT memory://out are one place: nothing was de"):
        await execute(world.spec(reuse="memory://alias", overwrite=True), services)
    assert alias.objects == before
    assert (await verify_output(world.output, deep=True)).records == len(world.records)


@pytest.mark.parametrize("name", [
    "notes.txt", "v2/_run/spec.json", "v2/zarr.json", "other/c/0/0", "y/c.txt", "y/d/c/0"])
@virtually
async def test_an_overwrite_deletes_nothing_where_there_is_something_else(name):
    world = World(1)
    await world.live()
    assert (await contents_of(world.output)).objects == len(world.output.objects)
    world.output.objects[name] = b"precious"
    before = dict(world.output.objects)
    with pytest.raises(MismatchError, match=f"memory://out holds {name} too, which is not of this output"):
        await world.live(overwrite=True, codec="zstd")
    assert world.output.objects == before


@virtually
async def test_an_output_below_another_one_is_no_part_of_it():
    world = World(1)
    await world.live()
    for key, data in list(world.output.objects.items()):
        world.output.objects[f"v2/{key}"] = data
    await verify_output(world.output, deep=True)
    world.output.objects["y/c/99/0"] = b""
    with pytest.raises(DataError, match="y/c/99/0 is no chunk of this run"):
        await verify_output(world.output)


@virtually
async def test_an_overwrite_does_not_delete_what_it_would_read():
    world = World(1)
    await world.live()
    before = dict(world.output.objects)
    for name, url in (("INPUT", "memory://out/y"), ("--reuse", "memory://out")):
        services = world.services()
        inside = MemoryStore(url)
        changed = replace(services, source_store=inside) if name == "INPUT" else replace(services, reuse_store=inside)
        with pytest.raises(UsageError, match=f"{name} {url} is in OUTPUT memory://out"):
            await execute(world.spec(overwrite=True), changed)
        assert world.output.objects == before


@virtually
async def test_an_overwrite_that_would_end_at_a_missing_chunk_deletes_nothing():
    world = World(1)
    missing = world.source.objects.pop("c/9/0")
    await world.live(allow_missing=True)
    before = dict(world.output.objects)
    for go in (pipeline.plan_run, execute):
        with pytest.raises(DataError, match="scored with --allow-missing, since INPUT lacked 1 chunks: run again"):
            await go(world.spec(overwrite=True, codec="zstd"), world.services())
    assert world.output.objects == before
    assert (await world.live(overwrite=True, codec="zstd", allow_missing=True)).missing_chunks == 1
    await remove_output(world.output)
    world.source.objects["c/9/0"] = missing
    assert (await world.live()).missing_chunks == 0


@virtually
async def test_an_overwrite_takes_the_chunk_size_only_of_what_it_goes_on_with(monkeypatch):
    world = World(1)

    async def size(place, **changes):
        services = replace(world.services(), output_store=place)
        spec = world.spec(chunk_records=None, overwrite=True, **changes)
        return (await prepare(spec, services)).plan.chunk_records

    default = await size(MemoryStore("memory://empty"))
    assert default != 3 * CHUNK
    await world.live(chunk_records=3 * CHUNK)
    assert await size(world.output) == default
    del world.output.objects[SUCCESS_KEY]
    assert await size(world.output) == 3 * CHUNK
    assert await size(world.output, codec="zstd") == default
    # Nor is a size that this run can't have, which nobody has asked for, a reason to refuse it.
    monkeypatch.setattr(plan, "MAX_CHUNK_BYTES_OUT", CHUNK * 9)
    monkeypatch.setattr(plan, "LARGEST_CHUNK_BYTES_OUT", 2 * CHUNK * 9)
    assert await size(world.output, codec="zstd") == CHUNK
    await world.output.create(SUCCESS_KEY, b"")
    assert await size(world.output) == CHUNK


@virtually
async def test_an_output_is_in_no_place_that_it_is_made_from():
    world = World(1)
    services = replace(world.services(), output_store=MemoryStore("memory://old/new"),
                       reuse_store=MemoryStore("memory://old"))
    with pytest.raises(UsageError, match="OUTPUT memory://old/new is in --reuse memory://old"):
        await execute(world.spec(), services)
    for url in ("memory://source/scores", "memory://source/c/9/0"):
        services = replace(world.services(), output_store=MemoryStore(url))
        with pytest.raises(UsageError, match=f"OUTPUT {url} is in INPUT memory://source"):
            await execute(world.spec(), services)


@pytest.mark.parametrize(("output", "old", "wanted"), [
    ("in.zarr/scores", None, "OUTPUT .*/in.zarr/scores is in INPUT .*/in.zarr: the output needs a place of its own"),
    (".", None, "INPUT .*/in.zarr is in OUTPUT"), ("old/new", "old", "OUTPUT .*/old/new is in --reuse .*/old"),
    ("old", "old/former", "--reuse .*/old/former is in OUTPUT .*/old"),
])
async def test_a_place_that_can_not_be_written_is_refused_before_a_server_starts(output, old, wanted, tmp_path):
    zarr.create_array(tmp_path / "in.zarr", data=np.zeros((8, 3), np.uint8))
    spec = RunSpec(input=tmp_path / "in.zarr", output=tmp_path / output, reuse=old and tmp_path / old,
                   archive=tmp_path / "no such model.mar")
    with pytest.raises(UsageError, match=wanted):
        async with open_services(spec):
            pass
