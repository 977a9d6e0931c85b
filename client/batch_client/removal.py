"""Taking an output away: for a person at a desk who says so.

First a mark is made: from then on no client begins, proves or publishes anything there. Then the generation goes, what
opens, the proofs, what they prove, what says whose it is, whatever clients wrote meanwhile, and last the mark. So what
is left of a removal that was cut off proves nothing, and the removal can be repeated.
"""

from __future__ import annotations

import asyncio
import math
import re
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from batch_client.errors import MismatchError, StorageError, UsageError, one_error
from batch_client.jsontext import parse_json
from batch_client.layout import GENERATION_KEY, LEDGER_PREFIX, REMOVING_KEY, SPEC_KEY, STATUS, SUCCESS_KEY
from batch_client.storage import Blob, Meta, Store

__all__ = ["Contents", "contents_of", "remove_output", "require_unpublished"]

DELETES_AT_ONCE = 32
SHOWN = 20


@dataclass(frozen=True)
class Contents:
    """What removal would delete: objects, their bytes, and the first SHOWN of them."""

    objects: int
    nbytes: int
    first: tuple[Meta, ...]


async def contents_of(store: Store) -> Contents:
    """What an output consists of; zero objects if the place is empty. The listing is not held.

    Raises MismatchError for a place that is not an output of ours, or holds something else too.
    """
    first: list[Meta] = []
    objects = nbytes = 0
    ours = False
    arrays = await _arrays(store)
    other: str | None = None
    async for meta in store.list(""):
        objects, nbytes = objects + 1, nbytes + meta.size
        ours = ours or meta.key in (SPEC_KEY, REMOVING_KEY)
        if other is None and not arrays.fullmatch(meta.key):
            other = meta.key
        if len(first) < SHOWN:
            first.append(meta)
    if objects and not ours:
        raise MismatchError(f"{store.url} is not empty ({first[0].key}) and is no output of batch-client: "
                            "nothing was deleted; do that with the store's own tools")
    if other is not None:
        raise MismatchError(f"{store.url} holds {other} too, which is not of this output: nothing was deleted; move "
                            "what is not of it away first")
    return Contents(objects, nbytes, tuple(first))


async def _arrays(store: Store) -> re.Pattern[str]:
    """What the keys of an output's objects look like; where it is not known what its arrays are called, with any."""
    blob, names = await store.get(SPEC_KEY), "[^/]+"
    with suppress(ValueError, LookupError, TypeError):  # of another version
        outputs = [] if blob is None else parse_json(blob.data)["outputs"]
        names = "|".join(re.escape(name) for name, *_ in (*outputs, (STATUS.name,))) if outputs else names
    return re.compile(rf"_run/.+|{SUCCESS_KEY}|zarr\.json|({names})/(zarr\.json|c/.+)", re.DOTALL)


async def remove_output(store: Store, *, published: bool = True, kept: Sequence[Store] = ()) -> None:
    """Delete an output, published or not. May be repeated after a kill.

    Raises MismatchError for a place that is not an output of ours, UsageError for one that is published although
    `published` is false, or that is one of `kept` under another name; StorageError where objects stay or somebody else
    removes them at the same time.
    """
    if not (await contents_of(store)).objects:
        return
    made = await store.create(REMOVING_KEY, secrets.token_hex(8).encode())
    mark = await store.get(REMOVING_KEY)
    try:
        await _require_apart(store, mark, kept)
        if not published:  # nobody publishes after the mark
            await require_unpublished(store)
    except Exception:  # whatever it is: nothing has been deleted
        if made:  # else it is of a removal that somebody asked for
            await store.delete(REMOVING_KEY)
        raise
    # What has a known key needs no listing, which takes long where there are millions of objects.
    await _delete(store, [GENERATION_KEY], mark)
    await _delete(store, ["zarr.json", SUCCESS_KEY], mark)
    await _remove_all(store, "", lambda key: key.endswith("zarr.json"), mark)
    await _remove_all(store, LEDGER_PREFIX, lambda _: True, mark)
    await _remove_all(store, "", lambda key: key not in (SPEC_KEY, REMOVING_KEY), mark)
    await _delete(store, [SPEC_KEY], mark)
    await _remove_all(store, "", lambda key: key != REMOVING_KEY, mark)
    await store.delete(REMOVING_KEY)


async def _require_apart(store: Store, mark: Blob | None, kept: Sequence[Store]) -> None:
    """Raises UsageError where a mark that was made here is seen in another store: a place may have more names than its
    URL tells.
    """
    for other in kept:
        seen = await other.get(REMOVING_KEY)
        if mark is not None and seen is not None and seen.data == mark.data:
            raise UsageError(f"{other.url} and OUTPUT {store.url} are one place: nothing was deleted; the output needs "
                             "a place of its own")


async def require_unpublished(store: Store) -> None:
    """Raises UsageError for a published output."""
    if await store.head(SUCCESS_KEY) is not None:
        raise UsageError(f"{store.url} is published: --clean removes only outputs that are not")


async def _remove_all(store: Store, prefix: str, wanted: Callable[[str], bool], mark: Blob | None) -> None:
    """Delete all objects with this prefix whose key is wanted."""
    # A listing need not show all while objects of it vanish: they are gone when one shows none.
    before = math.inf
    while found := await _remove_listed(store, prefix, wanted, mark):
        if found >= before:
            raise StorageError(f"{store.url}: {found:,} objects are still listed after they were deleted: "
                               "nothing else may write there; try again")
        before = found


async def _remove_listed(store: Store, prefix: str, wanted: Callable[[str], bool], mark: Blob | None) -> int:
    """Delete what is wanted of what a listing shows; how many objects that were."""
    found, batch = 0, []
    async for meta in store.list(prefix):
        if wanted(meta.key):
            found += 1
            batch.append(meta.key)
        if len(batch) == DELETES_AT_ONCE:
            await _delete(store, batch, mark)
            batch = []
    await _delete(store, batch, mark)
    return found


async def _delete(store: Store, keys: Sequence[str], mark: Blob | None) -> None:
    if not keys:
        return
    now = await store.get(REMOVING_KEY)
    if mark is None or now is None or now.data != mark.data:
        # What is there by now may be an output that has begun since.
        raise StorageError(f"{store.url}: somebody else has removed what was there: try again if it is still wanted")
    with one_error():
        async with asyncio.TaskGroup() as tasks:
            for key in keys:
                tasks.create_task(store.delete(key))
