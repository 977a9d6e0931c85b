"""The byte budget: who is served when, what is given back, and what a run makes of it."""

import asyncio
import random

import numpy as np
import pytest

from batch_client import pipeline, plan
from batch_client.budget import ByteBudget
from batch_client.events import ChunkWritten, RecordsScored
from batch_client.pipeline import execute
from batch_client.prepare import Services
from support.runs import source_of
from support.simulated import SimulatedServer
from support.virtual import run_virtually, virtually
from support.world import CHUNK, World


async def begun(*waiting):
    """Tasks that wait, after they had a turn of the loop."""
    tasks = [asyncio.ensure_future(one) for one in waiting]
    await asyncio.sleep(0)
    return tasks


async def test_the_lowest_rank_is_served_first_and_of_equals_who_came_first():
    budget, served = ByteBudget(10), []
    held = await budget.take(10)

    async def wait(name, rank, nbytes):
        lease = await budget.take(nbytes, rank)
        served.append(name)
        lease.release()

    tasks = await begun(wait("late", 2, 10), wait("early", 1, 10), wait("early too", 1, 10), wait("first", 0, 10))
    held.release()
    await asyncio.gather(*tasks)
    assert served == ["first", "early", "early too", "late"]
    assert budget.used == 0


async def test_nobody_passes_a_lower_rank_that_wants_more_but_a_lower_rank_passes():
    budget = ByteBudget(10)
    await budget.take(6)
    large, small = await begun(budget.take(8, 1), budget.take(2, 1))
    assert not large.done()
    assert not small.done()
    (lower,) = await begun(budget.take(3, 0))
    assert (await lower) is not None
    assert budget.used == 9
    for task in (large, small):
        task.cancel()


async def test_who_stops_waiting_holds_nothing_and_nobody_up():
    budget = ByteBudget(10)
    held = await budget.take(6)
    large, small = await begun(budget.take(8), budget.take(2))
    large.cancel()
    await small
    assert budget.used == 8
    held.release()
    assert budget.used == 2


@pytest.mark.parametrize("cancel_first", [True, False])
async def test_bytes_given_back_at_the_moment_of_a_cancellation_are_not_lost(cancel_first):
    budget = ByteBudget(10)
    held = await budget.take(10)
    waiting, other = await begun(budget.take(4), budget.take(5))
    if cancel_first:
        waiting.cancel()
        held.release()
    else:
        held.release()
        waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    (await other).release()
    assert budget.used == 0


async def test_a_lease_is_given_back_by_its_last_holder():
    budget = ByteBudget(4)
    lease = (await budget.take(4)).hold()
    lease.release()
    assert budget.used == 4
    lease.release()
    assert budget.used == 0


async def test_more_than_the_whole_budget_is_refused():
    with pytest.raises(ValueError, match="5 bytes asked of a budget of 4"):
        await ByteBudget(4).take(5)


def test_output_chunks_that_share_the_bytes_have_them_in_order_and_few_are_begun(monkeypatch):
    ranks, seen = [], []

    class Recorded(ByteBudget):
        async def take(self, nbytes, rank=0):
            ranks.append(rank)
            return await super().take(nbytes, rank)

    monkeypatch.setattr(pipeline, "ByteBudget", Recorded)
    records = np.random.default_rng(0).integers(0, 99, (960, 3), np.uint8)
    world = World(1, server=SimulatedServer(seconds=0.01), records=records, source=source_of(records, (16, 3)))
    # Bytes for two output chunks of ten requests each; requests for more.
    asked = world.spec(chunk_records=160, request_records=16, in_flight=32, max_bytes_in_flight=2 * 160 * 3)
    run_virtually(execute(asked, Services(world.server.servers(), world.source, world.output,
                                          rng=random.Random(0)), (seen.append,)))
    blocks = len(ranks) // 6
    assert blocks > 1
    assert sorted(ranks) == sorted(list(range(6)) * blocks)
    before = seen[:[type(event) for event in seen].index(ChunkWritten)]
    assert {event.start // 160 for event in before if isinstance(event, RecordsScored)} <= {0, 1, 2, 3}


@virtually
async def test_output_chunks_that_fill_the_memory_are_assembled_one_at_a_time(monkeypatch):
    monkeypatch.setattr(plan, "OUTPUT_BYTES", 1)
    world = World(1, server=SimulatedServer(seconds=5))
    await world.live()
    await world.check()
    assert world.server.most_at_once == CHUNK // 4
