"""No model at all: zeros, at once, so that `bench` sees how quick everything around a model is.

Rule: zeros can't be taken for predictions. Only an archive without weights runs under it, which has a digest of
its own; no setting makes a model's archive do so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from batch_handler.runtimes.device import Device
from batch_handler.runtimes.slots import Slot, most_stacked
from batch_handler.signature import InputSpec, ModelDescription, OutputSpec

__all__ = ["NoopRuntime", "open_noop"]


class NoopRuntime:
    """Takes records of the declared inputs and gives zeros of the declared outputs."""

    def __init__(self, device: Device, inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec]) -> None:
        self.numerics: Mapping[str, Any] = {**device.numerics, "runtime": "noop"}
        self._device = device
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)

    def prepare(self, micro_batch: int) -> tuple[Slot, ...]:
        """One slot, whose outputs are zeros and stay so."""
        most = most_stacked(self._inputs, self._outputs, micro_batch, self._device.stack_bytes)
        return (Slot(self._device, self._inputs, self._outputs, micro_batch * most),)

    def session(self) -> AbstractContextManager[None]:
        return nullcontext()

    def run(self, slot: Slot, size: int) -> None:
        """Nothing is issued."""
        slot.results = [host[:size] for host in slot.landing]


def open_noop(description: ModelDescription, directory: Path, device: Device, precision: str) -> NoopRuntime:
    """The runtime for a description; neither weights nor precision matter."""
    del directory, precision
    return NoopRuntime(device, description.inputs, description.outputs)
