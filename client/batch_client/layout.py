"""What an output looks like: its keys, its arrays, its metadata documents. zarr spells them; nothing is stored here.

A capturing store takes what zarr would have written and hands it back as bytes, so that each object can be written
once, create-only, metadata last.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from zarr.api import asynchronous as zarr_async
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.core.array import AsyncArray
from zarr.core.buffer import default_buffer_prototype
from zarr.core.group import AsyncGroup
from zarr.errors import ZarrUserWarning
from zarr.storage import MemoryStore

from batch_client.plan import OutputGeometry, Plan
from batch_handler.oip import RECORD_STATUS

__all__ = ["FAILED_PREFIX", "GENERATION_KEY", "LEDGER_PREFIX", "MANIFEST_KEY", "MANIFEST_PREFIX", "REMOVING_KEY",
           "SPEC_KEY", "STATUS", "SUCCESS_KEY", "OutputLayout"]

SPEC_KEY = "_run/spec.json"
GENERATION_KEY = "_run/generation"
REMOVING_KEY = "_run/removing"
LEDGER_PREFIX = "_run/ledger/"
FAILED_PREFIX = "_run/failed/"
MANIFEST_KEY = "_run/manifest.json"
MANIFEST_PREFIX = "_run/manifest/"
SUCCESS_KEY = "_SUCCESS"
STATUS = OutputGeometry(RECORD_STATUS, np.dtype(np.uint8), ())
# What a reader finds of a chunk object that somebody has removed: no status that a record has.
_STATUS_LOST = 255


class OutputLayout:
    """The Zarr v3 group of one plan: an array for each model output, and `record_status`.

    Codecs are bytes and crc32c, with zstd between them when `codec` is "zstd". No sharding: a stored chunk is one
    object, written once.
    """

    def __init__(self, plan: Plan, codec: str) -> None:
        self._plan = plan
        self._codec = codec
        self._store = MemoryStore()
        self._arrays: dict[str, AsyncArray[Any]] = {}

    @classmethod
    async def open(cls, plan: Plan, codec: str) -> Self:
        """A layout whose arrays exist, so that chunks can be encoded."""
        layout = cls(plan, codec)
        layout._arrays = await layout._create(layout._store, {})
        return layout

    @property
    def array_names(self) -> tuple[str, ...]:
        """Names of the arrays in the order in which their chunks are written: predictions, then status."""
        return (*(output.name for output in self._plan.outputs), STATUS.name)

    async def encode(self, name: str, unit_index: int, values: np.ndarray) -> tuple[str, bytes]:
        """The key and the bytes of one array's chunk number `unit_index`; `values` is (records, *shape)."""
        array = self._arrays[name]
        start = unit_index * self._plan.chunk_records
        await array.setitem(slice(start, start + len(values)), values)
        inner = "/".join([str(unit_index)] + ["0"] * (values.ndim - 1))
        key = f"{name}/c/{inner}"
        data = await _written(self._store, key)
        await self._store.delete(key)
        return key, data

    async def metadata(self, attributes: Mapping[str, Any]) -> list[tuple[str, bytes]]:
        """Metadata documents in the order in which they are to be written: each array's, then the group's.

        The group's has the arrays' inline (consolidated), so that readers need not list.
        """
        store = MemoryStore()
        await self._create(store, attributes)
        with warnings.catch_warnings():
            # zarr warns that consolidated metadata is not in the v3 specification; xarray warns without it.
            warnings.filterwarnings("ignore", category=ZarrUserWarning, message="Consolidated metadata")
            await zarr_async.consolidate_metadata(store)
        keys = [f"{name}/zarr.json" for name in self.array_names] + ["zarr.json"]
        return [(key, await _written(store, key)) for key in keys]

    async def _create(self, store: MemoryStore, attributes: Mapping[str, Any]) -> dict[str, AsyncArray[Any]]:
        group: AsyncGroup = await zarr_async.open_group(
            store=store, mode="w", zarr_format=3, attributes=dict(attributes))
        arrays = {}
        for output in (*self._plan.outputs, STATUS):
            arrays[output.name] = await group.create_array(
                name=output.name,
                shape=(self._plan.count, *output.shape),
                chunks=(self._plan.chunk_records, *(max(1, size) for size in output.shape)),
                dtype=output.dtype,
                serializer=BytesCodec(),
                compressors=[ZstdCodec(level=3), Crc32cCodec()] if self._codec == "zstd" else [Crc32cCodec()],
                fill_value=_lost(output),
                dimension_names=["record", *(f"{output.name}_{axis}" for axis in range(1, len(output.shape) + 1))],
                config={"write_empty_chunks": True},
            )
        return arrays


async def _written(store: MemoryStore, key: str) -> bytes:
    buffer = await store.get(key, default_buffer_prototype())
    if buffer is None:
        raise RuntimeError(f"zarr wrote no {key}")
    return buffer.to_bytes()


def _lost(output: OutputGeometry) -> float:
    """The fill value: every chunk is written, so whoever reads it reads what was lost since."""
    if output.name == STATUS.name:
        return _STATUS_LOST
    return math.nan if output.dtype.kind == "f" else 0
