"""Which ways to run a model are tried, in which order, and when one is better. Pure; time is passed in.

A way is compared with the best one so far by windows of measurement in turn, since a machine's speed drifts by more
than two ways differ; the median of the pairs' ratios decides, and a tie leaves what is there. From the best way the
search goes to its neighbours, one setting changed at a time, until none is better or the time is over: the full grid
would take an hour and rarely end elsewhere. In the end the best way is compared with the one that the search began
from: only what wins there, too, is a gain.
"""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from batch_client.errors import ServingError
from batch_client.plan import MAX_REQUEST_BYTES

__all__ = ["ROUNDS", "Space", "Way", "decided", "next_way", "ratio", "shares", "space_of", "wins"]

MARGIN = 1.02  # the ratio from which a way counts as better: below it is noise
ROUNDS = 5  # pairs of windows for two ways that are close
CLEAR_AFTER, CLEAR = 2, 1.25  # pairs after which so large a ratio is believed
LEAST_MICRO_BATCH, MOST_MICRO_BATCH = 8, 4096
MANY_CORES = 8


@dataclass(frozen=True)
class Way:
    """A way to run a model on all of a machine: `threads` are of each of its `workers`."""

    runtime: str
    micro_batch: int
    workers: int
    threads: int
    allocator: str

    def __str__(self) -> str:
        return (f"{self.runtime}, micro-batches of {self.micro_batch}, {self.workers} x {self.threads} threads, "
                f"{self.allocator}")


@dataclass(frozen=True)
class Space:
    """What may be chosen; `splits` are pairs of workers and threads of each, `most_micro_batch` is in records."""

    runtimes: tuple[str, ...]
    splits: tuple[tuple[int, int], ...]
    allocators: tuple[str, ...]
    most_micro_batch: int


def space_of(
    runtimes: Sequence[str], allocators: Sequence[str], *, cores: int, gpus: int, record_bytes: int, micro_batch: int,
) -> Space:
    """What is worth trying on a machine: one process with all cores, one a core, on many cores one in between; on GPUs
    one or two workers each. `micro_batch` is the archive's, which may be over MOST_MICRO_BATCH; `record_bytes` those in
    a request or, if there are more, in a reply.

    Raises ServingError where it is over what a request may have: a bulk request has whole micro-batches.
    """
    fitting = MAX_REQUEST_BYTES // max(1, record_bytes)
    if micro_batch > fitting:
        todo = f"pack it with --micro-batch {fitting} or less" if fitting else "no server takes such a record"
        raise ServingError(f"the archive's micro-batch of {micro_batch:,} records has {micro_batch * record_bytes:,} "
                           f"bytes, and a request or reply at most {MAX_REQUEST_BYTES:,}: {todo}")
    if gpus:
        counts = [gpus, 2 * gpus]
    else:
        middle = 1 << (cores.bit_length() // 2)
        counts = [cores, 1, *([middle] if cores >= MANY_CORES else [])]
    pairs = dict.fromkeys((count, max(1, cores // count)) for count in counts)
    return Space(tuple(runtimes), tuple(pairs), tuple(allocators), max(micro_batch, min(MOST_MICRO_BATCH, fitting)))


def next_way(best: Way, space: Space, tried: Collection[Way]) -> Way | None:
    """The neighbour of the best way to try next, those first that may matter most; None if all were tried."""
    return next((way for way in _neighbours(best, space) if way not in tried), None)


def _neighbours(best: Way, space: Space) -> Iterator[Way]:
    for runtime in space.runtimes:
        yield replace(best, runtime=runtime)
    for workers, threads in space.splits:
        yield replace(best, workers=workers, threads=threads)
    least = min(LEAST_MICRO_BATCH, space.most_micro_batch)
    for size in (best.micro_batch * 2, best.micro_batch // 2, best.micro_batch * 4, best.micro_batch // 4):
        if size <= space.most_micro_batch:
            # An archive may be packed for less than the least, and a search must not be stuck there.
            yield replace(best, micro_batch=max(size, least))
    for allocator in space.allocators:
        yield replace(best, allocator=allocator)


def ratio(best: Sequence[float], other: Sequence[float]) -> float:
    """How much quicker `other` is: the median over pairs of windows, each with the mean of the best's around it.

    `best` has one window more than `other`, before its first.
    """
    return statistics.median(_ratios(best, other))


def wins(best: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `other` is better: by MARGIN, and in all pairs but one. Of five pairs of equal ways on a noisy machine
    four or five say so one time in five by chance, and the median is over the margin still less often.
    """
    ratios = sorted(_ratios(best, other))
    return statistics.median(ratios) >= MARGIN and ratios[0 if len(ratios) < ROUNDS else 1] > 1


def decided(best: Sequence[float], other: Sequence[float]) -> bool:
    """Whether more pairs of windows would not change what `ratio` says."""
    if len(other) < ROUNDS:
        found = ratio(best, other)
        return len(other) >= CLEAR_AFTER and not 1 / CLEAR < found < CLEAR
    return True


def _ratios(best: Sequence[float], other: Sequence[float]) -> list[float]:
    around = [(before + after) / 2 for before, after in pairwise(best)]
    return [rate / base for rate, base in zip(other, around, strict=True)]


def shares(budget: float, *, with_input: bool) -> dict[str, float]:
    """Seconds of the budget for each thing that is measured; what starts servers takes comes on top."""
    if not with_input:
        return {"model": 0.85 * budget, "wire": 0.15 * budget}
    return {"model": 0.6 * budget, "wire": 0.1 * budget, "reading": 0.05 * budget, "writing": 0.05 * budget,
            "whole": 0.2 * budget}
