"""A module → its program, as `torch.export` finds it: what is compiled, or written as a graph, by `pack`.

Rule: a module that torch can't export is refused in one line, and whatever torch prints on the way stays unsaid.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch

from batch_handler.runtimes.foreign import raise_if_device, said
from batch_handler.runtimes.transform import ModelError, example_inputs
from batch_handler.signature import InputSpec

__all__ = ["export_program", "quiet"]


def export_program(
    module: torch.nn.Module, inputs: Sequence[InputSpec], records: int, dynamic_shapes: Any = None
) -> torch.export.ExportedProgram:
    """The program of a module on the CPU, as engines take it that compile it or write it anew; raises `ModelError`.

    It takes `records` at a time and no other number, but for `dynamic_shapes` that say otherwise.
    """
    examples = example_inputs(inputs, records, torch.device("cpu"))
    try:
        with torch.no_grad(), quiet():
            return torch.export.export(module, examples, dynamic_shapes=dynamic_shapes)
    except (Exception, SystemExit) as error:
        raise_if_device(error)
        raise ModelError(f"the module can't be exported, wanted another runtime: {said(error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Silence torch, which prints, logs and warns about its own code and dumps a graph before it refuses a module.

    For the whole process, which packs one model at a time.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
