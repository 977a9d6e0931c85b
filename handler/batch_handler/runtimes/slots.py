"""Micro-batches through two slots of static buffers, so that the next one is filled while one computes.

Rule: `prepare` allocates everything once; `run` issues upload, model and download and returns; a slot is
touched again only after its `wait`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from batch_handler.oip import Array
from batch_handler.runtimes.device import PRECISIONS, Device, DeviceError, Event, classify
from batch_handler.runtimes.transform import ModelError, Preprocess, collect, torch_dtype
from batch_handler.signature import InputSpec, OutputSpec

__all__ = ["Forward", "Slot", "SlotRuntime", "autocast"]

Tensor = torch.Tensor
Forward = Callable[..., Any]

_SLOTS = 2
# TorchScript's profiling executor watches the first runs and changes the graph after them; so do cuDNN's and
# oneDNN's caches. A worker that is ready has left that behind.
_WARM_UP_RUNS = 3


class Slot:
    """Buffers of one micro-batch on host and device, and the event that says when they are free."""

    def __init__(
        self, device: Device, inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec], micro_batch: int
    ) -> None:
        self.hosts = [device.host_buffer((micro_batch, *s.shape), torch_dtype(s.dtype)) for s in inputs]
        self.targets = [device.mirror(host) for host in self.hosts]
        self.landing = [device.host_buffer((micro_batch, *s.shape), torch_dtype(s.dtype)) for s in outputs]
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
            with _mapped():
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

    def prepare(self, micro_batch: int) -> tuple[Slot, ...]:
        """Allocate the slots and run zeros through them; raises `CapacityError` where they do not fit."""
        if self._fixed not in (None, micro_batch):
            raise ModelError(
                f"the model takes {self._fixed} records at a time and no other number, "
                f"found micro-batches of {micro_batch}, wanted {self._fixed}"
            )
        with _mapped():
            self._device.settle()
            slots = tuple(Slot(self._device, self._inputs, self._outputs, micro_batch) for _ in range(_SLOTS))
        for slot in slots * _WARM_UP_RUNS:
            for array in slot.inputs:
                array[:] = 0
            self.run(slot, micro_batch)
            slot.wait()
        return slots

    def run(self, slot: Slot, size: int) -> None:
        """Issue the first `size` rows of a slot that was waited for."""
        with _mapped(), self._settled_on_error():
            rows = self._fixed or size
            for array in slot.inputs:
                array[size:rows] = 0
            targets = [target[:rows] for target in slot.targets]
            uploaded = self._device.upload([host[:rows] for host in slot.hosts], targets)
            results, computed = self._device.compute(lambda: self._compute(targets, size), uploaded)
            landing = [host[:size] for host in slot.landing]
            slot.results, slot.event = self._device.download(results, landing, computed)

    def _compute(self, records: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
        rows = records[0].shape[0]
        with torch.inference_mode(), autocast(self._precision, self._device.torch_device):
            prepared = [step(tensor) for step, tensor in zip(self._preprocess, records, strict=True)]
            results = collect(self._forward(*prepared), self._outputs, rows)
        return tuple(result[:size] for result in results)

    @contextlib.contextmanager
    def _settled_on_error(self) -> Iterator[None]:
        """The slot of a micro-batch that failed half-way is free again only when its upload is done."""
        try:
            yield
        except Exception:
            self._device.settle()
            raise


def autocast(
    precision: str, device: torch.device, *, cache: bool = True
) -> contextlib.AbstractContextManager[object]:
    """Where a precision is lower than float32: what torch can compute in it is computed in it."""
    dtype = PRECISIONS[precision]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype, cache_enabled=cache)


@contextlib.contextmanager
def _mapped() -> Iterator[None]:
    """Errors of the engine become ours here, once: the device's, or the model's."""
    try:
        yield
    except (DeviceError, ModelError, MemoryError):
        raise
    except Exception as error:
        mapped = classify(error)
        if mapped is error:
            first = (str(error).splitlines() or [""])[0]
            mapped = ModelError(f"the model raised {type(error).__name__}: {first}")
        raise mapped from error
