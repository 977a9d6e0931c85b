"""The ways to run a model: one file each, and one small protocol.

Rule: `prepare(B)` allocates for stacks of micro-batches of B records, then `run(slot, size)` issues one, within a
`session()`; a new way to run models is one file, one line of the registry, and its kinds of weights in
`signature.runtimes_for`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from batch_handler.runtimes.device import PRECISIONS, Device
from batch_handler.runtimes.slots import Slot
from batch_handler.runtimes.transform import ModelError
from batch_handler.signature import ModelDescription, check_runtime

__all__ = ["Opener", "Runtime", "open_runtime"]


class Runtime(Protocol):
    """A loaded model. `numerics` says everything of it that decides bits."""

    numerics: Mapping[str, Any]

    def prepare(self, micro_batch: int) -> tuple[Slot, ...]:
        """Allocate static buffers, of whole micro-batches each, and warm up."""

    def session(self) -> AbstractContextManager[None]:
        """What `run` and the waits for it have to be within; for many of them."""

    def run(self, slot: Slot, size: int) -> None:
        """Issue the first `size` places of a free slot: up to a micro-batch, or whole ones, each computed alone."""


Opener = Callable[[ModelDescription, Path, Device, str], Runtime]


_ALL = tuple(PRECISIONS)
# The precisions that each offers. Its file and its `open_NAME` are named after it, so that an engine is imported by
# those who run models with it and by nobody else.
_RUNTIMES: Mapping[str, tuple[str, ...]] = {
    "eager": _ALL,
    "torchscript": _ALL,
    # What is compiled or exported has its dtypes inside.
    "aot": ("float32",),
    "onnx": ("float32", "tf32"),
    "noop": _ALL,
}


def open_runtime(
    description: ModelDescription,
    directory: Path,
    device: Device,
    *,
    precision: str = "float32",
    runtime: str | None = None,
) -> Runtime:
    """Load the model of an archive's directory, with the runtime of its description unless one is named.

    Raises `SignatureError` for a runtime that its weights can't run under, `ModelError` for the rest.
    """
    name = runtime or description.runtime
    check_runtime(name, description.weights.kind)
    offered = _RUNTIMES[name]
    if precision not in offered:
        raise ModelError(
            f"precision is {precision}, which runtime {name} does not offer, wanted {' or '.join(offered)}"
        )
    opener: Opener = getattr(importlib.import_module(f"{__name__}.{name}"), f"open_{name}")
    return opener(description, directory, device, precision)
