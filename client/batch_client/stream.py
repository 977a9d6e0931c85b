"""One unit's records as requests: blocks read within the byte budget, cut into spans at the request grid."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from batch_client.budget import ByteBudget, Lease
from batch_client.errors import MismatchError
from batch_client.events import Step
from batch_client.pieces import Pieces
from batch_client.plan import Plan, Span, Unit
from batch_client.reader import Source

__all__ = ["UnitStream"]


@dataclass
class UnitStream:
    """Reads a unit once. `etags` and `nbytes` are of what has been read so far; `timed` is put around each step.

    Units of a lower `rank` have the budget first.
    """

    source: Source
    plan: Plan
    unit: Unit
    budget: ByteBudget
    allow_missing: bool
    rank: int = 0
    timed: Callable[[Step], AbstractContextManager[None]] = lambda _: nullcontext()
    etags: dict[str, str | None] = field(default_factory=dict)
    nbytes: int = 0

    async def spans(self) -> AsyncIterator[tuple[Span, Pieces, Lease]]:
        """Each request's span, its records (n, *record shape), and the lease on their bytes, to be released by
        whoever takes them.

        Raises MismatchError when a source chunk changes between two reads, and what `Source.read` raises.
        """
        carried: Pieces | None = None
        for start, stop in self.plan.blocks(self.unit):
            with self.timed(Step.BUDGET):
                lease = await self.budget.take((stop - start) * self.plan.source.record_bytes, self.rank)
            try:
                with self.timed(Step.READ):
                    block = await self.source.read(start, stop, allow_missing=self.allow_missing)
                self._pin(block.etags)
                self.nbytes += block.nbytes
                first = start - (0 if carried is None else len(carried))
                for span in self.plan.requests(first, stop):
                    records = block.records[max(span.start - start, 0):span.stop - start]
                    if carried is not None:
                        records, carried = carried + records, None
                    if self._goes_on(span, stop):
                        # Without the rest of their chunk: the block's bytes are given back while these wait.
                        carried = records.compact()
                    else:
                        yield span, records, lease.hold()
                # While the next block waits for the budget, this one's requests alone have its bytes.
                del block, records
            finally:
                lease.release()

    def _goes_on(self, span: Span, stop: int) -> bool:
        """Whether the next block has more of this request."""
        cut = (span.first_row + span.count) % self.plan.request_size(span.start)
        return span.stop == stop < self.unit.stop and cut != 0

    def _pin(self, etags: Mapping[str, str | None]) -> None:
        for key, etag in etags.items():
            if self.etags.setdefault(key, etag) != etag:
                raise MismatchError(f"{self.source.url}: chunk {key} changed while it was being scored: "
                                    "score a source that stays as it is, into a new OUTPUT")
