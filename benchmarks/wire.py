"""The wire alone: how many bytes a run moves through TorchServe when the model computes nothing.

    python benchmarks/wire.py [--record-bytes 784 150528] [--repeats 15] [--megabytes 1000] [--bodies | --replies]
                              [--echo]

A whole run, from its first read to publication, by the client's own code, with input and output in memory instead of in
storage; the embedded TorchServe with its own settings and our handler, whose model returns the first two bytes of each
record, or with --echo the whole record, like a model whose outputs are as large as its records. So everything of a run
is there (checksums both ways, micro-batches, digests, ledger) but the model and the store. Records, and outputs if they
are large, are in shared memory, as for every server on the client's machine; with --bodies they travel in bodies, as to
any other, and with --replies the outputs alone do. The first run warms up and does not count. CPU seconds are of this
process, Java and the workers.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from pathlib import Path

import psutil
import zarr
import zarr.storage
from measure import cpu_seconds, heading, interval, java_and_workers, stamped
from workload import cli

from batch_client import exchange
from batch_client.__main__ import keep_memory
from batch_client.eventloop import run_until_complete
from batch_client.pipeline import execute
from batch_client.prepare import Services
from batch_client.server import EmbeddedServer, ServerSettings
from batch_client.serving import Servers
from batch_client.spec import RunSpec
from batch_client.storage import MemoryStore
from batch_client.transport import HttpTransport

CHUNK_BYTES = 1 << 20
RING = 256  # input chunks that differ
INPUT, OUTPUT = "memory://in", "memory://out"
SIGNATURE = """
[[inputs]]
name = "bytes"
dtype = "uint8"
shape = [{0}]
cast = false
[[outputs]]
name = "y"
"""


class Memory(MemoryStore):
    """Objects in memory whose ETags cost nothing."""

    @staticmethod
    def _etag(data: bytes) -> str:
        return f'"{len(data)}"'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record-bytes", type=int, nargs="+", default=[784, 150_528])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--megabytes", type=int, default=1000, help="of records in one run")
    sent = parser.add_mutually_exclusive_group()
    sent.add_argument("--bodies", action="store_true", help="send records and outputs instead of sharing them")
    sent.add_argument("--replies", action="store_true", help="send the outputs instead of sharing them")
    parser.add_argument("--echo", action="store_true", help="return each record whole")
    options = parser.parse_args()
    keep_memory()  # as the command does
    if options.replies:
        exchange.SHARED_OUTPUT_BYTES = sys.maxsize
    how = "in bodies" if options.bodies else "in memory, outputs in replies" if options.replies else "in memory"
    shared = not options.bodies
    print(f"{options.repeats} runs of {options.megabytes} MB each\n")
    print(heading("date", "machine", "records", "bytes a record", "MB/s (95 % interval)", "records/s (95 % interval)",
                  "CPU s per GB: client", "Java", "workers"))
    for size in options.record_bytes:
        with tempfile.TemporaryDirectory() as folder:
            archive = packed(Path(folder), size, size if options.echo else 2)
            run_until_complete(measured(archive, size, options.megabytes * 1_000_000 // size, options.repeats, how,
                                        shared=shared))


def packed(work: Path, size: int, returned: int) -> Path:
    """The archive of a TorchScript module that returns the first bytes of its records."""
    import torch

    class Slice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.returned = returned

        def forward(self, records: torch.Tensor) -> torch.Tensor:
            return records[:, :self.returned]

    torch.jit.script(Slice()).save(  # type: ignore[no-untyped-call] # torch ships no types for it
        str(work / "slice.pt"))
    (work / "slice.toml").write_text(SIGNATURE.format(size), "utf-8")
    cli("pack", work / "slice.pt", "--signature", work / "slice.toml", "-o", work / "slice.mar")
    return work / "slice.mar"


async def records_in_memory(count: int, size: int) -> Memory:
    """An uncompressed Zarr array whose chunks are a ring of RING objects: more than a cache holds, and bounded."""
    chunk = max(1, CHUNK_BYTES // size)
    written: dict[str, zarr.core.buffer.Buffer] = {}
    zarr.create_array(zarr.storage.MemoryStore(written), shape=(count, size), chunks=(chunk, size), dtype="uint8",
                      compressors=None)
    store, block = Memory(INPUT), bytes(range(1, 251)) * math.ceil(chunk * size / 250)
    store.objects = {key: value.to_bytes() for key, value in written.items()}
    ring = [bytes(bytearray(block[:chunk * size])) for _ in range(RING)]
    store.objects |= {f"c/{index}/0": ring[index % RING] for index in range(-(-count // chunk))}
    return store


async def measured(archive: Path, size: int, count: int, repeats: int, how: str, *, shared: bool) -> None:
    source = await records_in_memory(count, size)
    spec = RunSpec(input=INPUT, output=OUTPUT, archive=str(archive))
    settings = ServerSettings(archive, batch_size=1, shared_memory=shared)
    async with HttpTransport() as transport, EmbeddedServer(settings) as server:
        servers = Servers(transport, {server.url: server}, server.model_name, alone=True)
        await once(spec, servers, source)
        before = used()
        rates = [await once(spec, servers, source) for _ in range(repeats)]
        gigabytes = repeats * count * size / 1e9
        spent = [(now - then) / gigabytes for now, then in zip(used(), before, strict=True)]
    print(stamped(how, f"{size:,}", interval_of([rate * size / 1e6 for rate in rates]), interval_of(rates),
                  *(f"{seconds:.2f}" for seconds in spent)), flush=True)


async def once(spec: RunSpec, servers: Servers, source: Memory) -> float:
    """Records a second of one run."""
    summary = await execute(spec, Services(servers, source, Memory(OUTPUT)))
    assert summary.published
    assert summary.failed == 0
    return summary.records / summary.seconds


def used() -> tuple[float, float, float]:
    """CPU seconds so far of this process, Java and the workers."""
    here = psutil.Process()
    java, workers = java_and_workers(here.pid)
    return math.fsum(here.cpu_times()[:2]), cpu_seconds(java), cpu_seconds(workers)


def interval_of(values: list[float]) -> str:
    found = interval(values)
    return f"{found.median:,.0f} ({found.low:,.0f} to {found.high:,.0f})"


if __name__ == "__main__":
    main()
