"""What is at OUTPUT when a run comes: whether it is finished, goes on, is replaced, or turns the run away.

Writes and deletes nothing, so that a dry run is told the same.
"""

from __future__ import annotations

from batch_client.errors import DataError, MismatchError
from batch_client.layout import SPEC_KEY, SUCCESS_KEY
from batch_client.ledger import LedgerView
from batch_client.manifest import Manifest, read_manifest
from batch_client.place import check_place, generation_of
from batch_client.prepare import Prepared
from batch_client.publish import published_manifest
from batch_client.removal import contents_of
from batch_client.spec import RunSpec
from batch_client.storage import Store

__all__ = ["check_occupant"]


async def check_occupant(spec: RunSpec, output: Store, prepared: Prepared) -> tuple[bool, Manifest | None]:
    """Whether this run replaces what is at its output, and else the manifest of one that is published already.

    Raises MismatchError for what it may neither replace nor go on with.
    """
    if spec.overwrite and await _replaces(spec, output, prepared):
        return True, None
    await check_place(output, prepared.identity)
    return False, await published_manifest(output)


async def _goes_on(output: Store, prepared: Prepared) -> bool:
    """Whether an output is this very run, not finished, of the source as it is now: it goes on, even where it was asked
    to overwrite.
    """
    if await output.head(SUCCESS_KEY) is not None:
        return False
    spec = await output.get(SPEC_KEY)
    if spec is None or bytes(spec.data) != prepared.identity.to_json():
        return False
    try:
        generation = await generation_of(output)
        if generation is None:  # its removal has begun, or nothing was scored yet
            return False
        proven = LedgerView(output, prepared.plan.unit_count, generation)
        await proven.refresh()
        if len(proven):
            await prepared.source.require_unchanged(row.source async for row in proven.rows())
    except MismatchError:
        return False
    return True


async def _replaces(spec: RunSpec, output: Store, prepared: Prepared) -> bool:
    """Whether a run that may overwrite takes away what is there. Writes nothing.

    Raises MismatchError for a place that is no output of ours, DataError where the run would end at a missing chunk
    that the published output tells of.
    """
    if await _goes_on(output, prepared):
        return False
    await contents_of(output)
    if not spec.allow_missing:
        await _require_no_missing_chunks(output, prepared)
    return True


async def _require_no_missing_chunks(output: Store, prepared: Prepared) -> None:
    try:
        there = await read_manifest(output)
    except MismatchError:
        return
    if there.missing_chunks and there.run.get("source_metadata") == prepared.identity.source_metadata:
        raise DataError(f"{output.url} was scored with --allow-missing, since INPUT lacked {there.missing_chunks:,} "
                        "chunks: run again with --allow-missing, or restore them and remove the output first; nothing "
                        "was deleted")
