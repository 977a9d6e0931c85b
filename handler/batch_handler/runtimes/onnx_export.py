"""A module → the ONNX graph of it, made by `pack`.

Rule: the graph holds what the module computes and nothing of where it was made, so equal modules give equal files.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from batch_handler.runtimes.foreign import raise_if_device, said
from batch_handler.runtimes.onnx import MAX_BYTES
from batch_handler.runtimes.program import export_program, quiet
from batch_handler.runtimes.transform import ModelError, OutputsInOrder
from batch_handler.signature import MAX_MICRO_BATCH, InputSpec, OutputSpec

__all__ = ["export_graph"]


def export_graph(
    module: torch.nn.Module, inputs: Sequence[InputSpec], outputs: Sequence[OutputSpec], micro_batch: int, path: Path
) -> None:
    """Write the graph of a module: for any number of records where torch finds that it takes any, else for
    `micro_batch`. Equal modules give equal files.

    Raises `ModelError` where torch can't export it, or ONNX can't hold it.
    """
    try:
        import onnx_ir  # noqa: PLC0415 - only `pack` exports
        import onnxscript  # noqa: F401, PLC0415 - torch's exporter is made with it
        from onnx_ir.passes import common as passes  # noqa: PLC0415 - only `pack` exports
    except ImportError as error:
        raise ModelError(f'exporting as ONNX needs {error.name}: pip install "batch-client[onnx]"') from error
    nbytes = sum(tensor.nbytes for tensor in module.state_dict().values())
    if nbytes > MAX_BYTES:
        raise ModelError(f"the module has {nbytes} bytes of weights, wanted at most {MAX_BYTES}, the most that ONNX "
                         "can hold, or another runtime")
    program = _program(OutputsInOrder(module, outputs), inputs, micro_batch)
    with quiet():
        try:
            graph: Any = torch.onnx.export(program, output_names=[spec.name for spec in outputs], verbose=False)
        except Exception as error:
            root = _root(error)  # the first line of torch's own is the same for all of them
            raise_if_device(root)
            raise ModelError(f"the module can't be exported as ONNX, wanted another runtime: {said(root)}") from error
    # torch keeps the stack of each operation: somebody's paths, and other ones for each copy of a file of code.
    passes.ClearMetadataAndDocStringPass()(graph.model)
    # Outputs were named after names had been made unique.
    passes.NameFixPass()(graph.model)
    onnx_ir.save(graph.model, path)


def _program(module: torch.nn.Module, inputs: Sequence[InputSpec], micro_batch: int) -> torch.export.ExportedProgram:
    """For any number of records, which a graph does not check: one that is right for some is bound to `micro_batch`."""
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in inputs)
    # A module may be bound to one record; what else is wrong with it is found again, and said, below.
    with suppress(ModelError):
        # torch takes a size of 1 for a constant.
        program = export_program(module, inputs, max(2, micro_batch), (shapes,))
        if _takes_any_number(program):
            return program
    return export_program(module, inputs, micro_batch)


def _takes_any_number(program: torch.export.ExportedProgram) -> bool:
    given = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    sizes = [given[name].shape[0] for name in program.graph_signature.user_inputs]
    # A size is a number, a symbol, or an expression of symbols, such as a multiple of 4.
    symbols = [size.node.expr for size in sizes if isinstance(size, torch.SymInt) and size.node.expr.is_symbol]
    return len(symbols) == len(sizes) and all(
        ranges.lower <= 2 and ranges.upper >= MAX_MICRO_BATCH for ranges in program.range_constraints.values()
    )


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error
