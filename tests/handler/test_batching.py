"""Two laws, for any server batch: every record exactly once, and a bulk record in its place."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from batch_handler.batching import Load, Span, Stack, gather, plan, scatter

loads = st.lists(st.builds(Load, st.integers(0, 40), st.none() | st.integers(0, 1000)), min_size=0, max_size=8)


@given(loads, st.integers(1, 17), st.integers(1, 4))
def test_every_record_is_in_exactly_one_place(given_loads, micro_batch, most):
    seen = [np.zeros(load.records, int) for load in given_loads]
    for stack in plan(given_loads, micro_batch, most):
        places = np.zeros(stack.size, int)
        records = sum(span.count for span in stack.spans)
        assert 1 <= records <= stack.size <= micro_batch * most
        for span in stack.spans:
            places[span.place : span.place + span.count] += 1
            seen[span.request][span.row : span.row + span.count] += 1
        assert places.max() == 1
        assert places.sum() == records
    for count in seen:
        assert (count == 1).all()


@given(loads, st.integers(1, 17), st.integers(1, 4))
def test_a_bulk_record_has_its_place_and_no_neighbour_of_another_request(given_loads, micro_batch, most):
    for stack in plan(given_loads, micro_batch, most):
        bulk = [span for span in stack.spans if given_loads[span.request].first_row is not None]
        if not bulk:
            assert stack.size == micro_batch or (stack.size & (stack.size - 1) == 0 and stack.size < micro_batch)
            continue
        assert len(stack.spans) == 1
        (span,) = bulk
        assert span.place % micro_batch == (given_loads[span.request].first_row + span.row) % micro_batch
        # Whole micro-batches, none of which is empty.
        assert stack.size % micro_batch == 0
        assert span.place < micro_batch
        assert stack.size - micro_batch < span.place + span.count <= stack.size


@given(st.integers(0, 60), st.integers(0, 60), st.integers(1, 9), st.integers(1, 4))
def test_places_do_not_depend_on_how_a_run_is_cut_into_requests(records, cut, micro_batch, most):
    def placed(parts):
        return {
            (first + span.row + i): (span.place + i) % micro_batch
            for first, count in parts
            for stack in plan([Load(count, first)], micro_batch, most)
            for span in stack.spans
            for i in range(span.count)
        }

    cut = min(cut, records)
    assert placed([(0, records)]) == placed([(0, cut), (cut, records - cut)])


@given(loads, st.integers(1, 17), st.integers(1, 4))
def test_gathered_and_scattered_records_come_back(given_loads, micro_batch, most):
    sources = [np.arange(load.records, dtype=np.int64) + 1000 * (index + 1) for index, load in enumerate(given_loads)]
    targets = [np.zeros_like(source) for source in sources]
    slot = np.full(micro_batch * most, -1, np.int64)
    for stack in plan(given_loads, micro_batch, most):
        gather(stack, sources, slot)
        taken = {place for s in stack.spans for place in range(s.place, s.place + s.count)}
        assert all(slot[place] == 0 for place in range(stack.size) if place not in taken)
        scatter(stack, slot, targets)
    for source, target in zip(sources, targets, strict=True):
        np.testing.assert_array_equal(source, target)


def test_the_plan_of_a_small_server_batch():
    assert plan([Load(3), Load(2, first_row=7), Load(2)], 4) == (
        Stack(4, (Span(0, 0, 0, 3), Span(2, 0, 3, 1))),
        Stack(1, (Span(2, 1, 0, 1),)),
        Stack(4, (Span(1, 0, 3, 1),)),
        Stack(4, (Span(1, 1, 0, 1),)),
    )


def test_bulk_micro_batches_are_stacked():
    assert plan([Load(11, first_row=2)], 4, 2) == (
        Stack(8, (Span(0, 0, 2, 6),)),
        Stack(8, (Span(0, 6, 0, 5),)),
    )
