"""This project and what a user could run instead, on the same Zarr array, with the ceiling beside them in every round.

    python benchmarks/compare.py [--rounds 15] [--records 100000] [--contenders plain dask …] [--s3] [--json FILE]

Zarr on local files → scores → Zarr on local files (--s3: on an S3 server on this machine), for everybody. Each round
runs the ceiling and every contender once, in another order; a figure is the median over rounds, a ratio the median of
the rounds' ratios with a 95 % bootstrap interval. The seconds that count are from a contender's first read to its last
write: processes are up, models loaded and warm. The seconds of its whole command stand beside them. Every output is
compared with eager scores of the same records before its rate counts. Memory is of a round of its own, before the
others, since looking costs time. "Tuned" is the same for all: frozen TorchScript, micro-batches of 128, the allocator
settings of the embedded server, a process a core with one thread; `ours-onnx` runs the same module as an ONNX graph.

Contenders with packages of their own get an environment each (`environments.py`), kept in --environments. One that
can't be installed, or fails, is listed with its reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import zarr
from ceiling import better, rate
from contenders.job import CLASSES, Job, store_of
from environments import EnvironmentFailedError, default_folder, interpreter
from measure import ALLOCATOR, PeakMemory, family, heading, interval, machine, row, today, unwind_when_terminated
from workload import SMALL, absolute, given_images, workload_flags

from batch_client.demo.objectstore import SeaweedServer
from batch_client.machine import cores

HERE = Path(__file__).parent / "contenders"
TOLERANCE = 1e-5
CEILING, OURS, OURS_ONNX = "ceiling", "ours", "ours-onnx"


@dataclass(frozen=True)
class Contender:
    """A script in `contenders/` and how it is called.

    environment: the requirements of an interpreter of its own; `client` says that only its server runs there.
    most: it is slow, so it gets only this many records. runtime: of the archive that it is given.
    """

    title: str
    script: str
    words: tuple[str, ...] = ()
    environment: str | None = None
    client: bool = False
    tuned: bool = True
    most: int | None = None
    runtime: str = "torchscript"


CONTENDERS = {
    OURS: Contender("batch-client run --archive", "product.py"),
    OURS_ONNX: Contender("batch-client run --archive, packed with --runtime onnx", "product.py", runtime="onnx"),
    "plain": Contender("processes written by hand, tuned", "plain.py"),
    "litserve": Contender("LitServe, tuned, 1,000 records a request", "litserve_client.py", (), "litserve", True),
    "triton": Contender("Triton (pytriton), tuned, 1,000 records a request", "triton_client.py", (), "triton", True),
    "ray": Contender("Ray Data, tuned", "ray_dataset.py", ("tuned",), "ray"),
    "dask": Contender("Dask, tuned", "dask_array.py", ("tuned",), "dask"),
    "ray-eager": Contender("Ray Data, eager", "ray_dataset.py", ("eager",), "ray", tuned=False),
    "dask-eager": Contender("Dask, as the notebook", "dask_array.py", ("eager",), "dask", tuned=False),
    "torchserve": Contender("TorchServe by its docs, a record a request", "torchserve_docs.py", ("raw",), tuned=False,
                            most=5_000),
    "torchserve-json": Contender("TorchServe by its docs, a record a request, JSON", "torchserve_docs.py", ("json",),
                                 tuned=False, most=5_000),
}


class FailedError(Exception):
    """A contender that gave no result; the message is one line."""


@dataclass
class Results:
    """Records a second and seconds of the whole command, a round each, by name; peak bytes; why some have none."""

    rates: dict[str, list[float]] = field(default_factory=dict)
    commands: dict[str, list[float]] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, records_per_s: float, seconds: float) -> None:
        self.rates.setdefault(name, []).append(records_per_s)
        self.commands.setdefault(name, []).append(seconds)

    def ratios(self, one: str, other: str) -> list[float]:
        """Of each round that both came through."""
        return [a / b for a, b in zip(self.rates[one], self.rates[other], strict=False)]


def main() -> None:
    unwind_when_terminated()
    options = arguments()
    with tempfile.TemporaryDirectory(prefix="compare-") as folder, contextlib.ExitStack() as stack:
        work = Path(folder)
        images = given_images(options.images, options.records)
        place: Path | SeaweedServer = work
        if options.s3:
            place = stack.enter_context(SeaweedServer())
            os.environ.update(place.environ())
        arena = Arena(work, SMALL.store(place, images), options)
        np.save(work / "records.npy", images)
        way = better(arena.archive, work / "records.npy", options.records)
        results = Results()
        arena.measure_memory(results)
        order = [CEILING, *(name for name in options.contenders if name not in results.failed)]
        for number in range(options.rounds):
            random.Random(number).shuffle(order)
            for name in order:
                if name == CEILING:
                    results.add(name, rate(arena.archive, work / "records.npy", options.records, *way)[0], 0.0)
                elif name not in results.failed:
                    arena.compete(name, results)
            print(f"round {number + 1}: " + ", ".join(f"{name} {rates[-1]:,.0f}" for name, rates in
                                                      results.rates.items()), flush=True)
    report(results, options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), metavar="NAME",
                        help=f"of {', '.join(CONTENDERS)} [default: all]")
    parser.add_argument("--s3", action="store_true", help="input and output on an S3 server on this machine")
    parser.add_argument("--environments", type=absolute, default=default_folder(), help="[default: %(default)s]")
    parser.add_argument("--triton-python", default=sys.executable, help="pytriton's binary holds a Python of its own, "
                        "which breaks on the library of some patch releases (3.11.7): another one of this minor "
                        "version [default: this one]")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one contender [default: 900]")
    parser.add_argument("--json", type=Path, help="write all rounds' figures into this file")
    workload_flags(parser)
    options = parser.parse_args()
    SMALL.require(options.records, parser)
    return options


class Arena:
    """The array that all score, the model, and what their outputs are compared with."""

    def __init__(self, work: Path, source: str, options: argparse.Namespace) -> None:
        self._work = work
        self._source = source
        self._options = options
        self._model = options.model or work / "model.pt"
        if options.model is None:
            torch.save(SMALL.module(), self._model)
        self.archive = SMALL.pack(work, "torchscript", options.model)
        self._archives = {"torchscript": self.archive}
        self._number = 0
        self._call(Contender("reference", "reference.py", tuned=False), sys.executable, work / "expected.zarr")
        self._expected = np.asarray(zarr.open_array(work / "expected.zarr", mode="r")[:])

    def _packed(self, runtime: str) -> Path:
        if runtime not in self._archives:
            try:
                self._archives[runtime] = SMALL.pack(self._work, runtime, self._options.model)
            except SystemExit as error:
                raise FailedError(f"can't be packed: {str(error).strip()}") from error
        return self._archives[runtime]

    def measure_memory(self, results: Results) -> None:
        """A round that is watched and does not count; it also makes the environments."""
        for name in self._options.contenders:
            try:
                _, _, results.memory[name] = self._run(name, watched=True)
            except (FailedError, EnvironmentFailedError) as error:
                results.failed[name] = str(error)
                print(f"{name}: {error}", flush=True)

    def compete(self, name: str, results: Results) -> None:
        try:
            records_per_s, seconds, _ = self._run(name)
        except FailedError as error:
            results.failed[name] = str(error)
            print(f"{name}: {error}", flush=True)
        else:
            results.add(name, records_per_s, seconds)

    def _run(self, name: str, *, watched: bool = False) -> tuple[float, float, int]:
        """Records a second, seconds of the whole command, peak bytes if watched."""
        contender = CONTENDERS[name]
        python = sys.executable
        if contender.environment is not None:
            base = self._options.triton_python if name == "triton" else sys.executable
            python = str(interpreter(contender.environment, self._options.environments, base))
        self._number += 1
        output = (f"{self._source.removesuffix('in.zarr')}out-{self._number}.zarr")
        answer, seconds, peak = self._call(contender, python, output, watched=watched)
        self._check(output, int(answer["records"]))
        if "://" not in output:
            shutil.rmtree(output)
        return answer["records"] / answer["seconds"], seconds, peak

    def _call(self, contender: Contender, python: str, output: object, *,
              watched: bool = False) -> tuple[dict[str, float], float, int]:
        records = min(self._options.records, contender.most or self._options.records)
        with tempfile.TemporaryDirectory(prefix="c-") as folder:
            job = Job(self._source, str(output), str(self._model), str(self._packed(contender.runtime)),
                      python, records, cores(), folder)
            told = Path(folder, "job.json")
            told.write_text(json.dumps(asdict(job)), "utf-8")
            command = [sys.executable if contender.client else python, str(HERE / contender.script), str(told),
                       *contender.words]
            log = Path(folder, "log")
            began = time.perf_counter()
            with log.open("wb") as errors, _process(command, self._environ(contender), errors) as process:
                watch = PeakMemory(process.pid)
                with watch.watched() if watched else contextlib.nullcontext():
                    try:
                        said, _ = process.communicate(timeout=self._options.timeout)
                    except subprocess.TimeoutExpired:
                        raise FailedError(f"no answer in {self._options.timeout:g} s") from None
            seconds = time.perf_counter() - began
            lines = said.strip().splitlines()
            if process.returncode or not lines:
                why = [line for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
                raise FailedError(f"exit code {process.returncode}: {why[-1][:300] if why else 'it said nothing'}")
            try:
                answer = {key: float(value) for key, value in json.loads(lines[-1]).items()}
            except (ValueError, TypeError, AttributeError):
                raise FailedError(f"its last line is no answer: {lines[-1][:300]}") from None
            return answer, seconds, watch.peak

    @staticmethod
    def _environ(contender: Contender) -> dict[str, str]:
        """Contenders import each other's files; those that are not tuned run as they come."""
        tuned: Mapping[str, str] = {**ALLOCATOR, "OMP_NUM_THREADS": "1"} if contender.tuned else {}
        path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
        return {**os.environ, **tuned, "PYTHONPATH": path}

    def _check(self, output: str, records: int) -> None:
        try:
            found = zarr.open(store_of(output), mode="r")
            array: Any = found["scores"] if isinstance(found, zarr.Group) else found
            scores = np.asarray(array[:])
        except (OSError, KeyError, ValueError) as error:
            raise FailedError(f"its output can't be read: {type(error).__name__}: {error}") from error
        if scores.shape != (records, CLASSES):
            raise FailedError(f"its output has shape {scores.shape}, wanted {(records, CLASSES)}")
        difference = float(np.abs(scores - self._expected[:records]).max())
        if not difference <= TOLERANCE:
            raise FailedError(f"its output is up to {difference:.1e} from eager scores, allowed {TOLERANCE:.0e}")


@contextlib.contextmanager
def _process(command: list[str], environ: dict[str, str], errors: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """A contender, and nothing of it left afterwards."""
    process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=errors, text=True)
    try:
        yield process
    finally:
        for one in family(process.pid) if process.poll() is None else []:
            with contextlib.suppress(OSError):
                one.kill()
        process.wait()


def report(results: Results, options: argparse.Namespace) -> None:
    where = "S3 on this machine" if options.s3 else "local files"
    print(f"\n{today()}, {machine()}; {options.records:,} records, Zarr to Zarr on {where}, {options.rounds} "
          "interleaved rounds; medians, ratios with 95 % intervals\n")
    leaders = {OURS: "ours ÷ this", OURS_ONNX: "with onnx ÷ this"}
    leaders = {name: title for name, title in leaders.items() if name in results.rates}
    print(heading("what", "records/s", "of the ceiling", *leaders.values(), "peak memory, MB", "whole command, s"))
    ceiling = results.rates[CEILING]
    print(row("ceiling: the model alone, records in memory", f"{statistics.median(ceiling):,.0f}", "1",
              *("" for _ in leaders), "", ""))
    for name in sorted(results.rates.keys() - {CEILING}, key=lambda name: -statistics.median(results.rates[name])):
        leads = ["" if name == leader else interval(results.ratios(leader, name)) for leader in leaders]
        print(row(CONTENDERS[name].title, f"{statistics.median(results.rates[name]):,.0f}",
                  interval(results.ratios(name, CEILING)), *leads, f"{results.memory[name] / 1e6:,.0f}",
                  f"{statistics.median(results.commands[name]):.1f}"))
    for name, reason in results.failed.items():
        print(row(CONTENDERS[name].title, "failed", reason, *("" for _ in leaders), "", ""))
    if options.json:
        about = {"date": today(), "machine": machine(), "records": options.records, "storage": where}
        options.json.write_text(json.dumps(about | asdict(results), indent=1), "utf-8")


if __name__ == "__main__":
    main()
