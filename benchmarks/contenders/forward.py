"""The model's forward, as a notebook has it and as well as this engine runs it: the same for all contenders."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

__all__ = ["MICRO_BATCH", "Score", "eager", "forward", "module_of", "score_with", "traced", "tuned"]

MICRO_BATCH = 128
WARM_UP_RUNS = 3

# uint8 (n, 28, 28) → float32 (n, classes)
Score = Callable[[np.ndarray], np.ndarray]


def forward(kind: str, model: str) -> Score:
    """`eager` or `tuned`."""
    return {"eager": eager, "tuned": tuned}[kind](model)


def module_of(model: str) -> torch.nn.Module:
    return torch.load(model, map_location="cpu", weights_only=False).eval()


def eager(model: str) -> Score:
    """The module as it is loaded, a block at a time, gradients on: what the notebook does."""
    return partial(score_with, module=module_of(model))


def score_with(records: np.ndarray, module: torch.nn.Module) -> np.ndarray:
    return torch.softmax(module(torch.tensor(records).unsqueeze(1) / 255), 1).detach().numpy()


def tuned(model: str) -> Score:
    """Frozen, optimised TorchScript in channels_last, micro-batches of 128, one thread, no gradients."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    module = module_of(model).requires_grad_(requires_grad=False).to(memory_format=torch.channels_last)
    graph = torch.jit.optimize_for_inference(torch.jit.freeze(traced(module)))

    @torch.inference_mode()
    def score(records: np.ndarray) -> np.ndarray:
        parts = []
        for start in range(0, len(records), MICRO_BATCH):
            batch = torch.from_numpy(records[start:start + MICRO_BATCH])
            parts.append(torch.softmax(graph(batch.to(torch.float32).mul_(1 / 255).unsqueeze(1)), -1).numpy())
        return np.concatenate(parts)

    for _ in range(WARM_UP_RUNS):
        score(np.zeros((MICRO_BATCH, 28, 28), np.uint8))
    return score


def traced(module: torch.nn.Module) -> Any:
    return torch.jit.trace(module, torch.zeros(MICRO_BATCH, 1, 28, 28), check_trace=False).eval()
