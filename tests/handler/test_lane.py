"""A worker in the bulk lane: what it says of it, and how it makes way."""

import json
import os
import subprocess
import sys

import pytest

from batch_handler.exchange import Exchange, Request
from batch_handler.lane import BULK_LANE, bulk_lane_of

# Prints nice, and whether the policy is SCHED_IDLE, of a thread that was there before, one that came after, the first.
THREADS = """
import os, threading
from batch_handler.lane import make_way

done = threading.Event()
threading.Thread(target=done.wait).start()
make_way()
threading.Thread(target=done.wait).start()
for thread in map(int, os.listdir("/proc/self/task")):
    print(os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread) == os.SCHED_IDLE)
done.set()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux")
def test_every_thread_of_the_worker_makes_way():
    done = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert done.stdout.split() == ["19", "True"] * 3


def test_metadata_names_the_bulk_lane_only_where_there_is_one(tiny):
    for lane in (None, "tiny.bulk"):
        reply = Exchange(tiny, bulk_lane=lane).read(Request(None, {}))
        parameters = json.loads(reply.body)["parameters"]
        assert parameters.get("bulk_lane") == lane
        assert parameters["fingerprint"] == tiny.fingerprint


def test_an_empty_name_is_none():
    assert [bulk_lane_of(environ) for environ in ({}, {BULK_LANE: ""}, {BULK_LANE: "m.bulk"})] == [None, None, "m.bulk"]
