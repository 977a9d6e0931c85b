"""Counters: their sums are right, and they are told now and then."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from batch_handler.counts import Counts

NAMES = ("Batches", "Records")


class Metrics:
    """Stands for TorchServe's metrics cache: every line that it is told."""

    def __init__(self):
        self.lines = []
        self.threads = set()

    def add_counter(self, name, value, dimensions):
        assert dimensions == []
        dimensions.append("TorchServe appends to it")
        self.lines.append((name, value))
        self.threads.add(threading.current_thread().name)

    def sums(self):
        return {name: sum(value for key, value in self.lines if key == name) for name in NAMES}


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()


def test_without_seconds_each_batch_is_told_at_once_where_it_is_counted():
    metrics, counts = Metrics(), Counts(NAMES, seconds=0)
    counts.add(metrics, (1, 50))
    assert metrics.lines == [("Batches", 1), ("Records", 50)]
    counts.add(metrics, (1, 7))
    assert metrics.lines[2:] == [("Batches", 1), ("Records", 7)]
    assert metrics.threads == {threading.current_thread().name}


def test_what_was_counted_in_the_meantime_is_told_in_one_sum(monkeypatch):
    due = []

    def timer(seconds, tell, args):
        assert seconds == 0.5
        return SimpleNamespace(start=lambda: due.append(lambda: tell(*args)))

    monkeypatch.setattr(threading, "Timer", timer)
    metrics, counts = Metrics(), Counts(NAMES, seconds=0.5)
    for records in range(100):
        counts.add(metrics, (1, records))
    assert metrics.lines == []
    due.pop()()
    assert metrics.lines == [("Batches", 100), ("Records", 4950)]
    counts.add(metrics, (1, 3))
    due.pop()()
    assert metrics.lines[2:] == [("Batches", 1), ("Records", 3)]  # counted once, not again
    assert due == []


def test_nothing_is_told_where_nothing_was_counted():
    metrics, counts = Metrics(), Counts(NAMES, seconds=0.01)
    counts.add(metrics, (1, 1))
    assert until(lambda: len(metrics.lines) == 2)
    assert until(lambda: not any(isinstance(thread, threading.Timer) for thread in threading.enumerate()))
    assert len(metrics.lines) == 2


@pytest.mark.parametrize("seconds", [0, 0.001, 0.05])
def test_sums_are_right_whoever_counts_and_whenever_it_is_told(seconds):
    metrics, counts = Metrics(), Counts(NAMES, seconds=seconds)

    def count():
        for _ in range(500):
            counts.add(metrics, (1, 3))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = {"Batches": 4000, "Records": 12_000}
    assert until(lambda: metrics.sums() == wanted), metrics.sums()


def test_where_no_thread_can_be_started_counts_are_told_at_once():
    metrics, counts = Metrics(), Counts(NAMES, seconds=60)
    threading.stack_size(1 << 47)  # more than a process has addresses for
    try:
        counts.add(metrics, (1, 50))
        counts.add(metrics, (1, 7))
    finally:
        threading.stack_size(0)
    assert metrics.sums() == {"Batches": 2, "Records": 57}


def test_a_value_for_each_name_is_wanted():
    with pytest.raises(ValueError, match="zip"):
        Counts(NAMES).add(Metrics(), (1,))
