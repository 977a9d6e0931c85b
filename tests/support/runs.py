"""Short runs against a simulated server, from a source in memory into an output in memory."""

from __future__ import annotations

import random

import numpy as np
import pytest
import zarr
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore as ZarrMemory

from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.spec import RunSpec
from batch_client.storage import MemoryStore
from support.simulated import URL, SimulatedServer


def records_of(count, shape=(3,), dtype=np.uint8, seed=0):
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.standard_normal((count, *shape)).astype(dtype)
    return rng.integers(0, 100, (count, *shape)).astype(dtype)


def source_of(records, chunks, **options):
    """A source in memory, written by zarr."""
    written = {}
    zarr.create_array(ZarrMemory(written), data=records, chunks=chunks, config={"write_empty_chunks": True}, **options)
    store = MemoryStore("memory://source")
    store.objects = {key: buffer.to_bytes() for key, buffer in written.items()}
    return store


def opened(store):
    """What a user finds in an output, by zarr's own means."""
    found = {key: cpu.Buffer.from_bytes(data) for key, data in store.objects.items()}
    return zarr.open_group(ZarrMemory(found), mode="r")


def spec(**options):
    return RunSpec(**{"input": "memory://source", "output": "memory://out", "endpoints": (URL,), "model": "toy",
                      "in_flight": 4, **options})


def services(server, source, output=None, seed=1):
    return Services(server.servers(), source, output or MemoryStore("memory://out"), rng=random.Random(seed))


async def refused(kind, wanted, source, server=None, **options):
    """The output of a run that ends with this error, in one line."""
    output = MemoryStore("memory://out")
    with pytest.raises(kind) as error:
        await execute(spec(**options), services(server or SimulatedServer(), source, output))
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)
    return output
