"""When and where a worker's threads run: behind online queries in a server's bulk lane, and on cores of their own.

Rule: what is said here decides when and where a worker runs, never what it computes; so it is no part of the numerics,
and both lanes have one fingerprint. Where the system refuses, the worker goes on as it is: slower is no reason not to
serve.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["BULK_LANE", "CORES", "bulk_lane_of", "keep_to_cores", "make_way"]

# Environment: the name under which the server has the model for bulk runs. All workers of a server see the same.
BULK_LANE = "BATCH_HANDLER_BULK_LANE"
# Environment: a folder of this server alone, in which its workers say which cores they keep to.
CORES = "BATCH_HANDLER_CORES"
LOWEST_PRIORITY = 19

_log = logging.getLogger(__name__)


def bulk_lane_of(environ: Mapping[str, str]) -> str | None:
    """The name of the server's bulk lane; None where one lane is for all."""
    return environ.get(BULK_LANE) or None


def make_way() -> None:
    """Give every thread of this process the lowest priority; threads that they start inherit it.

    On Linux that is the policy SCHED_IDLE: whatever else wants the core has it at once. A thread of nice 19 may first
    use up its time slice of some milliseconds, at each of the several steps of a query (sched(7);
    `benchmarks/interference.py` compares them). Elsewhere, and for who looks at it with `ps`, it is nice 19.
    """
    def lower(thread: int) -> None:
        os.setpriority(os.PRIO_PROCESS, thread, LOWEST_PRIORITY)
        if sys.platform == "linux":
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

    _for_every_thread(lower, "the bulk lane keeps its priority")


def keep_to_cores(environ: Mapping[str, str], threads: int) -> None:
    """Keep every thread of this process, and those that they start, to `threads` cores that no other worker of this
    server keeps to; nothing is done where the server did not ask for it, or has no such cores left.

    A file for each set of cores is locked for as long as the process lives, so a worker that takes the place of a dead
    one finds that one's cores.
    """
    folder = environ.get(CORES)
    if not folder or sys.platform != "linux":
        return
    usable = sorted(os.sched_getaffinity(0))
    sets = (usable[first:first + threads] for first in range(0, len(usable) - threads + 1, threads))
    mine = next((cores for cores in sets if _locked(Path(folder) / f"cores-{cores[0]}")), None)
    if mine is not None:
        _for_every_thread(lambda thread: os.sched_setaffinity(thread, mine), "the worker uses all cores")


def _locked(path: Path) -> bool:
    """Whether this process now holds the lock of the file, which it keeps open until it ends."""
    try:
        file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _log.warning("the worker uses all cores: %s", error)
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return False
    return True


def _for_every_thread(change: Callable[[int], None], otherwise: str) -> None:
    """Call `change` with the id of each thread of this process, or 0 where the system has no such ids."""
    # On Linux priority and cores are a thread's own, and libraries start threads when they are imported.
    tasks = Path("/proc/self/task")
    threads = [int(task.name) for task in tasks.iterdir()] if sys.platform == "linux" else [0]
    for thread in threads:
        try:
            with contextlib.suppress(ProcessLookupError):  # it has ended
                change(thread)
        except OSError as error:
            _log.warning("%s: %s", otherwise, error)
            return
