"""A model file as people have it → which kind of weights it is, and the model as plainly as it can be run.

Rule: nothing that runs code when it is loaded is loaded unless somebody vouched for it.

    ModelFileError (ValueError)    a file that can't be packed, or not without --trust-pickle; one line
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from batch_handler.runtimes.aot import open_package
from batch_handler.runtimes.eager import build_module, fixed_records
from batch_handler.runtimes.foreign import raise_if_device, said
from batch_handler.runtimes.onnx import open_graph
from batch_handler.runtimes.torchscript import load_script
from batch_handler.signature import InputSpec, Weights

__all__ = ["ModelFileError", "PlainModel", "detect_kind", "graph_inputs", "open_plainly"]

_SUFFIXES = {".safetensors": "safetensors", ".onnx": "onnx"}
_RUNS_CODE = {
    "pickle": "is a pickle of whole objects, which runs code when it is loaded",
    "exported": "is an exported program, which torch may unpickle, and that runs code",
    "compiled": "is a compiled package, which is native code",
}
_CPU = torch.device("cpu")


class ModelFileError(ValueError):
    """A file that can't be packed."""


class PlainModel:
    """A model that is neither optimised nor laid out anew; `fixed` is the number of records of one that takes no other.

    Called with tensors of any number of records, it computes them beside zeros where it has to.
    """

    def __init__(self, forward: Callable[..., Any], fixed: int | None = None) -> None:
        self._forward = forward
        self.fixed = fixed

    def __call__(self, *inputs: torch.Tensor) -> Any:
        records = inputs[0].shape[0]
        if self.fixed in (None, records):
            return self._forward(*inputs)
        pieces = [
            self._forward(*(_padded(tensor[row : row + self.fixed], self.fixed) for tensor in inputs))
            for row in range(0, records, self.fixed)
        ]
        return _joined(pieces, records)


def detect_kind(path: Path, *, trust_pickle: bool = False) -> str:
    """One of `signature.KINDS` by suffix and content; raises `ModelFileError` for what nobody vouched for."""
    if not path.is_file():
        raise ModelFileError(f"{path} is not a file")
    kind = _SUFFIXES.get(path.suffix) or _kind_of_zip(path) or _kind_of_pickle(path)
    if kind in _RUNS_CODE and not trust_pickle:
        instead = ", or save its state_dict" if kind == "pickle" else ""
        raise ModelFileError(
            f"{path.name} {_RUNS_CODE[kind]}: pass --trust-pickle if you trust where it comes from{instead}"
        )
    return kind


def open_plainly(
    weights: Weights, directory: Path, inputs: Sequence[str], outputs: Sequence[str], micro_batch: int
) -> tuple[PlainModel, torch.nn.Module | None]:
    """The model of a weights file on the CPU, and its module where it has one; raises `ModelError`.

    `inputs` and `outputs` are their names, which a graph is held to; `micro_batch` is how many records a compiled
    package takes that does not say so itself.
    """
    path = directory / weights.file
    if weights.kind == "torchscript":
        return PlainModel(load_script(path, _CPU).eval()), None
    if weights.kind == "onnx":
        graph, _ = open_graph(path, _CPU, inputs, outputs, optimised=False)
        return PlainModel(graph, graph.fixed), None
    if weights.kind == "compiled":
        package = open_package(path, _CPU, micro_batch)
        return PlainModel(package, package.fixed), None
    module = build_module(weights, directory)
    return PlainModel(module, fixed_records(module)), module


def graph_inputs(kind: str, path: Path, given: Sequence[InputSpec]) -> tuple[InputSpec, ...]:
    """What a record is: as `given`, but not cast where an ONNX graph takes what travels; or what the graph says.

    Raises `ModelFileError` for what is no graph and has no inputs given, `SignatureError` where the graph leaves sizes
    open, `ModelError` where it has other inputs, or takes records of other sizes.
    """
    if kind != "onnx":
        if not given:
            raise ModelFileError("the signature has no inputs, wanted at least one")
        return tuple(given)
    graph, _ = open_graph(path, _CPU, [spec.name for spec in given], optimised=False)
    if not given:
        return graph.specs()
    graph.require_shapes(given)
    # A graph of another number of inputs is refused when it is called.
    return tuple(replace(spec, cast=False) if taken == spec.dtype.name != "float32" and not spec.scaled else spec
                 for spec, taken in zip_longest(given, graph.dtypes()[:len(given)]))


def _kind_of_zip(path: Path) -> str | None:
    """What torch wrote, by the members of its zip; None for `torch.save` and what is no zip."""
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            # All are below one folder, but in the exports of torch 2.7 and before.
            names = [f"/{name}" for name in archive.namelist()]
    except (OSError, MemoryError):
        raise
    except Exception as error:  # any damage of its list of members
        raise ModelFileError(f"{path.name} is a damaged zip, wanted it as torch wrote it: {said(error)}") from error
    if any("/data/aotinductor/" in name for name in names):
        return "compiled"
    if any(name.endswith(("/models/model.json", "/serialized_exported_program.json")) for name in names):
        return "exported"
    # torch.save writes the same kind of zip, without code and constants.
    return "torchscript" if any(name.endswith("/constants.pkl") for name in names) else None


def _kind_of_pickle(path: Path) -> str:
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader takes any bytes for a pickle's until it stumbles
        if isinstance(error, pickle.UnpicklingError) and _is_pickle(path):
            return "pickle"
        raise_if_device(error)
        if path.suffix == ".py":
            raise ModelFileError(f"{path.name} is Python: wanted a file of weights, and --arch {path.name}:CALLABLE "
                                 "beside it") from error
        raise ModelFileError(f"{path.name} is not a model file that torch can read: {said(error)}") from error
    if _is_state_dict(value):
        return "state_dict"
    instead = ""
    if isinstance(value, Mapping):
        within = [key for key, held in value.items() if _is_state_dict(held) and held]  # as training saves them
        if within:
            largest = max(within, key=lambda key: len(value[key]))
            instead = f"; save what is under {largest!r} as a file of its own"
        value = sorted(map(str, value))[:5]
    else:
        value = type(value).__name__
    raise ModelFileError(f"{path.name} holds {value}, wanted a state_dict: names and tensors{instead}")


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(held, torch.Tensor) for held in value.values())


def _is_pickle(path: Path) -> bool:
    """Whether it is torch's zip, or begins as torch has always written pickles: with the protocol's number."""
    with path.open("rb") as file:
        return file.read(1) == pickle.PROTO or zipfile.is_zipfile(path)


def _padded(tensor: torch.Tensor, records: int) -> torch.Tensor:
    return torch.cat([tensor, tensor.new_zeros((records - len(tensor), *tensor.shape[1:]))])


def _joined(pieces: Sequence[Any], records: int) -> Any:
    """What a model returned for each piece, as if it had been given all records at once."""
    first = pieces[0]
    if isinstance(first, Mapping):
        return {name: torch.cat([piece[name] for piece in pieces])[:records] for name in first}
    if isinstance(first, list | tuple):
        return [torch.cat([piece[index] for piece in pieces])[:records] for index in range(len(first))]
    return torch.cat(list(pieces))[:records]
