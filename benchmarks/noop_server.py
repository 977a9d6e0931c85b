"""An Open Inference Protocol server that computes nothing: what is left is the client and the wire.

    python benchmarks/noop_server.py RECORD_BYTES

Prints its URL, then answers until its standard input ends. Model `noop`: uint8 records of RECORD_BYTES, two float32
zeros each, with the checksums, digest and status of our handler, so that the client does all of its checking.
"""

from __future__ import annotations

import asyncio
import sys

import numpy as np
from aiohttp import web

from batch_handler.oip import (
    BODY_CHECKSUM,
    HEADER_LENGTH,
    InferReply,
    ModelMetadata,
    Tensor,
    TensorSpec,
    crc32c,
    decode_request,
    encode_reply,
)

LIMIT = 64 << 20


def application(record_bytes: int) -> web.Application:
    outputs = (TensorSpec("y", np.dtype(np.float32), (2,)),)
    metadata = ModelMetadata("noop", ("1",), "noop", (TensorSpec("x", np.dtype(np.uint8), (record_bytes,)),), outputs,
                             {"model_digest": "sha256:noop", "fingerprint": "noop", "micro_batch": 128})

    async def describe(_: web.Request) -> web.Response:
        return web.json_response(metadata.to_json())

    async def infer(request: web.Request) -> web.Response:
        body = await request.read()
        asked = decode_request(body, int(request.headers[HEADER_LENGTH]), max_tensor_bytes=LIMIT)
        count = len(asked.inputs[0].data)
        tensors = (Tensor("y", np.zeros((count, 2), np.float32)), Tensor("record_status", np.zeros(count, np.uint8)))
        reply = InferReply(asked.id, "noop", "1", tensors, {
            "request_crc32c": crc32c(body), "model_digest": "sha256:noop", "fingerprint": "noop"})
        message = encode_reply(reply, binary={"y": True, "record_status": True})
        return web.Response(body=message.join(), headers={
            HEADER_LENGTH: str(message.header_length), BODY_CHECKSUM: str(message.crc32c)})

    app = web.Application(client_max_size=LIMIT)
    app.router.add_get("/v2/models/noop", describe)
    app.router.add_post("/v2/models/noop/infer", infer)
    return app


async def main() -> None:
    runner = web.AppRunner(application(int(sys.argv[1])), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(f"http://127.0.0.1:{runner.addresses[0][1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await runner.cleanup()


if __name__ == "__main__":
    asyncio.run(main())
