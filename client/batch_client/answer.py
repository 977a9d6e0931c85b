"""Whether a reply is the answer to a request, and the prediction that it then is.

A reply is taken only if its id, checksum of the request, names, dtypes, shapes, extents in shared memory, model digest
and fingerprint are the expected ones. Nothing is sent here, and shared memory is read by a function that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from batch_client.contract import ModelContract
from batch_client.transport import HttpReply
from batch_handler.oip import (
    BODY_CHECKSUM,
    HEADER_LENGTH,
    RECORD_STATUS,
    STATUS_NOT_FINITE,
    STATUS_OK,
    Extent,
    InferReply,
    OipError,
    crc32c,
    decode_reply,
)

__all__ = ["Expected", "OtherModelError", "Prediction"]

SERVED = (STATUS_OK, STATUS_NOT_FINITE)  # what a record that was scored may have
LONGEST_NUMBER = 18  # digits of a length in bytes


class OtherModelError(Exception):
    """A sound reply of a model, or of numerics, that are not this run's."""


@dataclass(frozen=True)
class Prediction:
    """The answer to one request: an array (records, *output shape) by output name, and a uint8 status a record.

    In its server batch the model computed for `before` seconds for others, then for `compute` for it; 0 if unknown.
    `server` is the URL of the one that answered.
    """

    outputs: Mapping[str, np.ndarray]
    status: np.ndarray
    compute: float = 0.0
    before: float = 0.0
    server: str = ""


class Expected:
    """What the replies of one run have to agree with: its model, and in exact mode its numerics."""

    def __init__(self, contract: ModelContract, *, exact: bool) -> None:
        self._contract = contract
        self._exact = exact
        self._version: str | None = None

    def prediction(self, reply: HttpReply, ident: str, checksum: int, count: int, extents: frozenset[Extent],
                   read: Callable[[int, int], bytearray]) -> Prediction:
        """The answer to the request of `count` records with this id and checksum. Its outputs may be in `extents` of
        shared memory, which `read(offset, size)` reads, raising OSError.

        Raises OipError for any other reply, OtherModelError for a sound one of another model.
        """
        return self._check(_decode(reply, extents, read), ident, checksum, count)

    def _check(self, reply: InferReply, ident: str, checksum: int, count: int) -> Prediction:
        contract = self._contract
        if reply.id != ident:
            raise OipError(f"the reply has id {reply.id!r}, the request {ident!r}")
        if contract.has_status and reply.parameters.get("request_crc32c") != checksum:
            raise OipError("the server received other bytes than were sent")
        digest = str(reply.parameters.get("model_digest", contract.digest))
        fingerprint = str(reply.parameters.get("fingerprint", contract.fingerprint)) if self._exact else ""
        if digest != contract.digest or (self._exact and fingerprint != contract.fingerprint):
            raise OtherModelError(f"its model is {digest} with numerics {fingerprint or 'of any kind'}, this run's is "
                                  f"{contract.digest} with {contract.fingerprint}")
        if not contract.has_status:
            # All that such a server says of which model it has loaded: the first reply's is the run's.
            self._version = self._version or reply.model_version
            if reply.model_version and reply.model_version != self._version:
                raise OtherModelError(f"its model is version {reply.model_version}, this run's is {self._version}")
        tensors = {tensor.name: tensor.data for tensor in reply.outputs}
        status = tensors.pop(RECORD_STATUS, None)
        if status is None and not contract.has_status:
            status = _status_of(tensors, count)
        # That a record failed is for the client to say, which lists it.
        if status is None or status.shape != (count,) or status.dtype != np.uint8 or not np.isin(status, SERVED).all():
            raise OipError(f"{RECORD_STATUS} is missing, not uint8 ({count},), or has other values than 0 and 2")
        for output in contract.outputs:
            array = tensors.get(output.name)
            wanted = (count, *output.shape)
            if array is None or array.shape != wanted or array.dtype != output.dtype:
                shown = "missing" if array is None else f"{array.dtype} {array.shape}"
                raise OipError(f"output {output.name} is {shown}, wanted {output.dtype} {wanted}")
        return Prediction({output.name: tensors[output.name] for output in contract.outputs}, status,
                          _seconds(reply.parameters.get("compute_ms")), _seconds(reply.parameters.get("queue_ms")))


def _status_of(tensors: Mapping[str, np.ndarray], count: int) -> np.ndarray:
    """A status a record for servers that give none: 2 where any of its float outputs is not finite."""
    finite = np.ones(count, bool)
    for array in tensors.values():
        if array.dtype.kind == "f" and len(array) == count:
            finite &= np.isfinite(array.reshape(count, -1)).all(axis=1)
    return np.where(finite, STATUS_OK, STATUS_NOT_FINITE).astype(np.uint8)


def _decode(reply: HttpReply, extents: frozenset[Extent], read: Callable[[int, int], bytearray]) -> InferReply:
    wanted = reply.headers.get(BODY_CHECKSUM.lower())
    if wanted is not None and wanted != str(crc32c(reply.body)):
        raise OipError(f"the reply's bytes have CRC-32C {crc32c(reply.body)}, its header says {wanted[:20]}")
    length = reply.headers.get(HEADER_LENGTH.lower())
    if length is not None and not (length.isascii() and length.isdecimal() and len(length) <= LONGEST_NUMBER):
        raise OipError(f"{HEADER_LENGTH} is {length[:40]!r}, wanted a number")
    most = len(reply.body) * 8 + sum(extent.size for extent in extents)
    return decode_reply(reply.body, None if length is None else int(length), max_tensor_bytes=most,
                        shared=partial(_shared, extents, read) if extents else None)


def _shared(extents: frozenset[Extent], read: Callable[[int, int], bytearray], name: str, offset: int,
            size: int) -> bytearray:
    """An output that the server has put into region `name`; raises OipError where none was to be there."""
    if (name, offset, size) not in extents:
        raise OipError(f"the reply has {size} bytes at {offset} of region {name[:60]!r}, wanted them where the "
                       "request has room for an output")
    try:
        data = read(offset, size)
    except OSError as error:
        raise OipError(f"region {name} can't be read: {error.strerror}") from error
    if len(data) != size:
        raise OipError(f"region {name} gave {len(data)} bytes, wanted {size}")
    return data


def _seconds(milliseconds: object) -> float:
    """What a server says it took; 0 for what can't be a time."""
    if not isinstance(milliseconds, int | float) or not 0 <= milliseconds <= 1e12:
        return 0.0
    return milliseconds / 1e3
