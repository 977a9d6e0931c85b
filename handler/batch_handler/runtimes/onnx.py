"""An ONNX graph, run by ONNX Runtime on the CPU, or on the GPU that the worker was given.

Rule: the graph is one file. A graph that keeps weights in files beside it is refused before ONNX Runtime sees
it, since those files would be in no digest.

The CUDA provider needs the package onnxruntime-gpu in place of onnxruntime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batch_handler.fields import SignatureError
from batch_handler.oip import DATATYPES
from batch_handler.runtimes.device import Device
from batch_handler.runtimes.foreign import classify
from batch_handler.runtimes.protobuf import fields_of
from batch_handler.runtimes.slots import SlotRuntime
from batch_handler.runtimes.transform import ModelError, torch_dtype
from batch_handler.signature import InputSpec, ModelDescription

__all__ = ["MAX_BYTES", "OnnxGraph", "open_graph", "open_onnx"]

Tensor = torch.Tensor

# A protobuf message can't be larger: https://protobuf.dev/programming-guides/proto-limits/
MAX_BYTES = 2**31 - 1
_ERRORS_ONLY = 3

# ONNX's names of the element types that records may have (https://onnx.ai/onnx/api/mapping.html).
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({dtype.name})": dtype.name for dtype in DATATYPES.values() if dtype.kind in "iu"},
}

# Where tensors are in a model: the message, and which field of it is which message. TensorProto's data_location
# (14) is 1 for data in another file. From onnx.proto, https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_DATA_LOCATION = 14


class OnnxGraph:
    """A session as a callable from torch tensors to torch tensors.

    `fixed` is the number of records of a graph whose first axis is not dynamic. Inputs and outputs that have the
    graph's names are bound by them, and those that have none of them by position. Outputs by name are a mapping of
    those asked for, or of all where none is; the others are not bound. Raises `ModelError` where the names don't fit.
    """

    def __init__(self, session: Any, device: torch.device, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        self._session = session
        self._device = device
        self._inputs = _inputs_in_order([node.name for node in session.get_inputs()], inputs)
        given = [node.name for node in session.get_outputs()]
        self._names, self._by_name = _outputs_taken(given, outputs)
        self._shapes: list[tuple[torch.dtype, tuple[int, ...]]] = []
        first = {node.shape[0] for node in session.get_inputs() if node.shape}
        self.fixed: int | None = next((size for size in first if isinstance(size, int)), None)

    def specs(self) -> tuple[InputSpec, ...]:
        """What the graph says that a record is; raises `SignatureError` where it leaves sizes open."""
        specs = []
        for node in self._session.get_inputs():
            shape = tuple(node.shape[1:])
            dtype = _DTYPES.get(node.type)
            if dtype is None or not node.shape or not all(isinstance(size, int) for size in shape):
                raise SignatureError(
                    f"input {node.name} of the graph is {node.type} {node.shape}, wanted a signature that says "
                    "what a record is: --input NAME:DTYPE:SHAPE"
                )
            specs.append(InputSpec(node.name, np.dtype(dtype), shape, shape, cast=dtype == "float32"))
        return tuple(specs)

    def dtypes(self) -> tuple[str | None, ...]:
        """What the graph takes of each input, in the order of the signature's, as numpy names it."""
        types = {node.name: _DTYPES.get(node.type) for node in self._session.get_inputs()}
        return tuple(types[name] for name in self._inputs)

    def require_shapes(self, given: Sequence[InputSpec]) -> None:
        """Raises `ModelError` for records, in the signature's order, of other sizes than the graph itself says."""
        shapes = {node.name: node.shape[1:] for node in self._session.get_inputs() if node.shape}
        for name, spec in zip(self._inputs, given, strict=False):  # of another number it is refused when it is called
            taken = shapes.get(name, spec.model_shape)
            fits = len(taken) == len(spec.model_shape) and all(
                not isinstance(size, int) or size == found for size, found in zip(taken, spec.model_shape, strict=True))
            if not fits:
                sizes = ", ".join(str(size) if isinstance(size, int) else "any" for size in taken)
                raise ModelError(f"a record of {spec.name} is {list(spec.model_shape)} in the model, the graph takes "
                                 f"[{sizes}]: say so with --input or --model-shape, or in the --signature file")

    def __call__(self, *inputs: Tensor) -> Any:
        if len(inputs) != len(self._inputs):
            raise ModelError(f"the graph takes {len(self._inputs)} inputs, the signature has {len(inputs)}")
        tensors = [tensor.contiguous() for tensor in inputs]
        try:
            results = self._bound(tensors) if self._shapes else self._first(tensors)
        except Exception as error:  # its errors have no base class of their own
            # One line of theirs, which may hold the file and line of their source.
            raise classify(RuntimeError(str(error))) from error
        return dict(zip(self._names, results, strict=True)) if self._by_name else results

    def _first(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run once through the host, which says what the outputs are."""
        feeds = {name: tensor.cpu().numpy() for name, tensor in zip(self._inputs, inputs, strict=True)}
        arrays = [np.asarray(array) for array in self._session.run(self._names, feeds)]
        # By its name: the dtype that ONNX Runtime gives uint64 is numpy's second of that size, which torch lacks.
        results = [torch.from_numpy(array.view(array.dtype.name)) for array in arrays]
        self._shapes = [(result.dtype, tuple(result.shape[1:])) for result in results]
        return results

    def _bound(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Read and write where the tensors are, with no copy between torch and ONNX Runtime."""
        binding = self._session.io_binding()
        where = (self._device.type, self._device.index or 0)
        records = inputs[0].shape[0]
        for name, tensor in zip(self._inputs, inputs, strict=True):
            binding.bind_input(name, *where, _numpy_dtype(tensor), tuple(tensor.shape), tensor.data_ptr())
        results = [
            torch.empty((records, *shape), dtype=dtype, device=self._device) for dtype, shape in self._shapes
        ]
        for name, result in zip(self._names, results, strict=True):
            binding.bind_output(name, *where, _numpy_dtype(result), tuple(result.shape), result.data_ptr())
        if self._device.type == "cuda":
            # ONNX Runtime has a stream of its own, which does not wait for the one that the inputs are made on.
            torch.cuda.current_stream(self._device).synchronize()
        self._session.run_with_iobinding(binding)
        if self._device.type == "cuda":
            binding.synchronize_outputs()
        return results


def _inputs_in_order(taken: list[str], named: Sequence[str]) -> list[str]:
    """The graph's inputs in the order of the signature's."""
    if set(taken) == set(named):
        return list(named)
    if set(taken) & set(named):
        raise ModelError(
            f"the graph takes inputs {taken}, the signature names {list(named)}, wanted all of the graph's names, or "
            "none of them and the graph's order"
        )
    return taken


def _outputs_taken(given: list[str], wanted: Sequence[str]) -> tuple[list[str], bool]:
    """The graph's outputs to bind, and whether by name."""
    missing = [name for name in wanted if name not in given]
    if not missing:
        return list(wanted) or given, True
    if len(missing) == len(wanted) == len(given):
        return given, False
    raise ModelError(
        f"the graph gives outputs {given}, wanted {', '.join(missing)}: name one of them with --output-name, or "
        "several as [[outputs]] in a --signature file"
    )


def open_onnx(description: ModelDescription, directory: Path, device: Device, precision: str) -> SlotRuntime:
    """The graph of an archive on a device."""
    inputs, outputs = ([spec.name for spec in specs] for specs in (description.inputs, description.outputs))
    path = directory / description.weights.file
    graph, numerics = open_graph(path, device.torch_device, inputs, outputs, tf32=precision == "tf32")
    return SlotRuntime(
        graph,
        device,
        description.inputs,
        description.outputs,
        numerics={"runtime": "onnx", **numerics},
        precision=precision,
        fixed=graph.fixed,
    )


def open_graph(
    path: Path,
    device: torch.device,
    inputs: Sequence[str] = (),
    outputs: Sequence[str] = (),
    *,
    optimised: bool = True,
    tf32: bool = False,
) -> tuple[OnnxGraph, dict[str, Any]]:
    """A graph as a callable, and what of it decides bits; raises `ModelError` with one line."""
    try:
        import onnxruntime as ort  # noqa: PLC0415 - an extra of its own, needed by those who have such models
    except ImportError as error:
        raise ModelError('runtime onnx needs ONNX Runtime: pip install "batch-client[onnx]"') from error
    content = _read(path)
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    if provider not in ort.get_available_providers():
        raise ModelError(f"this ONNX Runtime has no {provider}, wanted the package onnxruntime-gpu")
    options = ort.SessionOptions()
    # Those that the device was opened with.
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = _ERRORS_ONLY
    # Threads that spin between micro-batches take the cores from everybody else.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    chosen: list[Any] = [provider]
    if device.type == "cuda":
        cuda = {"device_id": device.index or 0, "use_tf32": int(tf32), "cudnn_conv_algo_search": "DEFAULT"}
        chosen = [(provider, cuda), "CPUExecutionProvider"]
    try:
        session = ort.InferenceSession(content, options, providers=chosen)
    except Exception as error:  # its errors have no base class of their own
        raise _as_model_error(path, error) from error
    if session.get_providers()[0] != provider:
        # It goes on without a provider that can't be opened, and without the options above.
        raise ModelError(f"ONNX Runtime can't use {provider} here: are its CUDA and cuDNN installed?")
    numerics = {"onnxruntime": ort.__version__, "provider": session.get_providers()[0]}
    return OnnxGraph(session, device, inputs, outputs), numerics


def _as_model_error(path: Path, error: Exception) -> BaseException:
    text = " ".join(str(error).split())[:300]
    mapped = classify(RuntimeError(text))
    return ModelError(f"{path.name} can't be loaded as ONNX: {text}") if type(mapped) is RuntimeError else mapped


def _read(path: Path) -> bytes:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise ModelError(f"{path.name} has {size} bytes, wanted at most {MAX_BYTES}, the most that ONNX can hold")
    content = path.read_bytes()
    try:
        external = _is_external(memoryview(content), "model")
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} is not an ONNX file: {error}") from error
    if external:
        raise ModelError(
            f"{path.name} keeps weights in another file, wanted one file: "
            "onnx.save_model(onnx.load(FILE), NEW, save_as_external_data=False)"
        )
    return content


def _is_external(message: memoryview, kind: str) -> bool:
    """Whether a tensor anywhere in the message says that its data are in another file."""
    inner = _MESSAGES[kind]
    for number, value in fields_of(message):
        if isinstance(value, int):
            if kind == "tensor" and number == _DATA_LOCATION and value:
                return True
        elif number in inner and _is_external(value, inner[number]):
            return True
    return False


def _numpy_dtype(tensor: Tensor) -> Any:
    return next(dtype for dtype in DATATYPES.values() if torch_dtype(dtype) == tensor.dtype)
