"""One HTTP request → a query for the model, and its score → one HTTP reply; TorchServe is not known here.

Rule: reading a request either gives a query that fits the signature or a reply that says why not; no request
makes another fail.
"""

from __future__ import annotations

import functools
import json
import logging
import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from batch_handler import content, oip
from batch_handler.model import Model
from batch_handler.oip import RECORD_STATUS, Array, Extent, InferRequest, ModelMetadata, OipError, Tensor, TensorSpec
from batch_handler.scoring import MAX_SECONDS, Failure, Query, Score
from batch_handler.shared import SharedMemory
from batch_handler.tensors import Buffer, noting, parse_json

__all__ = [
    "MAX_BATCH_BYTES",
    "MAX_RECORDS",
    "Exchange",
    "Pending",
    "Reply",
    "Request",
    "failed",
    "most_in_time",
    "refused",
]

MAX_RECORDS = 65_536
# TorchServe kills the worker that replies more than max_response_size, 64 MiB (serve_config/config.properties), and
# with it all requests of the server batch. This leaves room for the header and for numbers longer than most.
MAX_REPLY_BYTES = 60 << 20
_MAX_BODY_BYTES = 63 << 20
# Java parses the replies of a server batch as one message, from its beginning after each 64 KiB that arrive.
MAX_BATCH_BYTES = 64 << 20
# Characters of an error's text. Names that a client sends are in it, and each may become six bytes of JSON.
_LONGEST_ERROR = 2000
# Of a float32 in JSON, with its comma.
_NUMBER_BYTES = 20
# Lists and objects of a JSON body that hold no records, such as those that describe its tensors.
_OTHER_LISTS = 4096
_JSON = "application/json"
_FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")
_NPY = "application/x-npy"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """A body, None if there is none, and its headers, whose names are in lower case."""

    body: bytes | bytearray | None
    headers: Mapping[str, str]


@dataclass(frozen=True)
class Reply:
    """A body with what goes before it. `unshared` bytes of outputs are in it that were to be in shared memory."""

    body: bytes
    content_type: str = _JSON
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    unshared: int = 0


@dataclass(frozen=True)
class Pending:
    """A query, what makes a reply of its score and of how many requests the server batch had, and about how many bytes
    of outputs the reply has.
    """

    query: Query
    encode: Callable[[Score, int], Reply]
    nbytes: int

    def reply(self, score: Score, batch_requests: int) -> Reply:
        """The reply, or that it is too large to be sent."""
        made = self.encode(score, batch_requests)
        if len(made.body) > _MAX_BODY_BYTES:
            said = f"the reply has {len(made.body)} bytes, wanted at most {_MAX_BODY_BYTES}"
            return refused(OipError(f"{said}: send fewer records at a time, or ask for binary data", 413))
        return made


class Exchange:
    """The bodies that a model understands."""

    def __init__(
        self,
        model: Model,
        max_records: int = MAX_RECORDS,
        bulk_lane: str | None = None,
        shared_memory: SharedMemory | None = None,
    ) -> None:
        self._model = model
        self._bulk_lane = bulk_lane
        self._shared_memory = shared_memory
        self._max_records = max_records
        self._inputs: tuple[TensorSpec, ...] = tuple(spec.tensor() for spec in model.description.inputs)
        self._outputs = tuple(spec.name for spec in model.description.outputs)
        # By output of a reply: bytes a record where it is binary, numbers a record where it is JSON.
        self._sizes = {spec.name: _size(spec.tensor()) for spec in model.description.outputs} | {RECORD_STATUS: (1, 1)}
        self._record_bytes = max(_size(spec)[0] for spec in self._inputs)
        self._most_lists = max_records * (1 + sum(map(_lists, self._inputs))) + _OTHER_LISTS

    def read(self, request: Request) -> Pending | Reply:
        """What to score for a request, or the reply that it gets without the model."""
        try:
            return self._read(request)
        except OipError as error:
            return refused(error)

    def _read(self, request: Request) -> Pending | Reply:
        headers = request.headers
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            raise OipError(f"Content-Encoding is {encoding[:40]!r}, wanted none", 415)
        length = headers.get(oip.HEADER_LENGTH.lower())
        if length is not None:
            return self._read_oip(request.body or b"", _header_length(length))
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == oip.CONTENT_TYPE:
            kind = ""  # what clients say who know no better: look at the body instead
        # Of a form without fields TorchServe leaves no body; without one any other type is a question.
        absent = request.body is None and kind not in _FORMS
        if absent or (not kind and not request.body):
            return Reply(json.dumps(self._metadata().to_json(), separators=(",", ":")).encode())
        body = request.body or b""
        return self._read_simple(body, kind or _sniff(body), request.headers)

    def _metadata(self) -> ModelMetadata:
        """The model's, with what clients may use of this server: its bulk lane, its shared memory."""
        offered: dict[str, Any] = {}
        if self._bulk_lane is not None:
            offered["bulk_lane"] = self._bulk_lane
        if self._shared_memory is not None:
            offered["shared_memory"] = str(self._shared_memory.folder)
        metadata = self._model.metadata()
        return replace(metadata, parameters={**metadata.parameters, **offered})

    def _read_simple(self, body: bytes | bytearray, kind: str, headers: Mapping[str, str]) -> Pending | Reply:
        if kind == _JSON:
            self._check_lists(body, len(body))
            value = parse_json(body, "body", ": numbers that are not finite can be sent as npy")
            if isinstance(value, dict) and "inputs" in value:
                return self._read_oip(body, None)
            records = content.decode_json(value, self._inputs, self._max_records)
            return self._pending(records, self._as_json(), self._encode_predictions)
        if kind == _NPY:
            array, single = content.decode_npy(body, self._one_input(), self._max_records)
            if _wants_json(headers):
                return self._pending((array,), self._as_json(), self._encode_predictions)
            self._one_output()
            encode = functools.partial(self._encode_npy, single)
            return self._pending((array,), dict.fromkeys(self._outputs, True), encode)
        if kind.startswith("image/"):
            picture = content.decode_image(body, self._one_input())
            return self._pending((picture,), self._as_json(), self._encode_predictions)
        raise OipError(
            f"content type is {kind[:60]!r}, wanted {_NPY}, {_JSON}, image/* or a body with {oip.HEADER_LENGTH}",
            415,
        )

    def _read_oip(self, body: bytes | bytearray, header_length: int | None) -> Pending:
        self._check_lists(body, len(body) if header_length is None else header_length)
        read: list[Buffer] = []
        memory = self._shared_memory
        from_memory = noting(functools.partial(self._read_shared, memory) if memory else None, read)
        asked = oip.decode_request(
            body, header_length, max_tensor_bytes=self._max_records * self._record_bytes, shared=from_memory
        )
        arrays = self._arrays(asked)
        binary = self._binary_by_output(asked)
        echo = {"request_crc32c": oip.crc32c(body, *read)}
        extents = self._extents(asked, len(arrays[0]))
        encode = functools.partial(self._encode_oip, asked.id, binary, extents, echo)
        return self._pending(arrays, binary, encode, asked.first_row if asked.exact else None, extents)

    def _check_lists(self, body: bytes | bytearray, end: int) -> None:
        """Refuse JSON that no records can have: `[],` is three bytes, and some eighty in memory once it is parsed."""
        found = body.count(b"[", 0, end) + body.count(b"{", 0, end)
        if found > self._most_lists:
            raise OipError(f"the JSON has {found} lists and objects, wanted at most {self._most_lists} for "
                           f"{self._max_records} records", 413)

    def _read_shared(self, memory: SharedMemory, region: str, offset: int, size: int) -> Buffer:
        """What is in shared memory, of which no body bounds the size: no more than is scored in time."""
        most = most_in_time(self._model.micro_batch, self._model.micro_batch_ms / 1e3) * self._record_bytes
        if size > most:
            raise OipError(f"{size} bytes in shared memory would take over {MAX_SECONDS:.0f} s of this model: send at "
                           f"most {most} at a time", 413)
        return memory.read(region, offset, size)

    def _extents(self, asked: InferRequest, records: int) -> dict[str, Extent]:
        """Where in shared memory the request wants outputs; nowhere if this server has none."""
        memory = self._shared_memory
        extents = {output.name: output.extent for output in asked.outputs if output.extent is not None}
        for name, extent in extents.items():
            if extent.size != (size := records * self._sizes[name][0]):
                raise OipError(f"output {name} is given {extent.size} bytes of shared memory, wanted {size}")
            if memory is not None:
                memory.check_name(extent.region)
        return extents if memory else {}

    def _arrays(self, asked: InferRequest) -> tuple[Array, ...]:
        given = {tensor.name: tensor.data for tensor in asked.inputs}
        names = [spec.name for spec in self._inputs]
        for name in given:
            if name not in names:
                raise OipError(f"input {name[:60]!r} is not one of the model's, wanted {', '.join(names)}")
        for spec in self._inputs:
            _check_input(given.get(spec.name), spec)
        arrays = tuple(given[name] for name in names)
        counts = [len(array) for array in arrays]
        if len(set(counts)) > 1:
            raise OipError(f"inputs {', '.join(names)} have {counts} records, wanted equally many")
        return arrays

    def seconds(self, query: Query) -> float:
        """What the model takes for it at best; 0 where that is not known."""
        each, micro_batch = self._model.micro_batch_ms / 1e3, self._model.micro_batch
        micro_batches = query.records / micro_batch
        if query.first_row is not None:  # whole ones of its own
            micro_batches = math.ceil((query.first_row % micro_batch + query.records) / micro_batch)
        return micro_batches * each if each < math.inf else 0.0

    def _pending(
        self,
        arrays: tuple[Array, ...],
        binary: Mapping[str, bool],
        encode: Callable[[Score, int], Reply],
        first_row: int | None = None,
        extents: Container[str] = (),
    ) -> Pending:
        """The records, if they can be scored in time and their reply can be sent; `binary` are its outputs, and which
        are not JSON; those in `extents` are mostly not sent.
        """
        query = Query(arrays, first_row)
        most = most_in_time(self._model.micro_batch, self._model.micro_batch_ms / 1e3, first_row or 0)
        if query.records > most:
            raise OipError(
                f"the request's {query.records} records would take over {MAX_SECONDS:.0f} s of this model: send at "
                f"most {most} at a time",
                413,
            )
        sizes = {name: self._sizes[name][0] if raw else self._sizes[name][1] * _NUMBER_BYTES
                 for name, raw in binary.items()}
        replied = sum(sizes.values())
        computed = sum(self._sizes[name][0] for name in self._outputs)
        size = query.records * max(replied, computed)
        if size > MAX_REPLY_BYTES:
            instead = "" if replied <= computed else ", or ask for binary data"
            raise OipError(
                f"the outputs of {query.records} records would have some {size} bytes, wanted at most "
                f"{MAX_REPLY_BYTES}: send fewer at a time{instead}",
                413,
            )
        return Pending(query, encode, query.records * sum(sizes[name] for name in sizes if name not in extents))

    def _as_json(self) -> dict[str, bool]:
        return dict.fromkeys(self._outputs, False)

    def _binary_by_output(self, asked: InferRequest) -> dict[str, bool]:
        """The outputs of the reply in order, and which of them are binary."""
        known = (*self._outputs, RECORD_STATUS)
        default = asked.binary_output
        chosen = {output.name: _is_binary(output, default) for output in asked.outputs}
        for name in chosen:
            if name not in known:
                raise OipError(f"output {name[:60]!r} is not one of the model's, wanted {', '.join(known)}")
        if not chosen:
            chosen = dict.fromkeys(self._outputs, default)
        if asked.exact:
            chosen.setdefault(RECORD_STATUS, default)
        return chosen

    def _encode_oip(
        self,
        request_id: str,
        binary: Mapping[str, bool],
        extents: Mapping[str, Extent],
        echo: Mapping[str, Any],
        score: Score,
        batch_requests: int,
    ) -> Reply:
        arrays = dict(zip(self._outputs, score.outputs, strict=True))
        arrays[RECORD_STATUS] = score.status
        described = self._model.description
        reply = oip.InferReply(
            id=request_id,
            model_name=described.name,
            model_version=described.version,
            outputs=tuple(Tensor(name, arrays[name]) for name in binary),
            parameters={
                **echo,
                "model_digest": self._model.digest,
                "fingerprint": self._model.fingerprint,
                "queue_ms": score.queue_ms,
                "compute_ms": score.compute_ms,
                "batch_requests": batch_requests,
            },
        )
        message = oip.encode_reply(reply, binary=binary, extents=extents)
        unshared = 0
        if not self._written(message, [extents[name] for name in binary if name in extents]):
            message = oip.encode_reply(reply, binary=binary)
            unshared = sum(extent.size for extent in extents.values())
        if message.header_length is None:
            return Reply(message.join())
        headers = {oip.HEADER_LENGTH: str(message.header_length), oip.BODY_CHECKSUM: str(message.crc32c)}
        return Reply(message.join(), oip.CONTENT_TYPE, headers=headers, unshared=unshared)

    def _written(self, message: oip.Message, extents: Sequence[Extent]) -> bool:
        """Whether what the reply has in shared memory could be put there."""
        memory = self._shared_memory
        if memory is None:
            return not extents
        try:
            for extent, data in zip(extents, message.shared, strict=True):
                memory.write(extent.region, extent.offset, data)
        except OipError as error:  # the client is gone, or the memory is full
            _log.debug("outputs are sent: %s", error)
            return False
        return True

    def _encode_npy(self, single: bool, score: Score, batch_requests: int) -> Reply:  # noqa: FBT001 - partial
        del batch_requests
        (array,) = score.outputs
        return Reply(content.encode_npy(array[0] if single else array), _NPY, headers=self._simple_headers())

    def _encode_predictions(self, score: Score, batch_requests: int) -> Reply:
        del batch_requests
        outputs: Sequence[Tensor] = [
            Tensor(name, array) for name, array in zip(self._outputs, score.outputs, strict=True)
        ]
        return Reply(content.encode_predictions(outputs), headers=self._simple_headers())

    def _simple_headers(self) -> dict[str, str]:
        return {"X-Model-Digest": self._model.digest}

    def _one_input(self) -> TensorSpec:
        if len(self._inputs) != 1:
            raise OipError(f"the model has {len(self._inputs)} inputs, wanted JSON by input name or OIP", 415)
        return self._inputs[0]

    def _one_output(self) -> None:
        if len(self._outputs) != 1:
            raise OipError(f"the model has {len(self._outputs)} outputs, wanted Accept: {_JSON} or OIP", 415)


def _is_binary(output: oip.RequestedOutput, default: bool) -> bool:  # noqa: FBT001 - the request's
    if output.extent is not None:
        return True
    return default if output.binary is None else output.binary


def _size(spec: TensorSpec) -> tuple[int, int]:
    """Bytes and numbers of one record."""
    numbers = math.prod(spec.shape)
    return numbers * spec.dtype.itemsize, numbers


def _lists(spec: TensorSpec) -> int:
    """Of one record in JSON."""
    return sum(math.prod(spec.shape[:depth]) for depth in range(len(spec.shape)))


def most_in_time(micro_batch: int, seconds: float, first_row: int = 0) -> float:
    """How many records from that place on are scored within half of what TorchServe waits, at `seconds` a micro-batch
    at best; those of the first micro-batch in any case.
    """
    if not 0 < seconds < math.inf:  # no full micro-batch was measured, or it is too quick to be
        return math.inf
    return max(1, int(MAX_SECONDS / seconds)) * micro_batch - first_row % micro_batch


def refused(error: OipError) -> Reply:
    """The reply to a request that can't be scored."""
    return Reply(json.dumps({"error": str(error)[:_LONGEST_ERROR]}).encode(), status=error.status)


def failed(failure: Failure) -> Reply:
    """The reply to a request that the model failed on."""
    _log.error("a request failed: %s", failure.message)
    return refused(OipError(failure.message, failure.status))


def _check_input(array: Array | None, spec: TensorSpec) -> None:
    if array is None:
        raise OipError(f"the request has no input {spec.name}")
    if array.dtype != spec.dtype:
        found, wanted = oip.datatype_of(array.dtype), oip.datatype_of(spec.dtype)
        raise OipError(f"input {spec.name} is {found}, wanted {wanted}")
    if array.shape[1:] != spec.shape:
        raise OipError(f"input {spec.name} has shape {list(array.shape)}, wanted {spec.shape_of_many}")


def _header_length(value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 19):
        raise OipError(f"{oip.HEADER_LENGTH} is {value[:40]!r}, wanted a number of bytes")
    return int(value)


def _sniff(body: bytes | bytearray) -> str:
    """The kind of a body without a content type, as tritonclient and `curl -T` send it."""
    start = bytes(body[:16])
    if start.startswith(b"\x93NUMPY"):
        return _NPY
    return _JSON if start.lstrip()[:1] in (b"{", b"[") else "unknown"


def _wants_json(headers: Mapping[str, str]) -> bool:
    return any(part.partition(";")[0].strip().lower() == _JSON for part in headers.get("accept", "").split(","))
