"""Chunks of an earlier output that are still true: same source chunks, model, numerics and places, no failures.

They are copied through this client rather than by the store, so that each copy is proven against the earlier
manifest's SHA-256 before it is proven again here.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from batch_client.errors import BrokenPromiseError, DataError, MismatchError
from batch_client.jsontext import parse_json
from batch_client.ledger import Row
from batch_client.manifest import manifest_rows, read_manifest
from batch_client.prepare import Prepared
from batch_client.reader import ETags
from batch_client.spec import differences
from batch_client.storage import Store, child_url
from batch_client.writer import proof_of

__all__ = ["copy_chunks", "reusable_rows"]

# What decides a chunk's bytes beside its source chunks; where one differs nothing can be reused.
_SAME = ("start", "grid_records", "chunk_records", "micro_batch", "codec", "model_digest", "fingerprint", "outputs",
         "source_dtype", "source_encoding", "exact")


async def reusable_rows(old: Store, prepared: Prepared, *, require_finite: bool) -> AsyncIterator[Row]:
    """Rows of `old`'s manifest that are rows of this run too, read as they are asked for. Writes nothing.

    A part of the manifest that is damaged is found only when its rows are asked for, after this run has begun.

    Raises MismatchError when `old` is not a published output or of another geometry, model or numerics.
    """
    manifest = await read_manifest(old)
    ours, theirs = ({name: run[name] for name in _SAME if name in run}
                    for run in (parse_json(prepared.identity.to_json()), manifest.run))
    if differing := list(differences(ours, theirs)):
        raise MismatchError(f"--reuse {old.url}: no chunk of it can be reused: {'; '.join(differing)}")
    etags = await prepared.source.etags()
    return (row async for row in manifest_rows(old, manifest)
            if _is_true(row, prepared, etags) and not (require_finite and row.not_finite))


async def copy_chunks(old: Store, new: Store, row: Row) -> None:
    """Copy a row's objects. Raises DataError when one of them is not what the row says."""
    for chunk in row.chunks:
        await _copy(old, new, chunk.key, chunk.sha256)


def _is_true(row: Row, prepared: Prepared, etags: ETags) -> bool:
    if row.failed or row.unit >= prepared.plan.unit_count or row.records != prepared.plan.unit(row.unit).count:
        return False
    # A store without ETags can't show that a chunk is the same.
    return all(etag and etags.has(key, etag) for key, etag in row.source.items())


async def _copy(old: Store, new: Store, key: str, sha256: str) -> None:
    blob = await old.get(key)
    if blob is None or (await proof_of(key, blob.data)).sha256 != sha256:
        raise DataError(f"--reuse {child_url(old.url, key)}: {'missing' if blob is None else 'altered'} since it was "
                        "published: run batch-client verify on it, or score everything again without --reuse")
    if await new.create(key, blob.data):
        return
    stored = await new.get(key)
    if stored is None or (await proof_of(key, stored.data)).sha256 != sha256:
        raise BrokenPromiseError(f"{child_url(new.url, key)} holds other bytes than the output it is reused from")
