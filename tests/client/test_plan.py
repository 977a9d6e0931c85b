import numpy as np
import pytest
from hypothesis import given

from batch_client.errors import DataError, UsageError
from batch_client.plan import OutputGeometry
from batch_client.spec import MIB, Records
from support.plans import plan_of, plans


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
def test_requests_tile_each_unit_inside_one_grid_chunk_and_keep_the_places_of_the_whole_source(plan):
    total = 0
    for unit in plan.units():
        at = unit.start
        for span in plan.requests(unit.start, unit.stop):
            assert span.start == at
            assert 0 < span.count <= plan.request_records
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
    assert plan_of(count=200_000).grid_records == 8100
    assert plan_of(count=200_000, record=(224, 224, 3), chunk=8).grid_records == 64 * MIB // (224 * 224 * 3) // 8 * 8
    wide = OutputGeometry("map", np.dtype(np.float32), (512, 512))
    assert plan_of(output=wide, chunk=3).grid_records == 6
    assert plan_of(chunk=20_000, count=100_000).grid_records == 20_000


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


def test_a_billion_records_are_planned_without_listing_them():
    plan = plan_of(count=10**9, chunk=100)
    assert plan.unit_count == -(-(10**9) // 8100)
    assert plan.request_count > plan.unit_count
    assert plan.unit(plan.unit_count - 1).stop == 10**9


@pytest.mark.parametrize(("options", "wanted"), [
    ({"max_bytes_in_flight": 1000}, "over --max-bytes-in-flight 1,000: raise that to at least 78400"),
    ({"chunk_records": 150}, "multiple of the source's 100 records a chunk, such as 200"),
    ({"request_records": 100}, "multiple of the server's micro-batch, 64"),
    ({"request_records": 64 * 10_000}, "the most is"),
    ({"records": Records(5, 5)}, "0 <= A < B <= 1000"),
    ({"records": Records(0, 1001)}, "0 <= A < B <= 1000"),
])
def test_sizes_that_can_not_be_met_are_refused_with_both_numbers(options, wanted):
    with pytest.raises(UsageError, match=None) as refused:
        plan_of(**options)
    assert wanted in str(refused.value)


def test_an_empty_source_is_refused():
    with pytest.raises(DataError, match="no records"):
        plan_of(count=0)
