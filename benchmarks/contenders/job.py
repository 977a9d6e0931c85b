"""What a contender is told (a JSON file, its first argument) and what it answers (one JSON line).

Each reads the same Zarr array of uint8 images, scores every record and writes float32 scores in the same order. Its
seconds are from its first read to its last write; processes are up and models are loaded and warm before.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zarr

__all__ = ["BLOCK", "CLASSES", "Job", "store_of", "the_job"]

CLASSES = 10
BLOCK = 2000  # records that the tuned contenders read and write at a time: two input chunks


@dataclass(frozen=True)
class Job:
    """source, output: URLs or paths of Zarr arrays. model: a whole pickled module. archive: the same, packed.
    python: the interpreter of the contender's own environment. records: how many to score, from the first.
    processes: how many may score at once, one thread each. work: a folder of the contender's own.
    """

    source: str
    output: str
    model: str
    archive: str
    python: str
    records: int
    processes: int
    work: str

    def images(self) -> zarr.Array[Any]:
        return zarr.open_array(store_of(self.source), mode="r")

    def create_scores(self, block: int = BLOCK) -> zarr.Array[Any]:
        """The output, uncompressed, to be written in blocks of this many records."""
        return zarr.create_array(store_of(self.output), shape=(self.records, CLASSES), chunks=(block, CLASSES),
                                 dtype="float32", compressors=None)

    def scores(self) -> zarr.Array[Any]:
        return zarr.open_array(store_of(self.output), mode="r+")

    def blocks(self, block: int = BLOCK) -> list[slice]:
        return [slice(start, min(start + block, self.records)) for start in range(0, self.records, block)]

    def answer(self, seconds: float) -> None:
        """What the benchmark reads: the contender's last line of standard output."""
        print(json.dumps({"records": self.records, "seconds": seconds}), flush=True)


def the_job() -> Job:
    return Job(**json.loads(Path(sys.argv[1]).read_text("utf-8")))


def store_of(url: str) -> Any:
    """The zarr store at a URL or path."""
    if "://" not in url:
        return url
    from obstore.store import from_url
    from zarr.storage import ObjectStore

    return ObjectStore(from_url(url))
