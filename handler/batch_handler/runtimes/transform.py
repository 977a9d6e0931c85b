"""What happens to tensors on the device before and after the model, the same for every runtime.

Rule: records cross the bus in the dtype they travel in and are cast on the device; reductions happen before
the copy back. Nothing here writes to the tensors it is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from batch_handler.signature import InputSpec, OutputSpec

__all__ = [
    "ModelError",
    "OutputsInOrder",
    "Preprocess",
    "by_output",
    "collect",
    "example_inputs",
    "joined",
    "torch_dtype",
]

Tensor = torch.Tensor


class ModelError(RuntimeError):
    """The model raised, or gave something else than its description says."""


def torch_dtype(dtype: Any) -> torch.dtype:
    """The torch dtype of a numpy dtype."""
    found: torch.dtype = getattr(torch, dtype.name)
    return found


class Preprocess:
    """A record as it travels → as the model takes it."""

    def __init__(self, spec: InputSpec, device: torch.device) -> None:
        self._shape = spec.model_shape
        self._cast = spec.cast
        self._scale = spec.scale
        # One value a channel, along axis 0 of a record.
        rank = len(spec.model_shape)
        self._mean = _channels(spec.mean, rank, device)
        self._std = _channels(spec.std, rank, device)

    def __call__(self, records: Tensor) -> Tensor:
        """(n, *shape) of the travelling dtype → (n, *model_shape)."""
        shaped = records.reshape(records.shape[0], *self._shape)
        if not self._cast:
            return shaped
        values = shaped.to(torch.float32)
        owned = values.data_ptr() != records.data_ptr()
        if self._scale is not None:
            values = values.mul_(self._scale) if owned else values * self._scale
            owned = True
        if self._mean is not None:
            values = values.sub_(self._mean) if owned else values - self._mean
            owned = True
        if self._std is not None:
            values = values.div_(self._std) if owned else values / self._std
        return values


def example_inputs(inputs: Sequence[InputSpec], records: int, device: torch.device) -> tuple[Tensor, ...]:
    """Zeros as the model takes them, (records, *model_shape) each: what graphs are traced and compiled with."""
    zeros = [torch.zeros((records, *spec.shape), dtype=torch_dtype(spec.dtype), device=device) for spec in inputs]
    return tuple(Preprocess(spec, device)(tensor) for spec, tensor in zip(inputs, zeros, strict=True))


class OutputsInOrder(torch.nn.Module):
    """A module that gives the outputs of an archive in their order, whatever else it gives and in whichever form."""

    def __init__(self, module: torch.nn.Module, outputs: Sequence[OutputSpec]) -> None:
        super().__init__()
        self._module = module
        self._wanted = outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What the module gives, one tensor an output."""
        tensors = _by_output(self._module(*inputs), self._wanted)
        # numpy has no bfloat16, and outputs are never of it.
        return tuple(tensor.float() if tensor.dtype == torch.bfloat16 else tensor for tensor in tensors)


def collect(raw: Any, specs: Sequence[OutputSpec], records: int) -> tuple[Tensor, ...]:
    """What a module returned → one tensor an output, checked, reduced and of the declared dtype.

    A module returns a tensor, a sequence in the order of the outputs, or a mapping by their names.
    """
    tensors = _by_output(raw, specs)
    return tuple(_finish(tensor, spec, records) for tensor, spec in zip(tensors, specs, strict=True))


def by_output(raws: Iterable[Any], specs: Sequence[OutputSpec]) -> tuple[tuple[Tensor, ...], ...]:
    """What a module returns for several micro-batches → for each output, copies of their tensors in order.

    Each is copied before the next is asked for, since a module may work in the memory that it returned.
    """
    return tuple(zip(*(tuple(tensor.clone() for tensor in _by_output(raw, specs)) for raw in raws), strict=True))


def joined(outputs: Sequence[Sequence[Tensor]], specs: Sequence[OutputSpec]) -> tuple[Tensor, ...]:
    """One tensor an output, the rows of its micro-batches one after another.

    Stacked and flattened, not concatenated: raises `ModelError` where one of them has more rows, or other axes, than
    the others.
    """
    for tensors, spec in zip(outputs, specs, strict=True):
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        if len(shapes) > 1:
            rows = len(tensors[0])
            raise ModelError(
                f"output {spec.name} has shapes {list(shapes[0])} and {list(shapes[-1])}, wanted {[rows, *spec.shape]}"
            )
    return tuple(torch.stack(tuple(tensors)).flatten(0, 1) for tensors in outputs)


def _channels(values: tuple[float, ...] | None, rank: int, device: torch.device) -> Tensor | None:
    if values is None:
        return None
    shape = (1, len(values), *([1] * (rank - 1))) if rank else (1,)
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(shape)


def _by_output(raw: Any, specs: Sequence[OutputSpec]) -> Sequence[Any]:
    if isinstance(raw, Mapping):
        missing = [spec.name for spec in specs if spec.name not in raw]
        if missing:
            raise ModelError(f"the model gave outputs {sorted(map(str, raw))}, wanted {', '.join(missing)} too")
        return [raw[spec.name] for spec in specs]
    tensors: Any = [raw] if isinstance(raw, Tensor) else raw
    if not isinstance(tensors, list | tuple) or len(tensors) != len(specs):
        found = f"{len(tensors)} outputs" if isinstance(tensors, list | tuple) else type(raw).__name__
        raise ModelError(f"the model gave {found}, wanted {len(specs)}: {', '.join(s.name for s in specs)}")
    return tuple(tensors)


def _finish(tensor: Any, spec: OutputSpec, records: int) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ModelError(f"output {spec.name} is {type(tensor).__name__}, wanted a tensor")
    wanted = (records, *spec.shape)
    if tuple(tensor.shape) != wanted:
        # (n, 1) for a scalar a record, and the like: same elements, same order.
        if tensor.shape[:1] != (records,) or tensor.numel() != math.prod(wanted):
            raise ModelError(f"output {spec.name} has shape {list(tensor.shape)}, wanted {list(wanted)}")
        tensor = tensor.reshape(wanted)
    if spec.softmax:
        tensor = torch.softmax(tensor.to(torch.float32), dim=-1)
    finished: Tensor = tensor.to(torch_dtype(spec.dtype))
    return finished
