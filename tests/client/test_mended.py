"""What a reading of the code found: each stays mended."""

import asyncio
import random

import pytest
from obstore.exceptions import GenericError

from batch_client.endpoint import EJECT_AFTER, Pool
from batch_client.errors import CredentialsError, StoppedError, StorageError
from batch_client.layout import GENERATION_KEY
from batch_client.ledger import Ledger
from batch_client.storage import MemoryStore, _translate
from batch_client.transport import HttpReply
from support.faulty import Fate
from support.simulated import URL, SimulatedServer
from support.virtual import run_virtually
from support.world import World


def test_a_success_forgets_the_refusals_before_it():
    now = [0.0]
    pool = Pool((URL,), 4, lambda: now[0], random.Random(1))
    endpoint = pool.endpoints[0]
    assert pool.refused(endpoint, 0.0) == 0
    pool.answered(endpoint, 0.0, 1, 0.0, 0.0)
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
def test_a_record_that_always_gives_the_same_bad_answer_is_found(answer):
    class Choking(SimulatedServer):
        def answer(self, body, header_length):
            return answer if bytes(world.records[37]) in body[header_length:] else super().answer(body, header_length)

    world = World(1, server=Choking(seconds=0.01))
    world.records[37] = (201, 202, 203)
    world.source.objects = World(1, records=world.records).source.objects

    async def run():
        return await world.live(Fate(random.Random(1), faults=0), max_failed=1)

    assert run_virtually(run()).failed == 1


@pytest.mark.parametrize(("text", "kind"), [
    ("Error performing PUT http://s/b/y/c/403/0 in 1ms - Server returned non-2xx status code: 503: slow", StorageError),
    ("Unable to write /data/credentials/403: No space left on device", StorageError),
    ("Error performing PUT http://s/b/x in 1ms - Server returned non-2xx status code: 403 Forbidden", CredentialsError),
])
def test_what_a_store_said_is_not_looked_for_in_names(text, kind):
    assert type(_translate(GenericError(text), "writing", "x")) is kind


def test_a_flush_whose_answer_was_lost_loses_no_row():
    from batch_client.ledger import ChunkProof, LedgerView, Row

    class Losing(MemoryStore):
        lost = True

        async def create(self, key, data):
            done = await super().create(key, data)
            if self.lost:
                self.lost = False
                raise StorageError("connection reset")
            return done

    async def run():
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

    run_virtually(run())


def test_a_stop_before_anything_was_scored_writes_nothing():
    from batch_client.pipeline import execute
    from support.faulty import Life

    world = World(1)

    async def run():
        stop = asyncio.Event()
        stop.set()
        with pytest.raises(StoppedError):
            await execute(world.spec(), world.services(Fate(random.Random(1), faults=0), Life()), stop=stop)
        assert world.output.objects == {}

    run_virtually(run())
