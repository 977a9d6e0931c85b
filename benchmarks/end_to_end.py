"""Zarr on S3 → TorchServe → Zarr on S3, all on this machine, against the ceiling: the model alone in memory.

    python benchmarks/end_to_end.py [--pairs 15] [--records 200000] [--runtime torchscript] [--model MODEL]
    python benchmarks/end_to_end.py --heavy [--pairs 15] [--records 2000]
    python benchmarks/end_to_end.py --fast
    python benchmarks/end_to_end.py --input-chunk 8192 --micro-batch 32

Ceiling and run alternate, since a machine's speed drifts; a figure is the median of the pairs' ratios with a 95 %
bootstrap interval. The server is `batch-client serve` in a process of its own, warmed up by a run of a tenth of the
records, so that its Java and workers can be read before and after each run. Each pair has a new one, as each ceiling
has new processes: how quick a process is may depend on where its memory lies, and pairs that shared it would not be
independent. A run's seconds are those of its own summary: from the first read to publication. CPU seconds are of
client, Java and workers over the same time; the object store's are left out. The ceiling is measured by `ceiling.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from ceiling import better, rate
from measure import (
    cpu_seconds,
    heading,
    interval,
    java_and_workers,
    seconds_without_core,
    stamped,
    unwind_when_terminated,
)
from workload import HEAVY, SMALL, command, given_images, summary_of, workload_flags

from batch_client.demo.objectstore import SeaweedServer
from batch_client.machine import cores


def main() -> None:
    unwind_when_terminated()
    options = arguments()
    load, count = options.load, options.records
    with tempfile.TemporaryDirectory() as folder, SeaweedServer() as store:
        work = Path(folder)
        images = load.images(count) if options.heavy else given_images(options.images, count)
        np.save(work / "records.npy", images)
        source = load.store(store, images)
        archive = load.pack(work, options.runtime, options.model)
        way = better(archive, work / "records.npy", count)
        print(f"ceiling: processes x threads = {way[0]} x {way[1]}", flush=True)
        environ, pairs = {**os.environ, **store.environ()}, []
        for number in range(options.pairs):
            # Which of two things is first changes from pair to pair, so that none is always the later one.
            ceiling = alone(store, archive, work, count, way) if number % 2 else None
            with served(archive, work) as server:
                run(server, source, f"warm-up-{number}", environ, "--records", f"0:{-(-count // 10)}")
                flags = ["", "--fast"][:1 + options.fast]
                runs = {flag: run(server, source, f"{number}{flag}", environ, *filter(None, [flag]))
                        for flag in (flags if number // 2 % 2 == 0 else reversed(flags))}
            ceiling = ceiling or alone(store, archive, work, count, way)
            pairs.append(Pair(runs[""], *ceiling, runs.get("--fast")))
            print(f"pair {number + 1}: {pairs[-1]}", flush=True)
        what = f"{'heavy, ' if options.heavy else ''}{options.runtime}, micro-batches of {load.micro_batch}"
        report(pairs, f"{what}, {load.chunk:,} records an input chunk", count)


def alone(store: SeaweedServer, archive: Path, work: Path, count: int, way: tuple[int, int]) -> tuple[float, float]:
    """The ceiling, while nothing of a run is on the machine and the store stands still."""
    process = psutil.Process(store.pid)
    process.suspend()
    try:
        return rate(archive, work / "records.npy", count, *way)
    finally:
        process.resume()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--records", type=int, help="[default: 200,000; with --heavy 2,000]")
    parser.add_argument("--input-chunk", type=int, help="records in a chunk of the source [default: 1,000; with "
                        "--heavy 100]")
    parser.add_argument("--micro-batch", type=int, help="[default: 128; with --heavy 8]")
    parser.add_argument("--runtime", choices=["eager", "torchscript", "onnx"], default="torchscript")
    parser.add_argument("--heavy", action="store_true", help="a network of ResNet-50's size and 3x112x112 records")
    parser.add_argument("--fast", action="store_true", help="after each run another one with --fast")
    workload_flags(parser)
    options = parser.parse_args()
    for flag, value in (("--input-chunk", options.input_chunk), ("--micro-batch", options.micro_batch)):
        if value is not None and value < 1:
            parser.error(f"{flag} {value}: wanted at least one record")
    if options.heavy and (options.model or options.images):
        parser.error("--heavy brings its own model and records")
    load = HEAVY if options.heavy else SMALL
    options.load = replace(load, chunk=options.input_chunk or load.chunk,
                           micro_batch=options.micro_batch or load.micro_batch)
    if options.records is None:
        options.records = 2_000 if options.heavy else 200_000
    options.load.require(options.records, parser)
    return options


@dataclass(frozen=True)
class Cpu:
    """CPU seconds by what used them, and seconds that workers waited for a core."""

    client: float
    java: float
    workers: float
    displaced: float

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.client - other.client, self.java - other.java, self.workers - other.workers,
                   self.displaced - other.displaced)

    @property
    def total(self) -> float:
        return self.client + self.java + self.workers


@dataclass(frozen=True)
class Run:
    """One run: its records, its seconds, CPU seconds in them."""

    records: int
    seconds: float
    cpu: Cpu

    @property
    def rate(self) -> float:
        return self.records / self.seconds

    @property
    def cpu_per_million(self) -> float:
        return self.cpu.total / self.records * 1e6

    @property
    def idle(self) -> float:
        """The share of the machine's cores that the workers left: they are one thread a core together."""
        return 1 - self.cpu.workers / self.seconds / cores()

    @property
    def displaced(self) -> float:
        """The share of the cores' time in which a worker with work waited for a core; mostly a part of `idle`."""
        return self.cpu.displaced / self.seconds / cores()


@dataclass(frozen=True)
class Pair:
    """A run, the ceiling's records a second and CPU seconds per million, and a run with --fast if asked for."""

    ours: Run
    ceiling: float
    ceiling_cpu: float
    fast: Run | None

    @property
    def ratio(self) -> float:
        return self.ours.rate / self.ceiling

    @property
    def ceiling_idle(self) -> float:
        """What the ceiling's processes left of the cores: ends at different times, the kernel's own work."""
        return 1 - self.ceiling * self.ceiling_cpu / 1e6 / cores()

    @property
    def cpu_ratio(self) -> float:
        return self.ours.cpu_per_million / self.ceiling_cpu

    def __str__(self) -> str:
        fast = f", with --fast {self.fast.rate:,.1f}" if self.fast else ""
        return (f"run {self.ours.rate:,.1f} records/s, ceiling {self.ceiling:,.1f}, ratio {self.ratio:.3f}; CPU s per "
                f"million {self.ours.cpu_per_million:,.1f} / {self.ceiling_cpu:,.1f} = {self.cpu_ratio:.3f}{fast}")


@dataclass(frozen=True)
class Server:
    """`batch-client serve`, where a client finds it and which processes score."""

    url: str
    model: str
    token_file: Path
    java: list[psutil.Process]
    workers: list[psutil.Process]

    def cpu(self, client: psutil.Process) -> Cpu:
        return Cpu(cpu_seconds([client]), cpu_seconds(self.java), cpu_seconds(self.workers),
                   seconds_without_core(self.workers))


@contextmanager
def served(archive: Path, work: Path) -> Iterator[Server]:
    token = work / "token"
    words = command("serve", archive, "--token-out", token, "--log-dir", work)
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        said = [line for _, line in zip(range(3), process.stdout, strict=False)]
        if len(said) < 3:
            sys.exit("the server did not start")
        _, model, _, url = said[0].split()
        yield Server(url, model, token, *java_and_workers(process.pid))
    finally:
        process.terminate()
        process.wait()


def run(server: Server, source: str, name: str, environ: Mapping[str, str], *flags: str) -> Run:
    """A run whose log says when it begins and ends; processor time is read at those two lines."""
    words = command("run", source, f"s3://bench/out-{name}.zarr", "--endpoint", server.url, "--model", server.model,
                    "--token-file", server.token_file, "--log", "json", "--json", *flags)
    with subprocess.Popen(words, env=dict(environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        client, at, log = psutil.Process(process.pid), {}, []
        for line in process.stderr:
            log.append(line)
            event = json.loads(line).get("event") if line.startswith("{") else None
            if event in {"run started", "published"}:
                at[event] = server.cpu(client)
        said = process.stdout.read()
    if process.returncode:
        sys.exit("".join(log))
    summary = summary_of(said)
    return Run(summary["records"], summary["seconds"], at["published"] - at["run started"])


def report(pairs: list[Pair], what: str, records: int) -> None:
    runs = [pair.ours for pair in pairs]
    per_million = [statistics.median(part) * 1e6 / records for part in (
        [one.cpu.client for one in runs], [one.cpu.java for one in runs], [one.cpu.workers for one in runs])]
    print(f"\n{len(pairs)} interleaved pairs; medians\n")
    print(heading("date", "machine", "model, runtime", "records", "run, records/s", "ceiling, records/s",
                  "ratio (95 % interval)", "CPU s per million, run / ceiling", "ratio (95 % interval)",
                  "workers idle, run / ceiling"))
    print(stamped(what, f"{records:,}", f"{statistics.median(one.rate for one in runs):,.1f}",
              f"{statistics.median(pair.ceiling for pair in pairs):,.1f}", interval([pair.ratio for pair in pairs]),
              f"{statistics.median(one.cpu_per_million for one in runs):,.1f} / "
              f"{statistics.median(pair.ceiling_cpu for pair in pairs):,.1f}",
              interval([pair.cpu_ratio for pair in pairs]),
              f"{statistics.median(one.idle for one in runs):.1%} / "
              f"{statistics.median(pair.ceiling_idle for pair in pairs):.1%}"))
    print("\nCPU s per million: client {:.2f}, Java {:.2f}, workers {:.1f}".format(*per_million))
    print(f"client at 25,000 records/s: {per_million[0] * 0.025:.1%} of a core")
    print(f"workers with work and without a core: {statistics.median(one.displaced for one in runs):.1%} of the cores")
    fast = [pair.ours.rate / pair.fast.rate for pair in pairs if pair.fast]
    if fast:
        print(f"exact / --fast: {interval(fast)}")


if __name__ == "__main__":
    main()
