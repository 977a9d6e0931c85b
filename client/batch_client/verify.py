"""Is an output what its manifest says? Every object is there with its size; deep: every byte. No model needed."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from zarr.api import asynchronous as zarr_async

from batch_client.assemble import STATUS_FAILED
from batch_client.errors import DataError, MismatchError, one_error
from batch_client.jsontext import canonical_json
from batch_client.layout import MANIFEST_KEY, SPEC_KEY, STATUS, SUCCESS_KEY
from batch_client.ledger import ChunkProof
from batch_client.manifest import Manifest, RootHash, manifest_rows
from batch_client.publish import published_manifest
from batch_client.storage import Store
from batch_client.stringset import StringSet
from batch_client.zarrstore import SourceStore
from batch_handler.oip import STATUS_NOT_FINITE, STATUS_OK

__all__ = ["Verification", "verify_output"]

READS_AT_ONCE = 16
READ_BYTES = 64 << 20
NAMED = 5

_T = TypeVar("_T")


@dataclass(frozen=True)
class Verification:
    """An output that is what its manifest says."""

    output: str
    root: str
    records: int
    failed: int
    not_finite: int
    missing_chunks: int
    objects: int
    nbytes: int
    deep: bool


class _Problems:
    """What is wrong with an output: how much, and the first few of it in words."""

    def __init__(self) -> None:
        self.named: list[str] = []
        self.count = 0

    def add(self, text: str) -> None:
        self.count += 1
        if len(self.named) < NAMED:
            self.named.append(text)

    def require_none(self, store: Store) -> None:
        if self.count:
            more = f" and {self.count - NAMED} more" if self.count > NAMED else ""
            raise DataError(f"{store.url} is not what was published: {'; '.join(self.named)}{more}")


async def verify_output(store: Store, *, deep: bool = False,
                        advance: Callable[[int, int], None] = lambda *_: None) -> Verification:
    """Check a published output against its manifest. Neither the rows nor the listing are held. `advance` is called
    with the bytes that were read of the chunks, and all that are to be read.

    Raises MismatchError when there is no published output, DataError naming what is missing or other than proven.
    """
    manifest = await published_manifest(store)
    if manifest is None:
        raise MismatchError(f"{store.url}: no published output (no {SUCCESS_KEY}): see batch-client status")
    problems = _Problems()
    await _identity(store, manifest, problems)
    await _coverage(store, manifest, problems)
    objects, nbytes = await _sizes(store, manifest, problems)
    if deep and not problems.count:
        await _bytes(store, manifest, problems, lambda done: advance(min(done, nbytes), nbytes))
    if deep and not problems.count:
        await _statuses(store, manifest, problems)
    problems.require_none(store)
    return Verification(
        output=store.url,
        root=manifest.root,
        records=manifest.records,
        failed=manifest.failed,
        not_finite=manifest.not_finite,
        missing_chunks=manifest.missing_chunks,
        objects=objects,
        nbytes=nbytes,
        deep=deep)


async def _identity(store: Store, manifest: Manifest, problems: _Problems) -> None:
    """The run that the manifest proves is the one that the output was begun as."""
    spec = await store.get(SPEC_KEY)
    if spec is None:
        problems.add(f"{SPEC_KEY} is missing")
    elif spec.data != canonical_json(manifest.run):
        problems.add(f"{SPEC_KEY} is of another run than {MANIFEST_KEY}")


async def _coverage(store: Store, manifest: Manifest, problems: _Problems) -> None:
    """Every record once, the sums, and the root over it all."""
    root = RootHash()
    number = ok = failed = not_finite = missing = 0
    async for row in manifest_rows(store, manifest):
        if row.unit != number:
            problems.add(f"{MANIFEST_KEY} has chunk {row.unit} where chunk {number} belongs")
        root.add(row)
        number, ok = number + 1, ok + row.ok
        failed, not_finite = failed + row.failed, not_finite + row.not_finite
        missing += row.missing_chunks
    if ok + failed + not_finite != manifest.records:
        problems.add(f"{MANIFEST_KEY} proves {ok + failed + not_finite} records of {manifest.records}")
    if (ok, failed, not_finite) != (manifest.ok, manifest.failed, manifest.not_finite):
        problems.add(f"{MANIFEST_KEY} counts {(manifest.ok, manifest.failed, manifest.not_finite)} (ok, failed, not "
                     f"finite), its rows have {(ok, failed, not_finite)}")
    if missing != manifest.missing_chunks:
        problems.add(f"{MANIFEST_KEY} counts {manifest.missing_chunks} missing source chunks, its rows have {missing}")
    if str(root) != manifest.root:
        problems.add(f"{MANIFEST_KEY} has root {manifest.root}, its rows have {root}")


async def _sizes(store: Store, manifest: Manifest, problems: _Problems) -> tuple[int, int]:
    """Every object is there with its size, and no chunk beside them; how many chunks there are, and their bytes."""
    stored, wanted = StringSet(), StringSet()
    chunks_stored = objects = nbytes = 0
    arrays = [proof.key.removesuffix("zarr.json") for proof in manifest.metadata if "/" in proof.key]
    chunks = tuple(f"{array}c/" for array in arrays)
    async for meta in store.list(""):
        stored.add(f"{meta.key} {meta.size}")
        chunks_stored += meta.key.startswith(chunks)
    async for proof in _proofs(store, manifest):
        if proof.key.startswith(chunks):
            objects, nbytes = objects + 1, nbytes + proof.size
            wanted.add(proof.key)
        if f"{proof.key} {proof.size}" not in stored:
            found = await store.head(proof.key) if problems.count < NAMED else None
            problems.add(f"{proof.key} is {'missing' if found is None else f'{found.size} bytes'}, wanted {proof.size} "
                         "bytes")
    if problems.count or chunks_stored != objects:
        async for meta in store.list(""):
            if meta.key.startswith(chunks) and meta.key not in wanted:
                problems.add(f"{meta.key} is no chunk of this run")
    return objects, nbytes


async def _proofs(store: Store, manifest: Manifest) -> AsyncIterator[ChunkProof]:
    """Of all chunks, then of the metadata."""
    async for row in manifest_rows(store, manifest):
        for proof in row.chunks:
            yield proof
    for proof in manifest.metadata:
        yield proof


async def _bytes(store: Store, manifest: Manifest, problems: _Problems, advance: Callable[[int], None]) -> None:
    """Objects that have other bytes than were proven."""
    done = 0
    async for batch in _batches(_proofs(store, manifest), lambda proof: proof.size):
        for proof, found in zip(batch, await _all(_sha256(store, proof.key) for proof in batch), strict=True):
            if found != proof.sha256:
                problems.add(f"{proof.key} has SHA-256 {found}, wanted {proof.sha256}")
            done += proof.size
        advance(done)


async def _batches(items: AsyncIterator[_T], size: Callable[[_T], int]) -> AsyncIterator[list[_T]]:
    """As many as are read at a time: a number of them, or bytes, of which one item may have more."""
    batch: list[_T] = []
    nbytes = 0
    async for item in items:
        if batch and (len(batch) == READS_AT_ONCE or nbytes + size(item) > READ_BYTES):
            yield batch
            batch, nbytes = [], 0
        batch.append(item)
        nbytes += size(item)
    if batch:
        yield batch


async def _all(reads: Iterable[Coroutine[Any, Any, _T]]) -> list[_T]:
    with one_error():
        async with asyncio.TaskGroup() as tasks:
            found = [tasks.create_task(read) for read in reads]
    return [task.result() for task in found]


async def _sha256(store: Store, key: str) -> str:
    blob = await store.get(key)
    return "missing" if blob is None else (await asyncio.to_thread(hashlib.sha256, blob.data)).hexdigest()


async def _statuses(store: Store, manifest: Manifest, problems: _Problems) -> None:
    """Units whose status, as a reader finds it, is not what its row counts."""
    status = await zarr_async.open_array(store=SourceStore(store), path=STATUS.name, mode="r")

    async def counted(start: int, stop: int) -> tuple[int, ...]:
        found = np.asarray(await status.getitem(slice(start, stop)))
        return tuple(int((found == value).sum()) for value in (STATUS_OK, STATUS_FAILED, STATUS_NOT_FINITE))

    stop = 0
    async for batch in _batches(manifest_rows(store, manifest), lambda row: row.records):
        stops = list(itertools.accumulate((row.records for row in batch), initial=stop))
        stop = stops[-1]
        for row, counts in zip(batch, await _all(itertools.starmap(counted, itertools.pairwise(stops))), strict=True):
            if counts != (row.ok, row.failed, row.not_finite):
                problems.add(f"chunk {row.unit} of {STATUS.name} counts {counts} (ok, failed, not finite), wanted "
                             f"{(row.ok, row.failed, row.not_finite)}")
