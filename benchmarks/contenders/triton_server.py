"""`triton_server.py HTTP GRPC METRICS MODEL CLASSES WORKERS`: Triton through pytriton with the tuned forward."""

from __future__ import annotations

import sys

import numpy as np
from forward import tuned
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

http, grpc, metrics, model, classes, workers = sys.argv[1:]


class Scorer:
    """One instance of the model."""

    def __init__(self) -> None:
        self._score = tuned(model)

    @batch
    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return {"scores": self._score(image)}


config = TritonConfig(http_address="127.0.0.1", http_port=int(http), grpc_port=int(grpc), metrics_port=int(metrics))
with Triton(config=config) as triton:
    triton.bind("bench", infer_func=[Scorer() for _ in range(int(workers))],
                inputs=[Tensor(name="image", dtype=np.uint8, shape=(28, 28))],
                outputs=[Tensor(name="scores", dtype=np.float32, shape=(int(classes),))],
                config=ModelConfig(max_batch_size=1000, batcher=DynamicBatcher()))
    triton.serve()
