"""Plain processes written by hand: `plain.py JOB`. Each scores its share of the blocks: read, compute, write."""

import multiprocessing
import time
from multiprocessing.synchronize import Barrier

from forward import tuned
from job import Job, the_job


def share(job: Job, number: int, ready: Barrier, done: Barrier) -> None:
    score, images, scores = tuned(job.model), job.images(), job.scores()
    blocks = job.blocks()
    ready.wait()
    for block in blocks[len(blocks) * number // job.processes:len(blocks) * (number + 1) // job.processes]:
        scores[block] = score(images[block])
    done.wait()


def main() -> None:
    job = the_job()
    job.create_scores()
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(job.processes + 1)
    done = context.Barrier(job.processes + 1)
    processes = [context.Process(target=share, args=(job, number, ready, done)) for number in range(job.processes)]
    for process in processes:
        process.start()
    ready.wait()
    began = time.perf_counter()
    done.wait()
    seconds = time.perf_counter() - began
    for process in processes:
        process.join()
    assert not any(process.exitcode for process in processes)
    job.answer(seconds)


if __name__ == "__main__":
    main()
