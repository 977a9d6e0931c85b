"""What observers print where nobody reads for a while."""

import json
import os
import queue
import re
import threading
from contextlib import suppress

import pytest

from batch_client.cli.observers import LogLines, ProgressBar
from batch_client.cli.pack import command as pack
from batch_client.cli.stream import MOST_WAITING, PatientStream
from batch_client.events import (
    RecordsCast,
    ServerAway,
    ServerBack,
    ServerJoined,
    ServerLeftOut,
    SourceIsMasked,
    SourceIsPacked,
)
from batch_client.pipeline import execute, plan_run
from support.runs import records_of, services, source_of, spec
from support.simulated import SimulatedServer


class Screen:
    text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        """Nothing is held back."""

    def isatty(self):
        return False


def test_log_lines_that_are_dropped_are_whole_lines():
    reading, writing = os.pipe()
    stream = PatientStream(os.fdopen(writing, "w"))
    log = LogLines(stream)
    lines, read = 4 * MOST_WAITING // 200, []
    for number in range(lines):  # more than the pipe and the queue hold
        log(ServerLeftOut("http://s", f"{number} {'x' * 200}"))
    with os.fdopen(reading) as reader:
        thread = threading.Thread(target=lambda: read.extend(reader), daemon=True)
        thread.start()
        for number in range(lines, 2 * lines):
            log(ServerLeftOut("http://s", f"{number} {'x' * 200}"))
        stream.close()
        stream._thread.join(60)
        stream._target.close()  # which ends the reader
        thread.join(60)
    assert len(read) < 2 * lines
    numbers = [int(json.loads(line)["reason"].split()[0]) for line in read]
    assert numbers == sorted({*numbers})


def test_what_waits_for_a_reader_is_bounded_in_characters():
    reading, writing = os.pipe()
    stream = PatientStream(os.fdopen(writing, "w"))
    piece = "x" * (MOST_WAITING // 4)  # as a server's log comes, in whatever its model says in two seconds
    for _ in range(50):
        stream.write(piece)
        stream.write("")
    waiting = []
    with suppress(queue.Empty):
        while True:
            waiting.append(stream._queue.get_nowait())
    assert all(waiting)
    assert 0 < sum(map(len, waiting)) <= MOST_WAITING + len(piece)
    os.close(reading)  # which ends the thread's write
    stream.close()
    stream._thread.join(60)
    stream._target.close()


def test_what_becomes_of_servers_has_a_line_each():
    screen, reason = Screen(), "the connection broke: reset by peer"
    bar = ProgressBar(screen)
    bar(ServerAway("http://b", "the connection broke: reset\nby peer"))
    bar(ServerBack("http://b", 12.4))
    bar(ServerLeftOut("http://c", "http://c: can't be reached", asked_again=True))
    bar(ServerLeftOut("http://d", "http://d: another model"))
    bar(ServerJoined("http://c", 60.0, 64))
    assert screen.text.split("\n") == [
        "", f"http://b gives no sound answer ({reason}): it is tried again while the run goes on",
        "", "http://b answers again, after 12 s",
        "", "going on without a server: http://c: can't be reached; it is asked again while the run goes on",
        "", "going on without a server: http://d: another model", "", "http://c takes part from now on", ""]


def test_who_has_packed_numbers_is_told_of_flags_that_there_are():
    flags = {flag for option in pack.params for flag in option.opts}
    for event in (SourceIsPacked("in", 0.5, 1.0), RecordsCast("in", "uint8", "x", "float32")):
        assert {*re.findall(r"--[a-z-]+", str(event))} <= flags


@pytest.mark.parametrize(("dtype", "taken", "is_cast"), [
    ("uint8", "float32", True), ("bool", "float32", True), ("int32", "float64", True),
    ("uint8", "uint8", False), ("uint8", "int16", False), ("float32", "float64", False),
])
async def test_whole_numbers_for_a_model_of_floats_go_as_they_are_and_somebody_is_told(dtype, taken, is_cast):
    source = source_of(records_of(20, dtype=dtype), (10, 3))
    said = (f"memory://source: {dtype} records are sent as {taken}, as they are: a model that was trained on scaled "
            f"numbers needs an archive packed with --input x:{dtype}:SHAPE --scale NUMBER")
    for go in (plan_run, execute):
        told, screen, lines = [], Screen(), Screen()
        bar, log = ProgressBar(screen), LogLines(lines)
        await go(spec(), services(SimulatedServer(dtype=taken), source), (bar, log, told.append))
        bar.close()
        assert [str(event) for event in told if isinstance(event, RecordsCast)] == ([said] if is_cast else [])
        assert (said in screen.text) is is_cast
        assert ('"records are cast"' in lines.text) is is_cast


async def test_who_scores_a_number_that_stands_for_missing_values_is_told():
    source = source_of(records_of(20), (10, 3), attributes={"_FillValue": -2147483648})
    for go in (plan_run, execute):
        told, screen, lines = [], Screen(), Screen()
        bar, log = ProgressBar(screen), LogLines(lines)
        await go(spec(), services(SimulatedServer(), source), (bar, log, told.append))
        bar.close()
        found = [event for event in told if isinstance(event, SourceIsMasked)]
        assert found == [SourceIsMasked(source.url, -2147483648.0)]
        assert "-2147483648, which stands for missing values" in screen.text
        assert '"source is masked"' in lines.text
