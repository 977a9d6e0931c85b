"""What a reading of the code found: each stays mended."""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
import zarr
from obstore.exceptions import GenericError

from batch_client.buckets import _translate
from batch_client.endpoint import EJECT_AFTER, Pool
from batch_client.errors import CredentialsError, DataError, MismatchError, StoppedError, StorageError
from batch_client.events import ChunkWritten, RequestSent
from batch_client.layout import GENERATION_KEY, LEDGER_PREFIX
from batch_client.ledger import Ledger
from batch_client.pipeline import execute
from batch_client.storage import MemoryStore
from batch_client.transport import HttpReply
from support.simulated import URL, SimulatedServer
from support.virtual import virtually
from support.world import CHUNK, RECORDS, World


def test_a_success_forgets_the_refusals_before_it():
    now = [0.0]
    pool = Pool((URL,), 4, lambda: now[0], random.Random(1))
    endpoint = pool.endpoints[0]
    assert pool.refused(endpoint, 0.0) == 0
    pool.answered(endpoint, 0.0, 1, 0.0, 0.0, 1)
    now[0] = 3600.0
    assert pool.refused(endpoint, now[0]) == 0


def test_one_burst_of_resets_is_one_ejection():
    pool = Pool((URL,), 8, lambda: 10.0, random.Random(1))
    endpoint = pool.endpoints[0]
    for _ in range(EJECT_AFTER + 8):
        pool.broke(endpoint, 9.0, "reset")
    assert endpoint.ejections == 1


@pytest.mark.parametrize("answer", [
    HttpReply(507, {}, b'{"error": "out of memory"}'), HttpReply(200, {}, b"not a reply at all"),
])
@virtually
async def test_a_record_that_always_gives_the_same_bad_answer_is_found(answer):
    class Choking(SimulatedServer):
        def answer(self, body, header_length):
            return answer if bytes(world.records[37]) in body[header_length:] else super().answer(body, header_length)

    world = World(1, server=Choking(seconds=0.01))
    world.records[37] = (201, 202, 203)
    world.source.objects = World(1, records=world.records).source.objects
    assert (await world.live(max_failed=1)).failed == 1


@pytest.mark.parametrize(("text", "kind"), [
    ("Error performing PUT http://s/b/y/c/403/0 in 1ms - Server returned non-2xx status code: 503: slow", StorageError),
    ("Unable to write /data/credentials/403: No space left on device", StorageError),
    ("Error performing PUT http://s/b/x in 1ms - Server returned non-2xx status code: 403 Forbidden", CredentialsError),
])
def test_what_a_store_said_is_not_looked_for_in_names(text, kind):
    assert type(_translate(GenericError(text), "writing", "x")) is kind


@virtually
async def test_a_flush_whose_answer_was_lost_loses_no_row():
    from batch_client.ledger import ChunkProof, LedgerView, Row

    class Losing(MemoryStore):
        lost = True

        async def create(self, key, data):
            done = await super().create(key, data)
            if self.lost:
                self.lost = False
                raise StorageError("connection reset")
            return done

    store = Losing()
    store.objects[GENERATION_KEY] = b"a" * 16
    ledger = Ledger(store, "a" * 16, "w", lambda: 0.0)
    rows = [Row(unit, (ChunkProof(f"y/c/{unit}", 1, "0"),), {}, 1, 0, 0) for unit in (0, 1)]
    await ledger.add(rows[0])
    with pytest.raises(StorageError, match="connection reset"):
        await ledger.flush()
    await ledger.add(rows[1])
    await ledger.flush()
    view = LedgerView(store, 2, "a" * 16)
    await view.refresh()
    assert [row.unit async for row in view.rows()] == [0, 1]


@virtually
async def test_a_stop_before_anything_was_scored_writes_nothing():
    from batch_client.pipeline import execute

    world = World(1)
    stop = asyncio.Event()
    stop.set()
    with pytest.raises(StoppedError):
        await execute(world.spec(), world.services(), stop=stop)
    assert world.output.objects == {}


@virtually
async def test_a_chunk_that_somebody_removed_is_read_as_what_no_record_has():
    """Neither as a number that a model may give, nor as ok."""
    world = World(1)
    await world.live()
    for key in ("record_status/c/1", "y/c/1/0"):
        del world.output.objects[key]
    group = zarr.open_group(zarr.storage.MemoryStore({
        key: zarr.core.buffer.cpu.Buffer.from_bytes(data) for key, data in world.output.objects.items()}), mode="r")
    assert set(group["record_status"][CHUNK:2 * CHUNK]) == {255}
    assert np.isnan(group["y"][CHUNK:2 * CHUNK]).all()
    assert set(group["record_status"][:CHUNK]) == {0}


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


class NoLedger(MemoryStore):
    """A store that is away whenever a proof is to be written."""

    async def create(self, key, data):
        if key.startswith(LEDGER_PREFIX):
            raise StorageError("the store is away")
        return await super().create(key, data)


async def run_without_ledger(server, *observers):
    world = World(1, server)
    services = replace(world.services(), output_store=NoLedger("memory://o"))
    await execute(world.spec(), services, observers)


@virtually
async def test_an_error_that_ends_a_run_is_told_also_where_the_store_is_away():
    class Refusing(SimulatedServer):
        def answer(self, body, header_length):
            if self.requests > 8:
                return HttpReply(400, {}, b'{"error": "no more"}')
            return super().answer(body, header_length)

    with pytest.raises(DataError, match="nothing can be scored"):
        await run_without_ledger(Refusing())
    with pytest.raises(StorageError, match="the store is away"):
        await run_without_ledger(SimulatedServer())


@virtually
async def test_a_run_that_is_cancelled_waits_for_no_store():
    def cancel(event):
        if isinstance(event, ChunkWritten):
            task.cancel()

    task = asyncio.ensure_future(run_without_ledger(SimulatedServer(seconds=0.01), cancel))
    with pytest.raises(asyncio.CancelledError):
        await task
