"""The last step: prove that every record is there once, then write manifest, arrays' metadata, the group's, `_SUCCESS`.

Before the group's `zarr.json` is written nothing opens; each step is create-only and can be repeated by anyone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

from batch_client.errors import BrokenPromiseError, MismatchError
from batch_client.layout import MANIFEST_KEY, SUCCESS_KEY, OutputLayout
from batch_client.ledger import Row
from batch_client.plan import Plan
from batch_client.spec import RunIdentity, canonical_json
from batch_client.storage import Store, child_url

__all__ = ["is_published", "publish", "root_of"]


def root_of(rows: Mapping[int, Row], plan: Plan) -> str:
    """One hash over every chunk's key, size and SHA-256 in order, as `sha256:<hex>`.

    Raises BrokenPromiseError unless the rows cover each unit of the plan exactly once.
    """
    missing = [index for index in range(plan.unit_count) if index not in rows]
    if missing or len(rows) != plan.unit_count:
        raise BrokenPromiseError(f"{len(rows)} of {plan.unit_count} output chunks are proven "
                                 f"(missing: {missing[:5]}): not publishing")
    digest = hashlib.sha256()
    for index in range(plan.unit_count):
        row = rows[index]
        count = plan.unit(index).count
        if row.ok + row.failed + row.not_finite != count:
            raise BrokenPromiseError(f"output chunk {index} is proven with {row.ok + row.failed + row.not_finite} "
                                     f"records of {count}: not publishing")
        for chunk in row.chunks:
            digest.update(f"{chunk.key} {chunk.size} {chunk.sha256}\n".encode())
    return "sha256:" + digest.hexdigest()


async def is_published(store: Store) -> str | None:
    """The root hash of a published output, None while it is not published."""
    if await store.head(SUCCESS_KEY) is None:
        return None
    manifest = await store.get(MANIFEST_KEY)
    if manifest is None:
        raise MismatchError(f"{store.url} has a {SUCCESS_KEY} but no {MANIFEST_KEY}: it is not a whole output")
    try:
        return str(json.loads(bytes(manifest.data))["root"])
    except (ValueError, KeyError, TypeError) as error:
        raise MismatchError(f"{child_url(store.url, MANIFEST_KEY)} can't be read ({error})") from error


async def publish(store: Store, layout: OutputLayout, plan: Plan, identity: RunIdentity,
                  rows: Mapping[int, Row]) -> str:
    """Make a complete output visible and return its root hash.

    Raises BrokenPromiseError when it is not complete, or when something else was published here.
    """
    root = root_of(rows, plan)
    manifest = canonical_json({
        "format": 1,
        "root": root,
        "run": asdict(identity),
        "records": {
            "ok": sum(row.ok for row in rows.values()),
            "failed": sum(row.failed for row in rows.values()),
            "not_finite": sum(row.not_finite for row in rows.values()),
        },
        "rows": [rows[index].to_value() for index in range(plan.unit_count)],
    })
    await _create_same(store, MANIFEST_KEY, manifest)
    attributes = {
        "source": identity.source,
        "origin": identity.start,
        "records": plan.count,
        "model": identity.model,
        "model_digest": identity.model_digest,
        "fingerprint": identity.fingerprint,
        "root": root,
    }
    for key, document in await layout.metadata(attributes):
        await _create_same(store, key, document)
    await _create_same(store, SUCCESS_KEY, b"")
    return root


async def _create_same(store: Store, key: str, data: bytes) -> None:
    if await store.create(key, data):
        return
    stored = await store.get(key)
    if stored is None or stored.data != data:
        raise BrokenPromiseError(f"{child_url(store.url, key)} holds other bytes than this run would publish")
