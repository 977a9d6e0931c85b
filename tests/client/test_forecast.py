"""The forecast is right about streams of answers that are known, and a calibration about the run that follows."""

import asyncio
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_client.calibrate import calibrate
from batch_client.errors import StoppedError
from batch_client.forecast import (
    CHUNKS_A_SEGMENT,
    SECONDS_A_SEGMENT,
    Answer,
    Prices,
    cost_of,
    forecast,
    measured,
)
from batch_client.ledger import FLUSH_ROWS, FLUSH_SECONDS
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.storage import MemoryStore
from batch_client.transport import HttpReply
from support.plans import plan_of, plans
from support.runs import source_of
from support.simulated import Breaking, SimulatedServer
from support.virtual import run_virtually, virtually
from support.world import CHUNK, World


def test_what_is_costed_of_the_ledger_is_how_often_it_is_written():
    assert (CHUNKS_A_SEGMENT, SECONDS_A_SEGMENT) == (FLUSH_ROWS, FLUSH_SECONDS)


def answers_of(gaps, records=10):
    at, answers = 0.0, []
    for gap in gaps:
        at += gap
        answers.append(Answer(at, records))
    return answers


@given(st.integers(8, 400), st.floats(1e-3, 1e3), st.integers(1, 10**9))
def test_steady_answers_have_a_forecast_without_width(count, gap, records):
    found = forecast(answers_of([gap] * count), records)
    assert found is not None
    assert found.seconds == pytest.approx(records * gap / 10, rel=1e-6)
    assert found.seconds_low == pytest.approx(found.seconds_high, rel=1e-4)


@given(st.lists(st.floats(0, 100), max_size=100), st.integers(1, 10**6))
def test_a_forecast_lies_in_its_interval_and_few_answers_have_none(gaps, records):
    found = forecast(answers_of(gaps), records)
    if len(gaps) < 8:
        assert found is None
    if found is not None:
        assert 0 <= found.seconds_low <= found.seconds <= found.seconds_high


@pytest.mark.parametrize(("count", "shape"), [(8, 20), (10, 20), (14, 20), (14, 4), (200, 1)])
def test_nineteen_intervals_of_twenty_hold_the_truth(count, shape):
    rng, held = random.Random(7), 0
    for _ in range(1000):
        # Gaps of 0.1 s on average; with shape 1 they are those of a Poisson process.
        found = forecast(answers_of([rng.gammavariate(shape, 0.1 / shape) for _ in range(count)]), 1000)
        held += found.seconds_low <= 10.0 <= found.seconds_high
    assert 920 <= held <= 985


def test_answers_before_the_servers_were_busy_do_not_count():
    slow_then_steady = [5.0] * 15 + [0.1] * 85
    assert forecast(answers_of(slow_then_steady), 1000).seconds == pytest.approx(10.0)


@given(plans())
def test_objects_read_are_those_that_the_units_touch(plan):
    size = plan.source.chunk_records
    touched = sum((unit.stop - 1) // size - unit.start // size + 1 for unit in plan.units())
    assert plan.objects_read == touched


def test_a_cost_is_machines_for_the_time_and_the_stores_requests():
    plan = plan_of(count=80_000, chunk=100, chunk_records=8_000)  # 10 chunks: 2 objects each
    found = forecast(answers_of([1.0] * 100, records=100), plan.count)
    assert found.seconds == pytest.approx(800)
    cost = cost_of(plan, Prices(hour=3.6, thousand_puts=1.0, thousand_gets=10.0), found)
    # 800 s would have 80 segments; there are no more of them than chunks.
    assert cost.total == pytest.approx(0.80 + 0.030 + 8.0)
    assert cost_of(plan, Prices(thousand_puts=1.0), None).total == pytest.approx(0.020 + 10 / 64 / 1000)
    half = cost_of(plan, Prices(thousand_puts=1.0, thousand_gets=10.0), None, parts=2)
    assert half.total == pytest.approx((0.020 + 10 / 64 / 1000 + 8.0) / 2)


@pytest.mark.parametrize("part", [None, (2, 2)])
@virtually
async def test_a_calibration_forecasts_the_run_and_leaves_nothing(part):
    records = np.random.default_rng(0).integers(0, 99, (4_000, 3), np.uint8)
    world = World(1, server=SimulatedServer(seconds=0.5), records=records, source=source_of(records, (40, 3)))
    spec = world.spec(chunk_records=40, part=part)
    services = Services(world.server.servers(), world.source, world.output,
                        clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(0))
    found = await calibrate(spec, services)
    assert not world.output.objects
    summary = await execute(spec, services)
    assert found.records < len(records) / 2
    assert found.forecast.seconds == pytest.approx(summary.seconds, rel=0.05)
    assert found.forecast.records == summary.scored
    assert summary.forecast_seconds == pytest.approx(found.forecast.seconds, rel=0.02)
    assert summary.forecast_error == pytest.approx(summary.forecast_seconds / summary.seconds - 1, abs=1e-3)
    assert abs(summary.forecast_error) < 0.05


@pytest.mark.parametrize("bad_every", [256, 64])
@virtually
async def test_requests_that_look_for_bad_records_are_no_progress(bad_every):
    """Each of those some twenty has all records of its request."""
    records = np.random.default_rng(0).integers(0, 99, (16_000, 3), np.uint8)
    records[bad_every // 2::bad_every, 0] = 255
    world = World(1, server=Breaking(seconds=1.0), records=records, source=source_of(records, (64, 3)))
    spec = world.spec(chunk_records=64, request_records=64, max_failed=len(records))
    services = Services(world.server.servers(), world.source, world.output,
                        clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(0))
    found, summary = await calibrate(spec, services), await execute(spec, services)
    assert summary.failed == -(-(len(records) - bad_every // 2) // bad_every)
    assert found.forecast.seconds == pytest.approx(summary.seconds, rel=0.3)
    assert abs(summary.forecast_error) < 0.3
    assert found.records < len(records)


@virtually
async def test_a_calibration_has_the_chunks_of_what_is_there():
    world = World(1, server=SimulatedServer(seconds=5))
    services = Services(world.server.servers(), world.source, world.output,
                        clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(0))
    stop = asyncio.Event()
    asyncio.get_running_loop().call_later(8, stop.set)
    with pytest.raises(StoppedError):
        await execute(world.spec(chunk_records=2 * CHUNK), services, (), stop)
    found = await calibrate(world.spec(chunk_records=None), services)
    assert found.plan.grid_records == 2 * CHUNK
    # Where nothing is there, it is the rule's.
    found = await calibrate(world.spec(chunk_records=None), replace(services, output_store=MemoryStore("memory://new")))
    assert found.plan.grid_records != 2 * CHUNK


def test_a_calibration_that_got_no_answer_says_why():
    class Full(SimulatedServer):
        def answer(self, body, header_length):
            return HttpReply(503, {}, b"full")

    world = World(3, server=Full())
    services = Services(world.server.servers(), world.source, world.output,
                        clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(0))
    with pytest.raises(StoppedError, match=r"no request was answered within .* the server has no room"):
        run_virtually(calibrate(world.spec(), services))


def test_a_run_that_was_over_before_its_forecast_has_none():
    world = World(3)
    services = Services(world.server.servers(), world.source, world.output,
                        clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(0))
    summary = run_virtually(execute(world.spec(), services))
    assert summary.scored == len(world.records)
    assert (summary.forecast_seconds, summary.forecast_error) == (None, None)


def test_a_source_that_is_done_before_the_time_is_up_is_forecast_too():
    world = World(2)
    services = Services(world.server.servers(), world.source, MemoryStore("memory://out"),
                        clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(0))
    found = run_virtually(calibrate(world.spec(), services))
    assert found.records == len(world.records)
    # Not what its answers alone say, of which the first are left out: it was seen how long it takes.
    assert found.forecast.seconds == pytest.approx(found.seconds)
    assert found.forecast.seconds_low <= found.seconds <= found.forecast.seconds_high
    assert found.forecast.records_per_s == pytest.approx(len(world.records) / found.seconds)


def test_a_source_of_few_answers_that_was_scored_whole_has_the_time_that_it_took():
    records = np.zeros((8, 3), np.uint8)
    world = World(2, records=records, source=source_of(records, (8, 3)))
    services = Services(world.server.servers(), world.source, MemoryStore("memory://out"),
                        clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(0))
    found = run_virtually(calibrate(world.spec(chunk_records=8), services))
    assert (found.forecast.seconds, found.forecast.seconds_low) == (found.seconds, found.seconds)
    assert measured(0, 1.0, None) is measured(5, 0.0, None) is None


@pytest.mark.parametrize("parts", [1, 3, 5, 50])
def test_the_parts_of_a_plan_are_its_units_once_and_a_forecast_is_of_their_records(parts):
    world = World(2)

    def calibrated(number):
        services = Services(world.server.servers(), world.source, MemoryStore("memory://out"),
                            clock=lambda: asyncio.get_running_loop().time(), rng=random.Random(0))
        return run_virtually(calibrate(world.spec(part=(number, parts)), services))

    found = [calibrated(number + 1) for number in range(parts)]
    plan = found[0].plan
    units = [plan.part((number + 1, parts)) for number in range(parts)]
    assert [index for part in units for index in part] == list(range(plan.unit_count))
    wanted = [sum(plan.unit(index).count for index in part) for part in units]
    assert [one.forecast.records for one in found] == wanted
    assert sum(wanted) == plan.count
