"""What `bench --save` measured for one model on one kind of machine, and the file that keeps it.

    digits.mar                           the archive
    digits.tuning/cpu-avx2-2cores.json   beside it, one for each kind of machine

Rule: a file that can't be taken as it is, because it is damaged or was measured for another model, is refused and never
passed over: a server that is slow without a word costs more than one that does not start. All that changes bits is in
the server's fingerprint.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Self

from batch_client.errors import ServingError, StorageError
from batch_client.files import replace_file, require_writable
from batch_client.jsontext import parse_json

__all__ = ["ALLOCATORS", "ALLOCATOR_VARIABLES", "CLEARLY", "DEFAULT_ALLOCATOR", "MAX_BYTES", "PRECISIONS", "RUNTIMES",
           "Tuning", "better_tuning", "is_tuning", "read_tuning", "require_place", "tuning_path",
           "tunings_beside", "write_tuning"]

FORMAT = 1
MAX_BYTES = 1 << 20
CLEARLY = 1.05  # times as many records/s: less than that may be the drift of the machine
HELD = str(1 << 30)  # bytes: glibc keeps tensors' memory instead of paging it in again for every batch
# What the C library's allocator is told, by name. https://man7.org/linux/man-pages/man3/mallopt.3.html
ALLOCATORS: Mapping[str, Mapping[str, str]] = {
    "glibc-held": {"MALLOC_MMAP_THRESHOLD_": HELD, "MALLOC_TRIM_THRESHOLD_": HELD, "MALLOC_ARENA_MAX": "1"},
    "glibc-thresholds": {"MALLOC_MMAP_THRESHOLD_": HELD, "MALLOC_TRIM_THRESHOLD_": HELD},
    "glibc-default": {},
}
DEFAULT_ALLOCATOR = "glibc-held"
# What the handler can run an archive's model with, and in what it can compute.
RUNTIMES = ("eager", "torchscript", "aot", "onnx")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
ALLOCATOR_VARIABLES = tuple(ALLOCATORS[DEFAULT_ALLOCATOR])

_DESCRIPTION = "model.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,127}")
_COUNTS = {"micro_batch": 65_536, "workers": 4096, "threads": 4096}
_KNOWN: Mapping[str, Sequence[str]] = {
    "runtime": RUNTIMES, "precision": PRECISIONS, "allocator": tuple(ALLOCATORS),
}


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The quickest way found to run one model on one kind of machine.

    device: that kind, as `machine.device` names it. model_digest: the archive's. runtime, micro_batch, precision: of
    each worker. workers, threads: of the server, and of each worker. allocator: one of ALLOCATORS. records_per_s: of
    all workers together with nothing around them, the ceiling of a run. measured_at: ISO 8601. versions: of the
    libraries that it was measured with. table: everything that was tried, for people.
    """

    device: str
    model_digest: str
    runtime: str
    micro_batch: int
    workers: int
    threads: int
    precision: str
    allocator: str
    records_per_s: float
    measured_at: str = ""
    versions: Mapping[str, str]
    table: Sequence[Mapping[str, Any]] = ()

    def environment(self) -> dict[str, str]:
        """What makes a worker run the model in this way."""
        threads = str(self.threads)
        return {**ALLOCATORS[self.allocator], "OMP_NUM_THREADS": threads, "BATCH_HANDLER_THREADS": threads,
                "BATCH_HANDLER_RUNTIME": self.runtime, "BATCH_HANDLER_MICRO_BATCH": str(self.micro_batch),
                "BATCH_HANDLER_PRECISION": self.precision}

    def to_json(self) -> str:
        """The text of a tuning file."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes, where: str) -> Self:
        """Read a tuning file's bytes. Raises ServingError that names `where` for anything else."""
        try:
            value = parse_json(text)
        except ValueError as error:
            raise _refused(where, f"is not JSON ({error})") from error
        if not isinstance(value, dict) or value.pop("format", None) != FORMAT:
            raise _refused(where, f"is not a tuning file of format {FORMAT}")
        names = {field.name for field in fields(cls)}
        if names != set(value):
            differing = ", ".join(sorted(names ^ set(value)))
            raise _refused(where, f"has other fields than a tuning file: {differing[:200]}")
        for name, good in _checks(value).items():
            if not good:
                wanted = f", wanted {' or '.join(_KNOWN[name])}" if name in _KNOWN else ""
                raise _refused(where, f"has {name} {str(value[name])[:100]!r}{wanted}")
        return cls(**value)


def tuning_path(archive: Path, device: str) -> Path:
    """Where the tuning file of an archive for a kind of machine is."""
    return archive.with_suffix(".tuning") / f"{device}.json"


def read_tuning(archive: Path, device: Callable[[], str]) -> Tuning | None:
    """The tuning file beside an archive for this kind of machine, if there is one; `device` is asked only if need be.

    Raises ServingError for a file that is damaged or was measured for another model or kind of machine, and for one in
    the folder's place.
    """
    folder = archive.with_suffix(".tuning")
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise ServingError(f"{folder} is no folder, wanted one of tuning files, as `batch-client bench ARCHIVE "
                               "--save` makes it: move it away")
        return None
    path = tuning_path(archive, device())
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ServingError(f"{path} can't be read ({error.strerror}): make it a file that this user can read, or move "
                           "it away") from error
    if len(text) > MAX_BYTES:
        raise _refused(str(path), f"is over {MAX_BYTES:,} bytes")
    tuning = Tuning.from_json(text, str(path))
    if tuning_path(archive, tuning.device) != path:
        raise _refused(str(path), f"was measured on another kind of machine than its name says, {tuning.device}")
    found = _digest_of(archive)
    if tuning.model_digest != found:
        raise _refused(str(path), f"was measured for the model {tuning.model_digest[:19]}…, {archive.name} has "
                                  f"{found[:19]}…")
    return tuning


def tunings_beside(archive: Path) -> Iterator[tuple[Path, Tuning]]:
    """The tuning files beside an archive, in the order of their names, but for those that can't be taken."""
    for path in sorted(archive.with_suffix(".tuning").glob("*.json")):
        with contextlib.suppress(ServingError):
            tuning = read_tuning(archive, partial(str, path.stem))
            if tuning is not None:
                yield path, tuning


def better_tuning(archive: Path, tuning: Tuning) -> Tuning | None:
    """The tuning file that `tuning` would replace, where that says clearly more records/s for the same model and kind
    of machine, in the same precision and with the same versions; None where there is none, or one that can't be taken.
    """
    try:
        there = read_tuning(archive, lambda: tuning.device)
    except ServingError:
        return None
    # Another precision is asked for by name, and whoever goes back to float32 wants its scores.
    if there is None or (there.precision, there.versions) != (tuning.precision, tuning.versions):
        return None
    return there if there.records_per_s >= CLEARLY * tuning.records_per_s else None


def is_tuning(text: bytes) -> bool:
    """Whether bytes are a tuning file at all, of whatever format, and not, say, a web server's page."""
    try:
        value = parse_json(text)
    except ValueError:
        return False
    return isinstance(value, dict) and "format" in value


def require_place(archive: Path, device: str) -> None:
    """Raises UsageError where `write_tuning` could not write: to be told before a measurement, not after it."""
    path = tuning_path(archive, device)
    require_writable(path, "--save", path.parent if path.parent.exists() else archive.parent)


def write_tuning(archive: Path, tuning: Tuning) -> Path:
    """Write the tuning file beside an archive, whole or not at all; an earlier one is replaced.

    Raises StorageError when that can't be done.
    """
    path = tuning_path(archive, tuning.device)
    try:
        path.parent.mkdir(exist_ok=True)
        replace_file(path, tuning.to_json())
    except OSError as error:
        raise StorageError(f"{path} can't be written: {error.strerror or error}") from error
    return path


def _refused(where: str, why: str) -> ServingError:
    return ServingError(f"{where} {why}: measure again with `batch-client bench ARCHIVE --save`, or delete the file")


def _checks(value: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each field is what it should be; names end up in the environment of a process."""
    versions, table, rate = value["versions"], value["table"], value["records_per_s"]
    return {
        "device": isinstance(value["device"], str) and _NAME.fullmatch(value["device"]) is not None,
        **{name: value[name] in known for name, known in _KNOWN.items()},
        **{name: type(value[name]) is int and 1 <= value[name] <= most for name, most in _COUNTS.items()},
        "model_digest": isinstance(value["model_digest"], str),
        "records_per_s": type(rate) in (int, float) and 0 < rate < math.inf,
        "measured_at": isinstance(value["measured_at"], str) and value["measured_at"].isprintable(),
        "versions": isinstance(versions, dict) and all(isinstance(version, str) for version in versions.values()),
        "table": isinstance(table, list) and all(isinstance(row, dict) for row in table),
    }


def _digest_of(archive: Path) -> str:
    """The digest that an archive says its model has; the handler checks it when it loads."""
    try:
        with zipfile.ZipFile(archive) as mar, mar.open(_DESCRIPTION) as member:
            return str(json.loads(member.read(MAX_BYTES))["digest"])
    except Exception as error:  # any damage: each way to compress has errors of its own
        raise ServingError(f"{archive} has no {_DESCRIPTION} with a digest ({str(error) or type(error).__name__}): "
                           "`batch-client pack` makes one") from error
