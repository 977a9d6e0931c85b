# ruff: noqa: S108 - no file is made of these paths

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_client.contract import ModelContract
from batch_client.errors import DataError, UsageError
from batch_client.plan import Geometry, OutputGeometry, RequestSize, default_request, make_plan
from batch_client.prepare import _request_size
from batch_client.serving import Servers
from batch_client.spec import MIB, Records
from batch_handler.exchange import most_in_time
from support.plans import plan_of, plans, spec


@given(plans())
def test_units_cover_the_range_once_and_in_order(plan):
    ends = [plan.start]
    for index, unit in enumerate(plan.units()):
        assert unit.index == index
        assert unit.start == ends[-1]
        assert 0 < unit.count <= plan.chunk_records
        ends.append(unit.stop)
    assert ends[-1] == plan.stop
    assert len(ends) == plan.unit_count + 1


@given(plans())
def test_a_record_is_in_the_unit_that_has_it(plan):
    for unit in (plan.unit(0), plan.unit(plan.unit_count // 2), plan.unit(plan.unit_count - 1)):
        assert {plan.unit_of(unit.start), plan.unit_of(unit.stop - 1)} == {unit.index}


@given(plans())
def test_requests_tile_each_unit_inside_one_grid_chunk_and_keep_the_places_of_the_whole_source(plan):
    total = 0
    for unit in plan.units():
        at = unit.start
        for span in plan.requests(unit.start, unit.stop):
            assert span.start == at
            assert 0 < span.count <= plan.request_size(span.start) <= plan.request_records
            assert span.first_row == span.start % plan.grid_records
            assert span.first_row + span.count <= plan.grid_records
            # A request that goes on in a later one ends on a micro-batch, except where a stored chunk cuts it.
            if span.stop not in (unit.stop, plan.stop) and span.stop % plan.grid_records:
                assert (span.first_row + span.count) % plan.micro_batch == 0
            at = span.stop
            total += 1
        assert at == unit.stop
    assert total == plan.request_count


@given(plans())
def test_blocks_are_whole_input_chunks_within_the_byte_budget(plan):
    for unit in plan.units():
        at = unit.start
        for start, stop in plan.blocks(unit):
            assert start == at
            assert (stop - start) * plan.source.record_bytes <= plan.max_bytes_in_flight
            assert stop == unit.stop or stop % plan.source.chunk_records == 0
            at = stop
        assert at == unit.stop


def test_an_output_chunk_is_whole_input_chunks_within_the_three_bounds():
    assert plan_of(count=2_000_000, chunk=64).grid_records == 32_768
    assert plan_of(count=200_000, chunk=64).grid_records == 8192
    assert plan_of(count=100_000, record=(16,), chunk=64).grid_records == 8192
    assert plan_of(count=2000, chunk=64).grid_records == 192
    large = plan_of(count=200_000, record=(224, 224, 3), chunk=16, micro_batch=16)
    assert large.grid_records == 64 * MIB // (224 * 224 * 3) // 16 * 16
    wide = OutputGeometry("map", np.dtype(np.float32), (512, 512))
    assert plan_of(output=wide, chunk=3, micro_batch=3).grid_records == 6
    source, two = Geometry((1000, 28, 28), np.dtype(np.uint8), 3), (wide, replace(wide, name="other"))
    assert make_plan(spec(), source, np.dtype(np.uint8), two, 3).grid_records == 3
    assert plan_of(chunk=20_000, count=100_000).grid_records == 20_000


@pytest.mark.parametrize(("chunk", "micro_batch", "grid"), [(1000, 128, 6000), (100, 8, 8100), (1000, 1000, 8000),
                                                            (3000, 128, 6000), (5000, 128, 15_000)])
def test_an_output_chunk_leaves_few_places_of_its_last_micro_batch_empty(chunk, micro_batch, grid):
    assert plan_of(count=200_000, chunk=chunk, micro_batch=micro_batch).grid_records == grid


@pytest.mark.parametrize(("count", "micro_batch", "grid"), [
    (2_000, 8, 200),  # 8 MiB, more than a 32nd
    (800, 4, 100),  # an eighth of it
    (100, 4, 100),  # an input chunk
    (20_000, 8, 600),  # a 32nd
    (200_000, 8, 1600),  # 64 MiB
    (2_000, 4096, 1700),  # of all that 64 MiB allow none fills it
    (2_000, 128, 1400),  # 200 records would leave a fifth of the places empty, all up to 1300 over a hundredth
])
def test_a_short_run_of_large_records_has_smaller_output_chunks(count, micro_batch, grid):
    plan = plan_of(count=count, record=(3, 112, 112), micro_batch=micro_batch)
    assert plan.grid_records == grid


def test_plans_of_a_long_and_a_short_size_keep_the_count_and_the_places_off_the_grid_too():
    plan = plan_of(count=9_000, chunk=100, micro_batch=16, micro_batch_seconds=0.02, chunk_records=500,
                   records=Records(130, 8_777))
    assert (plan.request_records, plan.tail_request_records) == (80, 16)
    assert plan.start < plan.tail_start < plan.stop
    assert (plan.tail_start - plan.start) % plan.chunk_records == 0
    assert plan.stop - plan.tail_start >= 8 * 80
    spans = [span for unit in plan.units() for span in plan.requests(unit.start, unit.stop)]
    assert len(spans) == plan.request_count
    assert max(span.count for span in spans if span.start < plan.tail_start) == 80
    assert max(span.count for span in spans if span.start >= plan.tail_start) == 16
    assert all(span.first_row == span.start % 500 for span in spans)


def test_the_last_requests_of_a_run_are_a_quarter_as_long():
    plan = plan_of(count=100_000, micro_batch=128, micro_batch_seconds=0.025,
                   most=RequestSize.at(shared_memory=True, alone=True), chunk_records=6000)
    assert (plan.request_records, plan.tail_request_records) == (20 * 128, 5 * 128)
    # The output chunk in which the last eight requests begin is the first of the tail.
    assert plan.tail_start == 78_000
    lengths = [[span.count for span in plan.requests(unit.start, unit.stop)] for unit in plan.units()]
    assert lengths[12] == [2560, 2560, 880]
    assert lengths[13] == [640] * 9 + [240]
    asked_for = plan_of(count=100_000, micro_batch=128, request_records=2560)
    assert asked_for.tail_request_records == asked_for.request_records


def test_a_reply_is_bounded_as_a_request_is():
    maps = OutputGeometry("map", np.dtype(np.float32), (96, 96, 21))
    assert plan_of(output=maps, chunk=1, micro_batch=8).request_records * (1 + maps.record_bytes) <= 60 * MIB
    with pytest.raises(DataError, match="a --micro-batch of at most 81"):
        plan_of(output=maps, micro_batch=100)
    with pytest.raises(UsageError, match="--request-records 96: a reply would be 74,317,920 bytes"):
        plan_of(output=maps, micro_batch=8, request_records=96)


def test_a_small_source_is_one_chunk_of_its_own_size():
    assert plan_of(count=7).chunk_records == 7
    assert plan_of(count=7).unit_count == 1


def test_a_request_is_about_a_mebibyte_of_whole_micro_batches():
    assert plan_of(count=100_000, micro_batch=128).request_records == 1280
    assert plan_of(count=100_000, record=(512, 512, 3), chunk=1).request_records == 64


@pytest.mark.parametrize(("seconds", "wanted"), [
    (1e-6, 1280), (0.011, 9 * 128), (0.033, 3 * 128), (0.1, 128), (2.6, 128),
])
def test_a_request_of_a_slow_model_is_about_a_tenth_of_a_second_of_whole_micro_batches(seconds, wanted):
    assert plan_of(count=100_000, micro_batch=128, micro_batch_seconds=seconds).request_records == wanted
    assert plan_of(count=100_000, micro_batch=128, micro_batch_seconds=seconds,
                   request_records=2560).request_records == 2560


ONE_MIB, FOUR_MIB = 10 * 128, 41 * 128  # of records of 784 bytes, in whole micro-batches


@pytest.mark.parametrize(("shared_memory", "alone", "seconds", "wanted"), [
    (False, False, None, ONE_MIB), (False, True, None, ONE_MIB), (True, False, None, FOUR_MIB),
    (True, True, None, FOUR_MIB),
    # Quick models are bound by bytes, slow ones by seconds; nobody's request is less than a micro-batch.
    (False, False, 1e-6, ONE_MIB), (True, True, 1e-6, FOUR_MIB),
    (False, False, 0.02, 5 * 128), (True, False, 0.02, 5 * 128), (False, True, 0.02, 10 * 128),
    (True, True, 0.02, 25 * 128), (True, True, 0.2, 2 * 128), (True, True, 5.0, 128),
    # In between: what is shared has room for it, a body has not.
    (False, True, 0.01, ONE_MIB), (True, True, 0.01, FOUR_MIB), (True, True, 0.0125, 40 * 128),
    (True, False, 0.01, 10 * 128),
])
def test_a_request_is_larger_where_memory_is_shared_and_where_nobody_waits(shared_memory, alone, seconds, wanted):
    most = RequestSize.at(shared_memory=shared_memory, alone=alone)
    assert plan_of(count=100_000, micro_batch=128, micro_batch_seconds=seconds, most=most).request_records == wanted
    # A size that somebody asked for stays, and no request is more than an output chunk.
    assert plan_of(count=100_000, micro_batch=128, micro_batch_seconds=seconds, most=most,
                   request_records=2560).request_records == 2560
    small = plan_of(count=100_000, micro_batch=128, micro_batch_seconds=seconds, most=most, chunk_records=200)
    assert small.request_records == min(wanted, 256)


@pytest.mark.parametrize(("lane", "alone", "shared", "wanted"), [
    (None, False, None, RequestSize(1 * MIB, 0.1)), ("m.bulk", False, None, RequestSize(1 * MIB, 0.5)),
    (None, True, None, RequestSize(1 * MIB, 0.5)), (None, False, Path("/dev/shm/f"), RequestSize(4 * MIB, 0.1)),
    ("m.bulk", False, Path("/dev/shm/f"), RequestSize(4 * MIB, 0.5)),
])
def test_who_waits_is_known_by_the_lane_or_the_servers_owner(lane, alone, shared, wanted):
    contract = ModelContract("m", "1", "d", "f", 4, "x", np.dtype(np.uint8), (3,), (), bulk_lane=lane,
                             shared_memory=shared)
    assert _request_size(contract, Servers(None, {"http://s": None}, "m", alone=alone)) == wanted


def test_a_billion_records_are_planned_without_listing_them():
    plan = plan_of(count=10**9, chunk=100)
    assert plan.unit_count == -(-10**9 // 32_700)
    assert plan.request_count > plan.unit_count
    assert plan.unit(plan.unit_count - 1).stop == 10**9


@pytest.mark.parametrize(("options", "wanted"), [
    ({"max_bytes_in_flight": 1000}, "over --max-bytes-in-flight 1,000: raise that to at least 78400"),
    ({"chunk_records": 150}, "multiple of the source's 100 records a chunk, such as 200"),
    ({"request_records": 100}, "multiple of the server's micro-batch, 64"),
    ({"request_records": 64 * 10_000}, "the most is"),
    ({"count": 10**9, "chunk": 1000, "chunk_records": 10**8}, "4,000,000,000 bytes, the most is 1,073,741,824: lower"),
    ({"count": 10**6, "chunk": 1, "chunk_records": 300_000}, "read from 300,000 objects, the most is 200,000: lower"),
    ({"count": 10**17}, "chunks, the most is 50,000,000: raise --chunk-records, or take fewer with --records"),
    ({"records": Records(5, 5)}, "0 <= A < B <= 1000"),
    ({"records": Records(0, 1001)}, "0 <= A < B <= 1000"),
])
def test_sizes_that_can_not_be_met_are_refused_with_both_numbers(options, wanted):
    with pytest.raises(UsageError, match=None) as refused:
        plan_of(**options)
    assert wanted in str(refused.value)


@pytest.mark.parametrize(("size", "micro_batch", "wanted"), [
    (100 * MIB, 1, "1 are 104,857,601 bytes, a reply has at most 62,914,560: one record has too many"),
    (10 * MIB, 10, "--micro-batch of at most 5"),
])
def test_a_micro_batch_that_no_reply_has_room_for_is_refused(size, micro_batch, wanted):
    with pytest.raises(DataError) as refused:
        plan_of(output=OutputGeometry("y", np.dtype(np.uint8), (size,)), micro_batch=micro_batch, chunk=1)
    assert wanted in str(refused.value)


def test_the_bounds_are_of_the_output_chunk_that_is_made():
    wide = OutputGeometry("y", np.dtype(np.float32), (1 << 20,))
    assert plan_of(10**6, 500_000, record=(1,), output=wide, records=Records(0, 15), micro_batch=1).chunk_records == 15
    with pytest.raises(UsageError, match="store the source in smaller chunks"):
        plan_of(10**6, 500_000, record=(1,), output=wide, micro_batch=1)


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="no records"):
        plan_of(count=0)


@given(st.integers(1, 4096), st.floats(1e-6, 1e4), st.integers(1, 1 << 20), st.booleans())
def test_no_request_that_a_run_makes_by_itself_takes_a_server_too_long(micro_batch, seconds, record_bytes, alone):
    size = RequestSize.at(shared_memory=True, alone=alone)
    records = default_request(record_bytes, 4, micro_batch, 65_536, seconds, size)
    assert records == micro_batch or 50 * records <= most_in_time(micro_batch, seconds)
