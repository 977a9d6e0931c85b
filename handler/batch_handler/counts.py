"""What server batches counted, told to TorchServe's metrics now and then instead of after each.

Rule: nothing is counted twice or left out, but what the last moments of a killed worker counted. Each number that is
told is a line for the worker to write and for Java to parse: five a server batch took as long as receiving it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

__all__ = ["Counts"]

TELL_SECONDS = 0.25


class Counts:
    """Sums by name; what is added is told within `seconds`, at once where that is 0."""

    def __init__(self, names: Sequence[str], seconds: float = TELL_SECONDS) -> None:
        self._names = tuple(names)
        self._seconds = seconds
        self._sums = [0] * len(self._names)
        self._waiting = False
        self._lock = threading.Lock()

    def add(self, metrics: Any, values: Sequence[int]) -> None:
        """Add a value to each sum. `metrics` is TorchServe's, with `add_counter`; the lines may come of a thread."""
        with self._lock:
            self._sums = [had + value for had, value in zip(self._sums, values, strict=True)]
            if self._waiting:
                return
            self._waiting = self._seconds > 0
        if self._seconds <= 0:
            self._tell(metrics)
            return
        later = threading.Timer(self._seconds, self._tell, [metrics])
        later.daemon = True
        try:
            later.start()
        except RuntimeError:  # as many threads as there may be
            self._tell(metrics)

    def _tell(self, metrics: Any) -> None:
        with self._lock:
            sums, self._sums, self._waiting = self._sums, [0] * len(self._names), False
        for name, value in zip(self._names, sums, strict=True):
            # A fresh list: TorchServe appends to its default argument.
            metrics.add_counter(name, value, dimensions=[])
