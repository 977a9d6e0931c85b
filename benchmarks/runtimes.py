"""The same records through each runtime, in one process, in turn: which one is quickest on this machine.

    python benchmarks/runtimes.py RECORDS.npy [--threads 2] [--rounds 7] NAME=ARCHIVE[:RUNTIME[:PRECISION]] …

RECORDS are what the archives take. The first entry is the ceiling that the others are divided by. Set
MALLOC_MMAP_THRESHOLD_ and MALLOC_TRIM_THRESHOLD_ as servers have them. Fails where two entries differ by more than
their precision allows.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from measure import heading, interval, machine, row, today

if TYPE_CHECKING:
    from batch_handler.model import Model

ALLOWED = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}


def opened(archive: str, runtime: str, precision: str, threads: int) -> Model:
    from batch_handler.model import Model, Tuning

    with tempfile.TemporaryDirectory(prefix="runtimes-") as folder, zipfile.ZipFile(archive) as mar:
        mar.extractall(folder)
        return Model.open(Path(folder), Tuning(threads=threads, runtime=runtime or None, precision=precision))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("entries", nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args(argv)
    records = np.load(arguments.records)
    models: dict[str, Model] = {}
    rates: dict[str, list[float]] = {}
    scores: dict[str, np.ndarray] = {}
    for entry in arguments.entries:
        name, _, rest = entry.partition("=")
        archive, runtime, precision = (*rest.split(":"), "", "")[:3]
        models[name] = opened(archive, runtime, precision or "float32", arguments.threads)
        rates[name] = []
        scores[name] = models[name].score_bulk([records])[0]
        apart = float(np.abs(scores[name] - next(iter(scores.values()))).max())
        assert apart <= ALLOWED[precision or "float32"], f"{name} differs by {apart}"
    for _ in range(arguments.rounds):
        for name, model in models.items():
            begun = time.perf_counter()
            model.score_bulk([records])
            rates[name].append(len(records) / (time.perf_counter() - begun))
    first = next(iter(rates.values()))
    print(f"{today()}, {machine()}, {next(iter(models.values())).numerics['isa']}, {arguments.threads} threads, "
          f"{len(records)} records, {arguments.rounds} rounds")
    print(heading("entry", "runtime", "precision", "records/s", "ratio (95 % interval)", "golden difference"))
    for name, model in models.items():
        ratios = [mine / other for mine, other in zip(rates[name], first, strict=True)]
        print(row(name, model.numerics["runtime"], model.numerics["precision"],
                  f"{statistics.median(rates[name]):,.0f}", interval(ratios), f"{model.golden_difference:.1e}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
