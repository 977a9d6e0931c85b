"""Dask: `dask_array.py JOB eager|tuned`. `map_blocks` over a Dask array with a model, stored as Zarr.

eager is what the notebook does: blocks of 100 records, the module as a future that Dask hands to the workers, Dask's
own settings. tuned has blocks of two input chunks, the tuned forward, loaded once a worker, and the allocator settings.
"""

from __future__ import annotations

import sys
import time
from functools import cache

import dask
import dask.array as da
import numpy as np
from dask.distributed import Client, LocalCluster
from forward import Score, module_of, score_with, tuned
from job import BLOCK, CLASSES, Job, the_job

NOTEBOOK_BLOCK = 100
# Dask sets a worker's environment itself, so the benchmark's own would not reach it.
WORKER_ENVIRONMENT = "distributed.nanny.pre-spawn-environ"


@cache
def loaded(model: str) -> Score:
    return tuned(model)


def score_tuned(block: np.ndarray, model: str) -> np.ndarray:
    return loaded(model)(np.ascontiguousarray(block))


def as_the_notebook(job: Job, client: Client) -> float:
    module = client.submit(module_of, job.model)
    module.result()
    began = time.perf_counter()
    images = da.from_zarr(job.images())[:job.records].rechunk((NOTEBOOK_BLOCK, 28, 28))
    scores = images.map_blocks(score_with, module, chunks=(NOTEBOOK_BLOCK, CLASSES), dtype=np.float32, drop_axis=2)
    scores.to_zarr(job.create_scores(NOTEBOOK_BLOCK))
    return time.perf_counter() - began


def as_fast_as_it_goes(job: Job, client: Client) -> float:
    client.run(lambda: loaded(job.model) and None)
    began = time.perf_counter()
    images = da.from_zarr(job.images(), chunks=(BLOCK, 28, 28))[:job.records]
    scores = images.map_blocks(score_tuned, job.model, chunks=(images.chunks[0], (CLASSES,)), dtype=np.float32,
                               drop_axis=2)
    scores.to_zarr(job.create_scores())
    return time.perf_counter() - began


def main() -> None:
    job, kind = the_job(), sys.argv[2]
    if kind == "tuned":
        import os

        mine = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
        dask.config.set({WORKER_ENVIRONMENT: {**dask.config.get(WORKER_ENVIRONMENT), **mine}})
    with (LocalCluster(n_workers=job.processes, threads_per_worker=1, dashboard_address=None,
                       local_directory=job.work) as cluster, Client(cluster) as client):
        job.answer({"eager": as_the_notebook, "tuned": as_fast_as_it_goes}[kind](job, client))


if __name__ == "__main__":
    main()
