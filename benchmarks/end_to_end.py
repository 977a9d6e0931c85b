"""Zarr on S3 → TorchServe → Zarr on S3, all on this machine, against the ceiling: the model alone in memory.

    python benchmarks/end_to_end.py [--pairs 15] [--records 200000] [--runtime torchscript] [--model MODEL]

Pairs are interleaved, since a machine's speed drifts; the figure is the median of the pairs' ratios with a 95 %
bootstrap interval. The run's seconds are those of its own summary: from the first read to publication, the server's
start left out. The ceiling is measured by `ceiling.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import zarr
from ceiling import better, rate
from obstore.store import S3Store
from zarr.storage import ObjectStore

from batch_client.demo.objectstore import SeaweedServer

CHUNK = 1000


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as folder, SeaweedServer() as server:
        work = Path(folder)
        environ = {**os.environ, **server.environ()}
        server.create_bucket("bench")
        archive = packed(options, work, environ)
        images = images_of(options)
        np.save(work / "records.npy", images)
        write_source(server, images)
        way = better(archive, work / "records.npy", len(images))
        print(f"ceiling: processes x threads = {way[0]} x {way[1]}", flush=True)
        pairs = []
        for number in range(options.pairs):
            ceiling, cpu = rate(archive, work / "records.npy", len(images), *way)
            ours = run(archive, environ, number)
            pairs.append((ours["records_per_s"], ceiling))
            print(f"pair {number + 1}: run {ours['records_per_s']:,.0f} records/s, ceiling {ceiling:,.0f} "
                  f"({cpu:.0f} CPU s per million), ratio {ours['records_per_s'] / ceiling:.3f}", flush=True)
        report(pairs, len(images), options.runtime)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--records", type=int, default=200_000)
    parser.add_argument("--model", type=Path, help="a whole pickled module that takes 1x28x28 [default: the demo's]")
    parser.add_argument("--runtime", choices=["eager", "torchscript"], default="torchscript")
    parser.add_argument("--images", type=Path, help=".npz with uint8 images (n, 28, 28) [default: random ones]")
    return parser.parse_args()


def packed(options: argparse.Namespace, work: Path, environ: dict[str, str]) -> Path:
    common = ["--runtime", options.runtime, "--input", "image:uint8:28x28", "--model-shape", "1x28x28", "--scale",
              "1/255", "--softmax", "-o", str(work / "bench.mar")]
    if options.model is None:
        import torch
        from safetensors.torch import save_file

        from batch_client.demo import network

        torch.manual_seed(0)
        save_file(network.make_model().state_dict(), work / "weights.safetensors")
        words = [str(work / "weights.safetensors"), "--arch", f"{network.__file__}:make_model"]
    else:
        words = [str(options.model), "--trust-pickle"]
    cli(["pack", *words, *common], environ)
    return work / "bench.mar"


def images_of(options: argparse.Namespace) -> np.ndarray:
    if options.images is None:
        return np.random.default_rng(0).integers(0, 256, (options.records, 28, 28), dtype=np.uint8)
    known = np.load(options.images)["images"]
    return np.resize(known, (options.records, 28, 28))


def write_source(server: SeaweedServer, images: np.ndarray) -> None:
    store = ObjectStore(S3Store(
        "bench", prefix="in.zarr", endpoint=server.endpoint_url, region="us-east-1", access_key_id=server.access_key,
        secret_access_key=server.secret_key, client_options={"allow_http": True}))
    zarr.create_array(store=store, data=images, chunks=(CHUNK, 28, 28), config={"write_empty_chunks": True})


def run(archive: Path, environ: dict[str, str], number: int) -> dict[str, float]:
    said = cli(["run", "s3://bench/in.zarr", f"s3://bench/out-{number}.zarr", "--archive", str(archive), "--log",
                "none", "--json"], environ)
    summary: dict[str, float] = json.loads(said)
    assert summary["failed"] == 0
    return summary


def cli(words: list[str], environ: dict[str, str]) -> str:
    done = subprocess.run([sys.executable, "-m", "batch_client", *words], env=environ, capture_output=True,
                          text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def report(pairs: list[tuple[float, float]], records: int, runtime: str) -> None:
    ratios = [ours / ceiling for ours, ceiling in pairs]
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(ratios, k=len(ratios))) for _ in range(10_000))
    print(f"\n{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {platform.machine()}, {runtime}, {records:,} "
          f"records in {-(-records // CHUNK)} input chunks, {len(pairs)} interleaved pairs")
    print(f"run      {statistics.median(ours for ours, _ in pairs):>8,.0f} records/s (median)")
    print(f"ceiling  {statistics.median(ceiling for _, ceiling in pairs):>8,.0f} records/s (median)")
    print(f"ratio    {statistics.median(ratios):.3f}, 95 % interval {medians[249]:.3f} to {medians[9749]:.3f}, "
          f"range {min(ratios):.3f} to {max(ratios):.3f}")


if __name__ == "__main__":
    main()
