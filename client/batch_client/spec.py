"""What a run is: the request of a person (`RunSpec`) and the identity that an output keeps for ever (`RunIdentity`).

Both are frozen and validated when made, so that nothing later has to doubt them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from batch_client.errors import MismatchError, UsageError
from batch_client.figures import counted
from batch_client.jsontext import canonical_json, parse_json
from batch_client.kinds import Place, keep_kinds
from batch_client.urls import require_listed, split_url

__all__ = ["CODECS", "MIB", "Records", "RunIdentity", "RunSpec", "ServerSpec", "differences"]

MIB = 1 << 20
# A digest, of which the first six bytes tell people which one it is.
_DIGEST = re.compile(r"((?:\w+:)?[0-9a-f]{12})[0-9a-f]{20,}")
CODECS = ("none", "zstd")
_ANOTHER_RUN = "choose another OUTPUT, use the same settings to go on with it, or replace it with --overwrite"
MOST_DIGITS = 18  # of the number of a record


@dataclass(frozen=True)
class Records:
    """A half-open range of records, as a person types it (`A:B`, `A:`, `:B`); None is an open end."""

    start: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        keep_kinds(self)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `A:B`. Raises UsageError for anything else."""
        start, colon, stop = text.partition(":")
        if not colon or not all(end == "" or (end.isdecimal() and len(end) <= MOST_DIGITS) for end in (start, stop)):
            raise UsageError(f"--records {text[:100]!r}: wanted A:B, A: or :B with whole numbers, such as 0:1000")
        return cls(int(start) if start else None, int(stop) if stop else None)

    def resolve(self, count: int) -> tuple[int, int]:
        """The range's two ends in an array of `count` records. Raises UsageError if it is empty or outside."""
        start = 0 if self.start is None else self.start
        stop = count if self.stop is None else self.stop
        if not 0 <= start < stop <= count:
            raise UsageError(f"--records {start}:{stop}: wanted 0 <= A < B <= {count}, the source's record count")
        return start, stop


@dataclass(frozen=True, kw_only=True)
class ServerSpec:
    """What scores the records: servers that run already, or an archive to serve here.

    endpoints: base URLs of servers, such as `http://host:8080`; empty when `archive` is given.
    archive: path or URL of a `.mar` to serve here for the length of the command.
    model: the model's name at the endpoints; known from the archive otherwise.
    token_files: files with the bearer token of all endpoints, or of each in their order; read again when refused.
    token_command: command whose standard output is the token of all, run again when it is refused.
    workers, threads: of the embedded server; None is its default.
    anonymous: read and write storage without credentials.
    """

    endpoints: tuple[str, ...] = ()
    archive: Place | None = None
    model: str | None = None
    token_files: tuple[Place, ...] = ()
    token_command: str | None = None
    workers: int | None = None
    threads: int | None = None
    anonymous: bool = False

    def __post_init__(self) -> None:
        keep_kinds(self, Records)
        if bool(self.endpoints) == bool(self.archive):
            raise UsageError("name what scores the records: --endpoint URL (repeatable) or --archive MODEL.mar, "
                             f"{'not both' if self.archive else 'found neither'}")
        for endpoint in self.endpoints:
            if not re.fullmatch(r"https?://\S+", endpoint):
                raise UsageError(f"--endpoint {' '.join(endpoint.split())}: wanted a URL such as http://host:8080")
            if "@" in split_url(endpoint).netloc:
                raise UsageError("--endpoint has a user name or password in its URL, which would be shown in logs: "
                                 "give a token with --token-file or --token-command")
            if "?" in endpoint or "#" in endpoint:
                raise UsageError("--endpoint has a query or a fragment in its URL, which would be shown in logs and "
                                 "lead requests astray: wanted a URL such as http://host:8080")
        if len({endpoint.rstrip("/") for endpoint in self.endpoints}) < len(self.endpoints):
            raise UsageError(f"--endpoint {', '.join(self.endpoints)}: one of them is named twice")
        if self.endpoints and not self.model:
            raise UsageError("--endpoint also needs --model NAME, the name under which the server has the model")
        if self.token_files and self.token_command:
            raise UsageError("--token-file and --token-command: wanted one or the other")
        if len(self.token_files) not in (0, 1, len(self.endpoints)):
            servers = counted(len(self.endpoints), "server")
            raise UsageError(f"--token-file: found {len(self.token_files)} of them for {servers}, wanted one for all, "
                             "or one for each --endpoint in their order")
        self._at_least("workers", "threads")

    def _at_least(self, *names: str, least: int = 1) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not value >= least:  # NaN is not
                raise UsageError(f"--{name.replace('_', '-')} {value}: wanted at least {least}")


@dataclass(frozen=True, kw_only=True)
class RunSpec(ServerSpec):
    """What a person asks for: score `input`, write to `output`.

    input, output: URLs (`s3://bucket/path`, `file:///…`) or paths.
    array: name of the array when `input` is a group.
    records: the range to score; the default is all.
    chunk_records: records in an output chunk; None takes those of an output that is there or reused, else
        follows the rule in `plan.py`.
    request_records: records in a request, a multiple of the server's micro-batch; None follows the rule in `plan.py`.
    in_flight: the most requests at one endpoint at a time; how many there are `limiter.py` finds.
    max_bytes_in_flight: bytes of source records held at a time.
    codec: how output chunks are compressed, one of CODECS.
    patience: seconds without any answer after which the run stops, resumable.
    allow_missing: take the fill value for source chunks that are not there.
    exact: each record in its fixed place, so that the bytes are the same whatever happens; False gives that up.
    max_failed: records that may fail in an output that is published.
    require_finite: count a record with a prediction that is not finite as failed.
    part: (i, n) scores the i-th of n parts of the run; whoever completes the run publishes it.
    reuse: an earlier output whose chunks are copied where source, model and numerics are the same.
    overwrite: delete the output that is there first, unless it is an unfinished one of this very run, of the source as
        it is now.
    """

    input: Place
    output: Place
    array: str | None = None
    records: Records = Records()
    chunk_records: int | None = None
    request_records: int | None = None
    in_flight: int = 32
    max_bytes_in_flight: int = 64 * MIB
    codec: str = "none"
    patience: float = 600.0
    allow_missing: bool = False
    exact: bool = True
    max_failed: int = 0
    require_finite: bool = False
    part: tuple[int, int] | None = None
    reuse: Place | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, place in (("INPUT", self.input), ("OUTPUT", self.output), ("--reuse", self.reuse or "")):
            require_listed(place, name)
        if self.codec not in CODECS:
            raise UsageError(f"--codec {self.codec!r}: wanted one of {', '.join(CODECS)}")
        self._at_least("chunk_records", "request_records", "in_flight", "max_bytes_in_flight")
        self._at_least("patience", "max_failed", least=0)
        if self.part is not None and not 1 <= self.part[0] <= self.part[1]:
            raise UsageError(f"--part {self.part[0]}/{self.part[1]}: wanted I/N with 1 <= I <= N, such as 1/8")
        if self.overwrite and self.part is not None:
            raise UsageError("--overwrite and --part: each part would delete what the others have written")
        if self.reuse is not None and self.reuse.rstrip("/") == self.output.rstrip("/"):
            raise UsageError(f"--reuse and OUTPUT are both {self.reuse}: the output needs a place of its own")
        if self.reuse is not None and not self.exact:
            raise UsageError("--reuse and --fast: only chunks of exact runs can be told to be the same")
        if self.input.rstrip("/") == self.output.rstrip("/"):
            raise UsageError(f"INPUT and OUTPUT are both {self.input}: the output needs a place of its own")


@dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What an output is, for as long as it exists: two runs with equal identities write equal bytes.

    Stored as `_run/spec.json` by the first client, compared by every later one.
    """

    source: str
    source_array: str
    source_metadata: str
    source_shape: tuple[int, ...]
    source_dtype: str
    source_encoding: str
    start: int
    stop: int
    grid_records: int
    chunk_records: int
    micro_batch: int
    codec: str
    model: str
    model_digest: str
    fingerprint: str
    outputs: tuple[tuple[str, str, tuple[int, ...]], ...]
    exact: bool
    numerics: Mapping[str, object]
    format: int = 2

    def to_value(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self) -> bytes:
        return canonical_json(self.to_value())

    def require_same(self, stored: bytes, where: str, todo: str = _ANOTHER_RUN) -> None:
        """Raises MismatchError naming each field in which `stored` (a spec.json) differs from this run, and what there
        is `todo`.
        """
        try:
            other: Mapping[str, Any] = parse_json(stored)
            plain = parse_json(self.to_json())
            mine = {field.name: plain[field.name] for field in fields(self)}
            # What else a later version may keep there says nothing of this run.
            differing = list(differences(mine, {name: value for name, value in other.items() if name in mine}))
        except (ValueError, AttributeError) as error:
            raise MismatchError(f"{where} holds a _run/spec.json that can't be read ({error}): "
                                "it is not an output of batch-client; choose another OUTPUT") from error
        if differing:
            raise MismatchError(f"{where} belongs to another run: {'; '.join(differing)}; {todo}")


def differences(mine: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Each field of either in which they differ, and how, as an error says it."""
    for name in dict.fromkeys([*mine, *other]):
        now, there = mine.get(name), other.get(name)
        if isinstance(now, Mapping) and isinstance(there, Mapping):
            yield from differences(now, there, f"{prefix}{name}.")
        elif now != there or (name in mine) != (name in other):
            yield f"{prefix}{name} (there {_shown(name, other)}, now {_shown(name, mine)})"


def _shown(name: str, values: Mapping[str, Any]) -> str:
    value = values.get(name, "absent")
    digest = _DIGEST.fullmatch(value) if isinstance(value, str) else None
    return f"{digest[1]}…" if digest else repr(value) if name in values else "absent"
