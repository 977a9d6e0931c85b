"""Taking an output away: for a person at a desk who says so. What opens goes first, what says whose it is goes last."""

from __future__ import annotations

from batch_client.errors import MismatchError
from batch_client.layout import SPEC_KEY, SUCCESS_KEY
from batch_client.storage import Meta, Store

__all__ = ["list_output", "remove_output"]


async def list_output(store: Store) -> list[Meta]:
    """Everything that removal would delete; nothing if the place is empty.

    Raises MismatchError for a place that is not an output of ours.
    """
    found = [meta async for meta in store.list("")]
    if found and not any(meta.key == SPEC_KEY for meta in found):
        raise MismatchError(f"{store.url} is not empty ({found[0].key}) and is no output of batch-client: "
                            "nothing was deleted")
    return found


async def remove_output(store: Store) -> int:
    """Delete an output, published or not; returns how many objects it had. May be repeated after a kill."""
    found = await list_output(store)
    for meta in sorted(found, key=lambda meta: _order(meta.key)):
        await store.delete(meta.key)
    return len(found)


def _order(key: str) -> tuple[int, str]:
    """The group's metadata and `_SUCCESS` first, so that nothing half-deleted opens; `spec.json` last."""
    if key in ("zarr.json", SUCCESS_KEY):
        return 0, key
    if key.endswith("zarr.json"):
        return 1, key
    return (3 if key == SPEC_KEY else 2), key
