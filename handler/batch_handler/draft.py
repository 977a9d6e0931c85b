"""What people say of a model before it is packed, in a signature file or by flags.

Rule: what is left out stays None, and is found by running the model.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batch_handler.fields import as_object, count, dtype_of, flag, list_of, part, shape_of, text
from batch_handler.signature import InputSpec, SignatureError, check_micro_batch

__all__ = ["OutputDraft", "SignatureDraft", "input_from_json", "parse_signature"]


@dataclass(frozen=True)
class OutputDraft:
    """An output whose dtype and shape, where None, are found by running the model."""

    name: str
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] | None = None
    softmax: bool = False

    @classmethod
    def from_json(cls, value: Any) -> OutputDraft:
        """Read an output of a signature file."""
        fields = as_object(value, "an output", ("name", "dtype", "shape", "softmax"))
        name = text(fields, "name", "an output")
        where = f"output {name}"
        return cls(
            name,
            None if fields.get("dtype") is None else dtype_of(fields["dtype"], where),
            None if fields.get("shape") is None else shape_of(fields["shape"], "shape", where),
            flag(fields, "softmax", where, default=False),
        )


@dataclass(frozen=True)
class SignatureDraft:
    """What a signature file says; everything that it leaves out is None."""

    name: str | None
    version: str | None
    micro_batch: int | None
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputDraft, ...]
    tolerance: float | None = None


def input_from_json(value: Any) -> InputSpec:
    """Read an input of a signature file, or what flags say in its place.

    Where nobody asks for floats, integers that float32 would round stay as they travel. The archive says so: without
    `cast` in it, it casts.
    """
    spec = InputSpec.from_json(value)
    rounded = spec.dtype.kind in "iu" and not np.can_cast(spec.dtype, np.float32, "safe")
    return replace(spec, cast=False) if rounded and not spec.scaled and "cast" not in value else spec


def parse_signature(toml: str) -> SignatureDraft:
    """Read a signature file (TOML: `[model]`, `[[inputs]]`, `[[outputs]]`)."""
    try:
        value = tomllib.loads(toml)
    except (ValueError, RecursionError) as error:  # beside TOML's own, an integer of over 4300 digits
        raise SignatureError(f"the signature is not TOML: {error}") from error
    fields = as_object(value, "the signature", ("model", "inputs", "outputs"))
    model = as_object(fields.get("model", {}), "[model]", ("name", "version", "micro_batch", "tolerance"))
    micro_batch = model.get("micro_batch")
    if micro_batch is not None:
        check_micro_batch(count(micro_batch, "micro_batch"))
    return SignatureDraft(
        name=None if model.get("name") is None else text(model, "name", "[model]"),
        version=None if model.get("version") is None else text(model, "version", "[model]"),
        micro_batch=micro_batch,
        inputs=tuple(input_from_json(item) for item in list_of(fields, "inputs", [])),
        outputs=tuple(OutputDraft.from_json(item) for item in list_of(fields, "outputs", [])),
        tolerance=None if model.get("tolerance") is None else part(model["tolerance"], "tolerance", "[model]"),
    )
