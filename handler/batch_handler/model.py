"""A model's directory → checked files, a loaded runtime, and a proof that it computes what it should.

Rule: a worker is ready only when every file has the size and SHA-256 that `model.json` says and the golden
records come out as they did when the archive was packed.

    ModelLoadError (RuntimeError)    the worker must not become ready; the message is one line
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batch_handler.oip import Array, ModelMetadata
from batch_handler.runtimes import Runtime, open_runtime
from batch_handler.runtimes.device import Device, DeviceError, open_device
from batch_handler.runtimes.foreign import classify, said
from batch_handler.runtimes.transform import ModelError
from batch_handler.scoring import Failure, Query, Score, Scorer
from batch_handler.signature import (
    FileEntry,
    InputSpec,
    ModelDescription,
    OutputSpec,
    SignatureError,
    canonical_json,
    check_micro_batch,
)

__all__ = [
    "DESCRIPTION_FILE",
    "MAX_DESCRIPTION_BYTES",
    "Model",
    "ModelLoadError",
    "Tuning",
    "check_files",
    "fingerprint_of",
    "parse_description",
    "read_description",
    "read_golden",
    "write_golden",
]

DESCRIPTION_FILE = "model.json"
MAX_DESCRIPTION_BYTES = 1 << 20
_FINGERPRINT_DIGITS = 16
_TIMED_RUNS = 8
_TIMED_SECONDS = 0.25

# How far lower precision may be from the golden outputs, which were made in float32: the unit roundoff of the
# format (8, 11 and 11 bits of significand) times a handful of layers.
_PRECISION_TOLERANCE = {"float32": 0.0, "tf32": 5e-3, "bfloat16": 5e-2, "float16": 5e-3}
# Of the same records at the same places, beside other ones.
_ROWS_TOLERANCE = {"float32": 1e-5, "tf32": 1e-5, "bfloat16": 1e-2, "float16": 1e-2}
_ROWS_SECONDS = 30.0  # a slower model is not scored three times more: a worker has 300 s to load

# KServe's name where it has one: https://github.com/kserve/open-inference-protocol
_PLATFORMS = {"onnx": "onnxruntime_onnx"}

_LARGER = "or with a larger tolerance under [model] in a --signature file"

_log = logging.getLogger(__name__)


class ModelLoadError(RuntimeError):
    """The model can't be served."""


@dataclass(frozen=True)
class Tuning:
    """How a worker runs a model; `micro_batch` and `runtime` None take the archive's.

    `ceiling` is what was measured for the whole server, records/s: it decides nothing and is told to clients.
    """

    threads: int = 1
    micro_batch: int | None = None
    precision: str = "float32"
    gpu_id: int | None = None
    runtime: str | None = None
    ceiling: float | None = None


class Model:
    """A description and a scorer that reproduced its golden outputs."""

    def __init__(
        self,
        description: ModelDescription,
        scorer: Scorer,
        micro_batch: int,
        numerics: Mapping[str, Any],
        ceiling: float | None = None,
    ) -> None:
        self.description = description
        self.digest = description.digest
        self.micro_batch = micro_batch
        self.numerics = numerics
        self.fingerprint = fingerprint_of(numerics)
        self.golden_difference = 0.0
        self.ceiling = ceiling
        self._scorer = scorer

    @classmethod
    def open(cls, directory: Path, tuning: Tuning | None = None, *, device: Device | None = None) -> Model:
        """Check, load, warm up and self-test the model in `directory`; raises `ModelLoadError`."""
        tuning = tuning or Tuning()
        try:
            description = read_description(directory)
            check_files(directory, description.files)
            if device is None:
                device = open_device(tuning.gpu_id, threads=tuning.threads, precision=tuning.precision)
            runtime = open_runtime(
                description, directory, device, precision=tuning.precision, runtime=tuning.runtime
            )
            device.restore()  # code that came with the model has run
            return cls._ready(description, directory, runtime, tuning)
        except ModelLoadError:
            raise
        except (SignatureError, ModelError, DeviceError) as error:
            raise ModelLoadError(f"model in {directory}: {error}") from error
        except MemoryError as error:
            raise ModelLoadError(f"model in {directory}: {classify(error)}") from error
        except RuntimeError as error:  # what an engine says of a device that is full or lost as it is opened
            raise ModelLoadError(f"model in {directory}: {said(classify(error))}") from error

    @classmethod
    def _ready(cls, description: ModelDescription, directory: Path, runtime: Runtime, tuning: Tuning) -> Model:
        micro_batch = tuning.micro_batch or description.micro_batch
        check_micro_batch(micro_batch)
        scorer = Scorer(runtime, description.outputs, micro_batch)
        # How many workers there are is not in it: that changes no bit.
        numerics = {**runtime.numerics, "micro_batch": micro_batch}
        model = cls(description, scorer, micro_batch, numerics, tuning.ceiling)
        model.check_golden(directory, tuning.precision)
        _log.info(
            "scores in %s with %s differ from the golden ones by at most %.3g",
            *(tuning.precision, numerics.get("runtime"), model.golden_difference),
        )
        return model

    @property
    def micro_batches(self) -> int:
        """How many micro-batches were computed so far."""
        return self._scorer.micro_batches

    @property
    def micro_batch_ms(self) -> float:
        """What the quickest full micro-batch took, in milliseconds; infinite if there was none."""
        return round(self._scorer.micro_batch_seconds * 1e3, 3)

    def score(self, queries: Sequence[Query]) -> list[Score | Failure]:
        """Score the queries of a server batch."""
        return self._scorer.score(queries)

    def score_bulk(self, inputs: Sequence[Array], first_row: int = 0) -> tuple[Array, ...]:
        """Score records in their places, one array an input, (n, *shape) each; raises `ModelError`."""
        (answer,) = self._scorer.score([Query(tuple(inputs), first_row)])
        if isinstance(answer, Failure):
            raise ModelError(answer.message)
        return answer.outputs

    def metadata(self) -> ModelMetadata:
        """What `GET /predictions/{name}` answers."""
        known = {} if self.ceiling is None else {"ceiling_records_per_s": self.ceiling}
        runtime = str(self.numerics.get("runtime"))
        return self.description.metadata(_PLATFORMS.get(runtime, f"pytorch_{runtime}"), {
            "fingerprint": self.fingerprint,
            "micro_batch": self.micro_batch,
            "micro_batch_ms": self.micro_batch_ms,
            "numerics": dict(self.numerics),
            "golden_difference": self.golden_difference,
            **known,
        })

    def check_golden(self, directory: Path, precision: str) -> None:
        """Raise `ModelLoadError` unless the golden records give the golden outputs, whatever is beside them, and can be
        asked as a query; keeps how far they are apart.
        """
        tolerance = max(self.description.golden.tolerance, _PRECISION_TOLERANCE[precision])
        inputs, outputs = read_golden(directory / self.description.golden.file, self.description)
        began = time.perf_counter()
        scored = self._timed(inputs)
        quick = time.perf_counter() - began < _ROWS_SECONDS
        for spec, found, wanted in zip(self.description.outputs, scored, outputs, strict=True):
            worst = _difference(found, wanted, _largest(wanted))
            if not worst <= tolerance:
                if quick:  # a better reason, if there is one
                    self._check_chance(inputs, scored)
                    self._check_rows(inputs, scored, precision)
                raise ModelLoadError(
                    f"golden records of {self.description.name} {self.description.version}: "
                    f"output {spec.name} differs by {worst:.3g}, wanted at most {tolerance:.3g} of the largest number "
                    f"that they have there: pack again with another runtime, {_LARGER} where float32 is no more exact"
                )
            self.golden_difference = max(self.golden_difference, worst)
        if quick:
            self._check_rows(inputs, scored, precision)
            self._check_query(inputs)

    def _check_chance(self, inputs: Sequence[Array], scored: Sequence[Array]) -> None:
        """Raise `ModelLoadError` if the same records at the same places give other outputs each time."""
        tolerance = _ROWS_TOLERANCE["float16"]  # what is left to chance is not in the last bits
        for spec, found, wanted in zip(self.description.outputs, self.score_bulk(inputs), scored, strict=True):
            worst = _difference(found, wanted)
            if not worst <= tolerance:
                raise ModelLoadError(
                    f"the model leaves something to chance: output {spec.name} of the same golden records differs by "
                    f"{worst:.3g} from one time to the next, wanted at most {tolerance:.3g}: a model in eval mode, "
                    "without dropout"
                )

    def _check_rows(self, inputs: Sequence[Array], scored: Sequence[Array], precision: str) -> None:
        """Raise `ModelLoadError` if a record's outputs depend on the records beside it, or on its place.

        The golden records were scored together, and beside zeros where there is room. Here each half of them is scored
        at the same places and fills all others, over and over. A largest number that all records share is mostly in one
        half, and moves the other; one that each half has, and that of a single golden record, moves nothing. Records
        are taken as they are, since a number that none of them holds may be no index of a table. Places and shapes are
        the same, so the bits should be; the tolerance leaves a GPU the order of its sums. At other places kernels may
        differ in last bits, as from the golden outputs; and nobody can say how far is too far for a class.
        """
        if self.micro_batch == 1:
            return
        beside = _ROWS_TOLERANCE[precision]
        anywhere = max(beside, self.description.golden.tolerance, _PRECISION_TOLERANCE[precision])
        together = min(self.description.golden.records, self.micro_batch)
        found: list[tuple[Array, Sequence[Array]]] = []  # golden records by place, and what they gave there
        for half in np.array_split(np.arange(together), min(2, together)):
            rows = np.resize(half, self.micro_batch)
            rows[half] = half
            found.append((rows, self.score_bulk([array[rows] for array in inputs])))
            for spec, outputs, wanted in zip(self.description.outputs, found[-1][1], scored, strict=True):
                worst = _difference(outputs[half], wanted[half])
                if not worst <= beside:
                    raise ModelLoadError(
                        f"the model's rows influence each other: output {spec.name} of the same golden records differs "
                        f"by {worst:.3g} beside other ones, wanted at most {beside:.3g}: a model that scores each "
                        "record by itself"
                    )
        for rows, given in found:
            for spec, outputs, wanted in zip(self.description.outputs, given, scored, strict=True):
                worst = _difference(outputs, wanted[rows], _largest(wanted))
                if outputs.dtype.kind == "f" and not worst <= anywhere:
                    raise ModelLoadError(
                        f"the model's scores depend on a record's place in the micro-batch: output {spec.name} of the "
                        f"same golden records differs by {worst:.3g} at other places, wanted at most {anywhere:.3g} of "
                        "the largest number that they have there: pack a model that takes its records along axis 0 "
                        f"and nothing else there, {_LARGER}"
                    )

    def _check_query(self, inputs: Sequence[Array]) -> None:
        """Raise `ModelLoadError` if a query of golden records fails that has fewer rows than any bulk request, or one
        of a single record, whose axis some modules drop.

        The model took as many at once when it was packed, but what was traced with a micro-batch may be bound to it.
        Numbers are not compared again: kernels for fewer rows may differ in last bits, and of an output in bfloat16, or
        of a class, nobody can say how far is too far. Rows of the wrong number fail.
        """
        records = self.description.golden.records
        if records >= self.micro_batch:
            return
        # Rows are filled up to a power of two: of more records than this there would be a whole micro-batch of them.
        most = min(records, 1 << ((self.micro_batch - 1).bit_length() - 1))
        bound = "runtime eager, or a module that takes any number: a trace keeps len(x), and not x.shape[0]"
        alone = ("a module that takes any number: x.squeeze() drops the axis of a single record, x.squeeze(-1) does "
                 "not")
        single = {1: alone} if records < self.description.micro_batch else {}  # what was packed for bulk runs alone
        for asked, wanted in ({most: bound} | single).items():
            (answer,) = self._scorer.score([Query(tuple(array[:asked] for array in inputs))])
            if isinstance(answer, Failure):
                raise ModelLoadError(
                    f"the model takes {self.micro_batch} records at a time and fails on a query of {asked}, wanted "
                    f"{wanted}: {answer.message}"
                )

    def _timed(self, inputs: Sequence[Array]) -> tuple[Array, ...]:
        """Score records, a few times where that is quick: clients choose the size of their requests by what a
        micro-batch takes, and other workers may be loading beside this one.
        """
        began = time.perf_counter()
        for _ in range(_TIMED_RUNS):
            scored = self.score_bulk(inputs)
            if time.perf_counter() - began > _TIMED_SECONDS:
                break
        return scored


def read_description(directory: Path) -> ModelDescription:
    """The `model.json` of a directory, read within a size bound."""
    path = directory / DESCRIPTION_FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_DESCRIPTION_BYTES + 1)
    except OSError as error:
        raise ModelLoadError(f"{path} can't be read: {error.strerror}") from error
    return parse_description(text)


def parse_description(text: bytes) -> ModelDescription:
    """`model.json` from its bytes; raises `SignatureError`."""
    if len(text) > MAX_DESCRIPTION_BYTES:
        raise SignatureError(f"{DESCRIPTION_FILE} is over {MAX_DESCRIPTION_BYTES} bytes")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SignatureError(f"{DESCRIPTION_FILE} is not JSON: {error}") from error
    return ModelDescription.from_json(value)


def check_files(directory: Path, files: Mapping[str, FileEntry]) -> None:
    """Compare each file's size, then its SHA-256; raises `ModelLoadError` for the first that differs."""
    for name, entry in files.items():
        path = directory / name
        try:
            found = path.stat().st_size
            if found != entry.nbytes:
                raise ModelLoadError(f"{path} has {found} bytes, wanted {entry.nbytes}")
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ModelLoadError(f"{path} can't be read: {error.strerror}") from error
        if digest != entry.sha256:
            raise ModelLoadError(f"{path} has SHA-256 {digest}, wanted {entry.sha256}")


def read_golden(path: Path, description: ModelDescription) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """The golden records and their outputs, checked against the signature."""
    wanted = description.golden.records
    try:
        with np.load(path, allow_pickle=False) as golden:
            inputs = tuple(golden[f"input.{spec.name}"] for spec in description.inputs)
            outputs = tuple(golden[f"output.{spec.name}"] for spec in description.outputs)
    except MemoryError:
        raise
    except Exception as error:  # any damage: each way to compress has errors of its own
        raise ModelLoadError(f"{path} can't be read: {str(error) or type(error).__name__}") from error
    specs = [spec.tensor() for spec in description.inputs]
    specs += [spec.tensor() for spec in description.outputs]
    for spec, array in zip(specs, (*inputs, *outputs), strict=True):
        if array.shape != (wanted, *spec.shape) or array.dtype != spec.dtype:
            raise ModelLoadError(
                f"{path.name} holds {spec.name} as {array.dtype} {list(array.shape)}, "
                f"wanted {spec.dtype} {[wanted, *spec.shape]}"
            )
    return inputs, outputs


def write_golden(
    path: Path,
    inputs: Sequence[InputSpec],
    records: Sequence[Array],
    outputs: Sequence[OutputSpec],
    given: Sequence[Array],
) -> None:
    """Write golden records and what the model gave for them, one array an input and one an output."""
    arrays = {f"input.{spec.name}": array for spec, array in zip(inputs, records, strict=True)}
    arrays |= {f"output.{spec.name}": array for spec, array in zip(outputs, given, strict=True)}
    np.savez(path, **arrays)  # type: ignore[arg-type] # its stub fears an array named allow_pickle


def fingerprint_of(numerics: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of SHA-256 over the canonical JSON."""
    return hashlib.sha256(canonical_json(dict(numerics))).hexdigest()[:_FINGERPRINT_DIGITS]


def _difference(found: Array, wanted: Array, largest: Array | None = None) -> float:
    """The largest difference, relative where the wanted number, or the `largest` at its place, is over 1; equal
    infinities and NaNs are 0.
    """
    a, b = found.astype(np.float64), wanted.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        scaled = np.abs(a - b) / np.maximum(1.0, np.abs(b) if largest is None else largest)
    scaled = np.where(same, 0.0, np.where(np.isnan(scaled), np.inf, scaled))
    return float(scaled.max(initial=0.0))


def _largest(outputs: Array) -> Array | None:
    """For each place of an output the largest finite number that records have there, None for one that is no float:
    sums of float32 are that exact, and not as exact as one of their results happens to be small.
    """
    if outputs.dtype.kind != "f":
        return None
    sizes = np.abs(outputs.astype(np.float64))
    largest: Array = np.where(np.isfinite(sizes), sizes, 0.0).max(axis=0)
    return largest
