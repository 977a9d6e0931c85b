"""One finished unit → its objects in the store, each by one create-only PUT, and the proof of them.

An object that exists already may be this write with its answer lost, another client's or an earlier life's: it is read
back, and equal bytes mean done. Other bytes break the promise that an exact run's bytes are always the same. A fast run
adopts the predictions that the first writer stored, and writes the status before them: with another status they are not
predictions of the same records, and the run stops.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator

from batch_client.assemble import STATUS_FAILED, UnitAssembler
from batch_client.errors import BrokenPromiseError
from batch_client.layout import STATUS, OutputLayout
from batch_client.ledger import ChunkProof, Row
from batch_client.storage import Store, child_url
from batch_handler.oip import STATUS_NOT_FINITE, STATUS_OK

__all__ = ["ChunkWriter", "encode_unit", "proof_of"]

# Below this many bytes a hash is quicker than the way to a thread and back.
HASH_IN_THREAD = 1 << 18


class ChunkWriter:
    """Writes units of one output."""

    def __init__(self, store: Store, layout: OutputLayout, *, exact: bool) -> None:
        self._store = store
        self._layout = layout
        self._exact = exact

    async def write(self, unit: UnitAssembler, source: dict[str, str | None]) -> tuple[Row, bool]:
        """Store a complete unit: predictions first, status last. Returns its ledger row, and whether anything was
        there already.

        Raises BrokenPromiseError when other bytes are stored under one of its keys.
        """
        if not unit.complete:
            raise BrokenPromiseError(f"output chunk {unit.unit.index} was to be written with records missing")
        proofs = []
        adopted = False
        async for key, data in encode_unit(self._layout, unit, status_first=not self._exact):
            proof, found = await self._put(key, data)
            adopted |= found
            proofs.append(proof)
        return Row(
            unit=unit.unit.index,
            chunks=tuple(proofs),
            source=dict(source),
            ok=unit.count(STATUS_OK),
            failed=unit.count(STATUS_FAILED),
            not_finite=unit.count(STATUS_NOT_FINITE),
        ), adopted

    async def _put(self, key: str, data: bytes) -> tuple[ChunkProof, bool]:
        """The proof of what is stored now, and whether it was there already."""
        proof = await proof_of(key, data)
        if await self._store.create(key, data):
            return proof, False
        stored = await self._store.get(key)
        found = None if stored is None else await proof_of(key, stored.data)
        adopts = not self._exact and not key.startswith(f"{STATUS.name}/")
        if found is not None and (adopts or found == proof):
            return found, True
        raise BrokenPromiseError(
            f"{child_url(self._store.url, key)} holds other bytes than this run computes: the server's numbers are "
            "not repeatable, the source has changed, the chunk was altered, or another run's client wrote there; "
            "nothing was overwritten: score at another place, or end every client of this one and remove it")


async def encode_unit(layout: OutputLayout, unit: UnitAssembler, *,
                      status_first: bool = False) -> AsyncIterator[tuple[str, bytes]]:
    """Keys and bytes of a unit's objects: predictions first, status last, or the other way round."""
    for name in layout.array_names[::-1] if status_first else layout.array_names:
        yield await layout.encode(name, unit.unit.index, unit.outputs.get(name, unit.status))


async def proof_of(key: str, data: bytes | memoryview) -> ChunkProof:
    """What the ledger says of an object."""
    if len(data) < HASH_IN_THREAD:
        return ChunkProof(key, len(data), hashlib.sha256(data).hexdigest())
    return ChunkProof(key, len(data), (await asyncio.to_thread(hashlib.sha256, data)).hexdigest())
