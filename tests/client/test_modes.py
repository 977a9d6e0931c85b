"""Parts, several clients, overwrite, fast, status: the ways in which runs meet."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from batch_client.errors import DataError, MismatchError, StoppedError, UsageError
from batch_client.events import RunStarted
from batch_client.ledger import LedgerView
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.progress import progress_of
from batch_client.replay import replay
from batch_client.spec import Records, RunSpec
from batch_client.storage import MemoryStore
from batch_client.transport import HttpReply
from batch_handler.oip import HEADER_LENGTH, InferReply, Tensor, decode_request, encode_reply
from support.faulty import calm
from support.runs import opened
from support.simulated import URL, Breaking, SimulatedServer
from support.virtual import virtually
from support.world import CHUNK, RECORDS, World


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
@virtually
async def test_parts_share_a_ledger_and_the_last_one_publishes(order, root):
    world = World(1)
    summaries = [await world.live(part=(part, 3)) for part in order]
    assert [summary.published for summary in summaries] == [False, False, True]
    assert sum(summary.scored for summary in summaries) == len(world.records)
    await world.check(root)


@virtually
async def test_a_run_that_goes_on_passes_over_proven_chunks_together(root, monkeypatch):
    """One by one a million of them would keep everything else waiting."""
    world, proven, looks = World(1), LedgerView.__contains__, []

    def look(view, unit):
        looks.append((unit, proven(view, unit)))
        return looks[-1][1]

    await world.live(part=(2, 3))
    monkeypatch.setattr(LedgerView, "__contains__", look)
    assert (await world.live()).published
    await world.check(root)
    assert {unit for unit, _ in looks} == {*range(4), *range(8, 12)}
    assert not any(found for _, found in looks)


@pytest.mark.parametrize("clients", [2, 4])
@virtually
async def test_clients_at_one_output_publish_once_and_the_same(clients, root):
    world = World(2, server=SimulatedServer(seconds=5))
    async with asyncio.TaskGroup() as tasks:
        runs = [tasks.create_task(world.live(in_flight=1)) for _ in range(clients)]
    summaries = [task.result() for task in runs]
    assert {summary.root for summary in summaries} == {root}
    scored = sum(summary.scored for summary in summaries)
    # They read each other's rows: the work is shared, though not perfectly.
    assert len(world.records) <= scored < clients * len(world.records)
    await world.check(root)


class LongLedger(MemoryStore):
    """The second listing of the ledger ends once `go_on` is set."""

    def __init__(self, go_on, error=None):
        super().__init__("memory://out")
        self.listings = self.at_once = self.most_at_once = 0
        self._go_on, self._error = go_on, error

    async def list(self, prefix):
        if prefix.startswith("_run/ledger/"):
            self.listings += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            try:
                if self.listings == 2:
                    await self._go_on.wait()
                    if self._error is not None:
                        raise self._error
            finally:
                self.at_once -= 1
        async for meta in super().list(prefix):
            yield meta


class Finishing(SimulatedServer):
    """Sets `finished` with the answer to request number `last`."""

    def __init__(self, last, **options):
        super().__init__(**options)
        self.finished, self._last = asyncio.Event(), last

    def answer(self, body, header_length):
        if self.requests == self._last:
            self.finished.set()
        return super().answer(body, header_length)


@virtually
async def test_records_are_scored_while_the_ledger_is_listed(root):
    world = World(1, server=Finishing(RECORDS // 4, seconds=8))
    world.output = LongLedger(world.server.finished)
    await world.live()
    await world.check(root)
    assert (world.output.listings, world.output.most_at_once) == (3, 1)  # at the start, beside the work, at the end


@virtually
async def test_a_listing_that_comes_too_late_to_matter_is_not_waited_for(root):
    world = World(1, server=SimulatedServer(seconds=8))
    world.output = LongLedger(asyncio.Event())
    await world.live()
    await world.check(root)
    assert world.output.listings == 3


@virtually
async def test_what_is_found_wrong_in_the_ledger_ends_a_run_at_once():
    world = World(1, server=Finishing(12, seconds=8))
    world.output = LongLedger(world.server.finished, MismatchError("the ledger can't be trusted"))
    with pytest.raises(MismatchError, match=r"^the ledger can't be trusted$"):
        await world.live()
    assert world.server.requests < RECORDS // 4


@virtually
async def test_parts_that_fail_within_their_own_leave_do_not_publish_beyond_it():
    """Two parts at the same time, one failure each, one allowed: each may accept its own, the two together may not."""
    records = np.random.default_rng(5).integers(0, 99, (96, 3), np.uint8)
    records[[1, 95], 0] = 255
    world = World(1, server=Breaking(seconds=0.01), records=records)
    async with asyncio.TaskGroup() as tasks:
        runs = [tasks.create_task(outcome(world, part)) for part in (1, 2)]
    assert "2 records failed" in str([task.result() for task in runs])
    assert "zarr.json" not in world.output.objects
    assert (await world.live(max_failed=2)).published


async def outcome(world, part):
    try:
        return await world.live(part=(part, 2), max_failed=1)
    except DataError as error:
        return error


@virtually
async def test_overwrite_replaces_an_output_of_ours_and_nothing_else(root):
    world = World(1)
    await world.live()
    assert (await world.live()).already_published
    again = await world.live(overwrite=True)
    assert again.scored == len(world.records)
    assert again.root == root
    world.output.objects = {"notes.txt": b"mine"}
    with pytest.raises(MismatchError, match="nothing was deleted"):
        await world.live(overwrite=True)
    assert world.output.objects == {"notes.txt": b"mine"}


@virtually
async def test_an_unfinished_run_goes_on_with_its_own_chunks_even_where_it_may_be_overwritten():
    world, whole = World(1, server=SimulatedServer(seconds=5)), World(1)
    root = (await whole.live(chunk_records=2 * CHUNK)).root
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(8, stop.set)
    with pytest.raises(StoppedError):
        await execute(world.spec(chunk_records=2 * CHUNK), world.services(), (), stop)
    summary = await world.live(overwrite=True, chunk_records=None)
    assert 0 < summary.scored < len(world.records)
    assert summary.root == root
    # What is published is replaced, by the rule.
    again = await world.live(overwrite=True, chunk_records=None)
    assert again.scored == len(world.records)
    assert again.root != root


@virtually
async def test_an_overwrite_that_was_stopped_goes_on_and_a_refused_one_deletes_nothing(root):
    world = World(1)
    await world.live()
    before = dict(world.output.objects)
    services = world.services()
    services = Services(services.servers, services.source_store, services.output_store, MemoryStore("memory://none"),
                        services.clock, services.rng)
    with pytest.raises(MismatchError, match="there is none"):
        await execute(world.spec(overwrite=True, reuse="memory://none"), services)
    assert world.output.objects == before
    fate = calm()
    fate.at, fate.kinds = set(range(120, 140)), ("crash before",)
    await world.live(fate, overwrite=True)
    assert world.ends == ["crash"]
    begun = [key for key in world.output.objects if "/c/" in key]
    again = await world.live(overwrite=True)
    assert again.root == root
    assert begun


class Unverified(SimulatedServer):
    """Another server of the protocol: no digest, no fingerprint, no checksum, no status."""

    version = "1"

    def metadata(self):
        return replace(super().metadata(), parameters={})

    def answer(self, body, header_length):
        request = decode_request(body, header_length, max_tensor_bytes=1 << 20)
        y = super().predict(request.inputs[0].data, 0)
        y[request.inputs[0].data[:, 0] == 7] = np.inf
        reply = InferReply(request.id, "toy", self.version, (Tensor("y", y),))
        message = encode_reply(reply, binary={"y": True})
        return HttpReply(200, {HEADER_LENGTH.lower(): str(message.header_length)}, message.join())


@virtually
async def test_replay_finds_a_chunk_that_is_no_prediction_although_its_manifest_agrees(root):
    world = World(1)
    await world.live()
    services = world.services()
    done = await replay(world.spec(), services, 5)
    assert len(done.chunks) == 5
    assert done.records == 5 * CHUNK
    key, stored = next((key, data) for key, data in world.output.objects.items() if key.startswith("y/c/"))
    for other in (stored[:-1] + bytes([stored[-1] ^ 1]), None):
        world.output.objects.pop(key)
        world.output.objects |= {} if other is None else {key: other}
        with pytest.raises(DataError, match=f"{key} scored again has the SHA-256 that was published, stored is"):
            await replay(world.spec(), world.services(), 12)
    world.output.objects[key] = stored
    world.server.predict = lambda records, first_row: np.zeros((len(records), 2), np.float32)
    with pytest.raises(DataError, match="scored again has SHA-256"):
        await replay(world.spec(), world.services(), 3)


@virtually
async def test_replay_of_a_source_that_has_changed_says_nothing_of_the_output():
    world = World(1)
    await world.live()
    key = next(key for key in world.source.objects if "c/" in key)
    altered = bytearray(world.source.objects[key])
    altered[-1] ^= 1
    world.source.objects[key] = bytes(altered)
    with pytest.raises(MismatchError, match="another one than was scored"):
        await replay(world.spec(), world.services(), 12)


@virtually
async def test_a_server_that_changes_its_version_is_left_out_though_it_has_no_digest():
    class Reloading(Unverified):
        version = "1"

        def answer(self, body, header_length):
            self.version = "1" if self.requests < 5 else "2"
            return super().answer(body, header_length)

    world = World(1, server=Reloading())
    with pytest.raises(MismatchError, match="its model is version 2, this run's is 1"):
        await world.live()


@virtually
async def test_a_part_begins_with_what_it_has_to_do_itself():
    world = World(1, records=np.zeros((98, 3), np.uint8))  # thirteen output chunks, the last of two records
    events = []
    for part in ((1, 20), (6, 6), (2, 2), (1, 2)):
        await execute(world.spec(part=part), world.services(), (events.append,))
    begun = [event for event in events if isinstance(event, RunStarted)]
    assert [(event.part_records, event.part_done, event.done) for event in begun] == [
        (0, 0, 0), (18, 0, 0), (50, 18, 18), (48, 0, 50)]


@virtually
async def test_status_tells_how_far_a_run_is_and_who_wrote():
    world = World(1)
    await world.live(part=(1, 2))
    progress = await progress_of(world.output)
    assert not progress.published
    assert (progress.done, progress.records, progress.chunks_done, progress.chunks) == (48, 96, 6, 12)
    assert [writer.segments for writer in progress.writers] == [1]
    await world.live(part=(2, 2))
    progress = await progress_of(world.output)
    assert progress.published
    assert progress.done == 96
    assert len(progress.writers) == 2
    with pytest.raises(MismatchError, match="no output of batch-client"):
        await progress_of(MemoryStore("memory://nothing"))


class Small(SimulatedServer):
    """Takes a micro-batch and no more."""

    refused = 0

    def answer(self, body, header_length):
        if len(body) - header_length > 4 * 3:
            self.refused += 1
            return HttpReply(413, {}, b"")
        return super().answer(body, header_length)


@virtually
async def test_too_large_a_request_is_split_between_micro_batches_and_later_ones_of_its_size_at_once(root):
    world = World(1, server=Small())
    summary = await world.live(request_records=8, in_flight=1)
    assert summary.root == root
    assert world.server.refused < 6  # of 12: those that waited for room already


@virtually
async def test_both_halves_of_a_request_that_begins_within_a_micro_batch_keep_their_places():
    world = World(1, server=Small(), request_records=8)
    assert (await world.live(records=Records.parse("3:91"))).published
    found = opened(world.output)["y"][:]
    wanted = world.server.expected(world.records[3:91], CHUNK, start=3)
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


@virtually
async def test_a_foreign_server_of_the_protocol_is_driven_too():
    """No digest, fingerprint, checksum or status: what can be checked is, what is missing is worked out here."""
    world = World(1, server=Unverified())
    summary = await world.live(request_records=4)
    assert summary.published
    found = opened(world.output)
    np.testing.assert_array_equal(found["record_status"][:], np.where(world.records[:, 0] == 7, 2, 0))


def test_specs_of_parts_and_modes():
    common = {"input": "a", "output": "b", "endpoints": (URL,), "model": "toy"}
    for options, wanted in (
            ({"part": (0, 2)}, "--part 0/2: wanted I/N"), ({"part": (3, 2)}, "--part 3/2: wanted I/N"),
            ({"part": (1, 2), "overwrite": True}, "--overwrite and --part"),
            ({"reuse": "b", "overwrite": True}, "--reuse and OUTPUT are both b"),
            ({"reuse": "o", "exact": False}, "--reuse and --fast"), ({"max_failed": -1}, "--max-failed -1: wanted at"),
            ({"token_files": ["t"], "token_command": "c"}, "--token-file and --token-command"),
            ({"token_files": ["t", "u"]}, "--token-file: found 2 of them for 1 server, wanted one for all, or one for"),
            ({"patience": float("nan")}, "--patience nan: wanted at least 0"),
            ({"input": "a\0b"}, "input .*: wanted a URL or a path"),
            ({"endpoints": ("http://h", "http://h/")}, "--endpoint http://h, http://h/: one of them is named twice"),
            ({"endpoints": ("http://h/\r\nX: y",)}, "--endpoint http://h/ X: y: wanted a URL such as"),
            ({"input": "s3://key:secret@bucket/in"}, "INPUT has a user name or password"),
            ({"output": "s3://key@bucket/out"}, "OUTPUT has a user name or password"),
            ({"reuse": "abfss://key:secret@account.dfs.core.windows.net/out"}, "--reuse has a user name or password")):
        with pytest.raises(UsageError, match=wanted) as error:
            RunSpec(**common | options)
        assert "secret" not in str(error.value)
    RunSpec(**common | {"input": "abfss://container@account.dfs.core.windows.net/in"})
