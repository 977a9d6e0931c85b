"""Errors of code that is not ours, an engine's or a model's own, as ours.

Rule: what memory or the device is to blame for is no model's fault; and what an error says is one bounded line, since
it goes into logs and replies.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from batch_handler.runtimes.device import CapacityError, DeviceError, LostDeviceError
from batch_handler.runtimes.transform import ModelError

__all__ = ["classify", "foreign", "raise_if_device", "said"]

_MOST_SAID = 300  # characters
_NAMED = re.compile(r"\w+(Error|Exception): ")
_IN_TORCHSCRIPT = "The following operation failed in the TorchScript interpreter"
# How the engines say that memory is full where they have no class for it.
_MEMORY_TEXTS = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "ALLOC_FAILED",  # of cuBLAS, cuDNN, cuFFT, cuSOLVER
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "unable to find an engine to execute this computation",  # cuDNN's; of a model that ran as it was loaded
    "Failed to allocate memory",
    "bad_alloc",
)
# And that the context is poisoned: torch begins with it, ONNX Runtime has it behind its own words. What cuBLAS can't do
# begins the same, and the context is as it was.
_TORCH_LOST, _ONNX_LOST = ("CUDA error", "CUDA driver error"), "CUDA failure"
_NOT_LOST = ("CUBLAS_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_INVALID_VALUE")


def said(error: BaseException) -> str:
    """An error in one line: its type and the first line of its text, 300 characters of it at most. TorchScript's own
    first lines only say where it was; what the operation said begins with its error's name.
    """
    name, lines = type(error).__name__, [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return name
    text = lines[0]
    if text.startswith(_IN_TORCHSCRIPT):
        text = next((line for line in lines[1:] if _NAMED.match(line)), lines[-1]).removeprefix(f"{name}: ")
    return f"{name}: {text[:_MOST_SAID]}"


def classify(error: BaseException) -> BaseException:
    """Map an engine's error to `CapacityError` or `LostDeviceError`; any other is the model's and stays."""
    if isinstance(error, DeviceError | ModelError):
        return error
    if isinstance(error, MemoryError):
        return CapacityError(f"memory is full: {said(error)}")
    if not isinstance(error, RuntimeError):
        return error
    message = str(error)
    if isinstance(error, torch.OutOfMemoryError) or any(text in message for text in _MEMORY_TEXTS):
        return CapacityError(f"memory is full: {said(error)}")
    # AcceleratorError is what newer versions raise for errors that CUDA calls sticky; older ones raise
    # RuntimeError with the text alone.
    sticky = getattr(torch, "AcceleratorError", None)
    named = isinstance(error, sticky) if sticky is not None else False
    lost = named or message.startswith(_TORCH_LOST) or _ONNX_LOST in message
    if lost and not any(text in message for text in _NOT_LOST):
        return LostDeviceError(f"the device's context is lost: {said(error)}")
    return error


def raise_if_device(error: BaseException) -> None:
    """Raise the `DeviceError` that a foreign error is; return where it is the model's."""
    if isinstance(error, DeviceError):
        raise error
    # No local has it: with the error's own traceback that would keep the frames, and the module, in memory.
    if isinstance(classify(error), DeviceError):
        raise classify(error) from error


@contextmanager
def foreign(what: str) -> Iterator[None]:
    """Run code that is not ours: what it raises becomes `DeviceError`, or `ModelError` with `what` in front."""
    try:
        yield
    except (DeviceError, ModelError):
        raise
    except StopIteration as error:  # contextlib drops an error that it is the cause of, as one of the generator
        raise ModelError(f"{what} {said(error)}") from None
    except (Exception, SystemExit) as error:  # a model that ends the process fails its request, and the worker stays
        _let_go(error)
        raise_if_device(error)
        raise ModelError(f"{what} {said(error)}") from error


def _let_go(error: BaseException) -> None:
    """Empty the frames that an error came through and those of its causes: what a model had in its variables would
    stay in memory as long as the error does, and memory may be what is full.
    """
    left: list[BaseException | None] = [error]
    seen: set[int] = set()
    while left:
        one = left.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        traceback.clear_frames(one.__traceback__)
        left += [one.__cause__, one.__context__, *getattr(one, "exceptions", ())]
