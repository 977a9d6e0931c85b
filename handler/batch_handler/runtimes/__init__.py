"""The ways to run a model: one file each, and one small protocol.

Rule: `prepare(B)` allocates for micro-batches of at most B records, then `run(slot, size)` issues one; a new
way to run models is one file and one line of the registry.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from batch_handler.runtimes.device import Device
from batch_handler.runtimes.slots import Slot
from batch_handler.signature import ModelDescription

__all__ = ["Opener", "Runtime", "open_runtime"]


class Runtime(Protocol):
    """A loaded model. `numerics` says everything of it that decides bits."""

    numerics: Mapping[str, Any]

    def prepare(self, micro_batch: int) -> tuple[Slot, ...]:
        """Allocate static buffers and warm up."""

    def run(self, slot: Slot, size: int) -> None:
        """Issue the first `size` rows of a free slot."""


Opener = Callable[[ModelDescription, Path, Device, str], Runtime]

# By name, so that an engine is imported by those who run models with it and by nobody else.
_OPENERS: Mapping[str, tuple[str, str]] = {
    "eager": ("batch_handler.runtimes.eager", "open_eager"),
    "torchscript": ("batch_handler.runtimes.torchscript", "open_torchscript"),
}


def open_runtime(
    description: ModelDescription, directory: Path, device: Device, *, precision: str = "float32"
) -> Runtime:
    """Load the model of an archive's directory with the runtime that its description names."""
    module, name = _OPENERS[description.runtime]
    opener: Opener = getattr(importlib.import_module(module), name)
    return opener(description, directory, device, precision)
