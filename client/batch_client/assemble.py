"""Replies in any order → one output chunk and its status row. Pure; every record is placed exactly once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from batch_client.errors import BrokenPromiseError
from batch_client.plan import OutputGeometry, Span, Unit
from batch_handler.oip import STATUS_NOT_FINITE

__all__ = ["STATUS_FAILED", "UnitAssembler"]

STATUS_FAILED = 1  # which no server says: the client does, and lists the record

_UNPLACED = 255


class UnitAssembler:
    """The arrays of one unit while they fill: `outputs` by name (records, *shape), `status` uint8 (records,)."""

    def __init__(self, unit: Unit, outputs: tuple[OutputGeometry, ...]) -> None:
        self.unit = unit
        self.outputs = {output.name: np.zeros((unit.count, *output.shape), output.dtype) for output in outputs}
        self.status = np.full(unit.count, _UNPLACED, np.uint8)

    def place(self, span: Span, outputs: Mapping[str, np.ndarray], status: np.ndarray) -> None:
        """Put the predictions for a span's records at their index.

        Raises BrokenPromiseError when a record is outside the unit or has a prediction already.
        """
        here = slice(span.start - self.unit.start, span.stop - self.unit.start)
        if here.start < 0 or here.stop > self.unit.count or len(status) != span.count:
            raise BrokenPromiseError(f"records {span.start} to {span.stop - 1} do not belong to output chunk "
                                     f"{self.unit.index}, records {self.unit.start} to {self.unit.stop - 1}")
        if (self.status[here] != _UNPLACED).any():
            raise BrokenPromiseError(f"records {span.start} to {span.stop - 1} were scored twice")
        for name, target in self.outputs.items():
            target[here] = outputs[name]
        self.status[here] = status

    @property
    def complete(self) -> bool:
        return not (self.status == _UNPLACED).any()

    def failures(self, *, require_finite: bool) -> int:
        """Records that count as failed; those that are not finite only where that is required."""
        return self.count(STATUS_FAILED) + (self.count(STATUS_NOT_FINITE) if require_finite else 0)

    def count(self, status: int) -> int:
        """Records with this status."""
        return int(np.count_nonzero(self.status == status))
