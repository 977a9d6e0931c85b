"""Any supported model file → `.mar`, TorchServe's archive, and its description back out of one.

Rule: an archive is written only after a model opened from the very files that go into it has reproduced its
golden records; equal input gives an equal archive, byte for byte; and it appears under its name whole.

    ArchiveError (ValueError)    what was given can't be packed, or is no archive of ours; one line
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batch_handler.model import DESCRIPTION_FILE, Model, ModelLoadError, Tuning, parse_description
from batch_handler.oip import Array, OipError, datatype_of
from batch_handler.runtimes.eager import build_module, said
from batch_handler.runtimes.torchscript import load_script
from batch_handler.runtimes.transform import ModelError, Preprocess, collect
from batch_handler.signature import (
    FileEntry,
    Golden,
    InputSpec,
    ModelDescription,
    OutputDraft,
    OutputSpec,
    SignatureError,
    Weights,
    check_name,
)

__all__ = ["DEFAULT_MICRO_BATCH", "ArchiveError", "PackRequest", "detect_kind", "pack", "read_description"]

DEFAULT_MICRO_BATCH = 128

_WEIGHTS_FILES = {
    "state_dict": "weights.pt",
    "pickle": "weights.pt",
    "safetensors": "weights.safetensors",
    "torchscript": "model.ts",
}
_GOLDEN_FILE = "golden.npz"
_CONFIG_FILE = "model-config.yaml"
_ENTRY_FILE = "entry.py"
_ENTRY = b'''"""TorchServe's way in; the code is the batch_handler package of the server's environment."""

from batch_handler.service import handle

__all__ = ["handle"]
'''
# What zip can say at the earliest: archives of equal content are equal files.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CREATED = "01/01/1980 00:00:00"
_MAX_DESCRIPTION_BYTES = 1 << 20
_GOLDEN_SEED = 20240229
_GOLDEN_RECORDS = 4
_TRUST = (
    "is a pickle of whole objects, which runs code when it is loaded: "
    "pass --trust-pickle if you trust where it comes from, or save its state_dict"
)


class ArchiveError(ValueError):
    """What was given can't be packed, or is no archive of ours."""


@dataclass(frozen=True)
class PackRequest:
    """What to pack.

    `arch` is `module:callable` or `FILE.py:callable`, called without arguments to build the module of a
    state_dict or safetensors file. `outputs` empty takes what the model gives. `golden` is a .npy (one input)
    or .npz file, or arrays by input name; by default a few random records. `runtime` None is torchscript for a
    TorchScript file, else eager. `model_config` is the text of TorchServe's `model-config.yaml`.
    """

    model: Path
    output: Path
    name: str
    inputs: tuple[InputSpec, ...]
    model_config: bytes
    version: str = "1.0"
    outputs: tuple[OutputDraft, ...] = ()
    arch: str | None = None
    kind: str | None = None
    runtime: str | None = None
    trust_pickle: bool = False
    micro_batch: int = DEFAULT_MICRO_BATCH
    golden: Path | Mapping[str, Array] | None = None
    tolerance: float = 1e-5


def pack(request: PackRequest) -> Path:
    """Write the archive of `request` and return its path; raises `ArchiveError`."""
    try:
        check_name(request.name, request.version)
        if not request.inputs:
            raise ArchiveError("the signature has no inputs, wanted at least one")
        with tempfile.TemporaryDirectory(prefix="batch-pack-") as temporary:
            directory = Path(temporary)
            description = _stage(request, directory)
            text = json.dumps(description.to_json(), indent=1, ensure_ascii=False).encode()
            (directory / DESCRIPTION_FILE).write_bytes(text)
            Model.open(directory, Tuning(threads=torch.get_num_threads()))
            return _write(request, description, directory)
    except (SignatureError, ModelError, ModelLoadError) as error:
        raise ArchiveError(f"{request.model.name}: {error}") from error
    except OSError as error:
        raise ArchiveError(f"{error.filename or request.model}: {error.strerror or error}") from error


def read_description(archive: Path) -> ModelDescription:
    """The description in an archive, read within a size bound; nothing is unpacked and nothing is run."""
    try:
        with zipfile.ZipFile(archive) as mar, mar.open(DESCRIPTION_FILE) as member:
            text = member.read(_MAX_DESCRIPTION_BYTES + 1)
        return parse_description(text)
    except KeyError as error:
        raise ArchiveError(f"{archive} has no {DESCRIPTION_FILE}, wanted a .mar that pack wrote") from error
    except (SignatureError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ArchiveError(f"{archive}: {error}") from error
    except OSError as error:
        raise ArchiveError(f"{archive} can't be read: {error.strerror or error}") from error


def detect_kind(path: Path, *, trust_pickle: bool = False) -> str:
    """One of `signature.KINDS` by suffix and content; raises `ArchiveError` for a pickle nobody vouched for."""
    if not path.is_file():
        raise ArchiveError(f"{path} is not a file")
    if path.suffix == ".safetensors":
        return "safetensors"
    if _is_torchscript(path):
        return "torchscript"
    try:
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if trust_pickle:
            return "pickle"
        raise ArchiveError(f"{path.name} {_TRUST}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ArchiveError(f"{path.name} is not a model file that torch can read: {error}") from error
    if isinstance(value, Mapping) and value and all(isinstance(v, torch.Tensor) for v in value.values()):
        return "state_dict"
    keys = sorted(map(str, value))[:5] if isinstance(value, Mapping) else type(value).__name__
    raise ArchiveError(f"{path.name} holds {keys}, wanted a state_dict: names and tensors")


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        # torch.save writes the same kind of zip, without code and constants.
        return any(name.endswith("/constants.pkl") for name in archive.namelist())


def _stage(request: PackRequest, directory: Path) -> ModelDescription:
    """Put the archive's files into `directory` and describe them."""
    kind = request.kind or detect_kind(request.model, trust_pickle=request.trust_pickle)
    if kind == "pickle" and not request.trust_pickle:
        raise ArchiveError(f"{request.model.name} {_TRUST}")
    if kind in ("state_dict", "safetensors") and request.arch is None:
        raise ArchiveError(f"{request.model.name} holds weights only, wanted --arch FILE.py:callable")
    arch, arch_file = _stage_arch(request.arch, directory)
    weights = Weights(_WEIGHTS_FILES[kind], kind, arch)
    shutil.copyfile(request.model, directory / weights.file)
    forward = _forward(weights, directory)
    inputs = _golden_inputs(request)
    outputs, specs = _golden_outputs(forward, request, inputs)
    golden = {f"input.{spec.name}": array for spec, array in zip(request.inputs, inputs, strict=True)}
    golden |= {f"output.{spec.name}": array for spec, array in zip(specs, outputs, strict=True)}
    # mypy: numpy's stub lets keyword arrays collide with allow_pickle, which has a dot less than ours.
    np.savez(directory / _GOLDEN_FILE, **golden)  # type: ignore[arg-type]
    files = [weights.file, _GOLDEN_FILE, *([arch_file] if arch_file else [])]
    return ModelDescription(
        name=request.name,
        version=request.version,
        runtime=request.runtime or ("torchscript" if kind == "torchscript" else "eager"),
        weights=weights,
        inputs=request.inputs,
        outputs=specs,
        golden=Golden(_GOLDEN_FILE, len(inputs[0]), request.tolerance),
        micro_batch=request.micro_batch,
        files={name: _entry(directory / name) for name in files},
    )


def _stage_arch(arch: str | None, directory: Path) -> tuple[str | None, str | None]:
    """The arch as it is named in the archive, and the file of it there."""
    if arch is None:
        return None, None
    source, separator, name = arch.rpartition(":")
    if not separator or not source or not name.isidentifier():
        raise ArchiveError(f"arch is {arch!r}, wanted module:callable or FILE.py:callable")
    if not source.endswith(".py"):
        return arch, None
    code = Path(source).read_bytes()
    # Named by its content: two archives in one process must not share a module.
    file = f"arch_{hashlib.sha256(code).hexdigest()[:8]}.py"
    (directory / file).write_bytes(code)
    return f"{file}:{name}", file


def _forward(weights: Weights, directory: Path) -> Callable[..., Any]:
    """The model as plainly as it can be run: neither optimised nor laid out anew."""
    if weights.kind == "torchscript":
        script: Callable[..., Any] = load_script(directory / weights.file, torch.device("cpu")).eval()
        return script
    return build_module(weights, directory).eval()


def _golden_inputs(request: PackRequest) -> tuple[Array, ...]:
    given = request.golden
    if given is None:
        return _random_records(request.inputs)
    if isinstance(given, Path):
        given = _read_arrays(given, request.inputs)
    arrays = []
    for spec in request.inputs:
        array = given.get(spec.name)
        if array is None:
            raise ArchiveError(f"golden records have {sorted(given)}, wanted {spec.name}")
        if array.dtype != spec.dtype or array.shape[1:] != spec.shape or not len(array):
            raise ArchiveError(
                f"golden records of {spec.name} are {array.dtype} {list(array.shape)}, "
                f"wanted {spec.dtype} {['n', *spec.shape]}"
            )
        arrays.append(np.ascontiguousarray(array))
    if len({len(array) for array in arrays}) != 1:
        raise ArchiveError("golden records of the inputs differ in number, wanted equally many")
    return tuple(arrays)


def _read_arrays(path: Path, inputs: Sequence[InputSpec]) -> dict[str, Array]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {inputs[0].name: loaded}
        with loaded:
            return {name.removeprefix("input."): loaded[name] for name in loaded.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise ArchiveError(f"{path} is neither .npy nor .npz: {error}") from error


def _random_records(inputs: Sequence[InputSpec]) -> tuple[Array, ...]:
    rng = np.random.default_rng(_GOLDEN_SEED)
    arrays: list[Array] = []
    for spec in inputs:
        shape = (_GOLDEN_RECORDS, *spec.shape)
        if spec.dtype.kind == "f":
            arrays.append(rng.random(shape).astype(spec.dtype))
        else:
            # Bytes are mostly pixels; other integers may be indices of short tables.
            top = 256 if spec.dtype == np.uint8 and spec.cast else 2
            arrays.append(rng.integers(0, top, shape).astype(spec.dtype))
    return tuple(arrays)


def _golden_outputs(
    forward: Callable[..., Any], request: PackRequest, inputs: Sequence[Array]
) -> tuple[tuple[Array, ...], tuple[OutputSpec, ...]]:
    cpu = torch.device("cpu")
    records = len(inputs[0])
    try:
        with torch.inference_mode():
            prepared = [
                Preprocess(spec, cpu)(torch.from_numpy(array))
                for spec, array in zip(request.inputs, inputs, strict=True)
            ]
            raw = forward(*prepared)
    except Exception as error:
        lines = str(error).splitlines() or [""]
        wanted = ", ".join(f"{spec.name} {list(spec.model_shape)}" for spec in request.inputs)
        raise ArchiveError(
            f"{request.model.name} raised {type(error).__name__} on records of {wanted}: {lines[-1][:200]}"
        ) from error
    specs = _output_specs(raw, request.outputs, records)
    outputs = tuple(tensor.numpy() for tensor in collect(raw, specs, records))
    return outputs, specs


def _output_specs(raw: Any, drafts: Sequence[OutputDraft], records: int) -> tuple[OutputSpec, ...]:
    """The declared outputs, with what they leave open taken from what the model gave."""
    if isinstance(raw, Mapping):
        given = dict(raw)
    else:
        tensors = [raw] if isinstance(raw, torch.Tensor) else raw
        if not isinstance(tensors, list | tuple):
            raise ArchiveError(f"the model gave {type(raw).__name__}, wanted a tensor, or a list or mapping of tensors")
        names = [draft.name for draft in drafts] or _default_names(len(tensors))
        if len(names) != len(tensors):
            raise ArchiveError(f"the model gave {len(tensors)} outputs, the signature names {len(names)}")
        given = dict(zip(names, tensors, strict=True))
    specs = []
    for draft in drafts or [OutputDraft(str(name)) for name in given]:
        tensor = given.get(draft.name)
        if draft.name not in given:
            raise ArchiveError(f"the model gave outputs {sorted(map(str, given))}, wanted {draft.name}")
        if not isinstance(tensor, torch.Tensor):
            raise ArchiveError(f"output {draft.name} is {type(tensor).__name__}, wanted a tensor")
        if tensor.shape[:1] != (records,):
            raise ArchiveError(
                f"output {draft.name} has shape {list(tensor.shape)} for {records} records, wanted the records first"
            )
        dtype = np.dtype("float32") if draft.softmax else _numpy_dtype(draft.name, tensor)
        shape = tuple(tensor.shape[1:]) if draft.shape is None else draft.shape
        specs.append(OutputSpec(draft.name, draft.dtype or dtype, shape, draft.softmax))
    return tuple(specs)


def _default_names(count: int) -> list[str]:
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def _numpy_dtype(name: str, tensor: torch.Tensor) -> np.dtype[Any]:
    """What a tensor's elements are for clients; raises `ArchiveError` for those that the protocol can't carry."""
    if tensor.dtype == torch.bfloat16:  # numpy has none
        return np.dtype("float32")
    try:
        found: np.dtype[Any] = tensor[:0].numpy().dtype
        datatype_of(found)
    except OipError as error:
        raise ArchiveError(f"output {name}: {error}") from error
    except (TypeError, RuntimeError) as error:  # sparse, quantised or float8
        raise ArchiveError(f"output {name} is {tensor.dtype}, which numpy can't hold: {said(error)}") from error
    return found


def _entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


def _manifest(description: ModelDescription) -> bytes:
    manifest = {
        "createdOn": _CREATED,
        "runtime": "python",
        "model": {
            "modelName": description.name,
            "modelVersion": description.version,
            "handler": _ENTRY_FILE,
            "configFile": _CONFIG_FILE,
        },
        "archiverVersion": "0.12.0",
    }
    return json.dumps(manifest, indent=2).encode()


def _write(request: PackRequest, description: ModelDescription, directory: Path) -> Path:
    output = request.output
    members: dict[str, bytes | Path] = {
        "MAR-INF/MANIFEST.json": _manifest(description),
        _ENTRY_FILE: _ENTRY,
        _CONFIG_FILE: request.model_config,
        DESCRIPTION_FILE: directory / DESCRIPTION_FILE,
        **{name: directory / name for name in description.files},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{output.name}.", dir=output.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as mar:
                for name, source in members.items():
                    _add(mar, name, source)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return output


def _add(mar: zipfile.ZipFile, name: str, source: bytes | Path) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o644 << 16
    # Known beforehand, so that zip64 is used only where it must be: Java reads these as a stream.
    info.file_size = len(source) if isinstance(source, bytes) else source.stat().st_size
    with mar.open(info, "w") as member:
        if isinstance(source, bytes):
            shutil.copyfileobj(io.BytesIO(source), member)
        else:
            with source.open("rb") as file:
                shutil.copyfileobj(file, member, 1 << 20)
