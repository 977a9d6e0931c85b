"""Requests' records → micro-batches in stacks, and back.

Rule: a pure plan says for every record of a server batch in which micro-batch and place it is computed. Place *p*
of a stack is place *p* mod B of its micro-batch *p* div B. Two laws hold. Every record is in exactly one place. And
a bulk request's record *j* is in place `(first_row + j) mod B` of a micro-batch of exactly B records that holds no
other request's, so that its bits depend on nothing but its place: neither on who else is asking nor on how the run
was cut into requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from batch_handler.oip import Array

__all__ = ["Load", "Span", "Stack", "gather", "plan", "scatter"]


@dataclass(frozen=True)
class Load:
    """A request's records; `first_row` is None for an online request."""

    records: int
    first_row: int | None = None


@dataclass(frozen=True)
class Span:
    """Records `row` to `row + count` of load number `request`, in places `place` to `place + count` of a stack."""

    request: int
    row: int
    place: int
    count: int


@dataclass(frozen=True)
class Stack:
    """What is filled and issued at once: `size` places, of which `spans` (ascending by place) are taken.

    They are whole micro-batches of a bulk request, which the model computes one after another, or one of online ones.
    """

    size: int
    spans: tuple[Span, ...]

    @property
    def requests(self) -> tuple[int, ...]:
        """The loads that have records here."""
        return tuple(span.request for span in self.spans)


def plan(loads: Sequence[Load], micro_batch: int, most: int = 1) -> tuple[Stack, ...]:
    """All stacks of a server batch: online requests share micro-batches; bulk ones have `most` of their own in each."""
    online = [(index, load.records) for index, load in enumerate(loads) if load.first_row is None]
    stacks = list(_plan_online(online, micro_batch))
    for index, load in enumerate(loads):
        if load.first_row is not None:
            stacks.extend(_plan_bulk(index, load.records, load.first_row, micro_batch, most))
    return tuple(stacks)


def gather(stack: Stack, sources: Sequence[Array], target: Array) -> None:
    """Copy records into their places of `target` (at least `size` rows); free places become zeros.

    `sources` holds one array a load. Zeros, not what was there before: a runtime whose rows touch each other
    would otherwise let an earlier request into the bits.
    """
    free = 0
    for span in stack.spans:
        if span.place > free:
            target[free : span.place] = 0
        free = span.place + span.count
        target[span.place : free] = sources[span.request][span.row : span.row + span.count]
    if free < stack.size:
        target[free : stack.size] = 0


def scatter(stack: Stack, source: Array, targets: Sequence[Array | None]) -> None:
    """Copy places of `source` back to the rows of each load; a load whose target is None gets nothing."""
    for span in stack.spans:
        target = targets[span.request]
        if target is not None:
            target[span.row : span.row + span.count] = source[span.place : span.place + span.count]


def _plan_bulk(request: int, records: int, first_row: int, micro_batch: int, most: int) -> Iterator[Stack]:
    row, place = 0, first_row % micro_batch
    while row < records:
        count = min(most * micro_batch - place, records - row)
        yield Stack(-(-(place + count) // micro_batch) * micro_batch, (Span(request, row, place, count),))
        row, place = row + count, 0


def _plan_online(counts: Sequence[tuple[int, int]], micro_batch: int) -> Iterator[Stack]:
    spans: list[Span] = []
    taken = 0
    for request, records in counts:
        row = 0
        while row < records:
            count = min(micro_batch - taken, records - row)
            spans.append(Span(request, row, taken, count))
            row += count
            taken += count
            if taken == micro_batch:
                yield Stack(micro_batch, tuple(spans))
                spans, taken = [], 0
    if taken:
        yield Stack(_online_size(taken, micro_batch), tuple(spans))


def _online_size(records: int, micro_batch: int) -> int:
    """The next power of two: few distinct shapes, so that each is compiled, tuned or captured once."""
    return min(micro_batch, 1 << (records - 1).bit_length())
