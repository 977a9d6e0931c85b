"""`triton_server.py HTTP GRPC METRICS MODEL CLASSES WORKERS`: Triton through pytriton with the tuned forward."""

from __future__ import annotations

import sys
import tempfile

import numpy as np
from forward import tuned
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig


class Scorer:
    """One instance of the model."""

    def __init__(self, model: str) -> None:
        self._score = tuned(model)

    @batch
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"scores": self._score(image)}


def serve(http: str, grpc: str, metrics: str, model: str, classes: str, workers: str) -> None:
    config = TritonConfig(http_address="127.0.0.1", http_port=int(http), grpc_port=int(grpc),
                          metrics_port=int(metrics))
    with tempfile.TemporaryDirectory() as folder, Triton(config=config, workspace=f"{folder}/workspace") as triton:
        triton.bind("bench", infer_func=[Scorer(model) for _ in range(int(workers))],
                    inputs=[Tensor(name="image", dtype=np.uint8, shape=(28, 28))],
                    outputs=[Tensor(name="scores", dtype=np.float32, shape=(int(classes),))],
                    config=ModelConfig(max_batch_size=1000, batcher=DynamicBatcher()))
        triton.serve()


if __name__ == "__main__":
    serve(*sys.argv[1:])
