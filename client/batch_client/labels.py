"""The true classes of a range of records: which of the given ones those are, and no more of them than needed."""

from __future__ import annotations

import io
import tokenize
import zipfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from batch_client.buckets import open_store
from batch_client.errors import UsageError, in_one_line
from batch_client.reader import open_source
from batch_client.urls import WEB, split_url

__all__ = ["Range", "read_labels"]

# What numpy raises for a file that is none of its own, cut off, or claims what can't be.
_NO_NPY = (ValueError, EOFError, SyntaxError, MemoryError, OverflowError, tokenize.TokenError, zipfile.BadZipFile)
MOST_LABEL_BYTES = 1 << 30  # of a file, which is read whole


@dataclass(frozen=True)
class Range:
    """Records [start, stop) of a source of `whole`, of which [origin, origin + scored) are in the output."""

    start: int
    stop: int
    origin: int
    scored: int
    whole: int

    def first_label(self, shape: tuple[int, ...], dtype: np.dtype[Any], where: str) -> int:
        """Where in labels of this shape those of the range begin: there is one for each record of the range, of the
        output or of the source. Raises UsageError for others.
        """
        if len(shape) != 1 or dtype.kind not in "iub":
            raise UsageError(f"{where}: found {dtype} of shape {shape}, wanted one whole number a record")
        firsts = {self.whole: self.start, self.scored: self.start - self.origin, self.stop - self.start: 0}
        if shape[0] not in firsts:
            named = {self.whole: "of the source", self.scored: "of the output",
                     self.stop - self.start: f"of {self.start}:{self.stop}"}
            wanted = " or ".join(f"{count:,} (one for each record {which})" for count, which in sorted(named.items()))
            raise UsageError(f"{where}: found {shape[0]:,} labels, wanted {wanted}")
        return firsts[shape[0]]


async def read_labels(where: str, span: Range, *, anonymous: bool) -> np.ndarray:
    """The labels of the range, from a .npy file, local, in a store or on the web, or a Zarr array, of which no more is
    read.
    """
    if where.endswith(".npy"):
        labels = await _npy(where, anonymous=anonymous)
        first = span.first_label(labels.shape, labels.dtype, where)
        return labels[first:first + span.stop - span.start]
    source = await open_source(open_store(where, anonymous=anonymous), None)
    first = span.first_label(source.geometry.shape, source.geometry.dtype, where)
    return (await source.read(first, first + span.stop - span.start, allow_missing=True)).records.joined()


async def _npy(where: str, *, anonymous: bool) -> np.ndarray:
    folder, slash, name = where.rpartition("/")
    store = open_store(folder or (slash or "."), anonymous=anonymous)
    if split_url(where).scheme not in WEB:  # whose servers need not say how large a file is
        meta = await store.head(name)
        if meta is not None and meta.size > MOST_LABEL_BYTES:
            raise UsageError(f"{where}: {meta.size:,} bytes, over {MOST_LABEL_BYTES:,}: wanted a Zarr array for so "
                             "many labels, of which only the range is read")
    blob = await store.get(name)
    if blob is None:
        raise UsageError(f"{where}: no such file")
    try:
        labels = np.load(io.BytesIO(blob.data), allow_pickle=False)
    except _NO_NPY as error:
        raise UsageError(f"{where}: not a .npy file of numbers ({in_one_line(error)})") from error
    if not isinstance(labels, np.ndarray):
        raise UsageError(f"{where}: found an archive of arrays (.npz), wanted one array (.npy)")
    return labels
