"""Any supported model file → `.mar`, TorchServe's archive, and its description back out of one.

Rule: an archive is written only after a model opened from the very files that go into it has reproduced its
golden records; equal input gives an equal archive, byte for byte, but where it is compiled; and it appears under its
name whole.

    ArchiveError (ValueError)    what was given can't be packed, or is no archive of ours; one line
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from batch_handler.draft import OutputDraft
from batch_handler.golden import golden_outputs, golden_records
from batch_handler.model import (
    DESCRIPTION_FILE,
    MAX_DESCRIPTION_BYTES,
    Model,
    ModelLoadError,
    Tuning,
    parse_description,
    write_golden,
)
from batch_handler.modelfile import ModelFileError, detect_kind, graph_inputs, open_plainly
from batch_handler.oip import Array
from batch_handler.runtimes.aot import compile_package
from batch_handler.runtimes.device import DeviceError
from batch_handler.runtimes.foreign import classify, said
from batch_handler.runtimes.onnx_export import export_graph
from batch_handler.runtimes.transform import ModelError, OutputsInOrder
from batch_handler.signature import (
    FileEntry,
    Golden,
    InputSpec,
    ModelDescription,
    OutputSpec,
    SignatureError,
    Weights,
    check_name,
    runtimes_for,
)

__all__ = ["DEFAULT_MICRO_BATCH", "ArchiveError", "PackRequest", "pack", "read_description"]

DEFAULT_MICRO_BATCH = 128

_WEIGHTS_FILES = {
    "state_dict": "weights.pt",
    "pickle": "weights.pt",
    "safetensors": "weights.safetensors",
    "torchscript": "model.ts",
    "exported": "model.pt2",
    "compiled": "model.pt2",
    "onnx": "model.onnx",
}
# Kinds that are more than weights, as an error calls them.
_MORE_THAN_WEIGHTS = {
    "pickle": "a pickle of whole objects",
    "torchscript": "TorchScript",
    "exported": "an exported program",
    "compiled": "a compiled package",
    "onnx": "an ONNX graph",
}
# Runtimes that have a module made into another kind of weights.
_MADE_OF_MODULES = {"aot": "compiled", "onnx": "onnx"}
_GOLDEN_FILE = "golden.npz"
_TOLERANCE = 1e-5
_CONFIG_FILE = "model-config.yaml"
_ENTRY_FILE = "entry.py"
_ENTRY = b'''"""TorchServe's way in; the code is the batch_handler package of the server's environment."""

from batch_handler.service import handle

__all__ = ["handle"]
'''
# What errors call the code of a file, or the module that it becomes; see `_stage_arch`.
_ARCH_COPY = re.compile(r"\barch_[0-9a-f]{8}\b(\.py:\w+)?")
# What an exported program says that takes no more records.
_GUARD = re.compile(r"Guard failed: \w+\.size\(\)\[0\] <= (\d+)")
_WEIGHTS_COPY = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in sorted(set(_WEIGHTS_FILES.values()))))
# What zip can say at the earliest: archives of equal content are equal files.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_CREATED = "01/01/1980 00:00:00"


class ArchiveError(ValueError):
    """What was given can't be packed, or is no archive of ours."""


@dataclass(frozen=True)
class PackRequest:
    """What to pack.

    `arch` is `module:callable` or `FILE.py:callable`, called without arguments to build the module of a
    state_dict or safetensors file. `inputs` empty takes what an ONNX graph says, `outputs` empty what the model
    gives. `golden` is a .npy (one input) or .npz file, or arrays by input name; by default a few random records.
    `runtime` None is the first of `runtimes_for`; "aot" compiles the module that the file holds, "onnx" exports it.
    `micro_batch` None is the number of records that a graph is fixed to, else `DEFAULT_MICRO_BATCH`.
    `tolerance` is how far a worker may be from the golden outputs, as a part of the largest number that they have at
    the same place; None is 1e-5.
    `model_config` is the text of TorchServe's `model-config.yaml`. `scratch` is the folder for what is made on the way,
    None the system's own.
    """

    model: Path
    output: Path
    name: str
    inputs: tuple[InputSpec, ...]
    model_config: bytes
    version: str = "1.0"
    outputs: tuple[OutputDraft, ...] = ()
    arch: str | None = None
    runtime: str | None = None
    trust_pickle: bool = False
    micro_batch: int | None = None
    golden: Path | Mapping[str, Array] | None = None
    tolerance: float | None = None
    scratch: Path | None = None


def pack(request: PackRequest) -> Path:
    """Write the archive of `request` and return its path; raises `ArchiveError`."""
    try:
        check_name(request.name, request.version)
        with _without_working_folder(), tempfile.TemporaryDirectory(
                prefix="batch-pack-", dir=request.scratch) as temporary:
            directory = Path(temporary)
            description = _stage(request, directory)
            text = json.dumps(description.to_json(), indent=1, ensure_ascii=False).encode()
            (directory / DESCRIPTION_FILE).write_bytes(text)
            Model.open(directory, Tuning(threads=torch.get_num_threads()))
            return _write(request, description, directory)
    except ModelFileError as error:
        raise ArchiveError(str(error)) from error
    except (SignatureError, ModelError, DeviceError, ModelLoadError) as error:
        shown, cause = str(error), error.__cause__
        known = SignatureError | ModelError | DeviceError | MemoryError
        if isinstance(error, ModelLoadError) and isinstance(cause, known):
            shown = str(classify(cause))  # without the folder that it was loaded from, which nobody knows
        bound = _GUARD.search(shown)
        hint = f": say --micro-batch {bound[1]}, or less" if bound else ""
        raise ArchiveError(f"{request.model.name}: {_as_given(shown, request)}{hint}") from error
    except MemoryError as error:
        raise ArchiveError(f"{request.model.name}: {classify(error)}") from error
    except OSError as error:
        raise ArchiveError(f"{error.filename or request.model}: {error.strerror or error}") from error


def read_description(archive: Path) -> ModelDescription:
    """The description in an archive, read within a size bound; nothing is unpacked and nothing is run."""
    try:
        with zipfile.ZipFile(archive) as mar, mar.open(DESCRIPTION_FILE) as member:
            text = member.read(MAX_DESCRIPTION_BYTES + 1)
        return parse_description(text)
    except KeyError as error:
        raise ArchiveError(f"{archive} has no {DESCRIPTION_FILE}, wanted a .mar that pack wrote") from error
    except (SignatureError, zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise ArchiveError(f"{archive}: {error}") from error
    except OSError as error:
        raise ArchiveError(f"{archive} can't be read: {error.strerror or error}") from error
    except MemoryError:
        raise
    except Exception as error:  # each way to compress has errors of its own
        raise ArchiveError(f"{archive} is damaged, wanted it as pack wrote it: {said(error)}") from error


@contextmanager
def _without_working_folder() -> Iterator[None]:
    """Import as a worker does, which is started elsewhere: what only the working folder has is missing here too.

    `python -m` and `python -c` put that folder first. Where it is on the path for another reason, such as PYTHONPATH,
    it stays, and so does the folder of a script. For the whole process, which packs one model at a time.
    """
    whole = list(sys.path)
    first = 1 if whole and not sys.flags.safe_path and _is_working_folder(whole[0]) else 0
    sys.path[:] = [place for place in whole[first:] if place]
    try:
        yield
    finally:
        sys.path[:] = whole


def _is_working_folder(place: str) -> bool:
    try:
        return place == str(Path.cwd())
    except OSError:  # it is gone
        return False


def _require_same_order(spec: InputSpec) -> None:
    """Raise `ArchiveError` for a model_shape with the axes of the record in another order: a photograph with its
    channels last, reshaped to one with them first, is noise that every model takes.
    """
    there, wanted = ([size for size in shape if size > 1] for shape in (spec.shape, spec.model_shape))
    if there != wanted and sorted(there) == sorted(wanted):
        raise ArchiveError(
            f"model_shape of input {spec.name} is {list(spec.model_shape)}, that of its records {list(spec.shape)}: "
            "axes in another order, and records are reshaped, not transposed; transpose in the model (such as "
            "x.permute(0, 3, 1, 2)), or write the array in the model's order"
        )


def _stage(request: PackRequest, directory: Path) -> ModelDescription:
    """Put the archive's files into `directory` and describe them."""
    kind = detect_kind(request.model, trust_pickle=request.trust_pickle)
    if kind not in _MORE_THAN_WEIGHTS and request.arch is None:
        raise ArchiveError(f"{request.model.name} holds weights only, wanted --arch FILE.py:callable")
    if kind in _MORE_THAN_WEIGHTS and request.arch is not None:
        instead = ", or save its state_dict" if kind == "pickle" else ""
        raise ArchiveError(f"{request.model.name} is {_MORE_THAN_WEIGHTS[kind]}, which --arch says nothing of: leave "
                           f"--arch or its setting out{instead}")
    arch, arch_file = _stage_arch(request.arch, directory)
    weights = Weights(_WEIGHTS_FILES[kind], kind, arch)
    shutil.copyfile(request.model, directory / weights.file)
    inputs = graph_inputs(kind, directory / weights.file, request.inputs)
    for spec in inputs:
        _require_same_order(spec)
    taken, given = [spec.name for spec in inputs], [draft.name for draft in request.outputs]
    chosen = request.micro_batch
    model, module = open_plainly(weights, directory, taken, given, chosen or DEFAULT_MICRO_BATCH)
    micro_batch = chosen if chosen is not None else model.fixed or DEFAULT_MICRO_BATCH
    records = golden_records(request.golden, inputs)
    outputs, specs = golden_outputs(model, records, inputs, request.outputs)
    write_golden(directory / _GOLDEN_FILE, inputs, records, specs, outputs)
    if module is not None and request.runtime in _MADE_OF_MODULES:
        weights, arch_file = _make(request.runtime, module, inputs, specs, micro_batch, directory), None
    files = [weights.file, _GOLDEN_FILE, *([arch_file] if arch_file else [])]
    return ModelDescription(
        name=request.name,
        version=request.version,
        runtime=request.runtime or runtimes_for(weights.kind)[0],
        weights=weights,
        inputs=inputs,
        outputs=specs,
        golden=Golden(_GOLDEN_FILE, len(records[0]),
                      _TOLERANCE if request.tolerance is None else request.tolerance),
        micro_batch=micro_batch,
        files={name: _entry(directory / name) for name in files},
    )


def _make(
    runtime: str,
    module: torch.nn.Module,
    inputs: Sequence[InputSpec],
    outputs: Sequence[OutputSpec],
    micro_batch: int,
    directory: Path,
) -> Weights:
    """What takes the place of a module's weights: they are inside it, and its code is not needed any more."""
    kind = _MADE_OF_MODULES[runtime]
    weights = Weights(_WEIGHTS_FILES[kind], kind)
    if kind == "onnx":
        export_graph(module, inputs, outputs, micro_batch, directory / weights.file)
    else:
        compile_package(OutputsInOrder(module, outputs), inputs, micro_batch, directory / weights.file)
    return weights


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


def _as_given(text: str, request: PackRequest) -> str:
    """An error, with the model's file and the code that builds it named as they were given and not as their copies."""
    given = request.arch or ""
    module = Path(given.rpartition(":")[0]).stem
    text = _ARCH_COPY.sub(lambda found: given if found[1] else module, text)
    return _WEIGHTS_COPY.sub(lambda _: request.model.name, text)


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
    # Under a name that nobody can lay a link at beforehand; what others may do with it, the umask says.
    new = output.parent / f".{secrets.token_hex(8)}.part"
    descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as mar:
                for name, source in members.items():
                    _add(mar, name, source)
            file.flush()
            os.fsync(file.fileno())
        new.replace(output)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return output


def _add(mar: zipfile.ZipFile, name: str, source: bytes | Path) -> None:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.external_attr = 0o644 << 16
    # Known beforehand, so that zip64 is used only where it must be: Java reads these as a stream.
    info.file_size = len(source) if isinstance(source, bytes) else source.stat().st_size
    with mar.open(info, "w") as member:
        if isinstance(source, bytes):
            member.write(source)
        else:
            with source.open("rb") as file:
                shutil.copyfileobj(file, member, 1 << 20)
