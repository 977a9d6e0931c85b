"""What observers print where nobody reads for a while."""

import json
import os
import threading

from batch_client.cli.observers import LogLines
from batch_client.cli.stream import MOST_WAITING, PatientStream
from batch_client.events import Stopping


def test_log_lines_that_are_dropped_are_whole_lines():
    reading, writing = os.pipe()
    stream = PatientStream(os.fdopen(writing, "w"))
    log = LogLines(stream)
    lines, read = 4 * MOST_WAITING, []
    for number in range(lines):  # more than the pipe and the queue hold
        log(Stopping(f"{number} {'x' * 200}"))
    with os.fdopen(reading) as reader:
        thread = threading.Thread(target=lambda: read.extend(reader), daemon=True)
        thread.start()
        for number in range(lines, 2 * lines):
            log(Stopping(f"{number} {'x' * 200}"))
        stream.close()
        stream._thread.join(60)
        stream._target.close()  # which ends the reader
        thread.join(60)
    assert len(read) < 2 * lines
    numbers = [int(json.loads(line)["reason"].split()[0]) for line in read]
    assert numbers == sorted({*numbers})
