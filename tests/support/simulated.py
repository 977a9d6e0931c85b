"""A model server without a network: the wire protocol, the place law and a model whose bits depend on the place."""

from __future__ import annotations

import asyncio
import json

import numpy as np

from batch_client.serving import Servers
from batch_client.tokens import NoTokens
from batch_client.transport import HttpReply
from batch_handler.oip import (
    BODY_CHECKSUM,
    HEADER_LENGTH,
    InferReply,
    ModelMetadata,
    OipError,
    Tensor,
    TensorSpec,
    crc32c,
    decode_request,
    encode_reply,
)
from batch_handler.tensors import noting

URL = "http://simulated"
BINARY = {"y": True, "record_status": True}


class SimulatedServer:
    """A `Transport` that answers as the handler does.

    The model: sum and maximum of a record in float32, plus the record's place times one ulp-sized step, so that a
    record computed in the wrong place has other bits.
    """

    def __init__(self, record_shape=(3,), dtype=np.uint8, micro_batch=4, digest="sha256:model", seconds=0.0,
                 shared_memory=None):
        self.record_shape = record_shape
        self.dtype = np.dtype(dtype)
        self.micro_batch = micro_batch
        self.digest = digest
        self.fingerprint = "numerics"
        self.seconds = seconds
        self.shared_memory = shared_memory  # the handler's own reader of a folder
        self.shared = 0  # requests whose records were there
        self.returned = 0  # and whose outputs were put there
        self.sent_instead = 0  # because they could not be
        self.requests = 0
        self.at_once = 0
        self.most_at_once = 0

    def metadata(self):
        memory = {"shared_memory": str(self.shared_memory.folder)} if self.shared_memory else {}
        return ModelMetadata(
            name="toy", versions=("1",), platform="simulated",
            inputs=(TensorSpec("x", self.dtype, self.record_shape),),
            outputs=(TensorSpec("y", np.dtype(np.float32), (2,)),),
            parameters={"model_digest": self.digest, "fingerprint": self.fingerprint,
                        "numerics": {"simulated": self.fingerprint}, "micro_batch": self.micro_batch, **memory})

    def predict(self, records, first_row):
        flat = records.reshape(len(records), -1).astype(np.float32)
        place = (first_row + np.arange(len(records))) % self.micro_batch
        y = np.stack([flat.sum(1), flat.max(1, initial=0)], 1) / np.float32(7)
        return (y + place[:, None].astype(np.float32) * np.float32(2**-10)).astype(np.float32)

    async def send(self, method, url, headers, parts, deadline):
        if method == "GET":
            if url.endswith("/predictions/toy"):
                return HttpReply(200, {}, json.dumps(self.metadata().to_json()).encode())
            return HttpReply(404, {}, b'{"code": 404, "type": "ModelNotFoundException", "message": "no"}')
        self.requests += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await asyncio.sleep(self.seconds)
            return self.answer(b"".join(parts), int(headers[HEADER_LENGTH]))
        finally:
            self.at_once -= 1

    def answer(self, body, header_length):
        read = []
        try:
            request = decode_request(body, header_length, max_tensor_bytes=1 << 24,
                                     shared=noting(self.shared_memory.read if self.shared_memory else None, read))
            extents = self.extents(request)
        except OipError as error:
            return HttpReply(error.status, {}, json.dumps({"error": str(error)}).encode())
        self.shared += bool(read)
        y = self.predict(request.inputs[0].data, request.first_row)
        status = np.where(np.isfinite(y).all(1), 0, 2).astype(np.uint8)
        reply = InferReply(request.id, "toy", "1", (Tensor("y", y), Tensor("record_status", status)),
                           {"request_crc32c": self.checksum(body, read), **self.reply_parameters()})
        message = encode_reply(reply, binary=BINARY, extents=extents)
        try:
            for extent, data in zip(extents.values(), message.shared, strict=True):
                self.shared_memory.write(extent.region, extent.offset, data)
            self.returned += bool(extents)
        except OipError:
            message = encode_reply(reply, binary=BINARY)
            self.sent_instead += 1
        return HttpReply(200, {HEADER_LENGTH.lower(): str(message.header_length),
                               BODY_CHECKSUM.lower(): str(message.crc32c)}, message.join())

    def extents(self, request):
        """Where outputs are wanted in memory, if they can be."""
        sizes = {"y": 8 * len(request.inputs[0].data), "record_status": len(request.inputs[0].data)}
        extents = {output.name: output.extent for output in request.outputs if output.extent and self.shared_memory}
        for name in (output.name for output in request.outputs):
            if name not in sizes or (name in extents and extents[name].size != sizes[name]):
                raise OipError(f"output {name} can't be as it is wanted")
        return extents

    def checksum(self, body, shared):
        return crc32c(body, *shared)

    def reply_parameters(self):
        return {"model_digest": self.digest, "fingerprint": self.fingerprint, "compute_ms": 1.0}

    def servers(self):
        return Servers(self, {URL: NoTokens()}, "toy")

    def expected(self, records, grid_records, start=0):
        """What a run must write for source records from number `start` on."""
        rows = np.arange(start, start + len(records))
        out = np.empty((len(records), 2), np.float32)
        for row, at in zip(rows, range(len(records)), strict=True):
            out[at] = self.predict(records[at:at + 1], int(row % grid_records))[0]
        return out


class Breaking(SimulatedServer):
    """Fails on requests with a record that begins with 255, as long as it is `broken`."""

    broken = True

    def answer(self, body, header_length):
        data = decode_request(body, header_length, max_tensor_bytes=1 << 20).inputs[0].data
        if self.broken and (data[:, 0] == 255).any():
            return HttpReply(500, {}, b'{"error": "bad record"}')
        return super().answer(body, header_length)
