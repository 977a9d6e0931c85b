"""Golden records: a few records, and what the model gave for them in float32 when it was packed.

Rule: their outputs come from the model run as plainly as it can be, so that whatever is tuned later, or runs
in lower precision, is held to that and not to itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batch_handler.draft import OutputDraft
from batch_handler.oip import Array, OipError, datatype_of
from batch_handler.runtimes.foreign import raise_if_device, said
from batch_handler.runtimes.transform import ModelError, Preprocess, collect
from batch_handler.signature import InputSpec, OutputSpec, SignatureError

__all__ = ["golden_outputs", "golden_records"]

_SEED = 20240229
_RECORDS = 4
_MOST_SAID = 200  # characters of a model's own error


def golden_records(given: Path | Mapping[str, Array] | None, inputs: Sequence[InputSpec]) -> tuple[Array, ...]:
    """One array an input, (n, *shape) each: those of a .npy or .npz file, those given, or a few random ones.

    Raises `SignatureError` where they are not what the inputs say.
    """
    if given is None:
        return _random_records(inputs)
    if isinstance(given, Path):
        given = _read_arrays(given, inputs)
    arrays = []
    for spec in inputs:
        array = given.get(spec.name)
        if array is None:
            raise SignatureError(f"golden records have {sorted(given)}, wanted {spec.name}")
        if not array.ndim or array.dtype != spec.dtype or array.shape[1:] != spec.shape or not len(array):
            alone = ", a single record too: array[None]" if array.shape == spec.shape else ""
            raise SignatureError(
                f"golden records of {spec.name} are {array.dtype} {list(array.shape)}, "
                f"wanted {spec.dtype} {spec.tensor().shape_of_many}{alone}"
            )
        arrays.append(np.ascontiguousarray(array))
    if len({len(array) for array in arrays}) != 1:
        raise SignatureError("golden records of the inputs differ in number, wanted equally many")
    return tuple(arrays)


def _read_arrays(path: Path, inputs: Sequence[InputSpec]) -> dict[str, Array]:
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {inputs[0].name: loaded}
        with loaded:
            return {name.removeprefix("input."): loaded[name] for name in loaded.files}
    except (OSError, MemoryError):
        raise
    except Exception as error:  # any damage: each way to compress has errors of its own
        raise SignatureError(f"{path} is neither .npy nor .npz: {str(error) or type(error).__name__}") from error


def _random_records(inputs: Sequence[InputSpec]) -> tuple[Array, ...]:
    rng = np.random.default_rng(_SEED)
    arrays: list[Array] = []
    for spec in inputs:
        shape = (_RECORDS, *spec.shape)
        # Bytes are mostly pixels; other integers may be indices of short tables.
        top = 256 if spec.dtype == np.uint8 and spec.cast else 2
        try:
            array = rng.random(shape) if spec.dtype.kind == "f" else rng.integers(0, top, shape)
            arrays.append(array.astype(spec.dtype))
        except (ValueError, OverflowError, MemoryError) as error:
            raise SignatureError(
                f"{_RECORDS} records of {spec.name}, {spec.dtype} {list(spec.shape)}, can't be made: {said(error)}"
            ) from error
    return tuple(arrays)


def golden_outputs(
    forward: Callable[..., Any],
    records: Sequence[Array],
    inputs: Sequence[InputSpec],
    drafts: Sequence[OutputDraft],
) -> tuple[tuple[Array, ...], tuple[OutputSpec, ...]]:
    """What the model gives for records, and its outputs, where the drafts leave something open as it gave them.

    Raises `ModelError` where it raises, `SignatureError` where it gives something else than the drafts say.
    """
    cpu = torch.device("cpu")
    count = len(records[0])
    try:
        with torch.inference_mode():
            prepared = [  # of copies: a model may change its inputs in place
                Preprocess(spec, cpu)(torch.from_numpy(array.copy()))
                for spec, array in zip(inputs, records, strict=True)
            ]
            raw = forward(*prepared)
    except (Exception, SystemExit) as error:  # its own code, which may end the process
        raise_if_device(error)
        says = (str(error).splitlines() or [""])[-1][:_MOST_SAID]
        wanted = ", ".join(f"{spec.name} {list(spec.model_shape)}" for spec in inputs)
        raise ModelError(
            f"the model raised {type(error).__name__} on records of {wanted}: {says}{_hint(inputs, says)}"
        ) from error
    specs = _output_specs(raw, drafts, count)
    return tuple(tensor.numpy() for tensor in collect(raw, specs, count)), specs


def _hint(inputs: Sequence[InputSpec], says: str) -> str:
    """What to do where the model may have wanted records of another shape, or integers, such as indices of words, and
    was given floats, or floats and was given integers.
    """
    if "shape" in says or "size" in says:
        return "; model_shape (--model-shape, or in the --signature file) says in which shape it takes a record"
    cast = sorted({spec.dtype.name for spec in inputs if spec.cast and not spec.scaled
                   and spec.dtype.kind in "iuf" and spec.dtype != np.float32})
    if any(spec.dtype.name in ("int16", "uint16") and not spec.scaled for spec in inputs):  # of no use as they are
        return "; indices, such as of words, are packed as int64 (--input NAME:int64:SHAPE): runs send these so, too"
    if cast:
        return f"; records become float32; cast = false in a --signature file keeps {' and '.join(cast)}"
    kept = sorted({spec.dtype.name for spec in inputs if not spec.cast and spec.dtype.kind in "iu"})
    if not kept or "index" in says:  # of a table that is too short
        return ""
    return (f"; the model gets {' and '.join(kept)} as it travels: --scale 1, or cast = true in a --signature file, "
            "makes it float32")


def _output_specs(raw: Any, drafts: Sequence[OutputDraft], records: int) -> tuple[OutputSpec, ...]:
    """The declared outputs, with what they leave open taken from what the model gave."""
    if isinstance(raw, Mapping):
        given = dict(raw)
    else:
        tensors = [raw] if isinstance(raw, torch.Tensor) else raw
        if not isinstance(tensors, list | tuple):
            found = type(raw).__name__
            raise SignatureError(f"the model gave {found}, wanted a tensor, or a list or mapping of tensors")
        names = [draft.name for draft in drafts] or _default_names(len(tensors))
        if len(names) != len(tensors):
            raise SignatureError(
                f"the model gave {len(tensors)} outputs, the signature names {len(names)}, wanted [[outputs]] in a "
                "--signature file for each"
            )
        given = dict(zip(names, tensors, strict=True))
    specs = []
    for draft in drafts or [OutputDraft(str(name)) for name in given]:
        tensor = given.get(draft.name)
        if draft.name not in given:
            raise SignatureError(
                f"the model gave outputs {sorted(map(str, given))}, wanted {draft.name}: name one of them with "
                "--output-name, or several as [[outputs]] in a --signature file"
            )
        if not isinstance(tensor, torch.Tensor):
            raise SignatureError(f"output {draft.name} is {type(tensor).__name__}, wanted a tensor")
        if tensor.shape[:1] != (records,):
            raise SignatureError(
                f"output {draft.name} has shape {list(tensor.shape)} for {records} records, wanted the records first"
            )
        dtype = np.dtype("float32") if draft.softmax else _numpy_dtype(draft.name, tensor)
        shape = tuple(tensor.shape[1:]) if draft.shape is None else draft.shape
        specs.append(OutputSpec(draft.name, draft.dtype or dtype, shape, draft.softmax))
    return tuple(specs)


def _default_names(count: int) -> list[str]:
    return ["scores"] if count == 1 else [f"output_{index}" for index in range(count)]


def _numpy_dtype(name: str, tensor: torch.Tensor) -> np.dtype[Any]:
    """What a tensor's elements are for clients; raises `SignatureError` for those that the protocol can't carry."""
    if tensor.dtype == torch.bfloat16:  # numpy has none
        return np.dtype("float32")
    try:
        found: np.dtype[Any] = tensor[:0].numpy().dtype
        datatype_of(found)
    except OipError as error:
        raise SignatureError(f"output {name}: {error}") from error
    except (TypeError, RuntimeError) as error:  # sparse, quantised or float8
        raise SignatureError(f"output {name} is {tensor.dtype}, which numpy can't hold: {said(error)}") from error
    return found
