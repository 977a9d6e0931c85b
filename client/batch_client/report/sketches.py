"""What is kept of a stream of any length in a space of fixed size. Pure; nothing here is drawn from a random number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Generic, TypeVar

__all__ = ["EvenSample", "LogHistogram", "Timeline"]

T = TypeVar("T")


class Timeline:
    """Amounts by name over time, in at most `most` buckets: when the time outgrows them, they double in width."""

    def __init__(self, most: int = 240, width: float = 0.001) -> None:
        self._most = most
        self.width = width
        self.buckets: list[Counter[str]] = []

    def add(self, at: float, name: str, amount: int = 1) -> None:
        """`at` is in seconds from the beginning."""
        while at >= self.width * self._most:
            self._widen()
        index = int(at / self.width)
        while len(self.buckets) <= index:
            self.buckets.append(Counter())
        self.buckets[index][name] += amount

    def _widen(self) -> None:
        pairs = [self.buckets[at:at + 2] for at in range(0, len(self.buckets), 2)]
        self.buckets = [sum(pair, Counter()) for pair in pairs]
        self.width *= 2

    def names(self) -> list[str]:
        """All names, the one with the largest amount first."""
        total: Counter[str] = sum(self.buckets, Counter())
        return [name for name, _ in total.most_common()]

    def amounts(self, name: str) -> list[int]:
        return [bucket[name] for bucket in self.buckets]


class LogHistogram:
    """Counts of positive values in buckets of equal ratio, 16 for each factor of two: a percentile read from it is off
    by 2.2 % at most. Values outside [1e-6, 1e6] are counted at the nearer end.
    """

    BUCKETS_A_DOUBLING = 16
    LEAST, MOST = 1e-6, 1e6

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, value: float) -> None:
        bounded = min(max(value, self.LEAST), self.MOST)
        self.counts[math.floor(math.log2(bounded) * self.BUCKETS_A_DOUBLING)] += 1

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def percentile(self, percent: float) -> float:
        """The middle, by ratio, of the bucket that holds the value at this rank. Raises ValueError for none."""
        if not self.counts:
            raise ValueError("no value has been added")
        rank = max(1, math.ceil(self.total * percent / 100))
        for bucket in sorted(self.counts):
            rank -= self.counts[bucket]
            if rank <= 0:
                break
        return float(2.0 ** ((bucket + 0.5) / self.BUCKETS_A_DOUBLING))

    def coarser(self, buckets_a_doubling: int) -> Mapping[int, int]:
        """Counts in buckets [2^(i/k), 2^((i+1)/k)) of a ratio that divides this one's."""
        found: Counter[int] = Counter()
        for bucket, count in self.counts.items():
            found[bucket // (self.BUCKETS_A_DOUBLING // buckets_a_doubling)] += count
        return found


class EvenSample(Generic[T]):
    """At most `most` things of a stream, evenly spaced: every n-th, and n doubles when there is no more place."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._every = 1
        self._seen = 0
        self.items: list[T] = []

    def take(self, count: int) -> range:
        """Which of the next `count` things of the stream to append to `items`: their numbers from 0."""
        chosen = self._chosen(count)
        while len(self.items) + len(chosen) > self._most:
            self.items = self.items[::2]
            self._every *= 2
            chosen = self._chosen(count)
        self._seen += count
        return chosen

    def _chosen(self, count: int) -> range:
        return range(-self._seen % self._every, count, self._every)
