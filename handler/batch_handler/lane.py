"""The bulk lane of a server: its name, and how a worker in it makes way for online queries.

Rule: priority decides when a worker runs, never what it computes; so it is no part of the numerics, and both lanes have
one fingerprint.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["BULK_LANE", "bulk_lane_of", "make_way"]

# Environment: the name under which the server has the model for bulk runs. All workers of a server see the same.
BULK_LANE = "BATCH_HANDLER_BULK_LANE"
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

    Where the system refuses, the worker goes on as it is: slower queries are no reason not to serve.
    """
    # On Linux a priority is a thread's own, and libraries start threads when they are imported.
    tasks = Path("/proc/self/task")
    threads = [int(task.name) for task in tasks.iterdir()] if sys.platform == "linux" else [0]
    for thread in threads:
        try:
            os.setpriority(os.PRIO_PROCESS, thread, LOWEST_PRIORITY)
            if sys.platform == "linux":
                os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        except ProcessLookupError:  # it has ended
            continue
        except OSError as error:
            _log.warning("the bulk lane keeps its priority: %s", error)
            return
