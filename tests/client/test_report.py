"""The page of a run: what is gathered stays small, what is drawn stays inside, what others say stays text."""

import asyncio
import io
import itertools
import random
import re
import sys
import tracemalloc
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from batch_client.errors import DataError
from batch_client.events import (
    ChunkWritten,
    Published,
    RecordsScored,
    RequestDone,
    RequestRetried,
    RequestSent,
    RunStarted,
    ServerAway,
    ServerJoined,
    ServerLeftOut,
)
from batch_client.pieces import Pieces
from batch_client.pipeline import execute
from batch_client.plan import Geometry, OutputGeometry, make_plan
from batch_client.report import Report, render
from batch_client.report.charts import HEIGHT, WIDTH, columns, nice_ticks, shares_bar
from batch_client.report.collect import MOST_NAMES, MOST_SAMPLES, MOST_SCORED_BYTES, MOST_SCORES
from batch_client.report.page import _rates
from batch_client.report.sketches import EvenSample, LogHistogram, Timeline
from batch_client.report.thumbnail import thumbnail
from batch_client.spec import RunSpec
from support.faulty import Fate
from support.simulated import SimulatedServer
from support.virtual import virtually
from support.world import World

SVG = "{http://www.w3.org/2000/svg}"
HTML = "{http://www.w3.org/1999/xhtml}"
NASTY = "<script>alert('x')</script>&\x00\x1b\n\"' http://evil.example/x.png ]]>\ud800\udcff\uffff"
positive = st.floats(1e-6, 1e6)


def parsed(page):
    """The page as XML: everything that is opened is closed, and nothing is there that may not be."""
    # As bytes: what can't be encoded can't be written either.
    return ET.fromstring(page.partition("\n")[2].encode())  # noqa: S314 - our own page


@given(st.lists(st.tuples(st.floats(0, 1e7), st.sampled_from("ab"), st.integers(1, 9)), max_size=40))
def test_a_timeline_keeps_every_amount_at_its_time_and_its_size(added):
    line = Timeline(most=8, width=0.5)
    for at, name, amount in added:
        line.add(at, name, amount)
    assert len(line.buckets) <= 8
    for name in "ab":
        assert sum(line.amounts(name)) == sum(amount for _, other, amount in added if other == name)
    for at, name, _ in added:
        assert line.amounts(name)[int(at / line.width)] > 0


@given(st.lists(positive, min_size=1, max_size=200), st.floats(0, 100))
def test_a_percentile_is_off_by_little(values, percent):
    histogram = LogHistogram()
    for value in values:
        histogram.add(value)
    wanted = np.percentile(values, percent, method="inverted_cdf")
    assert histogram.percentile(percent) == pytest.approx(wanted, rel=0.0222)
    assert sum(histogram.coarser(4).values()) == len(values)


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(2, 16))
def test_a_sample_is_even_and_small_however_it_comes(counts, most):
    sample, seen = EvenSample(most), 0
    for count in counts:
        numbers = range(seen, seen + count)
        for at in sample.take(count):
            sample.items.append(numbers[at])
        seen += count
        assert len(sample.items) <= most
    if seen:
        apart = sample.items[1] if len(sample.items) > 1 else max(seen, 1)
        assert sample.items == list(range(0, seen, apart))
        assert len(sample.items) * 2 >= min(seen, most)


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (1, 28, 28), (9, 40, 3), (3, 9, 40), (300, 200, 3)])
def test_a_thumbnail_is_the_record(shape):
    record = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    found = np.asarray(Image.open(io.BytesIO(thumbnail(record))))
    wanted = np.moveaxis(record, 0, -1) if shape[0] == 3 else record.squeeze()
    step = 4 if shape[0] == 300 else 1
    np.testing.assert_array_equal(found, wanted[::step, ::step])


@pytest.mark.parametrize("record", [
    np.zeros(784, np.uint8), np.zeros((28, 28), np.float32), np.zeros((5, 28), np.uint8),
    np.zeros((28, 28, 4), np.uint8), np.uint8(3),
])
def test_a_record_that_is_no_picture_has_no_thumbnail(record):
    assert thumbnail(np.asarray(record)) is None


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9), st.integers(1, 10))
@example(900719925.9882812, 1e-06, 5)
def test_ticks_are_few_and_inside(low, width, most):
    ticks = nice_ticks(low, low + width, most)
    assert len(ticks) <= most + 1
    # Of an axis far from zero a tick is no more exact than its floats.
    slack = width * 1e-6 + np.spacing(abs(low) + width)
    assert all(low - slack <= tick <= low + width + slack for tick in ticks)


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False),
       st.integers(1, 10))
@example(0.0, sys.float_info.max, 4)
@example(-sys.float_info.max, sys.float_info.max, 8)
@example(-sys.float_info.max, sys.float_info.max, 1)
@example(0.0, 5e-324, 5)
@example(1e300, float(np.nextafter(1e300, np.inf)), 5)
@example(3.5000000005000004e16, 4.300000001300001e16, 4)
def test_any_two_numbers_have_ticks(one, other, most):
    ticks = nice_ticks(one, other, most)
    assert 1 <= len(ticks) <= most + 3
    assert all(np.isfinite(ticks))
    if most >= 4 and other / 2 - one / 2 > max(1e-299, 1e-6 * max(abs(one), abs(other))):
        assert len(ticks) >= 2


amounts = st.floats(0, 1e9)


@given(data=st.data(), count=st.integers(0, 50), marks=st.lists(st.floats(0, 1), max_size=3),
       level=st.none() | st.floats(5e-324, sys.float_info.max))
def test_nothing_is_drawn_outside_a_chart(data, count, marks, level):
    series = [(NASTY, data.draw(st.lists(amounts, min_size=count, max_size=count))) for _ in range(2)]
    chart = ET.fromstring(columns(  # noqa: S314 - our own chart
        series, x_label="x", y_label=NASTY, x_ticks=[(0, "0"), (1, "1")], marks=[(mark, "m") for mark in marks],
        level=level and (level, "l")).encode())
    height = float(chart.get("viewBox").split()[3])
    for box in chart.iter(f"{SVG}rect"):
        x, y, wide, high = (float(box.get(name)) for name in ("x", "y", "width", "height"))
        assert 0 <= x <= x + wide <= WIDTH + 0.1
        assert -0.1 <= y <= y + high <= height
    for line in chart.iter(f"{SVG}line"):
        assert 0 <= float(line.get("y1")) <= height
    assert height < 2 * HEIGHT


def test_shares_fill_their_bar_and_small_ones_are_left_out():
    chart = ET.fromstring(shares_bar([("a", 0.6), ("b", 0.397), ("c", 0.003)]))  # noqa: S314 - our own chart
    bars = [box for box in chart.iter(f"{SVG}rect") if box.get("height") == "34"]
    assert [float(box.get("width")) for box in bars] == pytest.approx([0.6 * WIDTH, 0.397 * WIDTH], abs=0.06)


def started(output="memory://out"):
    """The event of a run over 1,000 records; its plan does not matter here."""
    outputs = (OutputGeometry("scores", np.dtype(np.float32), (4,)),)
    spec = RunSpec(input="i", output=output, endpoints=("http://s",), model="m")
    plan = make_plan(spec, Geometry((1000, 12, 12), np.dtype(np.uint8), 100), np.dtype(np.uint8), outputs, 4)
    return RunStarted(plan, output, NASTY, NASTY, 0, NASTY, 8, 90.0, plan.count, 0)


def scored(start, rng, count=40):
    scores = rng.random((count, 4), np.float32)
    status = np.zeros(count, np.uint8)
    scores[3], status[3], status[5] = np.nan, 2, 1
    images = rng.integers(0, 256, (count, 12, 12), np.uint8)
    return RecordsScored(start, Pieces([images[:7], images[7:]]), {"scores": scores}, status)


def reported(seconds, steps, names=1):
    """A report of a run of `steps` requests over `seconds`."""
    now, rng = [0.0], np.random.default_rng(1)
    report = Report(NASTY, lambda: now[0], lambda: 0.0)
    report(started())
    for step in range(steps):
        now[0] = seconds * step / steps
        report(RequestSent(f"http://{step % names}", 40))
        report(RequestRetried(f"http://{step % names}", f"reason {step % names}: {NASTY}", 0.1, 0.01))
        report(RequestSent(f"http://{step % names}", 40))
        now[0] += 0.01
        report(RequestDone(f"http://{step % names}", 40, 1, 1, 10.0 ** rng.uniform(-3, 2), 5.0))
        report(scored(step * 40, rng))
        report(ChunkWritten(step, 40, 1, 100, 10))
    return report


@pytest.mark.parametrize("found", [1, 2, 7, 8, 9, 15, 16])
def test_samples_are_from_the_whole_run_and_as_many_as_there_is_room_for(found):
    data = reported(60.0, 50).data()
    samples = [replace(data.samples[0], index=1000 + number) for number in range(found)]
    rows = [["".join(cell.itertext()) for cell in row] for row in parsed(render(replace(data, samples=samples))).iter(
        f"{HTML}tr")]
    shown = [row[0] for row in rows if row and row[0].startswith("1,0")]
    assert len(set(shown)) == min(found, 8)
    assert (shown[0], shown[-1]) == ("1,000", f"{999 + found:,}")


def test_what_others_say_is_text_and_nothing_is_loaded():
    report = reported(60.0, 50)
    report(Published(f"memory://{NASTY}", "sha256:root"))
    report(ServerLeftOut("http://two", f"http://two: {NASTY}"))
    report(ServerLeftOut("http://late", "http://late: can't be reached"))
    assert "of the ceiling" in "".join(parsed(render(report.data(NASTY))).itertext())
    report(ServerJoined("http://late", 60.0, 64))
    assert report.data().started.ceiling is None
    report(ServerAway("http://two", NASTY))
    page = render(report.data(NASTY))
    root = parsed(page)
    assert "script" not in {element.tag.rpartition("}")[2] for element in root.iter()}
    for element in root.iter():
        assert not any(name.startswith("on") for name in element.keys())  # noqa: SIM118 - an element is no dict
        assert element.get("href") is None
        assert element.get("src", "data:image/png;base64,").startswith("data:image/png;base64,")
    text = "".join(root.itertext())
    assert "alert('x')" in text
    assert "The run went on without a server: http://two: <script>alert('x')" in text
    cells = [["".join(cell.itertext()) for cell in row] for row in root.iter(f"{HTML}tr")]
    assert ["http://two", "0", "0", "0", "1"] in cells
    assert "http://late" not in text
    assert "Limited by" in text
    assert "of the ceiling" not in text
    # The clock of a request begins before there is a connection for it.
    assert "From asking for a connection to the last byte" in text
    assert len([1 for _ in root.iter(f"{SVG}svg")]) == 5


def test_a_report_stays_small_however_long_the_run():
    long = reported(1e7, 3000, names=100)
    for number in range(100):
        long(ServerLeftOut(f"http://{number}", f"http://{number}: gone"))
    data = long.data()
    assert len(data.left_out) == MOST_NAMES
    assert f"The run went on without a server: and {100 - MOST_NAMES} more" in render(data)
    assert len(data.timeline.buckets) <= 240
    assert len(data.timeline.names()) <= MOST_NAMES + 2
    assert len(data.servers) <= MOST_NAMES + 1
    assert len(data.latency.counts) <= 640
    assert len(data.scores) <= MOST_SCORES
    assert len(data.samples) <= MOST_SAMPLES
    assert sum(data.statuses) == 3000 * 40
    assert data.retries == sum(server.retries for server in data.servers.values()) == 3000
    assert len(render(data)) < 300_000


@settings(max_examples=40)
@given(data=st.data(), shape=st.lists(st.integers(0, 3), max_size=3), record=st.lists(st.integers(0, 9), max_size=3),
       kind=st.sampled_from(["f4", "f2", "i8", "u1", "?"]))
def test_predictions_of_any_shape_are_gathered(data, shape, record, kind):
    report = Report("x", lambda: 1.0, lambda: 0.0)
    report(started())
    seen = 0
    for count in data.draw(st.lists(st.integers(1, 3 * MOST_SCORES), max_size=8)) + [1] * 40:
        report(RecordsScored(seen, Pieces([np.zeros((count, *record), np.uint8)]),
                             {"a": np.ones((count, *shape), kind)}, np.zeros(count, np.uint8)))
        seen += count
    gathered = report.data()
    assert gathered.statuses[0] == seen
    assert len(gathered.scores) == 0 if kind in ("i8", "u1", "?") or 0 in shape else set(gathered.scores) == {1.0}
    parsed(render(gathered))


def all_of(*values):
    return st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.sampled_from(values), max_size=20)


@given(st.sampled_from([0.0, -1.0, 1e-320, -5e-324, 0.3, 3.7, 1e15, 1e300, sys.float_info.max, -sys.float_info.max])
       .flatmap(lambda value: all_of(value, float(np.nextafter(value, 0.0)), -value)))
@example([sys.float_info.max, -sys.float_info.max])
@example([3.7, float(np.nextafter(3.7, 4))])
def test_scores_of_any_value_are_drawn(values):
    report = Report("x", itertools.count(1.0).__next__, lambda: 0.0)
    report(started())
    report(RequestSent("http://s", 1))
    report(RequestDone("http://s", 1, 1, 1, 1.0, 5.0))
    report(RecordsScored(0, Pieces([np.zeros((len(values), 2), np.uint8)]), {"\ud800": np.array(values, np.float64)},
                         np.zeros(len(values), np.uint8)))
    data = report.data()
    np.testing.assert_array_equal(data.scores, [value for value in values if np.isfinite(value)])
    root = parsed(render(data))
    if len(data.scores) > 1:
        assert "At least half of the records score" in "".join(root.itertext())
    assert not {"nan", "inf", "-inf"} & {value for element in root.iter() for value in element.attrib.values()}


def of_run(seconds, requests, records=4, publishing=0.0):
    """The report of a steady run: as many records with each request, evenly in time; then it is published."""
    now, rng = [0.0], np.random.default_rng(1)
    report = Report("x", lambda: now[0], lambda: 0.0)
    report(started())
    for step in range(requests):
        now[0] = seconds * (step + 1) / requests
        report(RequestSent("http://s", records))
        report(RequestDone("http://s", records, 1, 1, 1.0, 5.0))
        report(RecordsScored(step * records, Pieces([np.zeros((records, 2), np.uint8)]),
                             {"y": rng.random((records, 3), np.float32)}, np.zeros(records, np.uint8)))
        report(ChunkWritten(step, records, 0, 1, 1))
    now[0] += publishing
    report(Published("memory://out", "sha256:root"))
    return report


@pytest.mark.parametrize("publishing", [0.0, 6.0, 60.0])
def test_the_last_column_is_as_high_as_the_others_however_long_publishing_takes(publishing):
    _, rates = _rates(of_run(100.0, 400, publishing=publishing).data())
    assert rates == pytest.approx([16.0] * len(rates), rel=0.3)


def test_an_outage_at_the_end_of_a_run_that_gave_up_is_in_its_charts():
    data = replace(of_run(100.0, 400).data("no request was answered"), published=None, seconds=200.0)
    width, rates = _rates(data)
    assert width * len(rates) == pytest.approx(200.0, rel=0.05)
    assert rates[: len(rates) // 3] == pytest.approx([16.0] * (len(rates) // 3), rel=0.3)
    assert not any(rates[len(rates) // 2 + 2:])


@given(st.floats(0.5, 1e5), st.integers(1, 600))
def test_the_best_speed_is_no_less_than_the_average_and_of_a_steady_run_not_much_more(seconds, requests):
    text = "".join(parsed(render(of_run(seconds, requests).data())).itertext())
    average, best = re.search(r"(\S+) records/s on average, (\S+) at best", text).groups()
    average, best = (float(figure.replace(",", "")) for figure in (average, best))
    assert average == pytest.approx(4 * requests / seconds, rel=0.01, abs=0.5)
    assert best >= average * 0.99
    if requests > 8 * 6:
        assert best <= average * 1.6


def test_a_slow_model_has_a_speed():
    text = "".join(parsed(render(of_run(60.0, 20, records=1).data())).itertext())
    assert "0.333 records/s on average" in text


def test_of_equal_scores_no_half_is_above_another():
    report = Report("x", itertools.count(1.0).__next__, lambda: 0.0)
    report(started())
    report(RequestSent("http://s", 1))
    report(RequestDone("http://s", 1, 1, 1, 1.0, 5.0))
    report(RecordsScored(0, Pieces([np.zeros((10, 2), np.uint8)]), {"y": np.ones((10, 1), np.float32)},
                         np.zeros(10, np.uint8)))
    assert "At least half of the records score 1 or more" in "".join(parsed(render(report.data())).itertext())


def test_large_outputs_are_neither_copied_nor_cast_nor_all_looked_at():
    """Maps of 512 x 512 floats, 64 in a request: the highest of each is found in place."""
    report = Report("x", lambda: 1.0, lambda: 0.0)
    report(started())
    maps = np.ones((64, 512, 512), np.float32)
    maps[1, 100, 100] = 7.0
    event = RecordsScored(0, Pieces([np.zeros((64, 3), np.uint8)]), {"maps": maps}, np.zeros(64, np.uint8))
    tracemalloc.start()
    try:
        report(event)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < maps[0].nbytes
    data = report.data()
    # Every fourth of 64: what is looked at of one event is bounded.
    assert len(data.scores) * maps[0].nbytes <= MOST_SCORED_BYTES
    assert len(data.scores) == 16
    for start in range(64, 640, 64):
        report(RecordsScored(start, event.records, event.outputs, event.status))
    assert 8 <= len(report.data().scores) <= 16


@settings(max_examples=30)
@given(steps=st.integers(0, 6), seconds=st.floats(1e-3, 1e6))
def test_a_page_can_be_made_at_any_moment(steps, seconds):
    parsed(render(reported(seconds, steps).data("stopped")))


@virtually
async def test_a_report_agrees_with_the_summary():
    world = World(7)
    report = Report("memory://source", asyncio.get_running_loop().time, lambda: 0.0)
    fate = Fate(random.Random(3), steps=40, faults=16, kinds=Fate.SERVER)
    gathered, summary = report.data, await execute(world.spec(), world.services(fate), (report,))
    data = gathered()
    assert (data.stored, data.requests, data.retries) == (summary.scored, summary.requests, summary.retries)
    assert data.retries > 0
    assert data.seconds == pytest.approx(summary.seconds, abs=1e-3)
    assert data.bottleneck.limit.value == summary.limited_by
    highest = world.server.expected(world.records, 8).max(1)
    np.testing.assert_array_equal(np.sort(data.scores), np.sort(highest.astype(np.float64)))
    for sample in data.samples:
        assert sample.highest == highest[sample.index]
    assert summary.root in "".join(parsed(render(data)).itertext())


@virtually
async def test_a_run_that_fails_has_a_page_that_says_so():
    class Choking(SimulatedServer):
        def answer(self, body, header_length):
            return super().answer(b"", 0) if bytes(world.records[37]) in body[header_length:] else super().answer(
                body, header_length)

    world = World(1, server=Choking(seconds=0.01))
    world.records[37] = (201, 202, 203)
    world.source.objects = World(1, records=world.records).source.objects
    report = Report("memory://source", asyncio.get_running_loop().time, lambda: 0.0)
    with pytest.raises(DataError) as caught:
        await execute(world.spec(), world.services(), (report,))
    data = report.data(str(caught.value))
    assert (data.statuses[1], data.held, data.published) == (1, 1, None)
    text = "".join(parsed(render(data)).itertext())
    assert "ended before its output was published: 1 record failed" in text
