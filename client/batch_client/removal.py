"""Taking an output away: for a person at a desk who says so.

The generation goes first, which ends every client that still works there and makes all its proofs void; then what
opens, the proofs, what they prove, and last what says whose it is. So whatever is left of a removal that was cut off
proves nothing that is gone, and the removal can be repeated.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass

from batch_client.errors import MismatchError, StorageError, one_error
from batch_client.layout import GENERATION_KEY, LEDGER_PREFIX, SPEC_KEY, SUCCESS_KEY
from batch_client.storage import Meta, Store

__all__ = ["Contents", "contents_of", "remove_output"]

DELETES_AT_ONCE = 32
SHOWN = 20
LAST = 5


@dataclass(frozen=True)
class Contents:
    """What removal would delete: objects, their bytes, and the first SHOWN of them."""

    objects: int
    nbytes: int
    first: tuple[Meta, ...]


async def contents_of(store: Store) -> Contents:
    """What an output consists of; zero objects if the place is empty. The listing is not held.

    Raises MismatchError for a place that is not an output of ours.
    """
    first: list[Meta] = []
    objects = nbytes = 0
    ours = False
    async for meta in store.list(""):
        objects, nbytes = objects + 1, nbytes + meta.size
        ours = ours or meta.key == SPEC_KEY
        if len(first) < SHOWN:
            first.append(meta)
    if objects and not ours:
        raise MismatchError(f"{store.url} is not empty ({first[0].key}) and is no output of batch-client: "
                            "nothing was deleted")
    return Contents(objects, nbytes, tuple(first))


async def remove_output(store: Store) -> None:
    """Delete an output, published or not. May be repeated after a kill.

    Raises MismatchError for a place that is not an output of ours, StorageError where objects stay.
    """
    await contents_of(store)
    for order in range(LAST):
        # A listing need not show all while objects of it vanish: each kind is gone when one shows none.
        before = math.inf
        while found := await _remove_kind(store, order):
            if found >= before:
                raise StorageError(f"{store.url}: {found:,} objects are still listed after they were deleted: "
                                   "nothing else may write there; try again")
            before = found
    # What a client wrote meanwhile stays together with the name of whose it is, and can be removed by trying again.
    async for meta in store.list(""):
        if _order(meta.key) < LAST:
            raise StorageError(f"{store.url}: {meta.key} was written while the rest was deleted: end every client that "
                               "works there; try again")
    await store.delete(SPEC_KEY)


async def _remove_kind(store: Store, order: int) -> int:
    """Delete every object of one kind that a listing shows; how many there were."""
    found, batch = 0, []
    async for meta in store.list(""):
        if _order(meta.key) == order:
            found += 1
            batch.append(meta.key)
        if len(batch) == DELETES_AT_ONCE:
            await _delete(store, batch)
            batch = []
    await _delete(store, batch)
    return found


async def _delete(store: Store, keys: Sequence[str]) -> None:
    with one_error():
        async with asyncio.TaskGroup() as tasks:
            for key in keys:
                tasks.create_task(store.delete(key))


def _order(key: str) -> int:
    """The generation first, then the group's metadata and `_SUCCESS`, so that nothing half-deleted opens; `spec.json`
    last.
    """
    if key == GENERATION_KEY:
        return 0
    if key in ("zarr.json", SUCCESS_KEY):
        return 1
    if key.endswith("zarr.json"):
        return 2
    if key.startswith(LEDGER_PREFIX):
        return 3
    return LAST if key == SPEC_KEY else 4
