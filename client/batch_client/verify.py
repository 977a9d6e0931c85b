"""Is an output what its manifest says? Every object is there with its size; deep: every byte. No model needed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from zarr.api import asynchronous as zarr_async

from batch_client.assemble import STATUS_FAILED, STATUS_NOT_FINITE, STATUS_OK
from batch_client.errors import DataError, MismatchError, one_error
from batch_client.layout import MANIFEST_KEY, STATUS, SUCCESS_KEY
from batch_client.ledger import ChunkProof
from batch_client.manifest import Manifest, read_manifest, root_over
from batch_client.storage import Store
from batch_client.zarrstore import SourceStore

__all__ = ["Verification", "verify_output"]

READS_AT_ONCE = 16
NAMED = 5


@dataclass(frozen=True)
class Verification:
    """An output that is what its manifest says."""

    output: str
    root: str
    records: int
    failed: int
    not_finite: int
    objects: int
    nbytes: int
    deep: bool


async def verify_output(store: Store, *, deep: bool = False) -> Verification:
    """Check a published output against its manifest.

    Raises MismatchError when there is no published output, DataError naming what is missing or other than proven.
    """
    if await store.head(SUCCESS_KEY) is None:
        raise MismatchError(f"{store.url}: no published output (no {SUCCESS_KEY}): see batch-client status")
    manifest = await read_manifest(store)
    problems = list(_coverage(manifest))
    sizes = {meta.key: meta.size async for meta in store.list("")}
    chunks = [chunk for row in manifest.rows for chunk in row.chunks]
    problems += [f"{proof.key} is {'missing' if proof.key not in sizes else f'{sizes[proof.key]} bytes'}, "
                 f"wanted {proof.size} bytes" for proof in (*chunks, *manifest.metadata)
                 if sizes.get(proof.key) != proof.size]
    known = {chunk.key for chunk in chunks}
    problems += [f"{key} is no chunk of this run" for key in sizes if "/c/" in key and key not in known]
    if deep and not problems:
        problems = await _bytes(store, (*chunks, *manifest.metadata)) or await _statuses(store, manifest)
    if problems:
        more = f" and {len(problems) - NAMED} more" if len(problems) > NAMED else ""
        raise DataError(f"{store.url} is not what was published: {'; '.join(problems[:NAMED])}{more}")
    return Verification(
        output=store.url,
        root=manifest.root,
        records=sum(row.records for row in manifest.rows),
        failed=sum(row.failed for row in manifest.rows),
        not_finite=sum(row.not_finite for row in manifest.rows),
        objects=len(chunks),
        nbytes=sum(chunk.size for chunk in chunks),
        deep=deep)


def _coverage(manifest: Manifest) -> Iterable[str]:
    """Every record once, and the root over it all."""
    at = 0
    for number, row in enumerate(manifest.rows):
        if row.unit != number:
            yield f"{MANIFEST_KEY} has chunk {row.unit} where chunk {number} belongs"
        at += row.records
    if at != manifest.records:
        yield f"{MANIFEST_KEY} proves {at} records of {manifest.records}"
    if root_over(manifest.rows) != manifest.root:
        yield f"{MANIFEST_KEY} has root {manifest.root}, its rows have {root_over(manifest.rows)}"


async def _bytes(store: Store, proofs: Sequence[ChunkProof]) -> list[str]:
    """What of the objects has other bytes than were proven; read a bounded number at a time."""
    problems: list[str] = []
    for start in range(0, len(proofs), READS_AT_ONCE):
        some = proofs[start:start + READS_AT_ONCE]
        with one_error():
            async with asyncio.TaskGroup() as tasks:
                found = [tasks.create_task(_sha256(store, proof.key)) for proof in some]
        problems += [f"{proof.key} has SHA-256 {task.result()}, wanted {proof.sha256}"
                     for proof, task in zip(some, found, strict=True) if task.result() != proof.sha256]
    return problems


async def _sha256(store: Store, key: str) -> str:
    blob = await store.get(key)
    return "missing" if blob is None else (await asyncio.to_thread(hashlib.sha256, blob.data)).hexdigest()


async def _statuses(store: Store, manifest: Manifest) -> list[str]:
    """Units whose status, as a reader finds it, is not what its row counts."""
    status = await zarr_async.open_array(store=SourceStore(store), path=STATUS.name, mode="r")
    problems = []
    at = 0
    for row in manifest.rows:
        found = np.asarray(await status.getitem(slice(at, at + row.records)))
        at += row.records
        counts = tuple(int((found == value).sum()) for value in (STATUS_OK, STATUS_FAILED, STATUS_NOT_FINITE))
        if counts != (row.ok, row.failed, row.not_finite):
            problems.append(f"chunk {row.unit} of {STATUS.name} counts {counts} (ok, failed, not finite), wanted "
                            f"{(row.ok, row.failed, row.not_finite)}")
    return problems
