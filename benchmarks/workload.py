"""What is scored: a model and its records, packed and stored the same for every contender."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import ObjectStore

from batch_client.demo.objectstore import SeaweedServer

__all__ = ["HEAVY", "SMALL", "Workload", "absolute", "cli", "command", "given_images", "noop_server",
           "summary_of", "workload_flags"]

BUCKET = "bench"


@dataclass(frozen=True)
class Workload:
    """A kind of record and the network for it.

    network: module with `make_model`. shape: of a record as it travels, uint8. chunk: records in an input chunk.
    """

    network: str
    shape: tuple[int, ...]
    model_shape: tuple[int, ...]
    micro_batch: int
    chunk: int

    def images(self, count: int) -> np.ndarray:
        """Random records, uint8 (count, *shape), always the same."""
        return np.random.default_rng(0).integers(0, 256, (count, *self.shape), dtype=np.uint8)

    def require(self, records: int, parser: argparse.ArgumentParser) -> None:
        """End with a usage error unless there is a whole micro-batch of records: the ceiling scores nothing less."""
        if records < self.micro_batch:
            parser.error(f"--records {records}: wanted at least a micro-batch of {self.micro_batch}")

    def module(self) -> Any:
        """The untrained network in eval mode, its weights always the same."""
        import torch

        torch.manual_seed(0)
        return import_module(self.network).make_model().eval()

    def pack(self, work: Path, runtime: str, model: Path | None = None) -> Path:
        """The archive of `model`, a whole pickled module, or of the untrained network; named after the runtime."""
        archive = work / f"{runtime}.mar"
        sizes = ["x".join(map(str, shape)) for shape in (self.shape, self.model_shape)]
        words = ["--runtime", runtime, "--input", f"image:uint8:{sizes[0]}", "--model-shape", sizes[1], "--scale",
                 "1/255", "--softmax", "--micro-batch", str(self.micro_batch), "--name", "bench",
                 "-o", str(archive)]
        if model is None:
            import torch

            torch.save(self.module().state_dict(), work / "weights.pt")
            cli("pack", work / "weights.pt", "--arch", f"{import_module(self.network).__file__}:make_model", *words)
        else:
            cli("pack", model, "--trust-pickle", *words)
        return archive

    def store(self, place: Path | SeaweedServer, images: np.ndarray) -> str:
        """Write the records as a Zarr array into a folder or onto the S3 server; returns its URL or path."""
        if isinstance(place, Path):
            store: Any = place / "in.zarr"
            where = str(store)
        else:
            place.create_bucket(BUCKET)
            store = ObjectStore(place.store(BUCKET, prefix="in.zarr"))
            where = f"s3://{BUCKET}/in.zarr"
        zarr.create_array(store=store, data=images, chunks=(self.chunk, *self.shape),
                          config={"write_empty_chunks": True})
        return where


SMALL = Workload("batch_client.demo.network", (28, 28), (1, 28, 28), 128, 1000)
HEAVY = Workload("resnet", (3, 112, 112), (3, 112, 112), 8, 100)


def absolute(text: str) -> Path:
    """A path for processes that run in other folders. Links stay: a Python in an environment is one, and only its own
    place makes it that environment's.
    """
    return Path(text).absolute()


def workload_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of benchmarks that score 28 x 28 images."""
    parser.add_argument("--model", type=absolute, help="a whole pickled module that takes 1x28x28; it is loaded, so "
                        "trust it [default: the demo's network, untrained]")
    parser.add_argument("--images", type=Path, help=".npz with uint8 images (n, 28, 28), repeated in variations "
                        "[default: random]")


def given_images(path: Path | None, count: int) -> np.ndarray:
    """uint8 (count, 28, 28): random ones, or those of `path`, repeated in ever new orders, mirrored every other time
    and each darkened by up to a fifth. A chunk that had an image twice would compress as no real one does.
    """
    if path is None:
        return SMALL.images(count)
    given, rng = np.load(path)["images"], np.random.default_rng(0)
    images = np.empty((count, *SMALL.shape), np.uint8)
    for turn, start in enumerate(range(0, count, len(given))):
        part = images[start:start + len(given)]
        light = rng.uniform(0.8, 1.0, (len(part), 1, 1)).astype(np.float32)
        part[:] = np.rint(given[rng.permutation(len(given))[:len(part)], :, ::-1 if turn % 2 else 1] * light)
    return images


def command(*words: object) -> list[str]:
    """The command line of `batch-client`, by this interpreter."""
    return [sys.executable, "-m", "batch_client", *map(str, words)]


def cli(*words: object) -> str:
    """The standard output of a `batch-client` command; ends the benchmark with its error if it fails."""
    done = subprocess.run(command(*words), capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


@contextmanager
def noop_server(record_bytes: int) -> Iterator[str]:
    """The URL of a server whose model `noop` computes nothing."""
    with subprocess.Popen([sys.executable, Path(__file__).with_name("noop_server.py"), str(record_bytes)],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()


def summary_of(said: str) -> dict[str, Any]:
    """The JSON of a run, all of whose records have to be scored."""
    summary: dict[str, Any] = json.loads(said)
    assert summary["failed"] == 0, summary
    return summary
