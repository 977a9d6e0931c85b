"""The speed that `status` tells is of a stretch that is long enough to have one."""

from dataclasses import replace

import pytest

from batch_client.progress import _rate, progress_of
from support.virtual import virtually
from support.world import World


@pytest.mark.parametrize(("times", "wanted"), [
    ([], None), ([100.0], None), ([100.0, 100.05], None), ([100.0, 109.0], None),
    ([100.0, 110.0], 5.0),
    ([100.0, 110.0, 110.0, 120.0], 3.75),  # two at one time are two
    ([0.0, 1000.0, 1020.0], 50 / 3 / 10),  # the first is of ten minutes ago
])
def test_the_rate_is_of_segments_of_at_least_ten_seconds(times, wanted):
    assert _rate([(time, 50) for time in times], 100) == (wanted and pytest.approx(wanted))


def test_the_rate_is_of_records_and_not_of_segments():
    """A thousand chunks were copied in large segments, and are scored one by one since."""
    copied, scored = [(10.0 + at / 10, 64_000) for at in range(15)], [(1000.0 + 10 * at, 1000) for at in range(41)]
    assert _rate(copied + scored, 100 * (15 * 64 + 41)) == pytest.approx(10.0)


@pytest.mark.parametrize("gone", ["_run/ledger/", "_run/generation"])
@virtually
async def test_what_is_published_is_told_by_its_manifest_whatever_became_of_its_ledger(gone):
    world = World(1)
    await world.live()
    before = await progress_of(world.output)
    for key in [key for key in world.output.objects if key.startswith(gone)]:
        del world.output.objects[key]
    now = await progress_of(world.output)
    assert (now.done, now.chunks_done, now.published) == (len(world.records), now.chunks, True)
    assert replace(now, records_per_s=None, writers=()) == replace(before, records_per_s=None, writers=())
