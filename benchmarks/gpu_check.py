"""What no machine without a GPU can show: the handler's core on this one's, without TorchServe and without a network.

    python benchmarks/gpu_check.py [--archive MODEL.mar] [--device cuda] [--records N] [--restarts 3] [--micro-batch N]

- **Ratio**: records a second of the handler's core (records in host memory, two slots, upload, model, download) over
  the model alone (records on the device already). Upload and download should hide behind the model: 0.95 or more.
- **Overlap**: the same micro-batches one after another, each waited for, over both slots at once. More than 1 is what
  the second slot wins; at most 2.
- **Bits**: SHA-256 of the scores of the same records in fresh processes, cut into requests of other sizes each time,
  each record in its place. They have to be one, for each runtime that the archive can have.
- **Precision**: the same records by tf32, bfloat16 and float16: largest difference in scores, and speed.

Ends with 1 when bits differ, with 2 when there is no such device, with 3 when a process of it failed, and with 4 when
the ratio is under 0.95. `--device cpu` tries the program itself: a CPU copies nothing, so its speed says nothing, and
precisions are left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from measure import machine, row, today
from workload import HEAVY

ROUNDS = 5
PRECISIONS = ("tf32", "bfloat16", "float16")
LEAST_RATIO = 0.95
DIFFERENT, NO_DEVICE, FAILED, SLOW = 1, 2, 3, 4  # exit codes
# Of the network that is packed here. A GPU is idle for most of a micro-batch that fits a CPU.
MICRO_BATCH = {"cuda": 128, "cpu": 8}
# Micro-batches a request: speed is that of long ones, and the bits must not depend on it.
LONG_REQUEST = 8
REQUEST_SIZES = (LONG_REQUEST, 1, 3)


def main() -> None:
    options = arguments()
    if options.job:
        print(json.dumps(work(**json.loads(options.job))))
        return
    require_device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        micro_batch = options.micro_batch or MICRO_BATCH[options.device]
        archive = options.archive or replace(HEAVY, micro_batch=micro_batch).pack(Path(folder), "eager")
        unpacked = Path(folder) / "model"
        zipfile.ZipFile(archive).extractall(unpacked)
        sys.exit(check(options, {"directory": str(unpacked), "device": options.device, "records": options.records,
                                 "scores": str(Path(folder) / "scores.npy")}))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archive", type=Path, help="[default: an untrained network of ResNet-50's size]")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--records", type=int, default=4096)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--micro-batch", type=int, help="of that network [default: 128, on a CPU 8]")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def require_device(device: str) -> None:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device that this torch can use: nothing was checked (--device cpu tries the program)",
              file=sys.stderr)
        sys.exit(NO_DEVICE)


def check(options: argparse.Namespace, job: dict[str, Any]) -> int:
    lives = lives_of(job, options.restarts)
    first, different = lives[0], digests(lives) > 1
    exact = np.load(job["scores"])
    ratio = first["core"] / first["alone"]
    print(f"{today()}, {first['gpu'] or machine()}, {options.records:,} records, medians of {ROUNDS} rounds")
    print(row("what", "figure"))
    print(row("---", "---:"))
    print(row("model alone, records/s", f"{first['alone']:,.0f}"))
    print(row("handler's core, records/s", f"{first['core']:,.0f}"))
    print(row(f"ratio ({LEAST_RATIO} or more)", f"{ratio:.3f}"))
    print(row("overlap (1 to 2)", f"{first['core'] / first['serial']:.3f}"))
    print(row(f"bits over {len(lives)} restarts, {first['runtime']}", "DIFFERENT" if different else "equal"))
    for runtime in first["other_runtimes"]:
        others = digests(lives_of(job, options.restarts, runtime=runtime)) > 1
        print(row(f"bits over {options.restarts} restarts, {runtime}", "DIFFERENT" if others else "equal"))
        different = different or others
    for precision in PRECISIONS if options.device == "cuda" else ():
        other = life(job, request=LONG_REQUEST, precision=precision)
        worst = float(np.abs(np.load(job["scores"]) - exact).max())
        print(row(f"{precision}: largest difference, speed", f"{worst:.2g}, {other['core'] / first['core']:.2f} x"))
    if different:
        return DIFFERENT
    return SLOW if options.device == "cuda" and ratio < LEAST_RATIO else 0


def lives_of(job: dict[str, Any], restarts: int, **more: Any) -> list[dict[str, Any]]:
    """Fresh processes, one after another, with requests of another size each."""
    return [life(job, request=REQUEST_SIZES[number % len(REQUEST_SIZES)], **more) for number in range(restarts)]


def digests(lives: list[dict[str, Any]]) -> int:
    """How many different scores there were of the same records."""
    return len({one["digest"] for one in lives})


def life(job: dict[str, Any], **more: Any) -> dict[str, Any]:
    """One process of its own, from its start to its end."""
    words = [sys.executable, __file__, "--job", json.dumps(job | more)]
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"a process of the check failed with exit code {done.returncode}, for the reason above", file=sys.stderr)
        sys.exit(FAILED)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def work(directory: str, device: str, records: int, scores: str, request: int, precision: str = "float32",
         runtime: str | None = None) -> dict[str, Any]:
    """What a life measures: rates in records a second and the digest of all scores, which it leaves in a file."""
    import torch

    from batch_handler.model import Model, Tuning, read_golden
    from batch_handler.runtimes import open_runtime
    from batch_handler.runtimes.device import open_device
    from batch_handler.signature import runtimes_for

    gpu = 0 if device == "cuda" else None
    threads = torch.get_num_threads()
    model = Model.open(Path(directory), Tuning(threads=threads, precision=precision, gpu_id=gpu, runtime=runtime))
    described = model.description
    # The archive's own records over and over, which the model takes, whatever it takes.
    golden, _ = read_golden(Path(directory) / described.golden.file, described)
    rows = [np.resize(values, (records, *values.shape[1:])) for values in golden]
    step = request * model.micro_batch

    def core() -> np.ndarray:
        parts = [model.score_bulk([values[at:at + step] for values in rows], at)[0] for at in range(0, records, step)]
        return np.concatenate(parts)

    seam = open_device(gpu, threads=threads, precision=precision)
    engine: Any = open_runtime(described, Path(directory), seam, precision=precision, runtime=runtime)
    slot = engine.prepare(model.micro_batch)[0]
    whole = max(1, records // model.micro_batch)
    for target, values in zip(slot.inputs, rows, strict=True):
        target[:] = np.resize(values, target.shape)

    def serial() -> None:
        with engine.session():
            for _ in range(whole):
                engine.run(slot, model.micro_batch)
                slot.wait()

    targets = [target[:model.micro_batch] for target in slot.targets]

    def alone() -> None:
        with engine.session():
            for _ in range(whole):
                seam.compute(lambda: engine._compute(targets, model.micro_batch), seam.upload((), ()))  # noqa: SLF001 - without the copies
        seam.settle()

    found = core()
    np.save(scores, found)
    done = whole * model.micro_batch
    serially = done / timed(serial)  # first, since it uploads the records that the model alone takes
    return {
        "gpu": torch.cuda.get_device_name(gpu) if gpu is not None else None,
        "alone": done / timed(alone), "serial": serially, "core": records / timed(core),
        "runtime": runtime or described.runtime,
        "other_runtimes": [one for one in ("eager", "torchscript") if runtime is None and one != described.runtime
                           and one in runtimes_for(described.weights.kind)],
        "digest": hashlib.sha256(np.ascontiguousarray(found).data).hexdigest(),
    }


def timed(action: Callable[[], object]) -> float:
    """Median seconds, after one time that does not count."""
    action()
    seconds = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
