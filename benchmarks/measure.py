"""What every benchmark here needs: a median with its interval, what processes used, and what it ran on."""

from __future__ import annotations

import contextlib
import os
import platform
import random
import re
import signal
import statistics
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import psutil

from batch_client.tuning import ALLOCATORS, DEFAULT_ALLOCATOR

__all__ = ["ALLOCATOR", "Interval", "PeakMemory", "cpu_seconds", "family", "heading", "interval",
           "java_and_workers", "machine", "row", "seconds_without_core", "stamped", "today", "unwind_when_terminated"]

# What the embedded server sets for its workers: every tuned contender has it.
ALLOCATOR = ALLOCATORS[DEFAULT_ALLOCATOR]
LEAST_VALUES = 6  # of which all but one time in thirty-two the median is between
RESAMPLES = 10_000
SAMPLE_SECONDS = 0.25


class Interval(NamedTuple):
    """A median and its 95 % bootstrap interval."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def interval(values: Sequence[float]) -> Interval:
    """The median with a percentile bootstrap interval (Efron 1979), seeded, so that it can be computed again. Of fewer
    than six values it is from the least to the largest, which covers the median less often: 75 % of the time with
    three, 94 % with five.
    """
    if len(values) < LEAST_VALUES:
        return Interval(statistics.median(values), min(values), max(values))
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(RESAMPLES))
    return Interval(statistics.median(values), medians[RESAMPLES // 40], medians[-RESAMPLES // 40])


def today() -> str:
    return f"{datetime.now(UTC):%Y-%m-%d}"


def unwind_when_terminated() -> None:
    """Have SIGTERM end the benchmark as an error does: with the servers that it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def machine() -> str:
    """Cores, processor and vector units of this machine, such as `2 cores, AMD EPYC with AVX-512, no GPU`."""
    said = ""
    with contextlib.suppress(OSError):
        said = Path("/proc/cpuinfo").read_text("utf-8")
    units = next((name for flag, name in (("avx512f", "AVX-512"), ("avx2", "AVX2")) if f" {flag}" in said), "")
    named = re.search(r"^model name\s*: *(.+)$", said, re.MULTILINE)
    processor = named[1] if named else platform.machine()
    gpu = "with a GPU" if Path("/dev/nvidia0").exists() else "no GPU"
    return f"{os.cpu_count()} cores, {processor}{f' with {units}' if units else ''}, {gpu}"


def row(*cells: object) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def heading(*titles: str) -> str:
    """The first two rows of a Markdown table."""
    return f"{row(*titles)}\n{row(*['---'] * len(titles))}"


def stamped(*cells: object) -> str:
    """A row that begins with the date and the machine."""
    return row(today(), machine(), *cells)


def family(pid: int) -> list[psutil.Process]:
    """A process and everything below it that runs now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def java_and_workers(pid: int) -> tuple[list[psutil.Process], list[psutil.Process]]:
    """TorchServe's own process and those with the model, below the process that started it."""
    below = family(pid)[1:]
    java = [one for one in below if one.name() == "java"]
    workers = [one for one in below if any("model_service_worker" in word for word in one.cmdline())]
    assert java, below
    assert workers, below
    return java, workers


def cpu_seconds(processes: Sequence[psutil.Process]) -> float:
    """User and system seconds so far, those of ended children included; to 10 ms a process (Linux's clock tick)."""
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def seconds_without_core(processes: Sequence[psutil.Process]) -> float:
    """Seconds so far that threads of these processes could have run and waited for a core, whoever had it (Linux: run
    delay of Documentation/scheduler/sched-stats.rst; elsewhere 0). Of threads that have not ended.
    """
    waited = 0
    for process in processes:
        for stat in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):  # a thread that ended just now
                waited += int(stat.read_text("ascii").split()[1])
    return waited / 1e9


@dataclass
class PeakMemory:
    """The most memory that a process and all below it had at one time, in bytes, each shared page counted once (PSS).

    Looking costs the machine some milliseconds a process each time, so no run whose time counts is watched.
    """

    pid: int
    peak: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def watched(self) -> Iterator[PeakMemory]:
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield self
        finally:
            self._over.set()
            watcher.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            self.peak = max(self.peak, sum(_pss(process) for process in family(self.pid)))


def _pss(process: psutil.Process) -> int:
    try:
        pages: Mapping[str, int] = process.memory_full_info()._asdict()
    except psutil.Error:
        return 0  # it has ended since it was listed
    return pages.get("pss", pages["uss"])
