"""What does not depend on the model: starting, planning, resuming.

    python benchmarks/startup.py [--repeats 15] [--ledger-chunks 1000000]

- `batch-client --help`, beside Python that does nothing.
- The embedded server: `batch-client predict RECORD.npy --archive MODEL.mar`, from the command to its first reply.
- Planning 10⁹ records: `batch-client plan` on a Zarr array that has metadata only, against a server that computes
  nothing (`noop_server.py`); then, without the command, choosing all sizes and going through every unit of work.
- The ledger of 10⁶ chunks on local files, written and read by the client's own code, and published from there: manifest
  and metadata. With the memory that it takes. The chunks themselves are in the store's listing only.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import zarr
from measure import heading, interval, stamped
from workload import SMALL, command, noop_server

from batch_client.__main__ import end_process
from batch_client.buckets import open_store
from batch_client.layout import OutputLayout
from batch_client.ledger import ChunkProof, Ledger, LedgerView, Row
from batch_client.place import begin, generation_of
from batch_client.plan import Geometry, OutputGeometry, Plan, make_plan
from batch_client.publish import publish
from batch_client.spec import RunIdentity, RunSpec
from batch_client.storage import Blob, Meta, Store
from batch_client.summary import peak_memory

BILLION = 1_000_000_000
CHUNK = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--ledger-chunks", type=int, default=1_000_000)
    parser.add_argument("--ledger-of", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.ledger_of:
        asyncio.run(read_and_publish(options.ledger_of, options.ledger_chunks))
        end_process(0)
    print(f"{options.repeats} repeats\n")
    print(heading("date", "machine", "what", "seconds (95 % interval)"))
    with tempfile.TemporaryDirectory() as folder:
        work, many = Path(folder), options.repeats
        tell("Python that does nothing", [seconds_of([sys.executable, "-c", "pass"]) for _ in range(many)])
        tell("`batch-client --help`", [seconds_of(command("--help")) for _ in range(many)])
        archive = SMALL.pack(work, "torchscript")
        np.save(work / "record.npy", SMALL.images(1))
        predict = command("predict", work / "record.npy", "--archive", archive)
        tell("embedded server, command to first reply", [first_line(predict) for _ in range(many)])
        with noop_server(784) as url:
            source = planned(work)
            plan = command("plan", source, work / "out.zarr", "--endpoint", url, "--model", "noop")
            tell("`batch-client plan`, 10⁹ records", [seconds_of(plan) for _ in range(many)])
        tell("choosing sizes and going through all units of 10⁹ records", [walk() for _ in range(many)])
        asyncio.run(write_ledger(work / "ledger", options.ledger_chunks))
        said = subprocess.run([sys.executable, __file__, "--ledger-of", work / "ledger", "--ledger-chunks",
                               str(options.ledger_chunks)], stdout=subprocess.PIPE, text=True, check=True)
        print(said.stdout, end="")


def tell(what: str, seconds: list[float]) -> None:
    print(stamped(what, interval(seconds)), flush=True)


def seconds_of(words: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def first_line(words: list[str]) -> float:
    """Seconds until a command prints; it is then waited for."""
    began = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        seconds = time.perf_counter() - began
        process.stdout.read()
    assert process.returncode == 0
    return seconds


def planned(work: Path) -> Path:
    zarr.create_array(work / "in.zarr", shape=(BILLION, 784), chunks=(CHUNK, 784), dtype="uint8")
    return work / "in.zarr"


def walk() -> float:
    began = time.perf_counter()
    plan = plan_of(BILLION)
    assert sum(unit.count for unit in plan.units()) == BILLION
    return time.perf_counter() - began


def plan_of(records: int, chunk_records: int | None = None) -> Plan:
    return make_plan(RunSpec(input="in", output="out", archive="model.mar", chunk_records=chunk_records),
                     Geometry((records, 784), np.dtype(np.uint8), CHUNK), np.dtype(np.uint8),
                     (OutputGeometry("scores", np.dtype(np.float32), (10,)),), 128)


async def write_ledger(folder: Path, chunks: int) -> None:
    """Rows as a run of 28 x 28 images writes them: one of scores, one of statuses, one input chunk."""
    store = open_store(str(folder))
    begun = await begin(store, identity_of(plan_of(chunks * CHUNK, CHUNK)), "0" * 16)
    ledger = Ledger(store, begun.generation, "writer", time.monotonic)
    for unit in range(chunks):
        await ledger.add(Row(unit, proofs_of(unit), {f"c/{unit}/0/0": f'"{unit:032x}"'}, CHUNK, 0, 0))
    await ledger.flush()


def proofs_of(unit: int) -> tuple[ChunkProof, ...]:
    return tuple(ChunkProof(f"{name}/c/{unit}{last}", size, f"{unit:064x}")
                 for name, last, size in (("scores", "/0", 40_004), ("record_status", "", 1_004)))


class WithChunks:
    """A store whose listing also has chunks that nobody wrote: two million files are no part of what is measured."""

    def __init__(self, store: Store, chunks: int) -> None:
        self.url, self._store, self._chunks = store.url, store, chunks

    async def get(self, key: str, start: int | None = None, stop: int | None = None) -> Blob | None:
        return await self._store.get(key, start, stop)

    async def head(self, key: str) -> Meta | None:
        return await self._store.head(key)

    async def create(self, key: str, data: bytes | memoryview) -> bool:
        return await self._store.create(key, data)

    async def delete(self, key: str) -> None:
        await self._store.delete(key)

    async def list(self, prefix: str) -> AsyncIterator[Meta]:
        async for meta in self._store.list(prefix):
            yield meta
        for unit in range(0 if prefix else self._chunks):
            for proof in proofs_of(unit):
                yield Meta(proof.key, proof.size, None)


async def read_and_publish(folder: str, chunks: int) -> None:
    """In a process of its own, so that its peak memory is that of reading, and then of both."""
    store, plan = WithChunks(open_store(folder), chunks), plan_of(chunks * CHUNK, CHUNK)
    layout = await OutputLayout.open(plan, "none")
    view, before = LedgerView(store, plan.unit_count, await generation_of(store) or ""), peak_megabytes()
    began = time.perf_counter()
    await view.refresh()
    seconds = time.perf_counter() - began
    assert len(view) == chunks
    print(stamped(f"reading the ledger of {chunks:,} chunks ({before:.0f} MB before, {peak_megabytes():.0f} MB at "
                  "most)", f"{seconds:.3f} (one reading)"), flush=True)
    began = time.perf_counter()
    await publish(store, layout, plan, identity_of(plan), view)
    seconds = time.perf_counter() - began
    print(stamped(f"publishing {chunks:,} chunks ({peak_megabytes():.0f} MB at most)", f"{seconds:.3f} (once)"))


def identity_of(plan: Plan) -> RunIdentity:
    return RunIdentity(
        source="in", source_array="", source_metadata="", source_shape=plan.source.shape, source_dtype="uint8",
        source_encoding="", start=plan.start, stop=plan.stop, grid_records=plan.grid_records,
        chunk_records=plan.chunk_records, micro_batch=plan.micro_batch, codec="none", model="noop",
        model_digest="", fingerprint="", outputs=(("scores", "float32", (10,)),), exact=True, numerics={})


def peak_megabytes() -> float:
    return peak_memory() / 1e6


if __name__ == "__main__":
    main()
