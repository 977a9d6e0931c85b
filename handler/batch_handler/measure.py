"""What `batch-client bench` asks of the handler, in a process as a worker's is: its environment, its code, no server.

    python -m batch_handler.measure prepare ARCHIVE FOLDER
    python -m batch_handler.measure score DIRECTORY GPU

Rule: answers are JSON lines on what was standard output, and nothing else is: whatever a model prints goes to standard
error. A failure is an answer with `error`, one line, and exit code 1.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batch_handler.model import DESCRIPTION_FILE, Model, ModelLoadError, read_description, read_golden, write_golden
from batch_handler.oip import Array
from batch_handler.runtimes.foreign import said
from batch_handler.runtimes.transform import ModelError
from batch_handler.service import tuning_from
from batch_handler.signature import FileEntry, Golden, ModelDescription, SignatureError, Weights, runtimes_for

__all__ = ["main", "prepare", "score"]

# Fresh requests, as a worker gets them, and not one that stays in the cache: so many different ones, within so many
# bytes.
_RING = 8
_RING_BYTES = 64 << 20
_MEMBERS = ("MAR-INF/MANIFEST.json", "entry.py", "model-config.yaml")
_NOTHING = "weights.none"
_GOLDEN = "golden.npz"


def prepare(archive: Path, folder: Path) -> dict[str, Any]:
    """Unpack an archive to FOLDER/model, make FOLDER/noop.mar of it, and say what bench needs to know.

    The second archive takes and gives the same tensors and runs no model; its golden outputs are zeros, so its digest
    is another. Raises `ModelLoadError`, `SignatureError`, OSError or MemoryError.
    """
    directory = folder / "model"
    directory.mkdir()
    try:
        with zipfile.ZipFile(archive) as mar:
            mar.extract(DESCRIPTION_FILE, directory)
            described = read_description(directory)
            for name in described.files:
                mar.extract(name, directory)
            frame = {name: mar.read(name) for name in _MEMBERS}
    except (ModelLoadError, SignatureError, OSError, MemoryError):
        raise
    except Exception as error:  # each way to compress has errors of its own
        raise ModelLoadError(f"{archive} is damaged, wanted it as pack wrote it: {said(error)}") from error
    _write_noop(described, directory, frame, folder / "noop.mar")
    return {
        "name": described.name,
        "digest": described.digest,
        "runtime": described.runtime,
        "runtimes": list(runtimes_for(described.weights.kind)),
        "micro_batch": described.micro_batch,
        "record_bytes": sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in described.inputs),
        # As far as it is known before a worker has loaded the model.
        "metadata": described.metadata("", {"micro_batch": described.micro_batch}).to_json(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }


def score(
    directory: Path,
    gpu_id: int | None,
    lines: Iterable[str],
    answer: Callable[[Mapping[str, Any]], None],
) -> None:
    """Load the model as a worker would and score requests for as long as each line asks.

    Answers {"ready"} once, with what a micro-batch takes. The first line is the records of a request, the golden ones
    over and over; it is answered when two were scored. Each further line is the seconds of a window, answered with the
    records scored, the seconds they took (at least one request) and the CPU seconds. Raises `ModelLoadError`,
    `ModelError`.
    """
    tuning, _ = tuning_from(os.environ, gpu_id)
    model = Model.open(directory, tuning)
    answer({"ready": True, "fingerprint": model.fingerprint, "micro_batch_ms": model.micro_batch_ms})
    windows = iter(lines)
    records = int(next(windows, "0"))
    if not records:  # whoever asked is gone
        return
    ring = _requests(directory, model.description, records)
    for request in ring[:2]:
        model.score_bulk(request)
    answer({"request_records": records})
    turn = 0
    for line in windows:
        began, cpu, done = time.perf_counter(), time.process_time(), 0
        end = began + float(line)
        while not done or time.perf_counter() < end:
            model.score_bulk(ring[turn % len(ring)])
            turn += 1
            done += records
        answer({
            "records": done,
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
        })


def main(argv: Sequence[str]) -> int:
    """Answer one question; returns the exit code."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(value: Mapping[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        match argv:
            case ["prepare", archive, folder]:
                answer(prepare(Path(archive), Path(folder)))
            case ["score", directory, gpu]:
                score(Path(directory), int(gpu) if int(gpu) >= 0 else None, sys.stdin, answer)
            case _:
                answer({"error": f"asked for {' '.join(argv)[:100]!r}, wanted prepare or score"})
                return 1
    except (ModelLoadError, ModelError, SignatureError, OSError, MemoryError) as error:
        answer({"error": " ".join(str(error).split())[:500] or type(error).__name__})
        return 1
    return 0


def _requests(directory: Path, described: ModelDescription, records: int) -> list[tuple[Array, ...]]:
    golden, _ = read_golden(directory / described.golden.file, described)
    nbytes = records * sum(array[0].nbytes for array in golden)
    ring = max(1, min(_RING, _RING_BYTES // max(nbytes, 1)))
    rows = [np.arange(records) + shift for shift in range(ring)]
    return [tuple(array[index % len(array)] for array in golden) for index in rows]


def _write_noop(described: ModelDescription, directory: Path, frame: Mapping[str, bytes], output: Path) -> None:
    records, outputs = read_golden(directory / described.golden.file, described)
    path = directory.parent / _GOLDEN
    write_golden(path, described.inputs, records, described.outputs, [np.zeros_like(array) for array in outputs])
    files = {_NOTHING: b"", _GOLDEN: path.read_bytes()}
    noop = replace(
        described,
        runtime="noop",
        weights=Weights(_NOTHING, "none"),
        golden=Golden(_GOLDEN, len(records[0]), 0.0),
        files={name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()},
    )
    with zipfile.ZipFile(output, "w") as mar:
        for name, data in {**frame, DESCRIPTION_FILE: json.dumps(noop.to_json()).encode(), **files}.items():
            mar.writestr(name, data)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
