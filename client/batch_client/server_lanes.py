"""The lanes of a server: the archive registered once or twice, each time with a queue and workers of its own.

Rule: decisions only. Queries use the model's plain name; bulk runs learn of the other lane from the model's metadata.
Why there are two is told in docs/explanation/lanes.md.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["BATCH_SIZE", "Lane", "lanes_of"]

BULK_SUFFIX = ".bulk"
BATCH_SIZE = 8  # requests, where queries come together


class Lane(NamedTuple):
    """One registration of the archive; batch_size: requests in one server batch."""

    name: str
    workers: int
    batch_size: int


def lanes_of(
    model: str, workers: int, online_workers: int | None, gpus: int, batch_size: int = BATCH_SIZE,
) -> tuple[Lane, ...]:
    """The plain name's lane, then the bulk lane if there is one; `workers` are those of the last.

    The bulk lane has no batches of several requests. Each fills its micro-batches itself, so nothing would be gained;
    and a worker waits for a batch to fill, and takes what a free one could have had.

    online_workers: 0 makes one lane for both. None is 1 where the model runs on CPUs, where the operating system keeps
    the lanes apart, and 0 where it runs on GPUs, which they would share, with another copy of the model on each.
    """
    if online_workers is None:
        online_workers = 0 if gpus else 1
    if not online_workers:
        return (Lane(model, workers, batch_size),)
    return Lane(model, online_workers, batch_size), Lane(model + BULK_SUFFIX, workers, 1)
