"""What each part of a run can do alone: the wire, the reader, the writer; in records a second.

The parts are the run's own, so that a ceiling is what a run would see if nothing else were slow.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator

import numpy as np

from batch_client.assemble import UnitAssembler
from batch_client.budget import ByteBudget
from batch_client.contract import ModelContract, fetch_contract
from batch_client.dialect import Verdict
from batch_client.endpoint import Pool
from batch_client.errors import ServingError, one_error
from batch_client.exchange import Exchange
from batch_client.layout import OutputLayout
from batch_client.pieces import Pieces
from batch_client.plan import Plan, Span, Unit
from batch_client.reader import Source
from batch_client.serving import Servers
from batch_client.spec import RunSpec
from batch_client.storage import Store
from batch_client.stream import UnitStream
from batch_client.writer import ChunkWriter
from batch_handler.oip import STATUS_OK

__all__ = ["read_alone", "wire_alone", "write_alone"]

PATIENCE = 30.0
MOST_WRITTEN = 1 << 30  # bytes: a temporary folder may be memory
RING_BYTES = 64 << 20
RING = 8

Work = Callable[[], Awaitable[int]]


async def wire_alone(servers: Servers, spec: RunSpec, records: int, seconds: float) -> float:
    """Records/s that requests of `records` random records reach at a server.

    Raises ServingError when the server does not answer them.
    """
    contract = await fetch_contract(servers, servers.urls[0])
    rng = random.Random(0)  # noqa: S311 - no secret
    pool = Pool(servers.urls, spec.in_flight, time.monotonic, rng, PATIENCE)
    for endpoint in pool.endpoints:  # as a run's requests go
        endpoint.lane, endpoint.shared_memory = contract.bulk_lane, contract.shared_memory
    exchange = Exchange(servers=servers, pool=pool, contract=contract, exact=True, patience=PATIENCE,
                        clock=time.monotonic, rng=rng, emit=lambda _: None)
    rows = _random_requests(contract, records)
    span = Span(0, records, 0)
    turn = 0

    async def one() -> int:
        nonlocal turn
        turn += 1
        answer = await exchange.ask(span, rows[turn % len(rows)])
        if isinstance(answer, Verdict):
            raise ServingError(f"the wire can't be measured: {answer.outcome.value} ({answer.reason})")
        return records

    await one()
    return await _rate([one] * spec.in_flight, seconds)


async def read_alone(source: Source, plan: Plan, spec: RunSpec, seconds: float) -> float:
    """Records/s that the reader gives when what it reads is dropped; a short source is read again.

    Raises what reading raises.
    """
    budget = ByteBudget(spec.max_bytes_in_flight)
    units = _around(plan)

    async def one() -> int:
        unit = next(units)
        async for _, _, lease in UnitStream(source, plan, unit, budget, spec.allow_missing).spans():
            lease.release()
        return unit.count

    return await _rate([one] * plan.units_at_once(spec.in_flight), seconds)


async def write_alone(store: Store, plan: Plan, spec: RunSpec, seconds: float) -> float:
    """Records/s of random predictions that are encoded and written, each chunk once, up to MOST_WRITTEN bytes.

    Raises what writing raises.
    """
    layout = await OutputLayout.open(plan, spec.codec)
    writer = ChunkWriter(store, layout, exact=True)
    rng = np.random.default_rng(0)
    values = {output.name: _random((plan.chunk_records, *output.shape), output.dtype, rng)
              for output in plan.outputs}
    units, written = plan.units(), 0

    async def one() -> int:
        nonlocal written
        unit = next(units, None)
        if unit is None or written >= MOST_WRITTEN:
            return 0
        written += plan.unit_bytes_out
        assembler = UnitAssembler(unit, plan.outputs)
        assembler.place(Span(unit.start, unit.stop, 0), {name: array[:unit.count] for name, array in values.items()},
                        np.full(unit.count, STATUS_OK, np.uint8))
        await writer.write(assembler, {})
        return unit.count

    return await _rate([one] * plan.units_at_once(spec.in_flight), seconds)


async def _rate(works: list[Work], seconds: float) -> float:
    """Records/s of all works together, each done over and over until the time is up or it has nothing left (0)."""
    began = time.monotonic()
    end = began + seconds
    done = 0

    async def repeat(work: Work) -> None:
        nonlocal done
        while count := await work():
            done += count
            if time.monotonic() >= end:
                return

    with one_error():
        async with asyncio.TaskGroup() as tasks:
            for work in works:
                tasks.create_task(repeat(work))
    return done / (time.monotonic() - began)


def _random_requests(contract: ModelContract, records: int) -> list[Pieces]:
    rng = np.random.default_rng(0)
    shape, dtype = (records, *contract.input_shape), contract.input_dtype
    ring = max(1, min(RING, RING_BYTES // max(1, math.prod(shape) * dtype.itemsize)))
    return [Pieces([_random(shape, dtype, rng)]) for _ in range(ring)]


def _random(shape: tuple[int, ...], dtype: np.dtype[np.generic], rng: np.random.Generator) -> np.ndarray:
    """Floats in [0, 1), truth values, or integers over all that the dtype holds: what no codec makes small."""
    if dtype.kind == "f":
        return rng.random(shape).astype(dtype)
    if dtype.kind == "b":
        return rng.random(shape) < 0.5
    return np.frombuffer(rng.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def _around(plan: Plan) -> Iterator[Unit]:
    while True:
        yield from plan.units()
