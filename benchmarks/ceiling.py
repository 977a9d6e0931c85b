"""The ceiling: the same model, micro-batch, precision and allocator in plain processes, records already in memory.

    python benchmarks/ceiling.py ARCHIVE RECORDS.npy COUNT THREADS

Prints one JSON line with the records scored and the seconds. No server, no storage, no code of the handler but the one
that builds the module: what is left is the model itself. `better` tries it as one process of all cores and as one
process a core; the better of the two is the ceiling.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measure import ALLOCATOR

from batch_client.machine import cores

ROUNDS = 5  # of both ways, before the better one is chosen
LONGEST_ROUND = 400_000  # records; some 15 s, longer than a slow moment


def worker(archive: str, records: str, count: int, threads: int) -> None:
    import numpy as np
    import torch

    from batch_handler.archive import read_description

    torch.set_num_threads(threads)
    description = read_description(Path(archive))
    with tempfile.TemporaryDirectory() as folder:
        zipfile.ZipFile(archive).extractall(folder)
        forward = forward_of(description, Path(folder), threads)
    spec = description.inputs[0]
    size = description.micro_batch
    images = np.load(records)

    def score(start: int) -> None:
        batch = torch.from_numpy(images[start:start + size])
        prepared = batch.to(torch.float32).mul_(spec.scale or 1.0).reshape(len(batch), *spec.model_shape)
        torch.softmax(forward(prepared), -1).numpy()

    whole = len(images) - len(images) % size
    with torch.inference_mode():
        for start in range(0, min(whole, 20 * size), size):
            score(start)
        print("ready", flush=True)
        if not sys.stdin.readline():  # whoever started it has gone
            return
        cpu, began = time.process_time(), time.perf_counter()
        done = 0
        while done < count:
            score(done % whole)
            done += size
        print(json.dumps({"records": done, "seconds": time.perf_counter() - began,
                          "cpu": time.process_time() - cpu}), flush=True)


def forward_of(description: Any, folder: Path, threads: int) -> Callable[[Any], Any]:
    """The model of an unpacked archive as a function of tensors, with its own runtime."""
    import torch

    if description.runtime == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.use_deterministic_compute = True
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(folder / description.weights.file, options,
                                               providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda batch: torch.from_numpy(session.run(None, {name: batch.numpy()})[0])
    from batch_handler.runtimes.eager import load_module

    module, _ = load_module(description, folder, torch.device("cpu"))
    if description.runtime == "torchscript":
        example = torch.zeros(description.micro_batch, *description.inputs[0].model_shape)
        traced = torch.jit.trace(  # type: ignore[no-untyped-call] # torch ships no types for it
            module, example, check_trace=False)
        return torch.jit.optimize_for_inference(torch.jit.freeze(traced.eval()))
    return module


def rate(archive: Path, records: Path, count: int, processes: int, threads: int) -> tuple[float, float]:
    """Records a second over all processes, and CPU seconds per million records."""
    environ = {**os.environ, **ALLOCATOR, "OMP_NUM_THREADS": str(threads)}
    arguments = [sys.executable, __file__, str(archive), str(records), str(count // processes), str(threads)]
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(_process(arguments, environ)) for _ in range(processes)]
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        began = time.perf_counter()
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        results = [json.loads(process.communicate()[0]) for process in running]
        seconds = max(result["seconds"] for result in results)
        assert seconds <= time.perf_counter() - began
    total = sum(result["records"] for result in results)
    return total / seconds, sum(result["cpu"] for result in results) / total * 1e6


@contextlib.contextmanager
def _process(arguments: list[str], environ: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(arguments, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as process:
        try:
            yield process
        finally:  # a benchmark that is ended leaves none behind
            process.kill()


def better(archive: Path, records: Path, count: int) -> tuple[int, int]:
    """Processes and threads of the better way: one process with all cores, or one process a core.

    The median of interleaved rounds, each as long as what is measured afterwards or LONGEST_ROUND: shorter ones, and
    one alone, chose the worse way by a slow moment of the machine, and by how far apart the processes of a short round
    end.
    """
    count = min(count, LONGEST_ROUND)
    ways = ((1, cores()), (cores(), 1))
    rates = [[rate(archive, records, count, *way)[0] for way in ways] for _ in range(ROUNDS)]
    return max(zip(ways, zip(*rates, strict=True), strict=True), key=lambda pair: statistics.median(pair[1]))[0]


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
