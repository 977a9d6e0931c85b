"""The speed that `status` tells is of a stretch that is long enough to have one."""

import pytest

from batch_client.progress import _rate


@pytest.mark.parametrize(("times", "wanted"), [
    ([], None), ([100.0], None), ([100.0, 100.05], None), ([100.0, 109.0], None),
    ([100.0, 110.0], 5.0),
    ([100.0, 110.0, 110.0, 120.0], 3.75),  # two at one time are two
    ([0.0, 1000.0, 1020.0], 50 / 3 / 10),  # the first is of ten minutes ago
])
def test_the_rate_is_of_segments_of_at_least_ten_seconds(times, wanted):
    assert _rate(times, 100, rows=len(times)) == (wanted and pytest.approx(wanted))
