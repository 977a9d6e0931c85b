"""The last step: prove that every record is there once, then write manifest, arrays' metadata, the group's, `_SUCCESS`.

Before the group's `zarr.json` is written nothing opens; each step is create-only and can be repeated by anyone.
"""

from __future__ import annotations

import hashlib

from batch_client.errors import BrokenPromiseError, DataError, MismatchError
from batch_client.layout import MANIFEST_KEY, SUCCESS_KEY, OutputLayout
from batch_client.ledger import ChunkProof, LedgerView
from batch_client.manifest import Manifest, ManifestBuilder, read_manifest
from batch_client.plan import Plan
from batch_client.spec import RunIdentity
from batch_client.storage import Store, child_url, put_same
from batch_client.stringset import StringSet

__all__ = ["publish", "published_manifest"]


async def published_manifest(store: Store) -> Manifest | None:
    """What a published output has, None while it is not published.

    Raises MismatchError for a place that says it is published and has no manifest.
    """
    # Not `head`, whose answer has no body: this one tells a bucket that is not there from a key.
    return None if await store.get(SUCCESS_KEY) is None else await read_manifest(store)


async def publish(store: Store, layout: OutputLayout, plan: Plan, identity: RunIdentity, proven: LedgerView) -> str:
    """Make a complete output visible and return its root hash. `proven` has seen all segments.

    Raises BrokenPromiseError when it is not complete, DataError when something that was proven is not there any more,
    MismatchError when something else was published here, or it was removed meanwhile.
    """
    if len(proven) != plan.unit_count:
        raise BrokenPromiseError(f"{len(proven)} of {plan.unit_count} output chunks are proven: not publishing")
    await proven.require_current()
    manifest = await _write_parts(store, plan, proven)
    root = str(manifest.root)
    attributes = {
        "source": identity.source,
        "source_array": identity.source_array,
        "origin": identity.start,
        "records": plan.count,
        "model": identity.model,
        "model_digest": identity.model_digest,
        "fingerprint": identity.fingerprint,
        "root": root,
    }
    documents = await layout.metadata(attributes)
    proofs = [ChunkProof(key, len(document), hashlib.sha256(document).hexdigest()) for key, document in documents]
    await _create_same(store, MANIFEST_KEY, manifest.head(identity, proofs))
    for key, document in (*documents, (SUCCESS_KEY, b"")):
        await proven.require_current()
        await _create_same(store, key, document)
    return root


async def _write_parts(store: Store, plan: Plan, proven: LedgerView) -> ManifestBuilder:
    manifest, stored = ManifestBuilder(), StringSet()
    async for meta in store.list(""):
        stored.add(f"{meta.key} {meta.size}")
    async for row in proven.rows():
        count = plan.unit(row.unit).count
        if row.records != count:
            raise BrokenPromiseError(f"output chunk {row.unit} is proven with {row.records} records of {count}: "
                                     "not publishing")
        for proof in row.chunks:
            if f"{proof.key} {proof.size}" not in stored:
                await _require_stored(store, proof, row.unit, proven)
        if (part := manifest.add(row)) is not None:
            await _create_same(store, *part)
    if (part := manifest.close()) is not None:
        await _create_same(store, *part)
    return manifest


async def _require_stored(store: Store, proof: ChunkProof, unit: int, proven: LedgerView) -> None:
    """Raises DataError for an object that the listing does not have and the store neither: somebody deleted it, or a
    rule of the bucket did.
    """
    found = await store.head(proof.key)
    if found is None or found.size != proof.size:
        now = "is gone" if found is None else f"has {found.size} bytes"
        segments = await proven.segments_of(unit)
        names = " and ".join([*(["it"] if found else []), *segments])
        todo = f"remove {names} and run the same command again, which scores and compares what was proven there"
        if any(row.failed for rows in segments.values() for row in rows):
            todo = "run again with --overwrite, since records that failed once may not fail again"
        raise DataError(f"{child_url(store.url, proof.key)} {now}, {proof.size} were written: {todo}")


async def _create_same(store: Store, key: str, data: bytes) -> None:
    if not await put_same(store, key, data):
        raise MismatchError(f"{child_url(store.url, key)} holds other bytes than this run would publish: somebody else "
                            "wrote there")
