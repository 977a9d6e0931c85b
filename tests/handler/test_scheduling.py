"""When and where a worker runs: what it says of the bulk lane, how it makes way there, and which cores it keeps to."""

import json
import os
import subprocess
import sys

import pytest

from batch_handler.exchange import Exchange, Request
from batch_handler.scheduling import BULK_LANE, CORES, bulk_lane_of

# Prints nice, and whether the policy is SCHED_IDLE, of a thread that was there before, one that came after, the first.
THREADS = """
import os, threading
from batch_handler.scheduling import make_way

done = threading.Event()
threading.Thread(target=done.wait).start()
make_way()
threading.Thread(target=done.wait).start()
for thread in map(int, os.listdir("/proc/self/task")):
    print(os.getpriority(os.PRIO_PROCESS, thread), os.sched_getscheduler(thread) == os.SCHED_IDLE)
done.set()
"""


# Keeps to cores as the environment says; prints those of each of its threads, before and after; then waits.
CORES_OF = """
import os, sys, threading
from batch_handler.scheduling import keep_to_cores

done = threading.Event()
threading.Thread(target=done.wait).start()
keep_to_cores(os.environ, int(sys.argv[1]))
threading.Thread(target=done.wait).start()
print([sorted(os.sched_getaffinity(int(thread))) for thread in os.listdir("/proc/self/task")], flush=True)
sys.stdin.read()
done.set()
"""
ALL = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


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


@pytest.fixture
def worker(tmp_path):
    """A function: starts a process of so many threads; returns it and the cores that all of its threads keep to."""
    started = []

    def start(threads=1, folder=tmp_path):
        process = subprocess.Popen([sys.executable, "-c", CORES_OF, str(threads)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True,
                                   env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), CORES: str(folder)})
        started.append(process)
        first, *others = json.loads(process.stdout.readline())
        assert others == [first, first]
        return process, first

    yield start
    for process in started:
        process.kill()
        process.communicate()


needs_cores = pytest.mark.skipif(len(ALL) < 2, reason="needs Linux and two cores")


@needs_cores
def test_workers_keep_to_cores_of_their_own_as_long_as_there_are_any(worker):
    assert [worker()[1] for _ in ALL] == [[core] for core in ALL]
    assert worker()[1] == ALL


@needs_cores
def test_a_worker_takes_the_cores_of_one_that_died(worker):
    (first, cores), _ = worker(), worker()
    first.kill()
    first.wait()
    assert worker()[1] == cores


@needs_cores
def test_a_worker_of_several_threads_keeps_to_as_many_cores(worker):
    assert worker(2)[1] == ALL[:2]
    assert worker(len(ALL))[1] == ALL, "more than are left"


@needs_cores
@pytest.mark.parametrize("folder", ["", "missing"])
def test_without_a_place_to_say_so_a_worker_uses_all_cores(worker, tmp_path, folder):
    assert worker(folder=folder and tmp_path / folder)[1] == ALL
