"""Records as they were decoded: in arrays one after the other, joined only where somebody needs one array.

A request's records often come from several input chunks. Joining them would copy each record on the event loop, though
it is copied anyway when it is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np

__all__ = ["Pieces", "is_lean"]


class Pieces:
    """Records in at least one array (n, *record shape), all of one dtype and record shape."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = tuple(arrays)

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)

    @overload
    def __getitem__(self, rows: int) -> np.ndarray: ...

    @overload
    def __getitem__(self, rows: slice) -> Pieces: ...

    def __getitem__(self, rows: int | slice) -> np.ndarray | Pieces:
        """One record, or those of a slice without a step: views."""
        if isinstance(rows, int):
            row = range(len(self))[rows]
            return np.asarray(self[row:row + 1].arrays[0][0])
        start, stop, step = rows.indices(len(self))
        if step != 1:
            raise ValueError(f"records {rows}: wanted a slice without a step")
        found, end = [], 0
        for array in self.arrays:
            begin, end = end, end + len(array)
            if max(begin, start) < min(end, stop):
                found.append(array[max(start - begin, 0):stop - begin])
        return Pieces(found or [self.arrays[0][:0]])

    def __add__(self, more: Pieces) -> Pieces:
        return Pieces(self.arrays + more.arrays)

    def each(self, change: Callable[[np.ndarray], np.ndarray]) -> Pieces:
        """The records of each array changed."""
        return Pieces([change(array) for array in self.arrays])

    def lean(self) -> Pieces:
        """The same records, those copied that keep much more in memory than themselves."""
        return self.each(lambda array: array if is_lean(array) else array.copy())

    def joined(self) -> np.ndarray:
        """All records in one array (n, *record shape), a copy if there are several."""
        return self.arrays[0] if len(self.arrays) == 1 else np.concatenate(self.arrays)


def is_lean(array: np.ndarray) -> bool:
    """Whether an array keeps at most twice its own bytes in memory: a view keeps all that it is a view of."""
    whole = array
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    return whole.nbytes <= 2 * array.nbytes
