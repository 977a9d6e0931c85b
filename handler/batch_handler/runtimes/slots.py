"""Stacks of micro-batches through two slots of static buffers, so that the next is filled while one computes.

Rule: `prepare` allocates everything once; `run` issues upload, model and download and returns; a slot is
touched again only after its `wait`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from batch_handler.oip import Array
from batch_handler.runtimes.device import PRECISIONS, Device, Event
from batch_handler.runtimes.foreign import foreign
from batch_handler.runtimes.transform import (
    ModelError,
    Preprocess,
    by_output,
    collect,
    joined,
    share_memory,
    torch_dtype,
)
from batch_handler.signature import InputSpec, OutputSpec

__all__ = ["Forward", "Slot", "SlotRuntime", "autocast", "most_stacked"]

Tensor = torch.Tensor
Forward = Callable[..., Any]

_SLOTS = 2
_LIMIT = 32  # by then what is done once a stack is nothing
_ALIGNMENT = 64  # of what torch allocates on a CPU
# TorchScript's profiling executor watches the first runs and changes the graph after them; so do cuDNN's and
# oneDNN's caches. A worker that is ready has left that behind.
_WARM_UP_RUNS = 3
_RAISED = "the model raised"


class Slot:
    """Buffers of `places` records on host and device, and the event that says when they are free."""

    def __init__(
        self, device: Device, inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec], places: int
    ) -> None:
        self.places = places
        self.hosts = [device.host_buffer((places, *s.shape), torch_dtype(s.dtype)) for s in inputs]
        self.targets = [device.mirror(host) for host in self.hosts]
        self.landing = [device.host_buffer((places, *s.shape), torch_dtype(s.dtype)) for s in outputs]
        self.inputs: tuple[Array, ...] = tuple(host.numpy() for host in self.hosts)
        self.results: Sequence[Tensor] = ()
        self.event: Event | None = None

    @property
    def done(self) -> bool:
        """Whether `wait` would not block."""
        return self.event is None or self.event.done()

    def wait(self) -> tuple[Array, ...]:
        """Block until what was issued is done; the outputs, (size, *shape) each, until the next `run`."""
        event, self.event = self.event, None
        if event is not None:
            with foreign(_RAISED):
                event.wait()
        return tuple(result.numpy() for result in self.results)


class SlotRuntime:
    """A torch callable as a runtime: preprocessing, the model and reductions on one device.

    `lower` False is for a callable that has its precision inside. `fixed` is the number of records of a
    callable that takes no other: what is less is computed beside zeros.
    """

    def __init__(
        self,
        forward: Forward,
        device: Device,
        inputs: Sequence[InputSpec],
        outputs: Sequence[OutputSpec],
        *,
        numerics: Mapping[str, Any],
        precision: str = "float32",
        lower: bool = True,
        fixed: int | None = None,
    ) -> None:
        self.numerics: Mapping[str, Any] = {
            **device.numerics,
            **numerics,
            "torch": torch.__version__,
            "precision": precision,
        }
        self._forward = forward
        self._device = device
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._preprocess = [Preprocess(spec, device.torch_device) for spec in inputs]
        self._precision = precision if lower else "float32"
        self._fixed = fixed
        self._micro_batch = 0
        self._overwrites = False  # whether the callable gives the same memory again
        self._cleared = 0  # micro-batches of the longest stack for which it did not

    def prepare(self, micro_batch: int) -> tuple[Slot, ...]:
        """Allocate the slots and run zeros through them; raises `CapacityError` where they do not fit.

        What a stack needs beside its slot is allocated by the first that comes.
        """
        if self._fixed not in (None, micro_batch):
            raise ModelError(
                f"the model takes {self._fixed} records at a time and no other number, "
                f"found micro-batches of {micro_batch}, wanted {self._fixed}"
            )
        self._micro_batch = micro_batch
        # Joining outputs is an operation that autocast has its own rules for: no stacks there.
        stack_bytes = self._device.stack_bytes if PRECISIONS[self._precision] is None else 0
        places = micro_batch * most_stacked(self._inputs, self._outputs, micro_batch, stack_bytes)
        with foreign(_RAISED):
            self._device.settle()
            slots = tuple(Slot(self._device, self._inputs, self._outputs, places) for _ in range(_SLOTS))
        with self.session():
            for slot in slots * _WARM_UP_RUNS:
                for array in slot.inputs:
                    array[:micro_batch] = 0
                try:
                    self.run(slot, micro_batch)
                    slot.wait()
                except ModelError as error:  # golden records may have shown nothing of it
                    raise ModelError(
                        f"{error} (given a micro-batch of zeros, with which free places are filled)"
                    ) from error
        return slots

    @contextmanager
    def session(self) -> Iterator[None]:
        """No gradients, and the precision: for many runs, since entering costs more than some of a model's layers."""
        with torch.inference_mode(), autocast(self._precision, self._device.torch_device):
            yield

    def run(self, slot: Slot, size: int) -> None:
        """Issue the first `size` places of a slot that was waited for: up to a micro-batch, or whole ones."""
        if not torch.is_inference_mode_enabled():
            raise RuntimeError("run() outside of session() would compute in another precision")
        with foreign(_RAISED):
            try:
                self._issue(slot, size)
            except (Exception, SystemExit):
                # A slot that failed half-way is free again only when its upload is done.
                self._device.settle()
                raise

    def _issue(self, slot: Slot, size: int) -> None:
        rows = max(size, self._fixed or 0)
        for array in slot.inputs:
            array[size:rows] = 0
        targets = [target[:rows] for target in slot.targets]
        uploaded = self._device.upload([host[:rows] for host in slot.hosts], targets)
        results, computed = self._device.compute(lambda: self._compute(targets, size), uploaded)
        landing = [host[:size] for host in slot.landing]
        slot.results, slot.event = self._device.download(results, landing, computed)

    def _compute(self, records: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
        rows = records[0].shape[0]
        raw = self._forward_one(records) if rows <= self._micro_batch else self._one_by_one(records)
        return tuple(result[:size] for result in collect(raw, self._outputs, rows))

    def _forward_one(self, records: Sequence[Tensor]) -> Any:
        return self._forward(*(step(tensor) for step, tensor in zip(self._preprocess, records, strict=True)))

    def _one_by_one(self, records: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs of a stack. A module that writes into memory of its own and returns that is found out by it, and
        its outputs are copied before it is called again.

        Each micro-batch is preprocessed just before the model takes it, so that it comes from the nearest cache: the
        floats of a whole stack, written first, cost a worker 2 to 3 % more CPU where a core has 2 MB of its own cache.
        """
        if not self._overwrites:
            parts = self._micro_batches(records)
            # A module may change its inputs in place, too, and takes them again where it is found out.
            kept = [tensor.clone() for tensor in records] if len(parts) > self._cleared else records
            outputs = by_output(map(self._forward_one, parts), self._outputs)
            if not share_memory(outputs):
                self._cleared = max(self._cleared, len(parts))
                return joined(outputs, self._outputs)
            self._overwrites, records = True, kept
        copies = by_output(map(self._forward_one, self._micro_batches(records)), self._outputs, copy=True)
        return joined(copies, self._outputs)

    def _micro_batches(self, records: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
        return list(zip(*(torch.split(tensor, self._micro_batch) for tensor in records), strict=True))


def most_stacked(inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec], micro_batch: int, stack_bytes: int) -> int:
    """How many micro-batches to stack: as many as keep the inputs, as the model takes them, and the outputs of a stack
    within `stack_bytes`; one where they are larger.

    What is done once a stack, and not once a micro-batch, costs so much less. Each micro-batch begins where a tensor of
    its own would, at a multiple of 64 bytes, since kernels may take another path, and give other bits, where it doesn't
    (https://www.intel.com/content/www/us/en/docs/onemkl/developer-guide-linux/2024-2/reproducibility-conditions.html).
    """
    taken = [micro_batch * math.prod(spec.shape) * spec.model_dtype.itemsize for spec in inputs]
    given = [micro_batch * math.prod(spec.shape) * spec.dtype.itemsize for spec in outputs]
    if any(nbytes % _ALIGNMENT for nbytes in taken):
        return 1
    return max(1, min(stack_bytes // max(1, sum(taken) + sum(given)), _LIMIT))


def autocast(
    precision: str, device: torch.device, *, cache: bool = True
) -> AbstractContextManager[object]:
    """Where a precision is lower than float32: what torch can compute in it is computed in it."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=cache)
