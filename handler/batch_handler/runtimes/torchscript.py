"""A TorchScript file, or a module that is traced at load, frozen and optimised for inference.

Rule: if the graph can't be frozen or optimised it is served as it is, and the fingerprint says so.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from batch_handler.runtimes.device import Device
from batch_handler.runtimes.eager import fixed_records, load_module
from batch_handler.runtimes.foreign import foreign, raise_if_device, said
from batch_handler.runtimes.slots import SlotRuntime, autocast
from batch_handler.runtimes.transform import ModelError, OutputsInOrder, example_inputs
from batch_handler.signature import InputSpec, ModelDescription

__all__ = ["load_script", "open_torchscript"]

_log = logging.getLogger(__name__)


def open_torchscript(description: ModelDescription, directory: Path, device: Device, precision: str) -> SlotRuntime:
    """The graph of an archive on a device."""
    where = device.torch_device
    if description.weights.kind == "torchscript":
        script = load_script(directory / description.weights.file, where)
        layout, fixed, traced = "contiguous", None, False
    else:
        module, layout = load_module(description, directory, where, precision)
        fixed, traced = fixed_records(module), True
        # Of what a module may give, a trace can hold a tuple of tensors.
        ordered = OutputsInOrder(module, description.outputs)
        script = _trace(ordered, description.inputs, fixed or description.micro_batch, where, precision)
    script, optimised = _optimise(script.eval(), where)
    return SlotRuntime(
        script,
        device,
        description.inputs,
        description.outputs,
        numerics={"runtime": "torchscript", "layout": layout, "optimised": optimised},
        precision=precision,
        # A trace has the casts inside; in a file's graph TorchScript puts them where it can.
        lower=not traced,
        fixed=fixed,
    )


def load_script(path: Path, device: torch.device) -> Any:
    """A saved TorchScript module; raises `ModelError` where the file is another thing."""
    with foreign(f"{path.name} is not TorchScript:"), _deprecated_but_served():
        return torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call] # torch ships none


def _trace(module: Any, inputs: Sequence[InputSpec], records: int, device: torch.device, precision: str) -> Any:
    examples = example_inputs(inputs, records, device)
    try:
        with torch.inference_mode(), autocast(precision, device, cache=False), _deprecated_but_served():
            # A graph that a tensor's values steer comes out wrong, and the golden self-test catches it; the checks
            # of an exported program are such values, too.
            warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined] # torch has it
            return torch.jit.trace(  # type: ignore[no-untyped-call] # torch ships no types for it
                module, examples, check_trace=False
            )
    except (Exception, SystemExit) as error:
        raise_if_device(error)
        why = str(error) if isinstance(error, ModelError) else said(error)
        raise ModelError(
            f"the module can't be traced with a micro-batch of zeros, wanted one that can or runtime eager: {why}"
        ) from error


def _optimise(script: Any, device: torch.device) -> tuple[Any, str]:
    steps: list[tuple[str, Callable[[Any], Any]]] = [("frozen", torch.jit.freeze)]
    if device.type == "cpu":
        # On a GPU it fuses convolutions into cuDNN's own with ReLU, which torch calls with `deterministic` off whatever
        # is set (ATen/native/cudnn/ConvShared.cpp).
        steps.append(("optimised", torch.jit.optimize_for_inference))
    reached = "none"
    for name, step in steps:
        try:
            with _deprecated_but_served():
                script = step(script)
        except RuntimeError as error:
            raise_if_device(error)
            _log.warning("TorchScript stays %s: %s", reached, said(error))
            return script, reached
        reached = name
    return script, reached


@contextmanager
def _deprecated_but_served() -> Iterator[None]:
    """Silence one text: torch 2.9 and later warn that TorchScript is deprecated; people have such files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`torch\.jit\.\w+` is", category=DeprecationWarning)
        yield
