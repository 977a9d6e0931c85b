"""Ray Data: `ray_dataset.py JOB eager|tuned`. Read blocks, score them in a pool of actors, write in tasks.

Stages, as Ray Data's guide for batch inference has them; Ray fuses reading into the actors. eager scores input chunks
with the module as it is loaded; tuned scores two input chunks at a time with the tuned forward and the allocator
settings. The clock starts when the last actor is ready, whatever another has done before, and stops at the last write.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
from forward import forward
from job import BLOCK, the_job

NOTEBOOK_BLOCK = 1000


class Scorer:
    """An actor with the model."""

    def __init__(self, kind: str, model: str) -> None:
        self._score = forward(kind, model)
        self._ready = time.time()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"start": row["start"], "ready": self._ready, "scores": self._score(row["images"])}


def main() -> None:
    job, kind = the_job(), sys.argv[2]
    size = BLOCK if kind == "tuned" else NOTEBOOK_BLOCK
    job.create_scores(size)
    # One processor slot for each actor, and as many for the tasks that read and write beside them.
    ray.init(num_cpus=2 * job.processes, include_dashboard=False, log_to_driver=False, _temp_dir=job.work)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def read(row: dict[str, Any]) -> dict[str, Any]:
        start = int(row["id"]) * size
        return {"start": start, "images": job.images()[start:min(start + size, job.records)]}

    def write(row: dict[str, Any]) -> dict[str, Any]:
        scores = row["scores"]
        job.scores()[row["start"]:row["start"] + len(scores)] = scores
        return {"ready": row["ready"], "written": time.time()}

    blocks = len(job.blocks(size))
    rows = (ray.data.range(blocks, override_num_blocks=blocks)
            .map(read)
            .map(Scorer, fn_constructor_args=(kind, job.model), num_cpus=1,
                 compute=ray.data.ActorPoolStrategy(size=job.processes))
            .map(write)
            .take_all())
    ray.shutdown()
    job.answer(max(row["written"] for row in rows) - max(row["ready"] for row in rows))


if __name__ == "__main__":
    main()
