"""The client's peak memory as the number of records grows: it must stay flat.

    python benchmarks/memory.py [--records 10000 100000 1000000] [--record-bytes 784]

Zarr on local files → a server that computes nothing (`noop_server.py`) → Zarr on local files. The figure is the peak
resident memory of the client's process as its own summary gives it, imports included.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import zarr
from measure import heading, stamped
from workload import cli, noop_server, summary_of

CHUNK = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--record-bytes", type=int, default=784)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, noop_server(options.record_bytes) as url:
        print(heading("date", "machine", "records", "bytes a record", "records/s", "peak MB"))
        for count in options.records:
            source = Path(folder) / f"in-{count}.zarr"
            write(source, count, options.record_bytes)
            summary = summary_of(cli("run", source, Path(folder) / f"out-{count}.zarr", "--endpoint", url, "--model",
                                     "noop", "--log", "none", "--json"))
            assert summary["records"] == count
            print(stamped(f"{count:,}", options.record_bytes, f"{summary['records_per_s']:,.0f}",
                          f"{summary['peak_memory_bytes'] / 1e6:.0f}"), flush=True)


def write(path: Path, count: int, record_bytes: int) -> None:
    array = zarr.create_array(path, shape=(count, record_bytes), chunks=(CHUNK, record_bytes), dtype="uint8",
                              compressors=None)
    block = np.random.default_rng(0).integers(1, 256, (100 * CHUNK, record_bytes), np.uint8)
    for start in range(0, count, len(block)):
        array[start:start + len(block)] = block[:count - start]


if __name__ == "__main__":
    main()
