"""Is an output what its manifest says? Every object is there with its size; deep: every byte. No model needed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from zarr.api import asynchronous as zarr_async

from batch_client.assemble import STATUS_FAILED, STATUS_NOT_FINITE, STATUS_OK
from batch_client.errors import DataError, MismatchError, one_error
from batch_client.layout import MANIFEST_KEY, STATUS, SUCCESS_KEY
from batch_client.ledger import ChunkProof, Row
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
    problems += [f"{chunk.key} is {'missing' if chunk.key not in sizes else f'{sizes[chunk.key]} bytes'}, "
                 f"wanted {chunk.size} bytes" for chunk in chunks if sizes.get(chunk.key) != chunk.size]
    arrays = sorted({chunk.key.partition("/")[0] for chunk in chunks})
    problems += [f"{key} is missing" for key in ("zarr.json", *(f"{name}/zarr.json" for name in arrays))
                 if key not in sizes]
    known = {chunk.key for chunk in chunks}
    problems += [f"{key} is no chunk of this run" for key in sizes if "/c/" in key and key not in known]
    if deep and not problems:
        problems = await _bytes(store, manifest.rows) or await _metadata(store, arrays)
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


async def _bytes(store: Store, rows: Iterable[Row]) -> list[str]:
    gate = asyncio.Semaphore(READS_AT_ONCE)
    problems: list[str] = []

    async def check(chunk: ChunkProof) -> None:
        async with gate:
            blob = await store.get(chunk.key)
            found = "missing" if blob is None else (await asyncio.to_thread(hashlib.sha256, blob.data)).hexdigest()
            if blob is None or found != chunk.sha256:
                problems.append(f"{chunk.key} has SHA-256 {found}, wanted {chunk.sha256}")

    with one_error():
        async with asyncio.TaskGroup() as tasks:
            for row in rows:
                for chunk in row.chunks:
                    tasks.create_task(check(chunk))
    return sorted(problems)


async def _metadata(store: Store, arrays: Iterable[str]) -> list[str]:
    """The group opens, and its attributes and the statuses are those of the manifest."""
    manifest = await read_manifest(store)
    try:
        group = await zarr_async.open_group(store=SourceStore(store), mode="r")
        names = sorted([name async for name, _ in group.arrays()])
    except (ValueError, KeyError, TypeError, FileNotFoundError) as error:
        return [f"zarr.json can't be opened as a group ({type(error).__name__})"]
    problems = [] if names == sorted(arrays) else [f"the group has arrays {names}, wanted {sorted(arrays)}"]
    if group.attrs.get("root") != manifest.root:
        problems.append(f"zarr.json names root {group.attrs.get('root')}, wanted {manifest.root}")
    status = await zarr_async.open_array(store=SourceStore(store), path=STATUS.name, mode="r")
    found = np.asarray(await status.getitem(slice(None)))
    counts = {value: int((found == value).sum()) for value in (STATUS_OK, STATUS_FAILED, STATUS_NOT_FINITE)}
    wanted = {STATUS_OK: sum(row.ok for row in manifest.rows), STATUS_FAILED: sum(row.failed for row in manifest.rows),
              STATUS_NOT_FINITE: sum(row.not_finite for row in manifest.rows)}
    if counts != wanted:
        problems.append(f"{STATUS.name} counts {counts}, wanted {wanted}")
    return problems
