"""One unit's records as requests: the right ones, whatever the blocks are, and no block's bytes beyond its lease."""

import asyncio
import gc
import weakref

import numpy as np
import pytest
from hypothesis import given

from batch_client import zarrstore
from batch_client.budget import ByteBudget
from batch_client.reader import open_source
from batch_client.stream import UnitStream
from support.plans import plan_of, plans
from support.runs import records_of, source_of


@pytest.fixture(autouse=True)
def chunks_are_kept(monkeypatch):
    monkeypatch.setattr(zarrstore, "LEAST_KEPT_BYTES", 1)


async def stream_of(plan, unit, budget):
    source = plan.source
    store = source_of(records_of(source.count, source.record_shape), (source.chunk_records, *source.record_shape))
    return UnitStream(await open_source(store, None), plan, unit, budget, allow_missing=False)


@given(plans())
def test_every_request_has_its_records_and_gives_its_bytes_back(plan):
    async def read():
        budget, records = ByteBudget(plan.max_bytes_in_flight), records_of(plan.source.count, plan.source.record_shape)
        for unit in plan.units():
            spans = []
            async for span, rows, lease in (await stream_of(plan, unit, budget)).spans():
                np.testing.assert_array_equal(rows.joined(), records[span.start:span.stop])
                spans.append(span)
                lease.release()
            assert spans == list(plan.requests(unit.start, unit.stop))
        assert budget.used == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zarrstore, "LEAST_KEPT_BYTES", 1)
        asyncio.run(read())


async def test_a_request_may_have_records_of_three_blocks():
    plan = plan_of(count=40, chunk=4, record=(3,), micro_batch=10, request_records=10, chunk_records=40,
                   max_bytes_in_flight=4 * 3)
    assert plan.block_records == 4
    stream = await stream_of(plan, plan.unit(0), ByteBudget(plan.max_bytes_in_flight))
    pieces = []
    async for _, rows, lease in stream.spans():
        pieces.append([len(array) for array in rows.arrays])
        # What waited for the next block, whose lease is another's, keeps no chunk.
        assert all(array.base is None or array.base.nbytes <= array.nbytes for array in rows.arrays[:-1])
        lease.release()
    assert pieces == [[4, 4, 2], [2, 4, 4], [4, 4, 2], [2, 4, 4]]


async def test_requests_under_way_have_no_more_bytes_than_the_budget():
    """Of several input chunks each; those of an output chunk, 16 records, are of 7, 7 and 2."""
    plan = plan_of(count=64, chunk=1, record=(10,), micro_batch=7, request_records=7, chunk_records=16,
                   max_bytes_in_flight=8 * 10)
    budget, held = ByteBudget(plan.max_bytes_in_flight), []

    async def take(unit):
        async for _, rows, lease in (await stream_of(plan, unit, budget)).spans():
            held.append((rows.nbytes, lease))

    units = [asyncio.ensure_future(take(unit)) for unit in plan.units()]
    async with asyncio.timeout(60):
        while not all(unit.done() for unit in units):
            await asyncio.sleep(0)
            if len(budget._waiting) + sum(unit.done() for unit in units) == len(units):
                assert sum(nbytes for nbytes, _ in held) <= budget.most
                while held:
                    held.pop()[1].release()


async def test_while_a_block_waits_for_the_budget_the_one_before_is_its_requests_alone():
    plan = plan_of(count=20, chunk=10, record=(3,), micro_batch=5, request_records=5, chunk_records=20,
                   max_bytes_in_flight=30)
    budget = ByteBudget(plan.max_bytes_in_flight)
    stream = await stream_of(plan, plan.unit(0), budget)
    spans = stream.spans()
    _, first, lease = await anext(spans)
    _, second, other = await anext(spans)
    block = weakref.ref(first.arrays[0].base)
    next_one = asyncio.ensure_future(anext(spans))
    async with asyncio.timeout(60):
        while not budget._waiting:  # noqa: ASYNC110 - a budget tells nobody that it is waited for
            await asyncio.sleep(0)
    lease.release()
    del first, second
    gc.collect()
    assert block() is None
    other.release()
    _, third, lease = await next_one
    assert len(third) == 5
    lease.release()
    await spans.aclose()
