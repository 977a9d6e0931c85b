"""Records in pieces are the same records as in one array, however they are cut, sliced and put together."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_client.pieces import Pieces
from support.runs import records_of

COUNT = 20
CUTS = st.lists(st.integers(0, COUNT), max_size=6).map(sorted)
ENDS = st.integers(-COUNT - 2, COUNT + 2) | st.none()


def cut(records: np.ndarray, cuts: list[int]) -> Pieces:
    return Pieces(np.split(records, cuts))


@given(CUTS, ENDS, ENDS)
def test_a_slice_is_a_view_of_the_same_records(cuts, start, stop):
    records = records_of(COUNT)
    found = cut(records, cuts)[start:stop]
    np.testing.assert_array_equal(found.joined(), records[start:stop])
    assert (len(found), found.nbytes) == (len(records[start:stop]), records[start:stop].nbytes)
    assert all(np.shares_memory(array, records) for array in found.arrays if len(array))
    assert all(len(array) for array in found.arrays) or len(found.arrays) == 1
    np.testing.assert_array_equal(np.asarray(found), records[start:stop])


@given(CUTS, CUTS, st.integers(-COUNT, COUNT - 1))
def test_pieces_are_put_together_changed_and_asked_for_one_record(cuts, others, row):
    records = records_of(COUNT)
    both = cut(records, cuts) + cut(records[::-1], others)
    np.testing.assert_array_equal(both.joined(), np.concatenate([records, records[::-1]]))
    np.testing.assert_array_equal(both.each(lambda array: array + 1).joined(), both.joined() + 1)
    for number in (row, np.int64(row)):
        np.testing.assert_array_equal(cut(records, cuts)[number], records[row])


@pytest.mark.parametrize("row", [COUNT, -COUNT - 1])
def test_a_record_that_is_not_there_is_an_index_error(row):
    with pytest.raises(IndexError):
        cut(records_of(COUNT), [7])[row]


def test_a_step_is_refused():
    with pytest.raises(ValueError, match="without a step"):
        cut(records_of(COUNT), [7])[::2]


@pytest.mark.parametrize(("count", "compact"), [(COUNT, True), (COUNT - 2, True), (COUNT - 3, False), (1, False)])
def test_a_view_of_less_than_nearly_all_is_not_compact_and_is_copied(count, compact):
    records = records_of(COUNT).copy()
    for view in (records[:count], records[-count:], records.reshape(COUNT, -1)[:count], records[:][:count]):
        kept = Pieces([view]).compact().joined()
        np.testing.assert_array_equal(kept, view)
        assert np.shares_memory(kept, records) == compact


def test_one_record_of_numbers_is_a_number():
    assert Pieces([np.arange(3), np.arange(3, 5)])[4] == 4
