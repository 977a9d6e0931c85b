"""Records as they were decoded: in arrays one after the other, joined only where somebody needs one array.

A request's records often come from several input chunks. Joining them would copy each record on the event loop, though
it is copied anyway when it is sent.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import SupportsIndex, overload

import numpy as np

__all__ = ["Pieces"]


class Pieces:
    """Records in at least one array (n, *record shape), all of one dtype and record shape."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = tuple(array for array in arrays if len(array)) or (arrays[0],)
        self._ends = list(accumulate(map(len, self.arrays)))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @overload
    def __getitem__(self, rows: SupportsIndex) -> np.ndarray: ...

    @overload
    def __getitem__(self, rows: slice) -> Pieces: ...

    def __getitem__(self, rows: SupportsIndex | slice) -> np.ndarray | Pieces:
        """One record (*record shape), or those of a slice without a step: views."""
        if not isinstance(rows, slice):
            row = range(len(self))[rows]
            return np.asarray(self[row:row + 1].arrays[0][0])
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"records {rows}: wanted a slice without a step")
        if start >= stop:
            return Pieces([self.arrays[0][:0]])
        first, last = bisect_right(self._ends, start), bisect_left(self._ends, stop)
        found = list(self.arrays[first:last + 1])
        found[-1] = found[-1][:len(found[-1]) - (self._ends[last] - stop)]
        found[0] = found[0][start - (self._ends[first] - len(self.arrays[first])):]
        return Pieces(found)

    def __add__(self, more: Pieces) -> Pieces:
        return Pieces(self.arrays + more.arrays)

    def __array__(self, dtype: np.dtype[np.generic] | None = None, copy: bool | None = None,  # noqa: FBT001 - numpy's
                  ) -> np.ndarray:
        return np.array(self.joined(), dtype, copy=copy)

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Pieces:
        """The records of each array changed."""
        return Pieces([change(array) for array in self.arrays])

    def compact(self) -> Pieces:
        """The same records, those copied that keep more in memory than themselves: they are a view of it."""
        return self.each(lambda array: array if _is_compact(array) else array.copy())

    def joined(self) -> np.ndarray:
        """All records in one array (n, *record shape), a copy if there are several."""
        return self.arrays[0] if len(self.arrays) == 1 else np.concatenate(self.arrays)


def _is_compact(array: np.ndarray) -> bool:
    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    # What a codec leaves beside its chunk, such as a checksum, is no reason to copy it.
    return whole.nbytes <= array.nbytes * 9 // 8
