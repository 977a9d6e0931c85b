"""`litserve_server.py PORT MODEL WORKERS`: LitServe with the tuned forward; bodies are raw bytes both ways."""

import sys
from typing import Annotated

import litserve
import numpy as np
from fastapi import Body, Response
from forward import tuned


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:  # noqa: ARG002 - LitServe's signature
        self.score = tuned(sys.argv[2])

    def decode_request(self, request: Annotated[bytes, Body()]) -> np.ndarray:
        return np.frombuffer(request, np.uint8).reshape(-1, 28, 28).copy()

    def predict(self, records: np.ndarray) -> np.ndarray:
        return self.score(records)

    def encode_response(self, scores: np.ndarray) -> Response:
        return Response(scores.tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    server = litserve.LitServer(Api(), accelerator="cpu", workers_per_device=int(sys.argv[3]), timeout=False)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="error")
