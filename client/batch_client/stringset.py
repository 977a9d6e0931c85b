"""Which strings were added, in eight bytes each: for listings of millions of objects.

Python's hash of strings is 64 bits, keyed anew in each process. Of ten million strings one that was not added is taken
for one of them with a chance of 5 in 10¹³.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

import numpy as np

__all__ = ["StringSet"]


class StringSet:
    """A set that is filled first and asked afterwards; filling it again in between costs a sort."""

    def __init__(self) -> None:
        self._hashes = array("q")
        self._sorted = True

    def add(self, text: str) -> None:
        self._hashes.append(hash(text))
        self._sorted = False

    def __contains__(self, text: str) -> bool:
        if not self._sorted:
            np.frombuffer(self._hashes, np.int64).sort()
            self._sorted = True
        wanted = hash(text)
        place = bisect_left(self._hashes, wanted)
        return place < len(self._hashes) and self._hashes[place] == wanted
