"""What a model takes and gives, and the `model.json` that says so.

Rule: a description is validated whole when it is read, and everything after relies on it. The digest is over
what the model computes, not over how it is tuned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from batch_handler.fields import (
    NAME,
    VERSION,
    WANTED_NAME,
    SignatureError,
    as_object,
    count,
    dtype_of,
    file_name,
    flag,
    list_of,
    number,
    numbers,
    shape_of,
    text,
)
from batch_handler.oip import RESERVED_NAMES, ModelMetadata, OipError, TensorSpec, datatype_of

__all__ = [
    "FORMAT",
    "KINDS",
    "MAX_MICRO_BATCH",
    "FileEntry",
    "Golden",
    "InputSpec",
    "ModelDescription",
    "OutputSpec",
    "SignatureError",
    "Weights",
    "canonical_json",
    "check_micro_batch",
    "check_name",
    "check_runtime",
    "digest_of",
    "runtimes_for",
]

FORMAT = 1
# What can run each kind of weights; the first is what pack takes where nobody chooses.
_MODULE = ("eager", "torchscript")
_RUNTIMES_FOR: Mapping[str, tuple[str, ...]] = {
    "state_dict": _MODULE,
    "safetensors": _MODULE,
    "pickle": _MODULE,
    "exported": _MODULE,
    "torchscript": ("torchscript",),
    "compiled": ("aot",),
    "onnx": ("onnx",),
    # No model: what `bench` serves to see how quick everything around one is. `pack` never makes it.
    "none": ("noop",),
}
KINDS = tuple(_RUNTIMES_FOR)

MAX_MICRO_BATCH = 65_536


@dataclass(frozen=True)
class InputSpec:
    """A tensor that the model takes: how a record travels, and what it becomes in the model.

    `shape` and `model_shape` are those of one record. With `cast` it becomes float32, times `scale`, minus
    `mean`, over `std`, the latter two along axis 0 of `model_shape`.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    model_shape: tuple[int, ...]
    scale: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    cast: bool = True

    def __post_init__(self) -> None:
        _check_tensor("input", self.name, self.dtype, self.shape)
        if math.prod(self.shape) != math.prod(self.model_shape) or any(size < 1 for size in self.model_shape):
            raise SignatureError(
                f"model_shape of input {self.name} is {list(self.model_shape)}, "
                f"wanted as many elements as its shape {list(self.shape)}"
            )
        if not self.cast and self.scaled:
            raise SignatureError(f"input {self.name} has cast = false, wanted no scale, mean or std beside it")
        if self.scale == 0:
            raise SignatureError(f"scale of input {self.name} is 0, which would make all records alike")
        for field, values in (("mean", self.mean), ("std", self.std)):
            self._check_channels(field, values)

    def _check_channels(self, field: str, values: tuple[float, ...] | None) -> None:
        if values is None:
            return
        channels = self.model_shape[0] if self.model_shape else 1
        if len(values) not in (1, channels):
            raise SignatureError(
                f"{field} of input {self.name} has {len(values)} values, "
                f"wanted 1 or {channels}, the first size of its model_shape: one a channel needs the channels first "
                "(C x H x W); where they are last, normalise in the module"
            )
        if field == "std" and 0.0 in values:
            raise SignatureError(f"std of input {self.name} holds 0, wanted numbers to divide by")

    @property
    def scaled(self) -> bool:
        """Whether its numbers are changed on the way into the model."""
        return (self.scale, self.mean, self.std) != (None, None, None)

    @property
    def model_dtype(self) -> np.dtype[Any]:
        """What the model takes."""
        return np.dtype(np.float32) if self.cast else self.dtype

    def tensor(self) -> TensorSpec:
        """The input as clients see it."""
        return TensorSpec(self.name, self.dtype, self.shape)

    def to_json(self) -> dict[str, Any]:
        """The object in `model.json`."""
        value: dict[str, Any] = {
            "name": self.name,
            "dtype": self.dtype.name,
            "shape": list(self.shape),
            "model_shape": list(self.model_shape),
            "scale": self.scale,
            "mean": None if self.mean is None else list(self.mean),
            "std": None if self.std is None else list(self.std),
        }
        if not self.cast:
            value["cast"] = False
        return value

    @classmethod
    def from_json(cls, value: Any) -> InputSpec:
        """Read an input of `model.json` or of a signature file."""
        where = "an input"
        known = ("name", "dtype", "shape", "model_shape", "scale", "mean", "std", "cast")
        fields = as_object(value, where, known)
        name = text(fields, "name", where)
        where = f"input {name}"
        shape = shape_of(fields.get("shape"), "shape", where)
        model_shape = fields.get("model_shape")
        return cls(
            name=name,
            dtype=dtype_of(fields.get("dtype"), where),
            shape=shape,
            model_shape=shape if model_shape is None else shape_of(model_shape, "model_shape", where),
            scale=None if fields.get("scale") is None else number(fields["scale"], "scale", where),
            mean=numbers(fields.get("mean"), "mean", where),
            std=numbers(fields.get("std"), "std", where),
            cast=flag(fields, "cast", where, default=True),
        )


@dataclass(frozen=True)
class OutputSpec:
    """A tensor that the model gives; `softmax` is over the last axis, in float32, on the device."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    softmax: bool = False

    def __post_init__(self) -> None:
        _check_tensor("output", self.name, self.dtype, self.shape)
        if self.name in RESERVED_NAMES:
            raise SignatureError(f"output {self.name} has a name that replies or stored outputs need, wanted another")
        if self.softmax and (self.dtype.kind != "f" or not self.shape):
            raise SignatureError(f"output {self.name} has softmax, wanted a float dtype and a last axis")

    def tensor(self) -> TensorSpec:
        """The output as clients see it."""
        return TensorSpec(self.name, self.dtype, self.shape)

    def to_json(self) -> dict[str, Any]:
        """The object in `model.json`."""
        return {
            "name": self.name,
            "dtype": self.dtype.name,
            "shape": list(self.shape),
            "softmax": self.softmax,
        }

    @classmethod
    def from_json(cls, value: Any) -> OutputSpec:
        """Read an output of `model.json`."""
        fields = as_object(value, "an output", ("name", "dtype", "shape", "softmax"))
        name = text(fields, "name", "an output")
        where = f"output {name}"
        return cls(
            name,
            dtype_of(fields.get("dtype"), where),
            shape_of(fields.get("shape"), "shape", where),
            flag(fields, "softmax", where, default=False),
        )


@dataclass(frozen=True)
class Weights:
    """The file that holds the parameters, of one of `KINDS`, and what builds the module around them.

    `exported` is a program of torch.export, `compiled` a package of AOTInductor.
    """

    file: str
    kind: str
    arch: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SignatureError(f"kind of weights is {self.kind!r}, wanted one of {', '.join(KINDS)}")
        if self.arch is not None and not (isinstance(self.arch, str) and self.arch.count(":") == 1):
            raise SignatureError(f"arch is {self.arch!r}, wanted module:callable or FILE.py:callable")
        if self.kind in ("state_dict", "safetensors") and self.arch is None:
            raise SignatureError(f"weights of kind {self.kind} have no arch, the callable that builds the module")


@dataclass(frozen=True)
class Golden:
    """The sample records and their outputs, and how far a worker may be from them."""

    file: str
    records: int
    tolerance: float


@dataclass(frozen=True)
class FileEntry:
    """Size and SHA-256 of a file of the archive."""

    nbytes: int
    sha256: str


@dataclass(frozen=True)
class ModelDescription:
    """`model.json`, validated."""

    name: str
    version: str
    runtime: str
    weights: Weights
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    golden: Golden
    micro_batch: int
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        check_name(self.name, self.version)
        check_runtime(self.runtime, self.weights.kind)
        check_micro_batch(self.micro_batch)
        for what, names in (
            ("inputs", [spec.name for spec in self.inputs]),
            ("outputs", [spec.name for spec in self.outputs]),
        ):
            if not names or len(set(names)) != len(names):
                raise SignatureError(f"{what} are named {names}, wanted at least one and no name twice")
        for file in (self.weights.file, self.golden.file):
            if file not in self.files:
                raise SignatureError(f"files does not list {file}")

    @property
    def digest(self) -> str:
        """What the model computes: equal for archives that differ in tuning only."""
        return digest_of(self._body())

    def metadata(self, platform: str, parameters: Mapping[str, Any]) -> ModelMetadata:
        """What a server says of the model."""
        return ModelMetadata(
            name=self.name,
            versions=(self.version,),
            platform=platform,
            inputs=tuple(spec.tensor() for spec in self.inputs),
            outputs=tuple(spec.tensor() for spec in self.outputs),
            parameters={"model_digest": self.digest, **parameters},
        )

    def _body(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "name": self.name,
            "version": self.version,
            "runtime": self.runtime,
            "weights": {"file": self.weights.file, "kind": self.weights.kind, "arch": self.weights.arch},
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "golden": {
                "file": self.golden.file,
                "records": self.golden.records,
                "tolerance": self.golden.tolerance,
            },
            "micro_batch": self.micro_batch,
            "files": {name: {"bytes": entry.nbytes, "sha256": entry.sha256} for name, entry in self.files.items()},
        }

    def to_json(self) -> dict[str, Any]:
        """The content of `model.json`, digest included."""
        return {**self._body(), "digest": self.digest}

    @classmethod
    def from_json(cls, value: Any) -> ModelDescription:
        """Read and check `model.json`; raises `SignatureError`, also where the digest is another's."""
        where = "model.json"
        fields = as_object(value, where, (*_DESCRIPTION, "digest"))
        for name in _DESCRIPTION:
            if name not in fields:
                raise SignatureError(f"{where} has no {name}")
        if fields["format"] != FORMAT:
            raise SignatureError(f"format of {where} is {fields['format']!r}, wanted {FORMAT}")
        found = digest_of(fields)
        if fields.get("digest", found) != found:
            raise SignatureError(f"{where} says digest {fields['digest']}, its content has {found}")
        weights = as_object(fields["weights"], "weights", ("file", "kind", "arch"))
        golden = as_object(fields["golden"], "golden", ("file", "records", "tolerance"))
        return cls(
            name=text(fields, "name", where),
            version=text(fields, "version", where),
            runtime=text(fields, "runtime", where),
            weights=Weights(file_name(weights, "weights"), text(weights, "kind", "weights"), weights.get("arch")),
            inputs=tuple(InputSpec.from_json(item) for item in list_of(fields, "inputs")),
            outputs=tuple(OutputSpec.from_json(item) for item in list_of(fields, "outputs")),
            golden=Golden(
                file_name(golden, "golden"),
                count(golden.get("records"), "records of golden", 1),
                number(golden.get("tolerance"), "tolerance", "golden"),
            ),
            micro_batch=count(fields["micro_batch"], "micro_batch"),
            files=_files(fields["files"]),
        )


def canonical_json(value: Any) -> bytes:
    """Sorted keys, no spaces, UTF-8: equal values have equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_of(description: Mapping[str, Any]) -> str:
    """The digest of `model.json`'s content: without `digest` and `micro_batch`."""
    body = {key: value for key, value in description.items() if key not in ("digest", "micro_batch")}
    return f"sha256:{hashlib.sha256(canonical_json(body)).hexdigest()}"


def runtimes_for(kind: str) -> tuple[str, ...]:
    """The runtimes that weights of one of `KINDS` can run under, the usual one first."""
    return _RUNTIMES_FOR[kind]


def check_runtime(runtime: str, kind: str) -> None:
    """Raise `SignatureError` unless weights of this kind can run under this runtime."""
    if runtime not in runtimes_for(kind):
        wanted = ", ".join(runtimes_for(kind))
        raise SignatureError(f"runtime is {runtime!r}, wanted one of {wanted} for weights of kind {kind}")


def check_name(name: str, version: str) -> None:
    """Raise `SignatureError` unless both fit into a URL path and a file name."""
    if not NAME.fullmatch(name):
        raise SignatureError(f"name is {name!r}, {WANTED_NAME}")
    if not VERSION.fullmatch(version):
        raise SignatureError(f"version is {version!r}, wanted letters, digits, '.', '+' and '-'")


_DESCRIPTION = (
    *("format", "name", "version", "runtime", "weights", "inputs", "outputs"),
    *("golden", "micro_batch", "files"),
)


def _files(value: Any) -> dict[str, FileEntry]:
    if not isinstance(value, dict):
        raise SignatureError(f"files is {value!r}, wanted an object")
    files: dict[str, FileEntry] = {}
    for name, item in value.items():
        where = f"file {name!r}"
        if not NAME.fullmatch(name):
            raise SignatureError(f"files lists {name!r}, {WANTED_NAME}")
        fields = as_object(item, where, ("bytes", "sha256"))
        files[name] = FileEntry(count(fields.get("bytes"), f"bytes of {where}"), text(fields, "sha256", where))
    return files


def _check_tensor(what: str, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if not NAME.fullmatch(name):
        raise SignatureError(f"{what} is named {name!r}, {WANTED_NAME}")
    try:
        datatype_of(dtype)
    except OipError as error:
        raise SignatureError(f"{what} {name}: {error}") from error
    if any(size < 1 for size in shape):
        raise SignatureError(f"shape of {what} {name} is {list(shape)}, wanted sizes of at least 1")


def check_micro_batch(micro_batch: int) -> None:
    """Raise `SignatureError` for a micro-batch of no records, or of more than any machine is given."""
    if not 1 <= micro_batch <= MAX_MICRO_BATCH:
        raise SignatureError(f"micro_batch is {micro_batch}, wanted 1 to {MAX_MICRO_BATCH}")
