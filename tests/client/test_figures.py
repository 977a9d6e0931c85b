"""Figures that people read: of any size, and on an axis each another."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batch_client.figures import axis_labels, counted, number, percent, significant
from batch_client.report.charts import nice_ticks


@pytest.mark.parametrize(("value", "said"), [
    (0, "0"), (0.3333, "0.333"), (12.0, "12"), (999.6, "1,000"), (1234.5, "1,234"), (1e6, "1,000,000"), (3e-5, "3e-05"),
])
def test_numbers_of_any_size_are_read_at_once(value, said):
    assert number(value) == said


@pytest.mark.parametrize(("low", "high", "said"), [
    (1000.0, 1000.8, ["1,000.0", "1,000.2", "1,000.4", "1,000.6", "1,000.8"]),
    (100.0, 100.05, ["100.00", "100.01", "100.02", "100.03", "100.04", "100.05"]),
    (0.0, 1.0, ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
])
def test_an_axis_has_as_many_decimals_as_tell_its_ticks_apart(low, high, said):
    assert axis_labels(nice_ticks(low, high)) == said


@given(st.floats(-1e12, 1e12), st.floats(1e-3, 1e12))
def test_no_two_ticks_have_one_label(low, width):
    labels = axis_labels(nice_ticks(low, low + width))
    assert len({*labels}) == len(labels)


def test_an_empty_axis_has_no_labels():
    assert axis_labels([]) == []


@given(st.floats(0, 1))
def test_a_share_is_never_more_than_it_is(share):
    assert percent(share) == "100 %" if share == 1 else float(percent(share).removesuffix(" %")) <= share * 100 + 1e-9


@given(st.floats(1e-9, 1e12))
def test_a_rate_keeps_its_digits_however_small(rate):
    assert significant(rate) == pytest.approx(rate, rel=1e-5)
    assert significant(rate) > 0
    assert math.isfinite(significant(rate))


@pytest.mark.parametrize(("count", "words", "said"), [
    (0, ("chunk",), "0 chunks"), (1, ("chunk",), "1 chunk"), (2_000, ("chunk",), "2,000 chunks"),
    (1, ("retry", "retries"), "1 retry"), (0, ("retry", "retries"), "0 retries"),
])
def test_a_count_has_its_noun(count, words, said):
    assert counted(count, *words) == said
