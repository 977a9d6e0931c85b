"""Open Inference Protocol v2 messages ⇄ bytes, with the binary tensor extension.

Rule: pure and strict. A body is bounded before anything is allocated for it, nothing is guessed, and every
refusal is an `OipError` whose message is one sentence with what was found and what was wanted. Binary tensors
are views: decoding copies no array and encoding copies none that is already little-endian and contiguous.

The protocol: https://github.com/kserve/open-inference-protocol; the binary extension is Triton's:
https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/protocol/extension_binary_data.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np

from batch_handler.tensors import (
    DATATYPES,
    Array,
    Buffer,
    Extent,
    Fields,
    OipError,
    ReadShared,
    Tensor,
    crc32c,
    datatype_of,
    decode_tensors,
    dtype_named,
    encode_tensors,
    extent_of,
    noting,
    parse_json,
    refuse_duplicates,
    shown,
)

__all__ = [
    "BODY_CHECKSUM",
    "CONTENT_TYPE",
    "DATATYPES",
    "HEADER_LENGTH",
    "RECORD_STATUS",
    "RESERVED_NAMES",
    "STATUS_NOT_FINITE",
    "STATUS_OK",
    "Array",
    "Extent",
    "InferReply",
    "InferRequest",
    "Message",
    "ModelMetadata",
    "OipError",
    "ReadShared",
    "RequestedOutput",
    "Tensor",
    "TensorSpec",
    "crc32c",
    "datatype_of",
    "decode_reply",
    "decode_request",
    "encode_reply",
    "encode_request",
]

CONTENT_TYPE = "application/octet-stream"
HEADER_LENGTH = "Inference-Header-Content-Length"
# HTTP header of a reply: the CRC-32C of its whole body, so that no bit of it can change unnoticed.
BODY_CHECKSUM = "Body-Crc32c"
# The output beside the model's own, a uint8 a record, and what the server says in it.
RECORD_STATUS = "record_status"
# What no output of a model may be called: an array beside it, and the metadata of the group in which its own array is.
RESERVED_NAMES = (RECORD_STATUS, "zarr.json")
STATUS_OK = 0
STATUS_NOT_FINITE = 2

# The JSON header is padded with spaces to this many bytes, so that the first tensor of a body is aligned.
_ALIGNMENT = 64
# Characters of a request's id, which its reply repeats, each in up to twelve bytes of JSON.
_LONGEST_ID = 1000

_Parameters = Mapping[str, Any]


def _nothing() -> _Parameters:
    return MappingProxyType({})


@dataclass(frozen=True)
class RequestedOutput:
    """An output asked for by name; `binary` is None where the request's default holds. With an `extent` the server
    writes it there in shared memory, or, where it can't, sends it binary.
    """

    name: str
    binary: bool | None = None
    extent: Extent | None = None


@dataclass(frozen=True)
class InferRequest:
    """An inference request; `outputs` empty means all of the model's."""

    id: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[RequestedOutput, ...] = ()
    parameters: _Parameters = field(default_factory=_nothing)

    @property
    def exact(self) -> bool:
        """Whether this is a bulk request, whose records have fixed places."""
        return bool(self.parameters.get("exact", False))

    @property
    def first_row(self) -> int:
        """The place of the first record in its output chunk."""
        return int(self.parameters.get("first_row", 0))

    @property
    def binary_output(self) -> bool:
        """Whether outputs are binary unless they say otherwise."""
        return bool(self.parameters.get("binary_data_output", False))


@dataclass(frozen=True)
class InferReply:
    """The answer to one `InferRequest`."""

    id: str
    model_name: str
    model_version: str
    outputs: tuple[Tensor, ...]
    parameters: _Parameters = field(default_factory=_nothing)


@dataclass(frozen=True)
class Message:
    """A body to send: the JSON header, then views of the tensors. Those in `shared` have to be in their extents in
    shared memory instead; in a request they are one after the other from a region's beginning on.

    `header_length` is None for a body that is only JSON. `crc32c` is of the body, and in a request of what is shared
    too; a reply has the checksum of that in its header.
    """

    parts: tuple[bytes | memoryview, ...]
    header_length: int | None
    crc32c: int
    shared: tuple[memoryview, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that the other side has to read, in the body and in shared memory."""
        return sum(len(part) for part in (*self.parts, *self.shared))

    def join(self) -> bytes:
        """The body in one piece (a copy, unless it has one part)."""
        return b"".join(self.parts)


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model: `shape` is that of one record, without the axis that counts records."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def shape_of_many(self) -> str:
        """As messages name the shape of n records, such as `[n, 28, 28]`."""
        return f"[{', '.join(map(str, ('n', *self.shape)))}]"


@dataclass(frozen=True)
class ModelMetadata:
    """What a server says about a model."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parameters: _Parameters = field(default_factory=_nothing)

    def to_json(self) -> dict[str, Any]:
        """The metadata as a JSON object, shapes with a leading -1."""
        return {
            "name": self.name,
            "versions": list(self.versions),
            "platform": self.platform,
            "inputs": [_spec_to_json(spec) for spec in self.inputs],
            "outputs": [_spec_to_json(spec) for spec in self.outputs],
            "parameters": dict(self.parameters),
        }

    @classmethod
    def from_json(cls, value: Any) -> ModelMetadata:
        """Read metadata of any OIP server; raises `OipError` where it does not say what the model takes."""
        fields = Fields(value, "model metadata")
        parameters = fields.get("parameters", dict, {})
        return cls(
            name=fields.get("name", str),
            versions=tuple(str(version) for version in fields.get("versions", list, [])),
            platform=fields.get("platform", str, ""),
            inputs=tuple(_spec_from_json(item) for item in fields.get("inputs", list, [])),
            outputs=tuple(_spec_from_json(item) for item in fields.get("outputs", list, [])),
            parameters=MappingProxyType(parameters),
        )


def encode_request(request: InferRequest, *, binary: bool = True, region: str | None = None) -> Message:
    """A request as a body; `binary` sends every input raw, else all of it is JSON. With `region` every input is raw
    and in `Message.shared`, for the server to find in that region of shared memory.
    """
    header: dict[str, Any] = {"id": request.id}
    if request.parameters:
        header["parameters"] = dict(request.parameters)
    extents = {} if region is None else _one_after_the_other(request.inputs, region)
    header["inputs"], tail, shared = encode_tensors(request.inputs, lambda _: binary, extents)
    if request.outputs:
        header["outputs"] = [_requested_to_json(output) for output in request.outputs]
    if region is None:
        return _message(header, tail)
    text = _text(header)
    return Message((text,), len(text), crc32c(text, *shared), tuple(shared))


def _one_after_the_other(tensors: Sequence[Tensor], region: str) -> dict[str, Extent]:
    sizes = [tensor.nbytes for tensor in tensors]
    offsets = accumulate(sizes, initial=0)  # and one more, the end
    return {tensor.name: Extent(region, at, size) for tensor, at, size in zip(tensors, offsets, sizes, strict=False)}


def decode_request(
    body: Buffer, header_length: int | None, *, max_tensor_bytes: int, shared: ReadShared | None = None
) -> InferRequest:
    """Read a request; its binary inputs are views of `body` or of what `shared` reads.

    `max_tensor_bytes` is the most of one input, and of all that are in shared memory.

    `header_length` is the value of the `Inference-Header-Content-Length` header, None for a JSON body.
    """
    header, tail = _split(body, header_length)
    fields = Fields(header, "request")
    fields.only("id", "parameters", "inputs", "outputs")
    ident = fields.get("id", str, "")
    if len(ident) > _LONGEST_ID:
        raise OipError(f"id has {len(ident)} characters, wanted at most {_LONGEST_ID}")
    inputs = decode_tensors(fields.get("inputs", list), tail, "input", max_tensor_bytes, shared)
    if not inputs:
        raise OipError("inputs is empty, wanted at least one tensor")
    outputs = tuple(_requested_from_json(item) for item in fields.get("outputs", list, []))
    refuse_duplicates("output", [output.name for output in outputs])
    parameters = fields.get("parameters", dict, {})
    _check_parameters(parameters)
    return InferRequest(ident, inputs, outputs, MappingProxyType(parameters))


def encode_reply(
    reply: InferReply, *, binary: Mapping[str, bool], extents: Mapping[str, Extent] = MappingProxyType({})
) -> Message:
    """A reply as a body; outputs that neither `binary` nor `extents` names are JSON.

    With any binary output the parameters get `crc32c`, that of all bytes after the JSON header and then of those in
    their `extents` in shared memory, in the order of the outputs.
    """
    outputs, tail, shared = encode_tensors(reply.outputs, lambda name: binary.get(name, False), extents)
    parameters = dict(reply.parameters)
    if tail or shared:
        parameters["crc32c"] = crc32c(*tail, *shared)
    header = {
        "model_name": reply.model_name,
        "model_version": reply.model_version,
        "id": reply.id,
        "parameters": parameters,
        "outputs": outputs,
    }
    return _message(header, tail, shared)


def decode_reply(
    body: Buffer, header_length: int | None, *, max_tensor_bytes: int, shared: ReadShared | None = None
) -> InferReply:
    """Read a reply of any OIP server; its binary outputs are views of `body` or of what `shared` reads.

    The `crc32c` of the binary bytes is verified where the reply carries one; one with outputs in shared memory has to,
    since others may write there. `max_tensor_bytes` is the most of one output, and of all that are in shared memory.
    Raises `OipError`.
    """
    header, tail = _split(body, header_length)
    fields = Fields(header, "reply")
    parameters = fields.get("parameters", dict, {})
    read: list[Buffer] = []
    outputs = decode_tensors(fields.get("outputs", list), tail, "output", max_tensor_bytes, noting(shared, read))
    wanted = parameters.get("crc32c")
    if wanted is not None or read:
        found = crc32c(tail, *read)
        if found != wanted:
            raise OipError(f"binary outputs have CRC-32C {found}, the reply says {wanted}")
    return InferReply(
        id=fields.get("id", str, ""),
        model_name=fields.get("model_name", str, ""),
        model_version=fields.get("model_version", str, ""),
        outputs=outputs,
        parameters=MappingProxyType(parameters),
    )


def _split(body: Buffer, header_length: int | None) -> tuple[Any, memoryview]:
    """The parsed JSON header and the bytes after it."""
    view = memoryview(body).cast("B") if len(body) else memoryview(b"")
    length = len(view) if header_length is None else header_length
    if not 0 < length <= len(view):
        raise OipError(f"the JSON header is said to be {length} bytes of a body of {len(view)}")
    header = parse_json(view[:length], "header", ", wanted null for a number that is not finite")
    return header, view[length:]


def _message(header: Mapping[str, Any], tail: Sequence[memoryview], shared: Sequence[memoryview] = ()) -> Message:
    text = _text(header)
    if not tail and not shared:
        return Message((text,), None, crc32c(text))
    text += b" " * (-len(text) % _ALIGNMENT)
    return Message((text, *tail), len(text), crc32c(text, *tail), tuple(shared))


def _text(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, separators=(",", ":"), allow_nan=False).encode()


def _check_parameters(parameters: Mapping[str, Any]) -> None:
    for name in ("exact", "binary_data_output"):
        if not isinstance(parameters.get(name, False), bool):
            raise OipError(f"parameter {name} is {shown(parameters[name])}, wanted true or false")
    first_row = parameters.get("first_row", 0)
    if not isinstance(first_row, int) or isinstance(first_row, bool) or first_row < 0:
        raise OipError(f"parameter first_row is {shown(first_row)}, wanted an integer of at least 0")
    if parameters.get("exact") and "first_row" not in parameters:
        raise OipError("an exact request has no parameter first_row, the place of its first record")


def _requested_to_json(output: RequestedOutput) -> dict[str, Any]:
    if output.extent is not None:
        return {"name": output.name, "parameters": output.extent.to_json()}
    if output.binary is None:
        return {"name": output.name}
    return {"name": output.name, "parameters": {"binary_data": output.binary}}


def _requested_from_json(value: Any) -> RequestedOutput:
    fields = Fields(value, "a requested output")
    fields.only("name", "parameters")
    name = fields.get("name", str)
    parameters = fields.get("parameters", dict, {})
    binary = parameters.get("binary_data")
    if binary is not None and not isinstance(binary, bool):
        raise OipError(f"binary_data of output {shown(name)} is {shown(binary)}, wanted true or false")
    extent = extent_of(parameters, f"output {shown(name)}") if "shared_memory_region" in parameters else None
    return RequestedOutput(name, binary, extent)


def _spec_to_json(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": datatype_of(spec.dtype), "shape": [-1, *spec.shape]}


def _spec_from_json(value: Any) -> TensorSpec:
    fields = Fields(value, "a tensor of the metadata")
    name = fields.get("name", str)
    dtype = dtype_named(fields.get("datatype", str), name)
    shape = fields.get("shape", list)
    if not shape or not all(type(size) is int and size >= -1 for size in shape):
        raise OipError(f"shape of {name} is {shown(shape)}, wanted integers with -1 in front")
    # Triton and MLServer leave -1 for free axes; axis 0 counts records whatever it says.
    return TensorSpec(name, dtype, tuple(shape[1:]))
