"""Trains the demo's network: seeded, within a minute on two cores, saved as safetensors.

`python -m batch_client.demo.train WEIGHTS.safetensors` is a process of its own so that its OpenMP threads can sleep
between loops (OMP_WAIT_POLICY, read once): spinning ones made it three to ten times slower beside other work.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from batch_client.demo.digits import HELD_BACK, Digits, load
from batch_client.demo.network import make_model

__all__ = ["accuracy", "save", "train"]

EPOCHS = 10
_BATCH = 64
_PEAK_RATE = 2e-3
_SEED = 7


def train(digits: Digits, *, epochs: int = EPOCHS, progress: bool = True) -> nn.Module:
    """A trained network in evaluation mode. Progress goes to stderr when that is a terminal."""
    torch.manual_seed(_SEED)
    # NHWC is the order in which oneDNN's convolutions work; the weights are the same numbers.
    model: nn.Module = make_model().to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    images, labels = _tensors(digits)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PEAK_RATE)
    steps = -(-len(labels) // _BATCH) * epochs
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_PEAK_RATE, total_steps=steps)
    model.train()
    with tqdm(total=steps, desc="training", unit=" steps", file=sys.stderr, disable=None if progress else True) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(labels))
            for start in range(0, len(labels), _BATCH):
                rows = order[start : start + _BATCH]
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[rows]), labels[rows])
                loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
                optimizer.step()
                schedule.step()
                bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def accuracy(model: nn.Module, digits: Digits) -> float:
    """The part of `digits` whose highest score is at their label, 0 to 1."""
    images, labels = _tensors(digits)
    with torch.inference_mode():
        predicted = torch.cat([model(images[i : i + 500]).argmax(1) for i in range(0, len(images), 500)])
    return float((predicted == labels).double().mean())


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as safetensors."""
    from safetensors.torch import save_file  # noqa: PLC0415 - an extra

    beside = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, beside)
    beside.replace(path)


def _tensors(digits: Digits) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(digits.images.astype(np.float32) / 255).unsqueeze(1)
    return images.to(memory_format=torch.channels_last), torch.from_numpy(digits.labels.astype(np.int64))


if __name__ == "__main__":
    save(train(load()[: HELD_BACK.start]), Path(sys.argv[1]))
