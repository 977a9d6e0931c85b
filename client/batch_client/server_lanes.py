"""The lanes of a server: the archive registered once or twice, each time with a queue and workers of its own.

Rule: decisions only. Queries use the model's plain name; bulk runs learn of the other lane from the model's metadata.
Why there are two is told in docs/explanation/lanes.md.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Lane", "lanes_of"]

BULK_SUFFIX = ".bulk"


class Lane(NamedTuple):
    """One registration of the archive."""

    name: str
    workers: int


def lanes_of(model: str, workers: int, online_workers: int | None, gpus: int) -> tuple[Lane, ...]:
    """The plain name's lane, then the bulk lane if there is one; `workers` are those of the last.

    online_workers: 0 makes one lane for both. None is 1 where the model runs on CPUs, where the operating system keeps
    the lanes apart, and 0 where it runs on GPUs, which they would share, with another copy of the model on each.
    """
    if online_workers is None:
        online_workers = 0 if gpus else 1
    if not online_workers:
        return (Lane(model, workers),)
    return Lane(model, online_workers), Lane(model + BULK_SUFFIX, workers)
