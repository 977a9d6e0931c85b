"""One finished unit → its objects in the store, each by one create-only PUT, and the proof of them.

An object that exists already may be this write with its answer lost, another client's or an earlier life's: it is read
back, and equal bytes mean done. Other bytes break the promise that a run's bytes are always the same.
"""

from __future__ import annotations

import asyncio
import hashlib

from batch_client.assemble import STATUS_FAILED, STATUS_NOT_FINITE, STATUS_OK, UnitAssembler
from batch_client.errors import BrokenPromiseError
from batch_client.layout import OutputLayout
from batch_client.ledger import ChunkProof, Row
from batch_client.storage import Store, child_url

__all__ = ["ChunkWriter"]

# Below this many bytes a hash is quicker than the way to a thread and back.
HASH_IN_THREAD = 1 << 18


class ChunkWriter:
    """Writes units of one output."""

    def __init__(self, store: Store, layout: OutputLayout) -> None:
        self._store = store
        self._layout = layout

    async def write(self, unit: UnitAssembler, source: dict[str, str | None]) -> tuple[Row, bool]:
        """Store a complete unit: predictions first, status last. Returns its ledger row, and whether anything was
        there already.

        Raises BrokenPromiseError when other bytes are stored under one of its keys.
        """
        if not unit.complete:
            raise BrokenPromiseError(f"output chunk {unit.unit.index} was to be written with records missing")
        proofs = []
        adopted = False
        for name in self._layout.array_names:
            values = unit.outputs.get(name, unit.status)
            key, data = await self._layout.encode(name, unit.unit.index, values)
            adopted |= not await self._put(key, data)
            proofs.append(ChunkProof(key, len(data), await _sha256(data)))
        return Row(
            unit=unit.unit.index,
            chunks=tuple(proofs),
            source=dict(sorted(source.items())),
            ok=unit.count(STATUS_OK),
            failed=unit.count(STATUS_FAILED),
            not_finite=unit.count(STATUS_NOT_FINITE),
        ), adopted

    async def _put(self, key: str, data: bytes) -> bool:
        if await self._store.create(key, data):
            return True
        stored = await self._store.get(key)
        if stored is None or stored.data != data:
            raise BrokenPromiseError(
                f"{child_url(self._store.url, key)} holds other bytes than this run computes: the server's numbers are "
                "not repeatable, or the chunk was altered; nothing was overwritten")
        return False


async def _sha256(data: bytes) -> str:
    if len(data) < HASH_IN_THREAD:
        return hashlib.sha256(data).hexdigest()
    return (await asyncio.to_thread(hashlib.sha256, data)).hexdigest()
