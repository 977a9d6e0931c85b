"""The tensors and JSON objects that Open Inference Protocol messages are made of ⇄ bytes and arrays.

Rule: every size is checked before anything of that size is allocated, and every refusal is an `OipError`
whose message is one sentence with what was found and what was wanted. `batch_handler.oip` is the public face.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, TypeAlias

import google_crc32c
import numpy as np
import numpy.typing as npt

__all__ = [
    "DATATYPES",
    "GONE",
    "Array",
    "Buffer",
    "Extent",
    "Fields",
    "OipError",
    "ReadShared",
    "Tensor",
    "crc32c",
    "datatype_of",
    "decode_tensors",
    "dtype_named",
    "encode_tensors",
    "extent_of",
    "flattened",
    "from_json_numbers",
    "noting",
    "parse_json",
    "refuse_duplicates",
    "shown",
    "to_json_numbers",
]

Array: TypeAlias = npt.NDArray[Any]
Buffer: TypeAlias = bytes | bytearray | memoryview
# (region, offset, size) -> that many bytes of shared memory, or an OipError.
ReadShared: TypeAlias = Callable[[str, int, int], Buffer]

# numpy's own limit on dimensions.
_MAX_RANK = 64
# What a file's offset can be.
_FURTHEST = 1 << 62
# HTTP status: not in shared memory here. The client sends the same records in its next body.
GONE = 410
# A rendered value in an error message is cut here: messages are one readable line.
_SHOWN = 60

DATATYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype("?"),
        "INT8": np.dtype("i1"),
        "INT16": np.dtype("<i2"),
        "INT32": np.dtype("<i4"),
        "INT64": np.dtype("<i8"),
        "UINT8": np.dtype("u1"),
        "UINT16": np.dtype("<u2"),
        "UINT32": np.dtype("<u4"),
        "UINT64": np.dtype("<u8"),
        "FP16": np.dtype("<f2"),
        "FP32": np.dtype("<f4"),
        "FP64": np.dtype("<f8"),
    }
)
_NAMES = {(dtype.kind, dtype.itemsize): name for name, dtype in DATATYPES.items()}


class OipError(ValueError):
    """A message that can't be read or written; the text is the one sentence of the error reply."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class Extent(NamedTuple):
    """Where bytes are in shared memory: `size` of them, from `offset` on, in a region."""

    region: str
    offset: int
    size: int

    def to_json(self) -> dict[str, Any]:
        """The parameters that say so."""
        return {"shared_memory_region": self.region, "shared_memory_offset": self.offset,
                "shared_memory_byte_size": self.size}


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named array; axis 0 of `data` counts records. One that is sent may go on in `more` arrays of the same dtype and
    record shape.
    """

    name: str
    data: Array
    more: tuple[Array, ...] = ()

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + sum(array.nbytes for array in self.more)


def datatype_of(dtype: npt.DTypeLike) -> str:
    """The protocol's name of a numpy dtype of any byte order."""
    found = np.dtype(dtype)
    name = _NAMES.get((found.kind, found.itemsize))
    if name is None:
        raise OipError(f"dtype {found} has no datatype in the protocol, wanted one of {', '.join(DATATYPES)}")
    return name


def crc32c(*buffers: Buffer) -> int:
    """CRC-32C (Castagnoli) of the buffers, one after the other."""
    crc = 0
    for buffer in buffers:
        # The C extension refuses writable buffers but takes an array over them: no copy either way.
        readable = buffer if isinstance(buffer, bytes) else np.frombuffer(buffer, np.uint8)
        crc = google_crc32c.extend(crc, readable) if len(buffer) else crc
    return crc


class _Absent:
    """Marks a field that must be there."""


_KINDS: Mapping[type, str] = {str: "a string", list: "an array", dict: "an object", int: "an integer"}


@dataclass(frozen=True)
class Fields:
    """A JSON object whose fields are read by name and type, with errors that name both."""

    value: Any
    where: str

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            raise OipError(f"{self.where} is {shown(self.value)}, wanted an object")

    def only(self, *names: str) -> None:
        for name in self.value:
            if name not in names:
                raise OipError(f"{self.where} has an unknown field {shown(name)}, wanted {', '.join(names)}")

    def get(self, name: str, kind: type, default: Any = _Absent) -> Any:
        found = self.value.get(name)
        if found is None and default is not _Absent:
            return default
        if name not in self.value:
            raise OipError(f"{self.where} has no {name}")
        if not isinstance(found, kind) or isinstance(found, bool):
            raise OipError(f"{name} of {self.where} is {shown(found)}, wanted {_KINDS[kind]}")
        return found


def parse_json(text: Buffer, what: str, instead: str) -> Any:
    """Any JSON value; raises `OipError`, which says what to do `instead` of a number that is not finite."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON{instead}")

    try:
        return json.loads(bytes(text), parse_constant=refuse)
    except RecursionError as error:
        raise OipError(f"the JSON {what} is nested too deeply") from error
    except ValueError as error:
        raise OipError(f"the JSON {what} can't be parsed: {_why_no_json(error)}") from error


def shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=True, default=repr)
    except RecursionError:
        text = "nested too deeply"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def _why_no_json(error: ValueError) -> str:
    """What the parser found, in one line, since it may quote the body; of long numbers it says what programs may do."""
    if "set_int_max_str_digits" in str(error):
        return f"an integer has over {sys.get_int_max_str_digits()} digits"
    return str(error).splitlines()[0][:120]


def refuse_duplicates(what: str, names: Sequence[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise OipError(f"{what} {shown(name)} is named twice")
        seen.add(name)


def dtype_named(datatype: str, name: str) -> np.dtype[Any]:
    dtype = DATATYPES.get(datatype)
    if dtype is None:
        wanted = ", ".join(DATATYPES)
        raise OipError(f"datatype of {name} is {shown(datatype)}, wanted one of {wanted}")
    return dtype


def encode_tensors(
    tensors: Sequence[Tensor], is_binary: Callable[[str], bool], extents: Mapping[str, Extent] = MappingProxyType({})
) -> tuple[list[dict[str, Any]], list[memoryview], list[memoryview]]:
    """The tensors' JSON objects; the bytes of the binary ones that follow them in the body; and those of the tensors
    that have `extents` in shared memory.
    """
    described: list[dict[str, Any]] = []
    tail: list[memoryview] = []
    shared: list[memoryview] = []
    for tensor in tensors:
        arrays, datatype = (tensor.data, *tensor.more), datatype_of(tensor.data.dtype)
        item: dict[str, Any] = {
            "name": tensor.name,
            "datatype": datatype,
            "shape": [sum(map(len, arrays)), *tensor.data.shape[1:]],
        }
        pieces = [np.ascontiguousarray(array, dtype=DATATYPES[datatype]).reshape(-1) for array in arrays]
        if (extent := extents.get(tensor.name)) is not None:
            item["parameters"] = extent.to_json()
            shared += [piece.view(np.uint8).data for piece in pieces]
        elif is_binary(tensor.name):
            item["parameters"] = {"binary_data_size": tensor.nbytes}
            tail += [piece.view(np.uint8).data for piece in pieces]
        else:
            item["data"] = list(chain.from_iterable(map(to_json_numbers, pieces)))
        described.append(item)
    return described, tail, shared


def to_json_numbers(data: Array) -> list[Any]:
    """Nested lists of an array of at least one axis; what is not finite becomes None."""
    numbers = data
    if data.dtype.kind == "f":
        finite = np.isfinite(data)
        if not finite.all():
            numbers = data.astype(object)
            numbers[~finite] = None
    return list(numbers.tolist())


def decode_tensors(
    items: list[Any], tail: memoryview, what: str, limit: int, shared: ReadShared | None = None
) -> tuple[Tensor, ...]:
    """The tensors of a message; binary ones are views of `tail`, or of what `shared` gives: `limit` bytes in all."""
    tensors: list[Tensor] = []
    offset = read = 0
    for item in items:
        fields = Fields(item, f"an {what}")
        if what == "input":  # other servers' replies may say more than we know
            fields.only("name", "datatype", "shape", "parameters", "data")
        given = fields.get("name", str)
        name = shown(given)
        dtype, shape, nbytes = _geometry(fields, name, limit)
        parameters = fields.get("parameters", dict, {})
        size = parameters.get("binary_data_size")
        if "shared_memory_region" in parameters:
            if (read := read + nbytes) > limit:
                raise OipError(f"{read} bytes are said to be in shared memory, wanted at most {limit}", 413)
            data = _from_raw(_from_shared(parameters, nbytes, name, shared), dtype, shape, name)
        elif size is None:
            data = from_json_numbers(fields.get("data", list), dtype, shape, name)
        else:
            _check_size(size, nbytes, len(tail) - offset, name, dtype, shape)
            data = _from_raw(tail[offset : offset + nbytes], dtype, shape, name)
            offset += nbytes
        if what == "input" and "data" in item and (size is not None or "shared_memory_region" in parameters):
            raise OipError(f"input {name} has data in the JSON and bytes elsewhere, wanted one of them")
        tensors.append(Tensor(given, data))
    if offset != len(tail):
        raise OipError(f"{len(tail) - offset} bytes follow the last of the tensors, wanted none")
    refuse_duplicates(what, [tensor.name for tensor in tensors])
    return tuple(tensors)


def _geometry(fields: Fields, name: str, limit: int) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    dtype = dtype_named(fields.get("datatype", str), name)
    shape = fields.get("shape", list)
    if not 0 < len(shape) <= _MAX_RANK or not all(type(size) is int and size >= 0 for size in shape):
        raise OipError(f"shape of {name} is {shown(shape)}, wanted sizes of at least 0, records first")
    # numpy multiplies the sizes beside a zero among them too, and Python writes no number of 5000 digits.
    if max(shape) > limit or math.prod(filter(None, shape)) * dtype.itemsize > _FURTHEST:
        raise OipError(f"{name} has shape {shown(shape)}, wanted sizes and bytes of at most {limit}", 413)
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > limit:
        raise OipError(f"{name} of shape {shown(shape)} has {nbytes} bytes, wanted at most {limit}", 413)
    return dtype, tuple(shape), nbytes


def _check_size(size: Any, nbytes: int, left: int, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if type(size) is not int or size != nbytes:
        raise OipError(
            f"binary_data_size of {name} is {shown(size)}, wanted {nbytes} for shape {list(shape)} of {dtype}"
        )
    if nbytes > left:
        raise OipError(f"{name} has {left} bytes left in the body, wanted {nbytes}")


def _from_shared(parameters: Mapping[str, Any], nbytes: int, name: str, shared: ReadShared | None) -> memoryview:
    if shared is None:
        raise OipError(f"{name} is said to be in shared memory, wanted it in the body: there is none here", GONE)
    extent = extent_of(parameters, name)
    if extent.size != nbytes:
        raise OipError(f"{name} is {extent.size} bytes in shared memory, wanted {nbytes} bytes of its shape")
    return memoryview(shared(*extent))


def noting(shared: ReadShared | None, read: list[Buffer]) -> ReadShared | None:
    """`shared`, which adds what it reads to `read`: checksums are of that too."""
    if shared is None:
        return None

    def from_memory(region: str, offset: int, size: int) -> Buffer:
        read.append(shared(region, offset, size))
        return read[-1]

    return from_memory


def extent_of(parameters: Mapping[str, Any], name: str) -> Extent:
    """Where the parameters of a tensor say that it is."""
    where = Fields(parameters, f"the parameters of {name}")
    size, offset = where.get("shared_memory_byte_size", int), where.get("shared_memory_offset", int, 0)
    if not 0 <= size < _FURTHEST or not 0 <= offset < _FURTHEST:
        raise OipError(f"{name} is said to be {shown(size)} bytes at {shown(offset)} of shared memory, wanted numbers "
                       "from 0 to 2^62")
    return Extent(where.get("shared_memory_region", str), offset, size)


def _from_raw(raw: memoryview, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> Array:
    if dtype.kind == "b" and len(raw) and np.frombuffer(raw, np.uint8).max() > 1:
        raise OipError(f"{name} has a byte that is neither 0 nor 1, wanted BOOL")
    return np.frombuffer(raw, dtype).reshape(shape)


def from_json_numbers(data: list[Any], dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> Array:
    """Numbers of a JSON tensor, nested by `shape` or flat; null is NaN where `dtype` has one. Of several records a
    refusal names the first that is wrong, counted from 0.
    """
    try:
        return _from_json(data, dtype, shape, name)
    except OipError:
        for index, record in enumerate(data if len(data) == shape[0] > 1 else ()):
            try:
                _from_json([record], dtype, (1, *shape[1:]), name)
            except OipError as error:
                raise OipError(f"record {index}: {error}") from error
        raise


def flattened(rows: list[Any], shape: Sequence[int]) -> list[Any] | None:
    """What is in `rows` where each is lists as long and as deep as `shape` says, else None."""
    for size in shape:
        if not all(isinstance(row, list) and len(row) == size for row in rows):
            return None
        rows = list(chain.from_iterable(rows))
    return rows


def _from_json(data: list[Any], dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> Array:
    flat = flattened(data, shape[1:]) if data and isinstance(data[0], list) else data
    if flat is None:
        raise OipError(f"data of {name} is not nested by the shape of a record, {list(shape[1:])}")
    count = math.prod(shape)
    if len(flat) != count:
        raise OipError(f"data of {name} has {len(flat)} values, wanted {count} for shape {list(shape)}")
    return _numbers(flat, dtype, name).reshape(shape)


def _numbers(flat: list[Any], dtype: np.dtype[Any], name: str) -> Array:
    kinds: Any = {"b": (bool,), "f": (int, float, type(None))}.get(dtype.kind, (int,))
    for value in flat:
        if type(value) not in kinds:
            raise OipError(f"data of {name} holds {shown(value)}, wanted values of {dtype}")
    if dtype.kind in "iu" and flat:
        bounds = np.iinfo(dtype)
        for value in (min(flat), max(flat)):
            if not bounds.min <= value <= bounds.max:
                raise OipError(f"data of {name} holds {shown(value)}, outside {dtype}")
    if dtype.kind != "f":
        return np.array(flat, dtype)
    return _floats(flat, dtype, name)


def _floats(flat: list[Any], dtype: np.dtype[Any], name: str) -> Array:
    try:
        with np.errstate(over="ignore"):
            numbers = np.array([math.nan if v is None else v for v in flat], np.float64).astype(dtype)
    except OverflowError as error:
        raise OipError(f"data of {name} holds an integer outside {dtype}") from error
    if np.isinf(numbers).any():
        raise OipError(f"data of {name} holds a value outside {dtype}")
    return numbers
